"""TabNet over a table: numbers with holes and categories as features, each column one group.

Axes: b - batch, p - numeric columns, c - categorical columns, f - features, g - columns, d - n_d.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ehrfuse.nn.encoders import Tokens, single
from ehrfuse.nn.numeric import NumericFeatures
from ehrfuse.nn.tabnet import Sizes, TabNetDecoder, TabNetEncoder, reconstruction_loss


class TabNetInput(nn.Module):
    """Numbers and codes, side by side as features.

    Parameters
    ----------
    numbers : NumericFeatures or int
        What turns numbers with holes into features; an integer is so many numbers as they are.
    sizes, widths : list of int
        Number of codes and width of the vectors of every categorical column.

    Attributes
    ----------
    column : integer tensor (f,)
        The column of every feature, numbers before codes.
    """

    column: Tensor

    def __init__(
        self, numbers: NumericFeatures | int, sizes: Sequence[int], widths: Sequence[int]
    ) -> None:
        super().__init__()
        self.numbers = None if isinstance(numbers, int) else numbers
        own = torch.arange(numbers) if isinstance(numbers, int) else numbers.column
        self.embeddings = nn.ModuleList(
            nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True)
        )
        first = 1 + int(own.max()) if len(own) else 0
        repeats = torch.tensor(list(widths), dtype=torch.long)
        words = torch.arange(first, first + len(sizes)).repeat_interleave(repeats)
        self.register_buffer("column", torch.cat([own, words]), persistent=False)
        self.n_columns = first + len(sizes)

    def forward(self, values: Tensor | None, codes: Tensor | None) -> Tensor:
        parts = []
        if values is not None:
            parts.append(values if self.numbers is None else self.numbers(values))
        if codes is not None:
            parts += [table(codes[:, j]) for j, table in enumerate(self.embeddings)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class TabNetTableEncoder(nn.Module):
    """TabNet as an encoder of a table: one token, the sum of the steps' outputs.

    Reads ``values`` (b, p) in scaled units with NaN for missing, and ``codes`` (b, c) with 0 for
    null and 1 for unknown. All features of a column, its missing flag among them, are one group.

    Parameters
    ----------
    numbers : NumericFeatures
    n_codes : list of int
    sizes : Sizes
    cat_emb_dim : int or None
        Width of a category's vector; None grows with the number of categories, to at most 16.
    """

    def __init__(
        self,
        numbers: NumericFeatures,
        n_codes: Sequence[int],
        sizes: Sizes,
        cat_emb_dim: int | None = None,
    ) -> None:
        super().__init__()
        widths = [cat_emb_dim or min(16, max(2, round(1.6 * n**0.56))) for n in n_codes]
        self.embedder = TabNetInput(numbers, n_codes, widths)
        with torch.no_grad():
            for table in self.embedder.embeddings:
                table.weight[:2] = 0.0  # type: ignore[index, operator]  # null, never seen
        self.n_columns = self.embedder.n_columns
        # A table that no training row had may have no feature at all; one zero stands in.
        column = self.embedder.column if len(self.embedder.column) else torch.zeros(1).long()
        self.n_features, self.n_outputs = len(column), sizes.n_d
        self.tabnet = TabNetEncoder(len(column), column, sizes, torch.ones(len(column)))

    def features(self, x: dict[str, Tensor]) -> Tensor:
        """All features of a row side by side (b, f)."""
        if not len(self.embedder.column):
            some = next(iter(x.values()))
            return torch.zeros(len(some), 1, device=some.device, dtype=self.tabnet.norm.bias.dtype)
        return self.embedder(x.get("values"), x.get("codes"))

    def told(self, features: Tensor) -> Tensor:
        """Of features (b, f), those that tell what was observed (b, o): not the missing flags."""
        numbers = self.embedder.numbers
        if numbers is None or not len(numbers.flags):
            return features
        stop = len(numbers.column)
        start = stop - len(numbers.flags)
        if stop == features.shape[1]:
            return features[:, :start]
        return torch.cat([features[:, :start], features[:, stop:]], 1)

    def known(self, x: dict[str, Tensor]) -> Tensor:
        """1 for the features of `told` that were observed, 0 for the others (b, o)."""
        parts, dtype = [], self.tabnet.norm.bias.dtype
        if "values" in x and self.embedder.numbers is not None:
            values, numbers = x["values"], self.embedder.numbers
            seen = torch.eq(values, values, out=torch.empty_like(values))  # NaN is not itself
            if len(numbers.bin_column):
                seen = torch.cat([seen, seen.index_select(1, numbers.bin_column)], 1)
            parts.append(seen.to(dtype))
        if "codes" in x:
            widths = [int(table.embedding_dim) for table in self.embedder.embeddings]  # type: ignore[arg-type]
            repeats = torch.tensor(widths, device=x["codes"].device)
            parts.append((x["codes"] > 0).to(dtype).repeat_interleave(repeats, 1))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def hide(self, features: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Hide columns at random: features (b, f), prior (b, g), and what of `told` is gone (b, o).

        The last two hold 0 and 1; the prior of a hidden column is 0.
        """
        shape = len(features), self.tabnet.n_groups
        draw = torch.rand(shape, device=features.device, dtype=features.dtype)
        prior = torch.ge(draw, share, out=draw)
        left = prior if self.tabnet.groups is None else self.tabnet.groups.copy(prior)
        return features * left, prior, 1 - self.told(left)

    def outputs(
        self, x: dict[str, Tensor], with_entropy: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """What the steps give (b, d), and the mean of sum m log m, or zero if not asked for."""
        return self.tabnet(self.features(x), with_entropy=with_entropy)

    def forward(self, x: dict[str, Tensor]) -> Tokens:
        return single(torch.stack(self.outputs(x, with_entropy=False)[0]).sum(0))


class MaskedReconstruction(nn.Module):
    """Hide columns of a table and guess what was in their observed cells.

    NOTE[DIFF] Only observed cells are guessed: the paper's data have no holes.
    NOTE[DIFF] The vector of a category is a target that stands still; in the library the gradient
    moves it too, so that it can shrink to please.

    Parameters
    ----------
    encoder : TabNetTableEncoder
    mask_ratio : float
        Share of the columns hidden from every row.
    """

    def __init__(self, encoder: TabNetTableEncoder, mask_ratio: float) -> None:
        super().__init__()
        self.mask_ratio = mask_ratio
        n_told = encoder.told(torch.empty(0, encoder.n_features)).shape[1]
        self.decoder = TabNetDecoder(n_told, encoder.tabnet.sizes)

    def forward(
        self,
        encoder: TabNetTableEncoder,
        x: dict[str, Tensor],
        keep: Tensor | None,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the mean of sum m log m.

        `keep` (b,) says which rows have the table; None is all.
        """
        features = encoder.features(x)
        if not len(encoder.embedder.column):  # no column was ever filled in
            return self.decoder.out.weight.sum() * 0.0, features.sum() * 0.0
        hidden, prior, gone = encoder.hide(features, self.mask_ratio)
        known = encoder.known(x)
        if keep is not None:
            known = known * keep[:, None]
        outputs, entropy = encoder.tabnet(hidden, prior, with_entropy)
        guess, truth = self.decoder(outputs), encoder.told(features.detach())
        return reconstruction_loss(guess, truth, gone * known, known), entropy
