"""Pictures of patient vectors and of what a model looked at in a history."""

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from ehrfuse._runtime import check_option, import_optional
from ehrfuse.evaluation._style import (
    COLOURS,
    FONT,
    clean,
    fitted,
    mark_style,
    new_axes,
    new_figure,
)
from ehrfuse.evaluation.explanations import _stages, silhouette_report


class EmbeddingDisplay:
    """Patient vectors in the plane, one panel per stage; colour and shape tell the class.

    It is recommended to use `from_stages`; all parameters are stored.

    Parameters
    ----------
    points : dict of str to array of shape (n_rows, 2)
    y : array of shape (n_rows,)
    report : DataFrame
        As of `silhouette_report`: of the vectors, not of the picture.
    method : str
        How the plane was found.

    Attributes
    ----------
    figure_ : matplotlib Figure
    axes_ : dict of str to Axes

    See Also
    --------
    silhouette_report : The figures in the titles.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse.evaluation import EmbeddingDisplay
    >>> rng = np.random.default_rng(0)
    >>> y = np.repeat([0, 1], 30)
    >>> before, after = rng.normal(size=(2, 60, 4))
    >>> stages = {"before": before, "after": after + 3 * y[:, None]}
    >>> display = EmbeddingDisplay.from_stages(stages, y, method="pca")
    >>> list(display.axes_)
    ['before', 'after']
    """

    def __init__(self, points, y, report, method):
        self.points = points
        self.y = y
        self.report = report
        self.method = method

    @classmethod
    def from_stages(
        cls, stages, y, X=None, *, method="tsne", max_rows=1000, random_state=0, figure=None
    ):
        """Find a plane for every stage and draw it.

        Parameters
        ----------
        stages : mapping of str to array, or fitted estimator
            As for `silhouette_report`.
        y : array of shape (n_samples,)
            Classes.
        X : DataFrame of shape (n_samples, n_columns), default=None
            Only with an estimator.
        method : {"tsne", "umap", "pca"}, default="tsne"
            ``"umap"`` needs the package umap-learn.
        max_rows : int, default=1000
            More rows are sampled down.
        random_state : int, default=0
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : EmbeddingDisplay
        """
        check_option(method, "method", ("tsne", "umap", "pca"))
        vectors, y = _stages(stages, X), np.asarray(y)
        report = silhouette_report(vectors, y, max_rows=max_rows, random_state=random_state)
        kept = np.flatnonzero(~pd.isna(y))
        if len(kept) > max_rows:
            kept = np.random.default_rng(random_state).choice(kept, max_rows, replace=False)
        points = {name: _plane(part[kept], method, random_state) for name, part in vectors.items()}
        return cls(points, y[kept], report, method).plot(figure=figure)

    def plot(self, *, figure=None):
        """Draw the picture.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : EmbeddingDisplay
            With `figure_` and `axes_` set.
        """
        n = len(self.points)
        figure = new_figure(figure, 3.4 * n + 1.0, 3.6)
        axes = figure.subplots(1, n, squeeze=False)[0]
        self.figure_, self.axes_ = figure, dict(zip(self.points, axes, strict=True))
        classes = np.unique(self.y)
        for name, ax in self.axes_.items():
            for place, value in enumerate(classes):
                own = self.points[name][self.y == value]
                ax.scatter(*own.T, s=14, alpha=0.6, linewidth=0, label=fitted(value, 16, 1),
                           **mark_style(place))  # fmt: skip
            far = self.report.loc[name, "silhouette"]
            ax.set_title(f"{fitted(name, 36, 1)}\nsilhouette {far:.2f}", fontsize=FONT)
            ax.set_xticks([])
            ax.set_yticks([])
        # Beside the last panel, where it covers no patient.
        axes[-1].legend(fontsize=FONT - 1, markerscale=2, frameon=False, loc="upper left",
                        bbox_to_anchor=(1.01, 1))  # fmt: skip
        return self


def _plane(vectors, method, seed):
    """Two coordinates of every row."""
    if method == "umap":
        umap = import_optional("umap", "plots")
        return np.asarray(umap.UMAP(random_state=seed).fit_transform(vectors))
    if method == "pca" or len(vectors) < 5:
        found = PCA(min(2, *vectors.shape), random_state=seed).fit_transform(vectors)
        return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))
    perplexity = min(30, (len(vectors) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(vectors)


class TimelineDisplay:
    """What one prediction leaned on, over the patient's time: visits across, features down.

    It is recommended to use `from_explanation`; all parameters are stored.

    Parameters
    ----------
    table : DataFrame of shape (n_features, n_visits)
        Weights or effects, the columns are times.
    unit : str
        Unit of time.
    score : str
        What the numbers are.

    Attributes
    ----------
    figure_ : matplotlib Figure
    ax_ : Axes

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import TimelineDisplay
    >>> found = pd.DataFrame({
    ...     "row": 0, "visit": [0, 1, 1], "time": [-8.0, -2.0, -2.0],
    ...     "feature": ["sbp", "sbp", "glucose"], "weight": [0.1, 0.4, -0.2],
    ... })
    >>> TimelineDisplay.from_explanation(found, unit="w").table.shape
    (2, 2)
    """

    def __init__(self, table, unit, score):
        self.table = table
        self.unit = unit
        self.score = score

    @classmethod
    def from_explanation(cls, explanation, *, row=0, max_features=12, unit="", ax=None):
        """Draw the explanation of one row.

        Parameters
        ----------
        explanation : DataFrame
            Of an estimator's ``explain``, or of `sensitivity`.
        row : int, default=0
        max_features : int, default=12
            Features drawn, those with the largest sum of absolute weights.
        unit : str, default=""
            Unit of time.
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : TimelineDisplay
        """
        score = "effect" if "effect" in explanation else "weight"
        own = explanation[(explanation["row"] == row) & (explanation["visit"] >= 0)]
        if not len(own):
            raise ValueError(
                f"The explanation has no visit of row {row}; it has the rows "
                f"{sorted(explanation['row'].unique())[:8]}."
            )
        table = own.pivot_table(index="feature", columns="time", values=score, aggfunc="sum")
        largest = table.abs().sum(axis=1).sort_values(ascending=False, kind="stable")
        return cls(table.loc[largest.index[:max_features]], unit, score).plot(ax=ax)

    def plot(self, *, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : TimelineDisplay
            With `figure_` and `ax_` set.
        """
        ax = new_axes(ax, 6.4, 1.4 + 0.3 * len(self.table))
        self.figure_, self.ax_ = ax.figure, ax
        if len(self.table) == 1:
            self._bars(ax)
        else:
            self._map(ax)
        ax.set_xlabel(f"time ({self.unit})" if self.unit else "time", fontsize=FONT)
        return self

    def _bars(self, ax):
        times, heights = self.table.columns.to_numpy(float), self.table.iloc[0].to_numpy(float)
        gap = np.diff(times).min(initial=np.inf)
        # Two visits close together in a long history must not make hairs of all bars.
        width = max(0.8 * gap, np.ptp(times) / 400) if np.isfinite(gap) else 0.8
        ax.bar(times, heights, width=width, color=COLOURS[0])
        ax.set_ylabel(f"{self.score} of {self.table.index[0].strip('()')}", fontsize=FONT)
        clean(ax, "y")

    def _map(self, ax):
        """Visits side by side in their order, labelled with their times."""
        reach = float(np.nanmax(np.abs(self.table.to_numpy(float)))) or 1.0
        image = ax.imshow(self.table, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach)
        ax.set_yticks(
            range(len(self.table)),
            [fitted(name, 30, 1) for name in self.table.index],
            fontsize=FONT - 1,
        )
        self._label_visits(ax)
        self.figure_.colorbar(image, ax=ax, label=self.score)

    def _label_visits(self, ax):
        """Times of as many visits as have room: about forty letters below the map."""
        times = self.table.columns.to_numpy(float)
        labels = [f"{t:.0f}" if abs(t) >= 100 else f"{t:.3g}" for t in times]
        step = -(-len(labels) * (max(map(len, labels)) + 2) // 40)
        places = range(0, len(labels), step)
        ax.set_xticks(places, [labels[place] for place in places], fontsize=FONT - 1)
