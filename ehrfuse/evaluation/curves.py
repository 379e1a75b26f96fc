"""Pictures of decisions and calibration; matplotlib is needed only when one is drawn."""

import numpy as np
from sklearn.utils import check_scalar

from ehrfuse.evaluation._inputs import check_present, estimator_modalities
from ehrfuse.evaluation._style import (
    BLACK,
    BLUE,
    FONT,
    POOLED,
    clean,
    fitted,
    legend_below,
    line_style,
    new_axes,
    new_figure,
    pattern_title,
)
from ehrfuse.evaluation.decisions import calibration_table, decision_curve


class DecisionCurveDisplay:
    """Net benefit over thresholds: of models, of treating all, and of treating nobody.

    It is recommended to use `from_estimator` or `from_predictions`; all parameters are stored.

    Parameters
    ----------
    table : DataFrame
        Of `decision_curve`.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Set by `plot`.
    ax_ : matplotlib Axes

    See Also
    --------
    decision_curve : The numbers of the picture.

    Examples
    --------
    >>> from ehrfuse.evaluation import DecisionCurveDisplay
    >>> died, risk = [0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.8, 0.3, 0.2, 0.9]
    >>> display = DecisionCurveDisplay.from_predictions(died, {"score": risk}, random_state=0)
    >>> display.table["model"].unique().tolist()
    ['score']
    """

    def __init__(self, table):
        self.table = table

    @classmethod
    def from_predictions(cls, y, proba, *, ax=None, **options):
        """Draw the curves of predictions.

        Parameters
        ----------
        y : array-like of shape (n_samples,)
        proba : array-like, or dict of str to array-like
            Of one or several models.
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.
        **options : dict
            As in `decision_curve`: `thresholds`, `groups`, `n_resamples`, `confidence` and
            `random_state`.

        Returns
        -------
        display : DecisionCurveDisplay
        """
        return cls(decision_curve(y, proba, **options)).plot(ax=ax)

    @classmethod
    def from_estimator(cls, estimator, X, y, *, ax=None, **options):
        """Draw the curves of fitted estimators on held-out rows.

        Parameters
        ----------
        estimator : fitted classifier, or dict of str to such
        X : DataFrame of shape (n_samples, n_columns)
        y : array-like of shape (n_samples,)
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.
        **options : dict
            As in `decision_curve`.

        Returns
        -------
        display : DecisionCurveDisplay
        """
        models = estimator if isinstance(estimator, dict) else {type(estimator).__name__: estimator}
        proba = {name: model.predict_proba(X) for name, model in models.items()}
        return cls.from_predictions(y, proba, ax=ax, **options)

    def plot(self, *, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : DecisionCurveDisplay
            With `figure_` and `ax_` set.
        """
        parts = list(self.table.groupby("model", sort=False))
        ax = new_axes(ax, 6.4, 4.4 + 0.1 * len(parts))
        self.figure_, self.ax_ = ax.figure, ax
        # A single threshold is a point, which a line would not show.
        mark = {"marker": "o", "clip_on": False} if self.table["threshold"].nunique() == 1 else {}
        for place, (name, own) in enumerate(parts):
            style = line_style(place)
            ax.fill_between(own["threshold"], own["lo"], own["hi"], color=style["color"],
                            alpha=0.15 if len(parts) < 4 else 0, linewidth=0)  # fmt: skip
            ax.plot(own["threshold"], own["net_benefit"], lw=2, label=fitted(name, 34, 1),
                    **style, **mark)  # fmt: skip
        own = parts[0][1]
        ax.plot(own["threshold"], own["treat_all"], color=BLACK, ls=":", lw=1.5, label="treat all",
                **mark)  # fmt: skip
        ax.axhline(0, color=BLACK, linewidth=1, label="treat nobody")
        top = self.table[["hi", "treat_all"]].to_numpy().max()
        ax.set_ylim(-0.25 * max(top, 1e-3), 1.05 * max(top, 1e-3))
        ax.set_xlim(0, own["threshold"].max())
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        ax.set_xlabel("risk from which one would treat", fontsize=FONT)
        ax.set_ylabel("net benefit", fontsize=FONT)
        legend_below(ax)
        clean(ax, "y")
        return self


class PatternCalibrationDisplay:
    """Predicted against observed risk, one panel for each missing pattern.

    It is recommended to use `from_estimator` or `from_predictions`; all parameters are stored.

    Parameters
    ----------
    table : DataFrame
        Of `calibration_table`.
    modalities : list of str, default=()
        Names of all modalities, by which the patterns are titled.

    Attributes
    ----------
    figure_ : matplotlib Figure or SubFigure
        Set by `plot`.
    axes_ : dict of str to matplotlib Axes
        By pattern.

    See Also
    --------
    calibration_table : The numbers of the picture.
    Rectifier : Corrects what it shows.

    Examples
    --------
    >>> from ehrfuse.evaluation import PatternCalibrationDisplay
    >>> died, risk = [0, 1, 0, 1, 1, 0], [0.2, 0.2, 0.3, 0.6, 0.7, 0.6]
    >>> display = PatternCalibrationDisplay.from_predictions(died, risk, n_bins=2)
    >>> list(display.axes_)
    ['(all)']
    """

    def __init__(self, table, modalities=()):
        self.table = table
        self.modalities = modalities

    @classmethod
    def from_predictions(cls, y, proba, X=None, modalities=None, *, n_bins=5, max_patterns=8,
                         figure=None, **options):  # fmt: skip
        """Draw the calibration of predictions.

        Parameters
        ----------
        y : array-like of shape (n_samples,)
        proba : array-like of shape (n_samples,) or (n_samples, 2)
        X : DataFrame of shape (n_samples, n_columns), default=None
            The same rows, from which the patterns are read; None draws all rows together.
        modalities : dict of str to modality, str or list of str, default=None
        n_bins : int, default=5
        max_patterns : int, default=8
            Panels; the most frequent patterns have one each.
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.
        **options : dict
            As in `calibration_table`: `groups`, `strategy`, `min_count` and `confidence`.

        Returns
        -------
        display : PatternCalibrationDisplay
        """
        check_scalar(max_patterns, "max_patterns", (int, np.integer), min_val=1)
        table = calibration_table(y, proba, X, modalities, n_bins=n_bins, **options)
        shown = table["pattern"].unique()[:max_patterns]
        names = () if modalities is None else list(check_present(X, modalities).columns)
        return cls(table[table["pattern"].isin(shown)], names).plot(figure=figure)

    @classmethod
    def from_estimator(cls, estimator, X, y, modalities=None, **options):
        """Draw the calibration of a fitted estimator on held-out rows.

        Parameters
        ----------
        estimator : fitted classifier
        X : DataFrame of shape (n_samples, n_columns)
        y : array-like of shape (n_samples,)
        modalities : dict of str to modality, str or list of str, default=None
            None takes those that the estimator names.
        **options : dict
            As in `from_predictions`.

        Returns
        -------
        display : PatternCalibrationDisplay
        """
        modalities = estimator_modalities(estimator) if modalities is None else modalities
        return cls.from_predictions(y, estimator.predict_proba(X), X, modalities, **options)

    def plot(self, *, figure=None):
        """Draw the picture.

        Parameters
        ----------
        figure : matplotlib Figure or SubFigure, default=None
            Where to draw; a new figure by default.

        Returns
        -------
        display : PatternCalibrationDisplay
            With `figure_` and `axes_` set.
        """
        parts = dict(list(self.table.groupby("pattern", sort=False)))
        across = min(4, len(parts))
        down = -(-len(parts) // across)
        titles = {name: self._title(name, own) for name, own in parts.items()}
        n_lines = max(title.count("\n") + 1 for title in titles.values())
        figure = new_figure(figure, max(3.6, 2.7 * across), (2.5 + 0.24 * n_lines) * down + 0.2)
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        self.figure_, self.axes_ = figure, dict(zip(parts, grid, strict=False))
        for ax in grid[len(parts) :]:
            ax.set_visible(False)
        # One badly known bin must not squeeze all others into a corner.
        top = min(1.0, 1.15 * self.table[["predicted", "rate"]].to_numpy().max())
        for place, (name, own) in enumerate(parts.items()):
            self._draw(grid[place], titles[name], own, top)
            # Below the last panel of a column the labels would otherwise be hidden.
            grid[place].tick_params(labelbottom=place + across >= len(parts))
        figure.supxlabel("predicted risk", fontsize=FONT)
        figure.supylabel("observed rate", fontsize=FONT)
        return self

    def _title(self, name, own):
        title = fitted(pattern_title(name, self.modalities), 27)
        first, words = own.iloc[0], f"n = {own['n'].sum():,}"
        if not np.isnan(first["slope"]):
            words += f"\nintercept {first['intercept']:+.2f}, slope {first['slope']:.2f}"
        return f"{title}\n{words}"

    def _draw(self, ax, title, own, top):
        ax.plot([0, 1], [0, 1], color=BLACK, linestyle="--", linewidth=1, zorder=1)
        reach = np.abs(own[["lo", "hi"]].to_numpy().T - own["rate"].to_numpy())
        # Bars end at the panel, or they would run through its title; points at its edge are whole.
        ax.errorbar(own["predicted"], own["rate"], reach, fmt="none", ecolor=POOLED, elinewidth=2)
        ax.plot(own["predicted"], own["rate"], "o-", ms=5, color=BLUE, linewidth=1.2, zorder=3,
                clip_on=False)  # fmt: skip
        ax.set_xlim(0, top)
        ax.set_ylim(0, top)
        ax.set_aspect("equal")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
            axis.get_major_locator().set_params(nbins=4)
        ax.set_title(title, fontsize=FONT - 1)
        clean(ax)
