"""Pictures of missing patterns; matplotlib is needed only when one is drawn."""

import textwrap

import numpy as np
from sklearn.utils import check_scalar

from ehrfuse._runtime import import_optional
from ehrfuse.evaluation._inputs import (
    check_labels,
    check_present,
    estimator_modalities,
    find_patterns,
)
from ehrfuse.evaluation._style import BLACK, BLUE, FONT, GREY, POOLED, VERMILION, fitted
from ehrfuse.evaluation.missingness import pattern_table

_FEW, _MANY, _SHARE = 8, 16, 0.8  # patterns drawn by default


class MissingPatternDisplay:
    """Missing patterns of a frame as an UpSet picture, with the outcome rate below each.

    Every column of the picture is one pattern: a bar with its number of rows, a dot for each
    modality that it has and, if an outcome is known, the outcome rate with its interval
    against the rate of all rows. Bars at the left give the rows that have each modality.

    It is recommended to use `from_frame` or `from_estimator`; all parameters are stored.

    Parameters
    ----------
    table : DataFrame
        One row per pattern as from `outcome_by_pattern`; `known`, `rate`, `lo` and `hi` may lack.
    shares : Series
        Share of the rows that have each modality, indexed by modality name.
    overall_rate : float, default=None
        Outcome rate of all rows, drawn as a reference line.
    outcome : str, default=None
        What the rate is called.
    unit : str, default="stays"
        What a row is, in the plural.
    confidence : float, default=0.95
        Coverage of the intervals in `table`.
    pooled_shares : DataFrame, default=None
        For each pooled row of `table`, the share of its rows that have each modality, drawn as
        dots of that area.

    Attributes
    ----------
    figure_ : matplotlib Figure or SubFigure
        Set by `plot`.
    axes_ : dict of str to matplotlib Axes
        ``"counts"``, ``"totals"``, ``"patterns"`` and, with an outcome, ``"rates"``.

    See Also
    --------
    outcome_by_pattern : The numbers of the picture.

    References
    ----------
    Lex A, Gehlenborg N, Strobelt H, Vuillemot R, Pfister H. UpSet: visualization of intersecting
    sets. IEEE Trans Vis Comput Graph 2014;20:1983-1992.

    Okabe M, Ito K. Color universal design. 2008.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import MissingPatternDisplay
    >>> X = pd.DataFrame({"lactate": [2.1, None, 4.0, None], "note": ["a", "b", None, "d"]})
    >>> display = MissingPatternDisplay.from_frame(
    ...     X, {"labs": "lactate", "note": "note"}, y=[0, 0, 1, 0]
    ... )
    >>> display.table["pattern"].tolist()
    ['note', 'labs', 'labs+note']
    """

    def __init__(
        self,
        table,
        shares,
        *,
        overall_rate=None,
        outcome=None,
        unit="stays",
        confidence=0.95,
        pooled_shares=None,
    ):
        self.table = table
        self.shares = shares
        self.overall_rate = overall_rate
        self.outcome = outcome
        self.unit = unit
        self.confidence = confidence
        self.pooled_shares = pooled_shares

    @classmethod
    def from_frame(
        cls,
        X,
        modalities,
        y=None,
        *,
        groups=None,
        task=None,
        max_patterns=None,
        unit="stays",
        confidence=0.95,
        figure=None,
    ):
        """Find the patterns of a frame and draw them.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        modalities : dict of str to modality, str or list of str
            Columns of every modality; a modality is present where any of its cells is not null.
        y : array-like of shape (n_samples,) or (n_samples, n_tasks), default=None
            Yes/no outcome as for `outcome_by_pattern`; None draws counts only.
        groups : str or array-like of shape (n_samples,), default=None
            Patient of every row, or the column of X that holds it, for cluster-robust intervals.
        task : hashable, default=None
            Which column of `y` to draw; needed if it has several.
        max_patterns : int, default=None
            Patterns drawn one by one; rarer ones are pooled as ``"other (k patterns)"``. None
            draws those of four rows in five, sixteen at most (eight where these hold less than
            half of the rows), and pools the others by how many modalities a row has.
        unit : str, default="stays"
            What a row is, in the plural.
        confidence : float, default=0.95
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : MissingPatternDisplay
        """
        present, bands = check_present(X, modalities), 1
        if max_patterns is None:
            max_patterns, bands = _enough(present)
        check_scalar(max_patterns, "max_patterns", (int, np.integer), min_val=1)
        labels, outcome = (None, None) if y is None else _choose_task(y, task)
        table = pattern_table(
            X,
            modalities,
            y=labels,
            groups=groups,
            max_patterns=max_patterns,
            bands=bands,
            confidence=confidence,
        )
        overall = None
        if labels is not None and not np.isnan(labels).all():
            overall = float(np.nanmean(labels))
        display = cls(
            table,
            present.mean(),
            overall_rate=overall,
            outcome=outcome,
            unit=unit,
            confidence=confidence,
            pooled_shares=_pooled_shares(X, modalities, max_patterns, bands),
        )
        return display.plot(figure=figure)

    @classmethod
    def from_estimator(cls, estimator, X, y=None, **options):
        """Draw the patterns of a frame over the modalities of an estimator.

        Parameters
        ----------
        estimator : estimator
            With a mapping in `modalities_` or `modalities`, itself or the estimator inside it.
        X : DataFrame of shape (n_samples, n_columns)
        y : array-like, default=None
        **options : dict
            As in `from_frame`.

        Returns
        -------
        display : MissingPatternDisplay
        """
        return cls.from_frame(X, estimator_modalities(estimator), y, **options)

    def plot(self, *, figure=None):
        """Draw the picture.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : MissingPatternDisplay
            With `figure_` and `axes_` set.
        """
        pyplot = import_optional("matplotlib.pyplot", "plots")
        n_patterns, n_modalities = len(self.table), len(self.shares)
        heights = [2.0, 0.32 * n_modalities + (1.4 if self._banded else 0.1)]
        if self.overall_rate is not None:
            heights.append(1.8)
        widths = [1.3, _panel_width(n_patterns)]
        if figure is None:
            size = (sum(widths) + 1.9, sum(heights) + 0.7)
            figure = pyplot.figure(figsize=size, layout="constrained")
        grid = figure.add_gridspec(len(heights), 2, height_ratios=heights, width_ratios=widths)
        patterns = figure.add_subplot(grid[1, 1])
        self.figure_ = figure
        self.axes_ = {
            "counts": figure.add_subplot(grid[0, 1], sharex=patterns),
            "totals": figure.add_subplot(grid[1, 0], sharey=patterns),
            "patterns": patterns,
        }
        self._draw_patterns(patterns)
        self._draw_counts(self.axes_["counts"])
        self._draw_totals(self.axes_["totals"])
        if self.overall_rate is not None:
            self.axes_["rates"] = figure.add_subplot(grid[2, 1], sharex=patterns)
            self._draw_rates(self.axes_["rates"])
        return self

    def _draw_patterns(self, ax):
        flags = self.table[list(self.shares.index)]
        rows = np.arange(len(self.shares))
        for band in rows[::2]:
            ax.axhspan(band - 0.5, band + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
        for column, flag in enumerate(flags.itertuples(index=False)):
            if self._pooled[column]:
                self._draw_pool(ax, column, rows)
                continue
            there = rows[np.asarray(flag, dtype=bool)]
            ax.scatter([column] * len(rows), rows, s=55, color=GREY, linewidth=0, zorder=2)
            ax.scatter([column] * len(there), there, s=60, color=BLACK, linewidth=0, zorder=4)
            if len(there) > 1:
                ax.plot([column] * 2, [there[0], there[-1]], color=BLACK, lw=2, zorder=3)
        ax.set_xlim(-0.6, len(flags) - 0.4)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        names = [fitted(name, 30, 1) for name in self.shares.index]
        ax.set_yticks(rows, names, fontsize=FONT)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        self._label_columns(ax)

    def _draw_pool(self, ax, column, rows):
        """Dots of the area of a modality's share, or a dotted line where shares are not known."""
        if self.pooled_shares is None:
            ax.plot([column] * 2, [rows[0], rows[-1]], color=GREY, linestyle=":", zorder=1)
            return
        shares = self.pooled_shares.iloc[column - int((~self._pooled).sum())]
        ax.scatter([column] * len(rows), rows, s=55, color=GREY, linewidth=0, zorder=2)
        ax.scatter([column] * len(rows), rows, s=60 * shares, color=BLUE, linewidth=0, zorder=4)

    def _label_columns(self, ax):
        """Name the pooled columns under the dots; the others are named by their dots."""
        names = self.table["pattern"].str.replace(" (", "\n(")
        if self._banded:  # upright, since several stand side by side
            names = names.str.replace("other\n(", "other ").str.removesuffix(")")
            names = names.str.replace("(patterns?), ", "\\1:\n", regex=True)
        ax.set_xticks(range(len(names)), np.where(self._pooled, names, ""), fontsize=FONT - 1,
                      rotation=90 if self._banded else 0)  # fmt: skip

    @property
    def _banded(self):
        return self._pooled.sum() > 1

    @property
    def _pooled(self):
        return self.table[list(self.shares.index)].isna().all(axis=1).to_numpy()

    def _draw_counts(self, ax):
        counts = self.table["n"].to_numpy()
        colours = np.where(self._pooled, POOLED, BLUE)
        width = 0.68 * min(1, len(counts) / 5)  # two patterns should not make two walls
        bars = ax.bar(range(len(counts)), counts, width=width, color=colours)
        ax.bar_label(bars, [f"{count:,}" for count in counts], fontsize=FONT - 1, padding=2)
        ax.set_ylim(0, 1.15 * counts.max())
        ax.set_ylabel(self.unit, fontsize=FONT)
        ax.yaxis.set_major_formatter("{x:,.0f}")
        ax.yaxis.get_major_locator().set_params(integer=True, nbins=5)
        _clean(ax)

    def _draw_totals(self, ax):
        shares = self.shares.to_numpy()
        ax.barh(range(len(shares)), shares, height=0.6, color=BLACK, alpha=0.75)
        for row, share in enumerate(shares):
            ax.text(share + 0.04, row, f"{share:.0%}", ha="right", va="center", fontsize=FONT - 1)
        ax.set_xlim(1.5, 0)
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0, labelleft=False)
        ax.spines[:].set_visible(False)
        ax.set_title("present in", fontsize=FONT, loc="right")

    def _draw_rates(self, ax):
        ticker = import_optional("matplotlib.ticker", "plots")
        table = self.table
        rate = table["rate"].to_numpy(dtype=float)
        reach = np.abs(table[["lo", "hi"]].to_numpy(dtype=float).T - rate)
        ax.axhline(self.overall_rate, color=BLACK, linestyle="--", linewidth=1, zorder=1)
        ax.errorbar(range(len(rate)), rate, reach, fmt="o", ms=6, color=VERMILION,
                    ecolor=VERMILION, elinewidth=1.5, capsize=3, zorder=3)  # fmt: skip
        top = np.nanmax(table["hi"].to_numpy(dtype=float))
        ax.set_ylim(-0.05 * top, 1.08 * top)  # below 0, so that points at 0 are whole
        ax.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(lambda rate, _: f"{100 * rate:.3g}%")
        ax.set_ylabel("rate", fontsize=FONT)
        what = "outcome" if self.outcome is None else str(self.outcome)
        # About eleven letters to the inch of a panel that is no wider than its columns.
        what = textwrap.fill(f"{what}: rate, {self.confidence:.0%} interval", _letters(len(rate)))
        overall = f"dashed: all {self.unit}, {self.overall_rate:.1%}"
        ax.set_title(f"{what}\n{overall}", fontsize=FONT, loc="left")
        ax.grid(axis="y", color=GREY, linewidth=0.6)
        _clean(ax)


def _pooled_shares(X, modalities, max_patterns, bands):
    """Share of the rows that have each modality, of every pool; None without one."""
    patterns = find_patterns(X, modalities, max_patterns=max_patterns, bands=bands)
    pools = patterns.kinds.index[patterns.kinds.iloc[:, 1:].isna().all(axis=1)]
    if not len(pools):
        return None
    return patterns.present.groupby(patterns.rows).mean().loc[pools]


def _enough(present):
    """How many patterns a picture draws, and how many columns the others share."""
    shares = present.value_counts(normalize=True).to_numpy()
    if len(shares) <= _FEW:
        return len(shares), 1
    needed = 1 + int((shares.cumsum() < _SHARE).sum())
    kept = int(np.clip(needed, _FEW, _MANY))
    # Where single patterns hold few rows, how many modalities a row has tells more.
    return (kept, 3) if shares[:kept].sum() >= 0.5 else (_FEW, 6)


def _panel_width(n_patterns):
    """Width in inches of the panels with one column per pattern."""
    return max(3.6, (0.52 if n_patterns <= 13 else 0.46) * n_patterns)


def _letters(n_patterns):
    return int(11 * _panel_width(n_patterns))


def _clean(ax):
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.tick_params(axis="x", length=0, labelbottom=False)
    ax.tick_params(axis="y", labelsize=FONT - 1)
    ax.set_axisbelow(True)


def _choose_task(y, task):
    """Labels of the one task to draw, and its name."""
    tasks = check_labels(y)
    if tasks.names is None:
        return tasks.labels[:, 0], getattr(y, "name", None)
    if task is None and len(tasks.names) == 1:
        task = tasks.names[0]
    if task not in tasks.names:
        raise ValueError(
            f"task={task!r} is no column of y, which has {tasks.names}; choose one of these."
        )
    return tasks.labels[:, tasks.names.index(task)], task
