"""How the importance of columns differs between two models of the same table."""

import numpy as np
import pandas as pd
from sklearn.utils import check_scalar

from ehrfuse.evaluation._style import (
    BLUE,
    FONT,
    GREY,
    POOLED,
    clean,
    fitted,
    legend_below,
    new_axes,
)

__all__ = ["AttentionChangeDisplay"]


class AttentionChangeDisplay:
    """Importance of every column before and after, the largest changes first.

    Before and after an alignment with notes, for instance, or at two hospitals. It is recommended
    to use `from_estimators`; all parameters are stored.

    Parameters
    ----------
    table : DataFrame
        Columns ``before``, ``after`` and ``change``, indexed by column name, by size of the change.
    labels : tuple of str, default=("before", "after")

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    ax_ : matplotlib Axes

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse.evaluation import AttentionChangeDisplay
    >>> before, after = [0.5, 0.3, 0.2], [0.1, 0.6, 0.3]
    >>> display = AttentionChangeDisplay.from_importances(before, after, ["age", "bun", "wbc"])
    >>> display.table["change"].round(1).to_dict()
    {'age': -0.4, 'bun': 0.3, 'wbc': 0.1}
    """

    def __init__(self, table, *, labels=("before", "after")):
        self.table = table
        self.labels = labels

    @classmethod
    def from_importances(cls, before, after, names, *, labels=("before", "after"), **options):
        """Draw two lists of importances.

        Parameters
        ----------
        before, after : array-like of shape (n_columns,)
            Scaled here to sum to one each.
        names : list of str
        labels : tuple of str, default=("before", "after")
        **options : optional
            See `plot`.

        Returns
        -------
        display : AttentionChangeDisplay
        """
        both = np.array([before, after], dtype=float)
        if both.shape != (2, len(names)):
            raise ValueError(
                f"before and after have shape {both.shape[1:]}, names {len(names)} entries; give "
                "one importance a column."
            )
        both /= both.sum(1, keepdims=True).clip(1e-12)
        table = pd.DataFrame({"before": both[0], "after": both[1]}, index=list(names))
        table["change"] = table["after"] - table["before"]
        order = table["change"].abs().sort_values(ascending=False, kind="stable").index
        return cls(table.loc[order], labels=labels).plot(**options)

    @classmethod
    def from_estimators(cls, before, after, *, labels=("before", "after"), **options):
        """Draw two fitted estimators on the columns that both have.

        Parameters
        ----------
        before, after : fitted estimators
            With ``feature_importances_`` and ``feature_names_in_``.
        labels : tuple of str, default=("before", "after")
        **options : optional
            See `plot`.

        Returns
        -------
        display : AttentionChangeDisplay
        """
        parts = [
            pd.Series(e.feature_importances_, list(e.feature_names_in_)) for e in (before, after)
        ]
        names = [name for name in parts[0].index if name in parts[1].index]
        names = [name for name in names if parts[0][name] or parts[1][name]]
        if not names:
            raise ValueError(
                "The two estimators share no column that either attends to; fit both on the same "
                "table."
            )
        before, after = parts[0][names], parts[1][names]
        return cls.from_importances(before, after, names, labels=labels, **options)

    def plot(self, *, ax=None, max_columns=15):
        """Draw one line a column, from its importance before to that after.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.
        max_columns : int, default=15
            Those that changed most.

        Returns
        -------
        display : AttentionChangeDisplay
            With `figure_` and `ax_` set.
        """
        check_scalar(max_columns, "max_columns", (int, np.integer), min_val=1)
        shown = self.table.head(max_columns)[::-1]
        ax = new_axes(ax, 6.4, 1.3 + 0.3 * len(shown))
        rows = np.arange(len(shown))
        ax.hlines(rows, shown["before"], shown["after"], color=GREY, linewidth=3, zorder=1)
        ax.scatter(shown["before"], rows, color=POOLED, zorder=2, label=self.labels[0],
                   marker="s")  # fmt: skip
        ax.scatter(shown["after"], rows, color=BLUE, zorder=3, label=self.labels[1])
        ax.set_yticks(rows, [fitted(name, 30, 1) for name in shown.index])
        ax.set_xlabel("share of attention", fontsize=FONT)
        clean(ax, "x")
        legend_below(ax)
        self.ax_, self.figure_ = ax, ax.figure
        return self
