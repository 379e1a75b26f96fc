"""The leak audit: does anything tell a model what it must not know, in any estimator and data."""

import html
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.utils import check_random_state, check_scalar

from ehrfuse._runtime import check_option
from ehrfuse.evaluation import _leak_checks, _leak_fits, _leak_rows
from ehrfuse.evaluation._audit_case import VERDICTS, Case, EstimatorFailed, Finding

_ON_ROWS = {
    "group_overlap": _leak_rows.group_overlap,
    "duplicates": _leak_rows.duplicates,
    "time_order": _leak_rows.time_order,
    "preparation": _leak_rows.preparation,
}
_ON_COLUMNS = {
    "single_columns": _leak_checks.single_columns,
    "terms": _leak_checks.terms,
    "missingness": _leak_checks.missingness,
}
_ON_FITS = {
    "permuted_labels": _leak_fits.permuted_labels,
    "permuted_training": _leak_fits.permuted_training,
    "held_out_labels": _leak_fits.held_out_labels,
    "other_rows": _leak_fits.other_rows,
}
CHECKS = {  # what each asks, in the order of the report
    "group_overlap": "Do patients stand on both sides of a fold?",
    "duplicates": "Do copies of rows or notes stand on both sides of a fold?",
    "time_order": "Is anything dated after its prediction?",
    "preparation": "Were columns scaled, filled or encoded with all rows?",
    "single_columns": "Does a column alone tell the outcome?",
    "terms": "Do words or codes name the outcome?",
    "missingness": "Does being there tell the outcome?",
    # First of the fits: what others leave behind would look like a difference of its own.
    "held_out_labels": "Do other labels of test rows change predictions?",
    "permuted_labels": "Is a cross-validation on permuted labels at chance?",
    "permuted_training": "Does a fit on permuted labels tell the true ones?",
    "other_rows": "Do other test rows change a row's prediction?",
}
_WIDTH = 100


class LeakageError(ValueError):
    """Raised by `LeakageReport.raise_if_leaky`."""


class LeakageReport:
    """What `audit_leakage` found: one finding per check, in print, as a frame and as a page.

    Parameters
    ----------
    findings : list of Finding
        Each with `check`, `verdict` ("pass", "warn", "leak" or "skipped"), `sentence`, `evidence`
        (a DataFrame) and `fix`.
    about : str
        One line on the rows that were looked at, and the columns whose cells could not be read.

    Attributes
    ----------
    findings : list of Finding
    verdict : {"pass", "warn", "leak"}
        The worst of the findings.

    Notes
    -----
    Reports hold column names, counts, scores, and terms or codes of at least five patients. They
    hold no cell of X and no sentence of a note.
    """

    def __init__(self, findings, about=""):
        self.findings = list(findings)
        self.about = about

    @property
    def verdict(self):
        """The worst verdict of all findings; skipped checks count as nothing found."""
        worst = max((VERDICTS.index(f.verdict) for f in self.findings), default=0)
        return "pass" if VERDICTS[worst] == "skipped" else VERDICTS[worst]

    def __getitem__(self, check):
        """The finding of one check."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        ran = ", ".join(repr(f.check) for f in self.findings)
        raise KeyError(f"{check!r} was not run; there are {ran}")

    def to_frame(self):
        """One row per check: `verdict`, `finding`, `fix`, indexed by `check`.

        Returns
        -------
        table : DataFrame of shape (n_checks, 3)
        """
        rows = [(f.verdict, f.sentence, f.fix) for f in self.findings]
        index = pd.Index([f.check for f in self.findings], name="check")
        return pd.DataFrame(rows, columns=["verdict", "finding", "fix"], index=index)

    def _headline(self):
        counts = Counter(f.verdict for f in self.findings)
        told = [f"{counts[v]} {v}" for v in reversed(VERDICTS) if counts[v]]
        return f"Leak audit: {self.verdict} ({', '.join(told)})"

    def __str__(self):
        lines = [self._headline(), *textwrap.wrap(self.about, _WIDTH), ""]
        room = max((len(f.check) for f in self.findings), default=0)
        hang = " " * (9 + room + 2)
        for finding in sorted(self.findings, key=lambda f: -VERDICTS.index(f.verdict)):
            lead = f"{finding.verdict:<9}{finding.check:<{room}}  "
            lines += textwrap.wrap(lead + finding.sentence, _WIDTH, subsequent_indent=hang)
            if finding.fix:
                fix = textwrap.wrap(finding.fix, _WIDTH - len(hang) - 5)
                lines += [f"{hang}{'Fix: ' if not i else '     '}{t}" for i, t in enumerate(fix)]
        return "\n".join(lines)

    def __repr__(self):
        return f"<LeakageReport: {self.verdict}, {len(self.findings)} checks>"

    def _repr_html_(self):
        return self.to_html()

    def to_html(self, path=None):
        """The report as one page that needs nothing else, for a browser or a phone.

        Parameters
        ----------
        path : str or Path, default=None
            File to write.

        Returns
        -------
        page : str
            The HTML; everything that comes from the data is escaped.
        """
        cards = "\n".join(
            _card(f) for f in sorted(self.findings, key=lambda f: -VERDICTS.index(f.verdict))
        )
        page = _PAGE.format(
            title=html.escape(self._headline()), about=html.escape(self.about), cards=cards
        )
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def raise_if_leaky(self, warnings=False):
        """Raise if a leak was found, as a guard in a test or a script.

        Parameters
        ----------
        warnings : bool, default=False
            Whether findings of verdict "warn" count too.

        Raises
        ------
        LeakageError
            A ValueError that names the findings.
        """
        bad = [
            f for f in self.findings if f.verdict == "leak" or (warnings and f.verdict == "warn")
        ]
        if bad:
            told = " ".join(f"{f.check}: {f.sentence}" for f in bad)
            raise LeakageError(f"The leak audit found {len(bad)} problem(s). {told}")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
.audit {{ font: 16px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
  color: #1b1b1b; background: #fff; }}
.audit h1 {{ font-size: 1.35rem; margin: 0 0 .3rem; }}
.audit section {{ border: 1px solid #ccc; border-left: .5rem solid #999; border-radius: .3rem;
  padding: .6rem .8rem; margin: .7rem 0; }}
.audit section.leak {{ border-left-color: #b2182b; }}
.audit section.warn {{ border-left-color: #e08214; }}
.audit section.pass {{ border-left-color: #2166ac; }}
.audit h2 {{ font-size: 1rem; margin: 0; overflow-wrap: anywhere; }}
.audit p {{ margin: .3rem 0; overflow-wrap: anywhere; }}
.audit .asks {{ color: #555; }}
.audit summary {{ cursor: pointer; padding: .3rem 0; }}
.audit .wide {{ overflow-x: auto; }}
.audit table {{ border-collapse: collapse; font-size: .85rem; }}
.audit th, .audit td {{ text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd;
  vertical-align: top; }}
</style></head>
<body><div class="audit"><h1>{title}</h1><p>{about}</p>
{cards}
</div></body></html>
"""


def _card(finding):
    fix = f"<p><b>Fix:</b> {html.escape(finding.fix)}</p>" if finding.fix else ""
    evidence = ""
    if len(finding.evidence):
        table = finding.evidence.to_html(
            index=False, border=0, float_format=lambda x: f"{x:.3g}", na_rep="", escape=True
        )
        evidence = (
            f"<details{' open' if finding.verdict in ('leak', 'warn') else ''}>"
            f'<summary>Evidence</summary><div class="wide">{table}</div></details>'
        )
    return (
        f'<section class="{finding.verdict}"><h2>{finding.verdict.upper()} · {finding.check}</h2>'
        f'<p class="asks">{html.escape(CHECKS.get(finding.check, ""))}</p>'
        f"<p>{html.escape(finding.sentence)}</p>{fix}{evidence}</section>"
    )


def audit_leakage(
    estimator,
    X,
    y,
    *,
    groups=None,
    time=None,
    cv=5,
    checks="all",
    max_rows=2000,
    n_permutations=3,
    n_jobs=None,
    random_state=0,
):
    """Look for leaks in data, folds and estimator.

    Parameters
    ----------
    estimator : estimator or None
        Any classifier or regressor of scikit-learn's kind, a Pipeline too; it is cloned and never
        changed. None looks at the data alone.
    X : DataFrame, array or sparse matrix of shape (n_samples, n_columns)
        Numbers, categories, notes, dates, lists of codes, lists of records, vectors. Columns of
        other cells are named in the report; of these only being there is looked at.
    y : array-like of shape (n_samples,) or (n_samples, n_tasks)
        Classes, numbers, or yes/no tasks with NaN where unknown. Rows whose only outcome is unknown
        are left out.
    groups : str or array-like of shape (n_samples,), default=None
        Patient of every row, or the column of X that holds it.
    time : str or array-like of shape (n_samples,), default=None
        When the prediction of every row is made, numbers or dates on one clock, or the column of X.
        Records in lists are held to be relative to it, 0 being the prediction, unless they hold
        dates.
    cv : int, splitter or list of (train, test), default=5
        The folds of your evaluation. A number makes folds that keep patients whole if `groups` is
        given; then overlap cannot be found, so pass the splitter that you use.
    checks : "all" or sequence of str, default="all"
        Which checks to run, of `CHECKS`: ``"group_overlap"``, ``"duplicates"``, ``"time_order"``,
        ``"preparation"``, ``"single_columns"``, ``"terms"``, ``"missingness"`` look at the data;
        ``"permuted_labels"``, ``"permuted_training"``, ``"held_out_labels"``, ``"other_rows"`` fit
        the estimator.
    max_rows : int, default=2000
        Rows, patients whole, on which the estimator and models of columns are fitted; the first
        four checks look at all rows (copies: at 20,000). The report states the sample.
    n_permutations : int, default=3
        Permutations of the labels in each of the two permutation checks.
    n_jobs : int, default=None
        Processes for reading columns. The estimator is always fitted in this process, since
        what is kept from one fit to the next shows only there.
    random_state : int, RandomState instance or None, default=0
        Seeds samples, folds, permutations, and every `random_state` that the estimator leaves None.

    Returns
    -------
    report : LeakageReport
        Print it, or see its `findings`, `verdict`, `to_frame()`, `to_html()`, `raise_if_leaky()`.

    Raises
    ------
    ValueError
        If the inputs do not fit together, a check is unknown, or `y` holds one class.
    ImportError
        If datasketch (extra ``audit``) is not installed and ``"duplicates"`` is asked for.

    See Also
    --------
    presence_informativeness : What missingness tells, where it is no leak.
    out_of_fold : Predictions of rows that a model has not seen.

    Notes
    -----
    The estimator is fitted 1 + 2 p + 2 p + 6 times with p = `n_permutations` (p K instead of the
    second 2 p for K > 2 classes): 19 times by default, each on at most four fifths of
    `max_rows`. Without `estimator` nothing of yours is fitted.

    Scores are AUROC (several classes: one against the rest, averaged), for numbers
    (1 + Spearman's correlation) / 2, so that 0.5 is always chance. Models of a column are bins,
    or ridge regression on terms or vectors, out of fold with patients whole. A column is a leak
    where the lower end of a 99 % patient bootstrap is above 0.90 and either the score above 0.95 or
    far from the median of all columns; or where one level holds one outcome nearly alone. It is a
    warning where it is as good as all other columns together and explained by them, as the output
    of a risk model is. Terms are a leak where ten of them, chosen on other folds, reach 0.80.

    An honest look at permuted labels must be at chance [1]_, [2]_. What an audit cannot see, and
    how often it is wrong on clean data, stands in the user guide: a weak leak in one column looks
    like a good predictor, and no data tells when a cell was filled.

    References
    ----------
    .. [1] Ojala M, Garriga GC. Permutation tests for studying classifier performance. J Mach Learn
       Res 2010;11:1833-1863.
    .. [2] Kaufman S, Rosset S, Perlich C, Stitelman O. Leakage in data mining: formulation,
       detection, and avoidance. ACM Trans Knowl Discov Data 2012;6:15.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from sklearn.linear_model import LogisticRegression
    >>> from ehrfuse.evaluation import audit_leakage
    >>> rng = np.random.default_rng(0)
    >>> y = rng.integers(0, 2, 300)
    >>> X = pd.DataFrame({"age": rng.normal(60 + 5 * y, 10), "days": rng.normal(9 * y, 1)})
    >>> report = audit_leakage(LogisticRegression(), X, y, checks=["single_columns", "other_rows"])
    >>> print(report)
    Leak audit: leak (1 leak, 1 pass)
    300 rows, every row its own patient; 5 folds of its own.
    <BLANKLINE>
    leak     single_columns  1 column(s) alone tell(s) the outcome: 'days'.
                             Fix: Find out when and from what these columns are filled; drop what is
                                  written after the prediction, and what a model made that saw these
                                  patients.
    pass     other_rows      Predictions of a row do not depend on the rows beside it.
    """
    checks = _check_settings(checks, max_rows, n_permutations, cv)
    if isinstance(random_state, int | np.integer):
        seed = int(random_state)
    else:
        seed = int(check_random_state(random_state).randint(2**31 - 1))
    case = Case(
        estimator, X, y, groups=groups, time=time, cv=cv, max_rows=max_rows,
        n_permutations=n_permutations, n_jobs=n_jobs, seed=seed,
    )  # fmt: skip
    findings = [_ON_ROWS[name](case) for name in checks if name in _ON_ROWS]
    wanted, unread = [name for name in checks if name in _ON_COLUMNS], []
    if wanted:
        columns = _leak_checks.Columns(case)
        unread = columns.unread
        findings += [_ON_COLUMNS[name](case, columns) for name in wanted]
    findings += _on_fits(case, [name for name in checks if name in _ON_FITS])
    return LeakageReport(findings, _about(case, unread))


def _check_settings(checks, max_rows, n_permutations, cv):
    check_scalar(max_rows, "max_rows", (int, np.integer), min_val=20)
    check_scalar(n_permutations, "n_permutations", (int, np.integer), min_val=1)
    if isinstance(cv, int | np.integer):
        check_scalar(cv, "cv", (int, np.integer), min_val=2)
    if isinstance(checks, str) and checks == "all":
        return list(CHECKS)
    checks = [checks] if isinstance(checks, str) else list(checks)
    for name in checks:
        check_option(name, "checks", list(CHECKS))
    return [name for name in CHECKS if name in checks]


def _on_fits(case, names):
    """Findings of the checks that fit; an error on untouched rows is the user's to see."""
    if not names:
        return []
    if case.estimator is None:
        text = "No estimator was given."
        return [Finding(name, "skipped", text) for name in names]
    try:
        baseline = _leak_fits.Baseline(case)
    except EstimatorFailed as failed:
        error = failed.__cause__
        if case.tasks:
            kind = type(case.estimator).__name__
            error.add_note(
                f"audit_leakage gave {kind} y with {len(case.targets)} tasks; where it takes one, "
                "audit them one at a time, without the rows of unknown label, or pass "
                "estimator=None."
            )
        raise error from None
    findings = []
    for name in names:
        try:
            findings.append(_ON_FITS[name](case, baseline))
        except EstimatorFailed as failed:
            text = f"The estimator raised {failed} on altered labels or rows."
            findings.append(Finding(name, "skipped", text))
    return findings


def _about(case, unread):
    patients = "every row its own patient"
    if case.grouped:
        patients = f"{case.codes.max() + 1:,} patients"
    folds = "as given" if case.given_folds else "of its own"
    text = f"{len(case):,} rows, {patients}; {len(case.folds)} folds {folds}."
    if len(case.rows) < len(case):
        text += f" Fits and models of columns used a sample of {len(case.rows):,} rows."
    if unread:
        names = ", ".join(repr(str(name)) for name in unread)
        text += f" Columns not read, their cells being of no known kind: {names}."
    return text
