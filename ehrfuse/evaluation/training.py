"""Pictures of one model: its training, what each modality adds, what it was told, its rivals."""

import numpy as np
import pandas as pd

from ehrfuse.evaluation._resampling import LOSSES
from ehrfuse.evaluation._style import (
    BLACK,
    BLUE,
    COLOURS,
    FONT,
    GREY,
    VERMILION,
    clean,
    fitted,
    new_axes,
    new_figure,
)
from ehrfuse.evaluation._tables import metric_title
from ehrfuse.evaluation.contribution import modality_contribution


class TrainingHistoryDisplay:
    """Losses over epochs, one panel for each term, training and validation rows.

    It is recommended to use `from_estimator`; all parameters are stored.

    Parameters
    ----------
    history : list of dict
        One record per epoch, with `epoch`, `train_<term>` and, with validation rows, `val_<term>`.

    Attributes
    ----------
    figure_ : matplotlib Figure or SubFigure
        Set by `plot`.
    axes_ : dict of str to matplotlib Axes
        By term, the sum ``"loss"`` first.

    Examples
    --------
    >>> from ehrfuse.evaluation import TrainingHistoryDisplay
    >>> history = [{"epoch": e, "train_loss": 1 / (1 + e), "val_loss": 1.1} for e in range(4)]
    >>> display = TrainingHistoryDisplay(history).plot()
    >>> list(display.axes_)
    ['loss']
    """

    def __init__(self, history):
        self.history = history

    @classmethod
    def from_estimator(cls, estimator, *, figure=None):
        """Draw how an estimator was trained.

        Parameters
        ----------
        estimator : fitted estimator
            With a `history_`, as estimators with a torch core have it.
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : TrainingHistoryDisplay
        """
        history = getattr(estimator, "history_", None)
        if not history:
            raise ValueError(
                f"{type(estimator).__name__} has no history_; pass a fitted estimator with a torch "
                "core, such as FusionClassifier, or the inner one of a pipeline."
            )
        return cls(history).plot(figure=figure)

    def plot(self, *, figure=None):
        """Draw the picture.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : TrainingHistoryDisplay
            With `figure_` and `axes_` set.
        """
        table = pd.DataFrame(self.history)
        terms = dict.fromkeys(c.partition("_")[2] for c in table if c.startswith(("train_", "val")))
        terms = [t for t in terms if t != "loss"]
        # One term is the loss itself.
        terms = ["loss", *(terms if len(terms) > 1 else [])]
        across = min(4, len(terms))
        down = -(-len(terms) // across)
        figure = new_figure(figure, max(4.2, 2.7 * across), 2.6 * down + 0.3)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for ax in grid[len(terms) :]:
            ax.set_visible(False)
        self.figure_, self.axes_ = figure, dict(zip(terms, grid, strict=False))
        for term, ax in self.axes_.items():
            self._draw(ax, table, term)
        grid[0].legend(fontsize=FONT - 1, frameon=False)
        figure.supxlabel("epoch", fontsize=FONT)
        return self

    def _draw(self, ax, table, term):
        ticker = ax.xaxis.get_major_locator()
        ticker.set_params(integer=True)
        epochs = table["epoch"] + 1
        for side, colour, style in (("train", BLUE, "-"), ("val", VERMILION, "--")):
            values = table.get(f"{side}_{term}")
            if values is None:
                continue
            label = {"train": "training", "val": "validation"}[side]
            ax.plot(epochs, values, color=colour, linestyle=style, marker="o", ms=3, label=label)
            if side == "val" and term == "loss":
                best = values.idxmin()
                ax.plot(epochs[best], values[best], "*", ms=12, color=VERMILION, zorder=4,
                        label=f"best: epoch {epochs[best]}")  # fmt: skip
        title = "sum of the terms" if len(self.axes_) > 1 else "loss"
        ax.set_title(title if term == "loss" else fitted(term.replace("_", " "), 26),
                     fontsize=FONT)  # fmt: skip
        clean(ax, "y")


class ContributionDisplay:
    """What each modality adds to a score, with intervals, the largest first.

    It is recommended to use `from_estimator`; all parameters are stored.

    Parameters
    ----------
    table : DataFrame
        Of `modality_contribution`.
    metric : str, default="auroc"
        In whose units it is.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    ax_ : matplotlib Axes

    See Also
    --------
    modality_contribution : The numbers of the picture.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import ContributionDisplay
    >>> table = pd.DataFrame(
    ...     {"contribution": [0.02, 0.1, 0.3], "lo": [0, 0.08, 0.2], "hi": [0.04, 0.12, 0.35],
    ...      "present": [1.0, 0.5, 1.0]}, index=["note", "labs", "(all)"],
    ... )
    >>> ContributionDisplay(table).plot().ax_.get_xlabel()
    'contribution to AUROC'
    """

    def __init__(self, table, metric="auroc"):
        self.table = table
        self.metric = metric

    @classmethod
    def from_estimator(cls, estimator, X, y, modalities=None, *, metric="auroc", ax=None,
                       **options):  # fmt: skip
        """Draw the contributions to a fitted estimator on held-out rows.

        Parameters
        ----------
        estimator : fitted classifier
        X : DataFrame of shape (n_samples, n_columns)
        y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        modalities : dict of str to modality, str or list of str, default=None
            None takes those that the estimator names.
        metric : str, default="auroc"
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.
        **options : dict
            As in `modality_contribution`: `method`, `groups`, `n_resamples` and so on.

        Returns
        -------
        display : ContributionDisplay
        """
        table = modality_contribution(estimator, X, y, modalities, metric=metric, **options)
        return cls(table, metric).plot(ax=ax)

    def plot(self, *, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : ContributionDisplay
            With `figure_` and `ax_` set.
        """
        own = self.table.drop(index="(all)", errors="ignore")
        own = own.sort_values("contribution", kind="stable")
        ax = new_axes(ax, 6.4, 1.0 + 0.32 * len(own))
        self.figure_, self.ax_ = ax.figure, ax
        rows = np.arange(len(own))
        ax.axvline(0, color=BLACK, linewidth=1, zorder=1)
        ax.barh(rows, own["contribution"], height=0.6, color=BLUE, zorder=2)
        ax.hlines(rows, own["lo"], own["hi"], color=BLACK, linewidth=1.5, zorder=3)
        labels = [f"{fitted(name, 28, 1)} ({share:.0%})" for name, share in own["present"].items()]
        ax.set_yticks(rows, labels)
        what = "reduction of" if self.metric in LOSSES else "contribution to"
        ax.set_xlabel(f"{what} {metric_title(self.metric)}", fontsize=FONT)
        ax.set_title("share of the rows that have it in brackets", fontsize=FONT - 1, loc="left")
        clean(ax, "x")
        ax.tick_params(axis="y", length=0)
        return self


class ComparisonDisplay:
    """Differences of models from a reference with their intervals, one panel for each metric.

    It is recommended to use `from_comparison`; all parameters are stored.

    Parameters
    ----------
    differences : DataFrame
        Of a `Comparison`.
    reference : str
        Name of the model from which they are taken.

    Attributes
    ----------
    figure_ : matplotlib Figure or SubFigure
        Set by `plot`.
    axes_ : dict of str to matplotlib Axes
        By metric.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.dummy import DummyClassifier
    >>> from sklearn.naive_bayes import GaussianNB
    >>> from ehrfuse.evaluation import ComparisonDisplay, compare
    >>> X, y = make_classification(100, random_state=0)
    >>> found = compare({"nothing": DummyClassifier(), "bayes": GaussianNB()}, X, y, n_resamples=20)
    >>> list(ComparisonDisplay.from_comparison(found).axes_)
    ['auroc', 'auprc', 'brier']
    """

    def __init__(self, differences, reference):
        self.differences = differences
        self.reference = reference

    @classmethod
    def from_comparison(cls, comparison, *, task=None, figure=None):
        """Draw the differences that `compare` found.

        Parameters
        ----------
        comparison : Comparison
        task : hashable, default=None
            Which task; with several, None is their mean.
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : ComparisonDisplay
        """
        found = comparison.differences
        if not len(found):
            raise ValueError("There is one model only; compare at least two.")
        if found.index.nlevels == 3:
            found = found.xs("(mean)" if task is None else task, level="task")
        return cls(found, comparison.reference).plot(figure=figure)

    def plot(self, *, figure=None):
        """Draw the picture.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : ComparisonDisplay
            With `figure_` and `axes_` set.
        """
        metrics = list(dict.fromkeys(self.differences.index.get_level_values("metric")))
        names = list(dict.fromkeys(self.differences.index.get_level_values("model")))[::-1]
        figure = new_figure(figure, 2.2 + 2.5 * len(metrics), 1.2 + 0.34 * len(names))
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        self.figure_, self.axes_ = figure, dict(zip(metrics, axes, strict=True))
        rows = np.arange(len(names))
        for metric, ax in self.axes_.items():
            own = self.differences.xs(metric, level="metric").loc[names]
            ax.axvline(0, color=BLACK, linewidth=1, linestyle="--", zorder=1)
            ax.hlines(rows, own["lo"], own["hi"], color=GREY, linewidth=4, zorder=2)
            ax.plot(own["difference"], rows, "o", ms=7, color=BLUE, zorder=3)
            ax.set_title(metric_title(metric), fontsize=FONT)
            ax.xaxis.get_major_locator().set_params(nbins=4)
            ax.set_ylim(-0.6, len(names) - 0.4)
            clean(ax, "x")
            ax.tick_params(axis="y", length=0)
        axes[0].set_yticks(rows, [fitted(name, 34, 2) for name in names])
        figure.supxlabel(f"difference from {fitted(self.reference, 60, 1)}", fontsize=FONT)
        return self


class KnowledgeEvidenceDisplay:
    """Facts that were retrieved for one patient, by weight, with their sources.

    It is recommended to use `from_estimator`; all parameters are stored.

    Parameters
    ----------
    knowledge : DataFrame
        Columns `text`, `kind`, `score` and, if known, `sources` and `evidence`, as
        `KnowledgeRetriever` explains itself.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    ax_ : matplotlib Axes

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import KnowledgeEvidenceDisplay
    >>> told = pd.DataFrame({
    ...     "text": ["Warfarin interacts with aspirin."], "kind": ["triple"], "score": [0.03],
    ...     "sources": ["DrugBank"], "evidence": ["PMID 1"],
    ... })
    >>> KnowledgeEvidenceDisplay(told).plot().ax_.get_xlabel()
    'weight in retrieval'
    """

    def __init__(self, knowledge):
        self.knowledge = knowledge

    @classmethod
    def from_estimator(cls, estimator, X, *, row=0, max_facts=10, ax=None):
        """Draw what was retrieved for one row.

        Parameters
        ----------
        estimator : fitted KnowledgeRetriever or KnowledgeAugmentedRiskModel
        X : DataFrame of shape (n_samples, n_columns)
        row : int, default=0
            Position in X.
        max_facts : int, default=10
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : KnowledgeEvidenceDisplay
        """
        if not hasattr(estimator, "explain"):
            raise ValueError(
                f"{type(estimator).__name__} does not explain itself; pass a fitted "
                "KnowledgeRetriever or KnowledgeAugmentedRiskModel."
            )
        found = estimator.explain(X.iloc[[row]])[0]
        told = found[1] if isinstance(found, tuple) else getattr(found, "knowledge", None)
        if told is None or not len(told):
            raise ValueError(
                f"Nothing was retrieved for row {row}; it may mention nothing that the graph knows."
            )
        return cls(told.head(max_facts)).plot(ax=ax)

    def plot(self, *, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : KnowledgeEvidenceDisplay
            With `figure_` and `ax_` set.
        """
        told = self.knowledge.sort_values("score", ascending=False, kind="stable")[::-1]
        texts = [fitted(text, 58, 3) for text in told["text"]]
        heights = np.array([0.24 + 0.16 * (text.count("\n") + 2) for text in texts])
        ax = new_axes(ax, 8.4, 0.9 + heights.sum())
        self.figure_, self.ax_ = ax.figure, ax
        rows = np.cumsum(heights) - heights / 2
        kinds = list(dict.fromkeys(told["kind"][::-1]))
        colours = dict(zip(kinds, COLOURS * (1 + len(kinds)), strict=False))
        for kind in kinds:
            own = (told["kind"] == kind).to_numpy()
            ax.barh(rows[own], told["score"][own], height=0.28, color=colours[kind], label=kind)
        ax.set_yticks(rows, [self._label(*line) for line in zip(texts, self._origins(told),
                                                              strict=True)])  # fmt: skip
        ax.set_ylim(0, heights.sum())
        ax.set_xlabel("weight in retrieval", fontsize=FONT)
        if len(kinds) > 1:
            ax.legend(fontsize=FONT - 1, frameon=False, loc="lower right")
        clean(ax, "x")
        ax.xaxis.get_major_locator().set_params(nbins=4)
        ax.tick_params(axis="y", length=0)
        return self

    def _origins(self, told):
        """Source and evidence of every fact, in one line."""
        nothing = pd.Series("", index=told.index)
        pairs = zip(told.get("sources", nothing), told.get("evidence", nothing), strict=True)
        return ["; ".join(str(part) for part in pair if part) for pair in pairs]

    def _label(self, text, origin):
        return f"{text}\n[{fitted(origin, 56, 1)}]" if origin else text
