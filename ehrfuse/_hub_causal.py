"""The same door for models that write: causal language models, copied, built, and continued."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ehrfuse._hub import (
    TOKENS_PER_BATCH,
    ModelInfo,
    _config,
    _loading,
    _quiet,
    _tokenizer,
    longest_chunk,
)
from ehrfuse._runtime import resolve_device, seeded


def copy_causal(info: ModelInfo) -> nn.Module:
    """Copy a pretrained causal language model, on the CPU and trainable."""
    return copy.deepcopy(_causal_model(info, "cpu")).requires_grad_(True)


def open_causal(info: ModelInfo, device: "str | torch.device | None" = None) -> nn.Module:
    """Open the one copy of a causal language model in this process, to be read and not changed."""
    place = torch.empty(0, device=resolve_device(device)).device  # "cuda" is "cuda:0" too
    return _causal_model(info, str(place))


def build_causal(config: str) -> nn.Module:
    """Build the network of a causal model, with random weights and without any file."""
    from transformers import AutoModelForCausalLM

    with seeded(0, torch.device("cpu")), _quiet():
        return AutoModelForCausalLM.from_config(_config(config), dtype=torch.float32)


@lru_cache(maxsize=2)
def _causal_model(info: ModelInfo, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "revision": info.revision or "main", "trust_remote_code": False, "weights_only": True,
        "dtype": torch.float32, "output_loading_info": True,
    }  # fmt: skip
    with _loading(info.name, "causal language model"), seeded(0, torch.device("cpu")):
        loaded: Any = AutoModelForCausalLM.from_pretrained(info.name, **options)
        model, report = loaded
        if report["missing_keys"] or report["mismatched_keys"]:
            raise ValueError(
                "it has no weights for a language model's head, so it cannot write text"
            )
    return model.eval().requires_grad_(False).to(device)


def cut_prompt(ids: Sequence[int], room: int) -> list[int]:
    """The first and the last tokens of a text that is longer than the room for it."""
    if len(ids) <= room:
        return list(ids)
    first = (room + 1) // 2
    return [*ids[:first], *ids[len(ids) - (room - first) :]] if room > first else [*ids[:first]]


def continue_texts(
    texts: Sequence[str],
    info: ModelInfo,
    *,
    max_new_tokens: int = 128,
    device: "str | torch.device | None" = None,
) -> list[str]:
    """What a causal model writes after every text, without sampling."""
    tokenizer, frame = _tokenizer(info)
    model = open_causal(info, device)
    room = longest_chunk(info, 1 << 20) - max_new_tokens - len(frame.prefix)
    if room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a text in model {info.name!r}."
        )
    rows = [
        [*frame.prefix, *cut_prompt(tokenizer(text, add_special_tokens=False)["input_ids"], room)]
        for text in texts
    ]
    rows = [row or [frame.pad] for row in rows]
    return continue_ids(model, rows, tokenizer, frame.pad, max_new_tokens)


@torch.inference_mode()
def continue_ids(
    model: Any, rows: Sequence[Sequence[int]], tokenizer: Any, pad: int, max_new_tokens: int
) -> list[str]:
    """The same from token numbers, in batches of texts alike in length."""
    device = next(model.parameters()).device
    order = np.argsort([len(row) for row in rows], kind="stable")[::-1]
    said = [""] * len(rows)
    start = 0
    while start < len(order):
        longest = len(rows[order[start]])
        some = order[start : start + max(1, TOKENS_PER_BATCH // (longest + max_new_tokens))]
        start += len(some)
        ids = torch.full((len(some), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, i in enumerate(some):  # padded on the left: what is written follows the text
            ids[place, longest - len(rows[i]) :] = torch.tensor(rows[i])
            mask[place, longest - len(rows[i]) :] = 1
        with _quiet():
            found = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=False,
                max_new_tokens=max_new_tokens, pad_token_id=pad,
            )  # fmt: skip
        words = tokenizer.batch_decode(found[:, longest:].cpu(), skip_special_tokens=True)
        for i, text in zip(some, words, strict=True):
            said[i] = text
    return said


# ---------------------------------------------------------------- after a prefix of vectors


def room_after(info: ModelInfo, n_vectors: int) -> int:
    """Tokens that a model can read behind so many vectors."""
    return longest_chunk(info, 1 << 20) - len(_tokenizer(info)[1].prefix) - n_vectors


def word_unit(info: ModelInfo) -> tuple[int, float]:
    """Width of a model's vectors of words, and the deviation of their numbers."""
    words: Tensor = open_causal(info).get_input_embeddings().weight  # type: ignore[operator]
    return words.shape[1], float(words[:1000].std())


def note_ids(info: ModelInfo, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token numbers of texts to be written; one that is cut has no end."""
    tokenizer, _ = _tokenizer(info)
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*note, *end][:max_length] for note in ids]


def token_losses(info: ModelInfo, vectors: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Loss (b, t) of every token behind vectors (b, k, d), zero where padded on the right."""
    model: Any = open_causal(info, vectors.device)
    before = _with_start(model, info, vectors)
    here = torch.ones(before.shape[:2], dtype=torch.bool, device=mask.device)
    logits = model(
        inputs_embeds=torch.cat([before, model.get_input_embeddings()(ids)], 1),
        attention_mask=torch.cat([here, mask], 1).long(),
        logits_to_keep=ids.shape[1] + 1, use_cache=False,
    ).logits  # fmt: skip
    each = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids, reduction="none")
    return torch.where(mask, each, 0.0)


@torch.no_grad()  # not inference_mode: what the model remembers of its positions serves a fit too
def continue_vectors(
    vectors: np.ndarray,
    info: ModelInfo,
    *,
    max_new_tokens: int,
    device: "str | torch.device | None" = None,
) -> list[str]:
    """What a causal model writes after vectors (n, k, d) in the place of tokens, without sampling.

    All rows are equally long, so that none is padded and none depends on its neighbours.
    """
    model: Any = open_causal(info, device)
    tokenizer, frame = _tokenizer(info)
    size = max(1, TOKENS_PER_BATCH // (vectors.shape[1] + max_new_tokens))
    said = []
    for start in range(0, len(vectors), size):
        some = torch.from_numpy(vectors[start : start + size].astype("float32")).to(model.device)
        some = _with_start(model, info, some)
        with _quiet():
            found = model.generate(
                inputs_embeds=some, attention_mask=torch.ones(some.shape[:2], device=some.device),
                do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
                pad_token_id=frame.pad, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        said += tokenizer.batch_decode(found.cpu(), skip_special_tokens=True)
    return said


def _with_start(model: Any, info: ModelInfo, vectors: Tensor) -> Tensor:
    """The same behind what the tokenizer puts at the start of every text."""
    prefix = torch.tensor(_tokenizer(info)[1].prefix, dtype=torch.long, device=vectors.device)
    start = model.get_input_embeddings()(prefix).to(vectors.dtype)
    return torch.cat([start.expand(len(vectors), *start.shape), vectors], 1)
