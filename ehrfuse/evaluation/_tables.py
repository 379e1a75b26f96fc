"""The result of a comparison, and how it is printed."""

import html
import re

import numpy as np

NOTHING = "\N{EN DASH}"
NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "brier": "Brier score",
    "log_loss": "log loss",
    "ece": "ECE",
    "ece_uniform": "ECE (equal width)",
}


def metric_title(metric):
    """How a metric is called in a table or picture."""
    if metric in NAMES:
        return NAMES[metric]
    kind, _, threshold = metric.partition("@")
    return f"{kind.replace('_', ' ')} at {float(threshold):.3g}" if threshold else kind


class Comparison:
    """What `compare` found.

    Parameters
    ----------
    table : DataFrame
        Indexed by (`model`, `metric`), or (`model`, `task`, `metric`) with several tasks, among
        which ``"(mean)"`` is the mean over them: `mean`, `sd` and `folds` over folds and seeds;
        `estimate`, `lo`, `hi` and `n` of the pooled out-of-fold predictions.
    differences : DataFrame
        Indexed alike, without the reference: `difference` (model minus reference, pooled), `lo`,
        `hi`, `share_better` (share of the resamples in which the model is better) and `n`.
    predictions : DataFrame of shape (n_samples, n_models)
        Out-of-fold probability of the event, averaged over seeds, by position and index of X;
        columns (`model`, `task`) with several tasks. NaN in rows that no fold held out.
    fold_scores : DataFrame
        One row per model, seed, fold and task: each metric, `n`, and `seconds` (fit and predict).
    failures : dict of str to str
        Why models were left out.
    reference : str
    confidence : float

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from sklearn.dummy import DummyClassifier
    >>> from sklearn.naive_bayes import GaussianNB
    >>> from ehrfuse.evaluation import compare
    >>> X, y = make_classification(100, random_state=0)
    >>> found = compare({"nothing": DummyClassifier(), "bayes": GaussianNB()}, X, y, cv=2,
    ...                 metrics=["brier"], n_resamples=50)
    >>> found
    <Comparison of 2 models: nothing (reference), bayes>
    >>> list(found.differences.columns)
    ['difference', 'lo', 'hi', 'share_better', 'n']
    """

    def __init__(
        self, table, differences, predictions, fold_scores, failures, reference, confidence
    ):
        self.table = table
        self.differences = differences
        self.predictions = predictions
        self.fold_scores = fold_scores
        self.failures = failures
        self.reference = reference
        self.confidence = confidence

    def __repr__(self):
        names = [f"{name} (reference)" if name == self.reference else str(name) for name in
                 self._models]  # fmt: skip
        return f"<Comparison of {len(names)} models: {', '.join(names)}>"

    @property
    def _models(self):
        return list(dict.fromkeys(self.table.index.get_level_values("model")))

    def to_markdown(self, *, digits=3, differences=True):
        """Table in Markdown.

        Parameters
        ----------
        digits : int, default=3
            Decimal places.
        differences : bool, default=True
            Whether the paired differences follow.

        Returns
        -------
        text : str
        """
        return "\n\n".join(_markdown(*part) for part in self._parts(digits, differences))

    def to_latex(self, *, digits=3, differences=True):
        """Table in LaTeX, with the rules of the package booktabs.

        Parameters
        ----------
        digits : int, default=3
            Decimal places.
        differences : bool, default=True
            Whether the paired differences follow.

        Returns
        -------
        text : str
        """
        return "\n\n".join(_latex(*part) for part in self._parts(digits, differences))

    def _repr_html_(self):
        parts = [_html(*part) for part in self._parts(3, True)]
        lost = "".join(f"<p>{html.escape(text)}</p>" for text in self.failures.values())
        return "".join(parts) + lost

    def _parts(self, digits, differences):
        """Header and rows of words, of the scores and of the differences."""
        yield self._scores(digits)
        if differences and len(self.differences):
            yield self._leads(digits)

    def _scores(self, digits):
        interval = f"{100 * self.confidence:.3g} % interval"
        folds = int(self.table["folds"].max())

        def cells(row):
            spread = _number(row["mean"], digits)
            if not np.isnan(row["sd"]):
                spread += f" ± {row['sd']:.{digits}f}"
            return spread, _span(row["estimate"], row, digits)

        titles = (f", mean ± SD over {folds} folds", f" pooled ({interval})")
        return self._words(self.table, cells, titles)

    def _leads(self, digits):
        interval = f"{100 * self.confidence:.3g} % interval"
        what = f" minus {self.reference} ({interval})"
        return self._words(
            self.differences, lambda row: (_span(row["difference"], row, digits, "+"),), (what,)
        )

    def _words(self, table, cells, titles):
        metrics = list(dict.fromkeys(table.index.get_level_values("metric")))
        lines = list(dict.fromkeys(key[:-1] for key in table.index))
        titled = [f"{metric_title(m)}{title}" for m in metrics for title in titles]
        rows = [
            [*map(str, line), *(cell for m in metrics for cell in cells(table.loc[(*line, m)]))]
            for line in lines
        ]
        return ["", *(["task"] if table.index.nlevels == 3 else []), *titled], rows


def _number(value, digits):
    return NOTHING if np.isnan(value) else f"{value:.{digits}f}"


def _span(value, row, digits, sign=""):
    if np.isnan(value):
        return NOTHING
    lo, hi = (f"{row[end]:{sign}.{digits}f}" for end in ("lo", "hi"))
    return f"{value:{sign}.{digits}f} ({lo} to {hi})"


def _markdown(header, rows):
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in ([*header], ["---"] * len(header), *rows)]
    return "\n".join(lines).replace("|  |", "| |")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", NOTHING: "--",
}  # fmt: skip


def _latex(header, rows):
    columns = "l" * (1 + header.count("task")) + "r" * (len(header) - 1 - header.count("task"))
    lines = [[_escaped(cell) for cell in row] for row in (header, *rows)]
    body = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:],
         r"\bottomrule", r"\end{tabular}"]
    )  # fmt: skip


def _escaped(text):
    text = "".join(_LATEX.get(letter, letter) for letter in str(text))
    # A minus sign, not a hyphen, before a number.
    return re.sub(r"(?<![\w$])[+-]\d+\.\d+", lambda number: f"${number.group()}$", text)


def _html(header, rows):
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
