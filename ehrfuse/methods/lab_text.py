"""Text for MEDFuse: labs written out, and the sections of a note (Phan et al.; arXiv:2407.12309).

The paper's text branch reads four sections of a discharge summary and the abnormal labs, filled
into a template.
"""

import re
from numbers import Integral, Number, Real

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from ehrfuse._runtime import check_option
from ehrfuse.modalities._base import describe
from ehrfuse.modalities._numbers import _float64

__all__ = ["LabTextifier", "NoteSectionizer"]


def _refuse_other_than_frame(X):
    if not isinstance(X, pd.DataFrame):
        raise ValueError(f"X is {type(X).__name__}; it must be a pandas DataFrame.")
    twice = list(X.columns[X.columns.duplicated()])
    if twice:
        raise ValueError(f"X has columns of the same name: {twice[:5]}; every name must be unique.")


class _TextWriter(TransformerMixin, BaseEstimator):
    """What both share: one column written, the others passed through in the order of `fit`."""

    def __init_subclass__(cls, auto_wrap_output_keys=None, **kwargs):
        # By default scikit-learn puts the names of `fit` over a result's columns, by position. Here
        # the result is a frame with names of its own, and may lack a column that nobody reads.
        super().__init_subclass__(auto_wrap_output_keys=auto_wrap_output_keys, **kwargs)

    def set_output(self, *, transform=None):
        """Accept the settings that hold anyway: a frame comes out, whatever is set.

        Parameters
        ----------
        transform : {"default", "pandas"} or None, default=None

        Returns
        -------
        self : estimator
        """
        check_option(transform, "transform", ("default", "pandas", None))
        return self

    def _remember(self, X):
        self.feature_names_in_ = np.array(X.columns, dtype=object)
        self.n_features_in_ = X.shape[1]

    def _with(self, X, column, texts):
        """X with the texts in a column; other columns than those of `fit` are left out."""
        out = X.copy(deep=False)
        out[column] = pd.Series(texts, index=X.index, dtype=object)
        return out.reindex(columns=[c for c in self.get_feature_names_out() if c in out.columns])


class LabTextifier(_TextWriter):
    """Write the abnormal labs of every row out as a text column.

    The most abnormal first, with value, unit, direction and reference range, for a `Text` modality
    to read: ``"Abnormal results: lactate 6.1 mmol/L high (0.5-2.0); sodium 128 mmol/L low ..."``.

    Parameters
    ----------
    columns : str, list of str or None, default=None
        Numeric columns, one analyte each; None takes all numeric columns.
    output : str, default="lab_text"
        Name of the column added, the last; a column of X that has the name is replaced.
    reference_ranges : dict of str to (float, float), or None, default=None
        Lowest and highest normal value of analytes, in the unit of the column; None leaves a side
        open. Of analytes without an entry, the range is that of the middle of the training values,
        see `coverage`.
    coverage : float, default=0.9
        Share of the training values that a range learned from the data holds.
    units : dict of str to str, or None, default=None
    names : dict of str to str, or None, default=None
        What to write instead of the column's name: a test's name says more than its number.
    abnormal_only : bool, default=True
        Leave normal results out; otherwise they follow the abnormal ones, in column order.
    max_items : int, default=40
        Results of a row, the most abnormal.

    Attributes
    ----------
    columns_ : list of str
    ranges_ : dict of str to (float, float)

    Notes
    -----
    A row without any value gets null, one with normal values only an empty string. How abnormal a
    value is, is its distance from the range in widths of the range; of a range with one side open,
    in sizes of its bound. From 1e-4 to 1e15, numbers are written without an exponent.

    Columns come out in the order of `fit`. Columns that `fit` has not seen are left out. A column
    of `fit` that is not read may be gone, as an outcome is at predict; the result then lacks it.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import LabTextifier
    >>> X = pd.DataFrame({"sodium": [128.0, 140.0, None], "lactate": [6.1, 1.0, None]})
    >>> ranges = {"sodium": (135, 145), "lactate": (0.5, 2.0)}
    >>> LabTextifier(reference_ranges=ranges, units={"lactate": "mmol/L"}).fit_transform(X).lab_text
    0    Abnormal results: lactate 6.1 mmol/L high (0.5...
    1
    2                                                 None
    Name: lab_text, dtype: object
    """

    def __init__(
        self,
        columns=None,
        *,
        output="lab_text",
        reference_ranges=None,
        coverage=0.9,
        units=None,
        names=None,
        abnormal_only=True,
        max_items=40,
    ):
        self.columns = columns
        self.output = output
        self.reference_ranges = reference_ranges
        self.coverage = coverage
        self.units = units
        self.names = names
        self.abnormal_only = abnormal_only
        self.max_items = max_items

    def fit(self, X, y=None):
        """Learn the ranges that are not given from training rows.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : LabTextifier
        """
        check_scalar(
            self.coverage, "coverage", Real, min_val=0, max_val=1, include_boundaries="neither"
        )
        check_scalar(self.max_items, "max_items", Integral, min_val=1)
        _refuse_other_than_frame(X)
        self.columns_ = self._named(X)
        self._remember(X)
        self._refuse_strange_keys(X)
        given = self.reference_ranges or {}
        self.ranges_ = {
            column: _given_range(column, given[column]) if column in given else self._learn(values)
            for column, values in self._values(X).items()
        }
        return self

    def _named(self, X):
        """Columns to read; raise for none, and for one that is named twice."""
        columns = self.columns
        if columns is None:  # to pandas, a duration is a number
            columns = X.select_dtypes("number", exclude="timedelta").columns
        columns = [columns] if isinstance(columns, str) else list(columns)
        if not columns:
            raise ValueError(
                f"columns={self.columns!r} finds no numeric column in X; name one at least."
            )
        if len(set(columns)) < len(columns):
            raise ValueError(f"columns={columns} names a column twice; name every column once.")
        return columns

    def _learn(self, values):
        tail, known = (1 - self.coverage) / 2, values[~np.isnan(values)]
        low, high = np.quantile(known, [tail, 1 - tail]) if len(known) else (-np.inf, np.inf)
        return float(low), float(high)

    def _refuse_strange_keys(self, X):
        for option in ("reference_ranges", "units", "names"):
            strange = [key for key in getattr(self, option) or {} if key not in X.columns]
            if strange:
                raise ValueError(
                    f"{option} speaks of {strange}, which X has no column for; its keys are names "
                    "of columns of X."
                )

    def _values(self, X):
        _refuse_other_than_frame(X)
        lost = [c for c in self.columns_ if c not in X.columns]
        if lost:
            raise ValueError(f"X lacks columns {lost}; add them, with nulls where not measured.")
        values = {c: _float64(X[c]) for c in self.columns_}
        infinite = [c for c, v in values.items() if np.isinf(v).any()]
        if infinite:
            raise ValueError(
                f"Columns {infinite} hold infinity; replace it by a null cell or a finite number."
            )
        return values

    def transform(self, X):
        """Add the text column.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        X_out : DataFrame of shape (n_samples, n_columns_out)
            The columns of `get_feature_names_out`, without those that X lacks.
        """
        check_is_fitted(self)
        values = self._values(X)
        table = np.column_stack(list(values.values()))
        low, high = np.array([self.ranges_[c] for c in self.columns_]).T
        beyond = np.maximum(low - table, table - high) / _widths(low, high)
        texts = [self._write(row, far, low, high) for row, far in zip(table, beyond, strict=True)]
        return self._with(X, self.output, texts)

    def _write(self, row, far, low, high):
        """Text of one row: values (p,), and how far outside their ranges (p,)."""
        known = np.flatnonzero(~np.isnan(row))
        if not len(known):
            return None
        abnormal = known[far[known] > 0]
        shown = abnormal[np.argsort(-far[abnormal], kind="stable")]
        parts = [(shown, "Abnormal results: ")]
        if not self.abnormal_only:
            parts.append((known[far[known] <= 0], "Normal results: "))
        found, left = [], self.max_items
        for places, head in parts:
            items = [self._item(j, row[j], low[j], high[j]) for j in places[:left]]
            left -= len(items)
            found += [head + "; ".join(items) + "."] if items else []
        return " ".join(found)

    def _item(self, j, value, low, high):
        column = self.columns_[j]
        name, unit = (self.names or {}).get(column, column), (self.units or {}).get(column)
        passed, digits = min(max(value, low), high), 4
        while value != passed and _reads_as(value, passed, digits):
            digits += 1  # or it would seem to lie on the bound that it lies beyond
        words = [name, _number(value, digits)] + ([unit] if unit else [])
        if value != passed:
            words += ["low" if value < low else "high", f"({_range(low, high, digits)})"]
        return " ".join(words)

    def get_feature_names_out(self, input_features=None):
        """Names of the columns: those of `fit`, and `output` last unless it is among them.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        names : array of str
        """
        check_is_fitted(self)
        if self.output in self.feature_names_in_:
            return self.feature_names_in_
        return np.append(self.feature_names_in_, self.output)


def _given_range(column, bounds):
    """Lowest and highest normal value that a user gave, infinite where a side is open."""
    pair = list(bounds) if np.iterable(bounds) else []
    if len(pair) != 2 or not all(b is None or isinstance(b, Number) for b in pair):
        raise ValueError(
            f"reference_ranges[{column!r}] is {bounds!r}; it must be a pair of numbers (lowest, "
            "highest), with None for a side that is open."
        )
    low = -np.inf if pair[0] is None else float(pair[0])
    high = np.inf if pair[1] is None else float(pair[1])
    if not (low <= high and low < np.inf and high > -np.inf):
        raise ValueError(
            f"reference_ranges[{column!r}] is ({low}, {high}); the lowest normal value "
            "comes first, and None stands for a side that is open."
        )
    return low, high


def _widths(low, high):
    """Unit of the distance from every range: its width, or the size of its only bound, or 1."""
    width = np.where(np.isfinite(high - low), high - low, 0.0)
    bound = np.where(np.isfinite(low), low, high)
    width = np.where(np.isfinite(low) != np.isfinite(high), abs(bound), width)
    return np.where(width > 0, width, 1.0)


def _number(value, digits):
    """At least so many significant digits, and all before the point: no exponent to be split."""
    whole = len(str(round(abs(value)))) if abs(value) <= 1e15 else 0
    return f"{value:.{max(digits, whole)}g}"


def _reads_as(value, other, digits):
    return float(_number(value, digits)) == float(_number(other, digits))


def _range(low, high, digits):
    if np.isinf(low):
        return f"<{_number(high, digits)}"
    if np.isinf(high):
        return f">{_number(low, digits)}"
    return f"{_number(low, digits)}-{_number(high, digits)}"


SECTIONS = (
    "chief complaint", "history of present illness", "present illness", "past medical history",
    "medical history", "medications on admission", "medication on admission",
)  # fmt: skip
MAX_WORDS = 7  # of a heading that is not all in capitals
# What may be a heading: a bullet or number if any, words, and a colon that is none of a time or an
# address, nor in brackets. Possessive quantifiers (*+) make a line of many dashes cheap.
_LINE = re.compile(
    r"""^(?:[^\w\n(\[]|_)*+(?:(?:\w{1,6}[.)])++[ \t]*+)?
    (?P<words>(?:\([^)\n]{0,80}+\)|\[[^]\n]{0,80}+\]|[^:\n]){1,120}+):(?!//|(?<=\d:)\d\d)""",
    re.MULTILINE | re.VERBOSE,
)
_LINE_END = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_BRACKETS = re.compile(r"\([^)]*\)|\[[^]]*\]")
_SENTENCE = re.compile(r"[.;?!]\s")
_TITLE = re.compile(r"[A-Z]\w{2,}(?:\s+[A-Z]\w{2,})+,")  # Hospital Course, by problem; no "In ED,"


def _headings(note, wanted):
    """Where the headings of a note start, in order; and the set of those that are wanted."""
    lines = [(match.start(), match["words"]) for match in _LINE.finditer(note)]
    kept = {start for start, words in lines if wanted & _names(words)}
    likely = [(start, words) for start, words in lines if _like_heading(_unbracketed(words))]
    capital = [line for line in likely if not _first_letter(_unbracketed(line[1])).islower()]
    # A note without any capital heading is one in small letters.
    return sorted(kept.union(start for start, _ in capital or likely)), kept


def _like_heading(text):
    if not _first_letter(text) or _SENTENCE.search(text):
        return False
    short = len(text.split()) <= MAX_WORDS and ("," not in text or bool(_TITLE.match(text)))
    return short or text.isupper()


def _unbracketed(text):
    """Without what is in brackets, unless all words are."""
    rest = _BRACKETS.sub("", text).strip()
    return rest if _first_letter(rest) else text


def _first_letter(text):
    return next(filter(str.isalpha, text), "")


def _names(heading):
    """What a heading may be called by: as it stands, and without what is in brackets."""
    return {_bare(heading), _bare(_unbracketed(heading))} - {""}


def _bare(heading):
    """In small letters, single spaces, without marks around it."""
    return re.sub(r"^[\W_]+|[\W_]+$", "", " ".join(heading.lower().split()))


class NoteSectionizer(_TextWriter):
    r"""Keep the sections of a note that may be read; a note of unknown layout stays whole.

    Nothing is learned. The defaults are the four sections that MEDFuse reads of a discharge
    summary: what follows them tells the course and the diagnoses.

    Parameters
    ----------
    column : str, default="note"
    sections : tuple of str or None, default=None
        Headings to keep, whatever their case: a line that starts with one and a colon. None keeps
        the chief complaint, the present illness, the medical history and the drugs on admission;
        an empty tuple keeps the whole note.
    max_words : int or None, default=None
        Cut longer texts in the middle: their start and their end stay.
    hide_terms : tuple of str, default=()
        Words and phrases to take out, whatever their case and the white space between their words:
        those that name the label.

    Notes
    -----
    A heading stands at the start of a line, after a bullet or a number if any, and ends in a colon:
    no full stop within, and either all in capitals or at most seven words that begin with a capital
    (unless no heading of the note does), with a comma only after two capitalized words, as in
    "Hospital Course, by problem:". A name in `sections` is one whatever its form. What is in
    brackets does not count: "Medical History (per family):" is kept as "Medical History:" is. A
    section ends at the next heading, even one of an item in a list: in doubt text is lost rather
    than an outcome told.

    A note without any heading stays whole; one with headings none of which is wanted becomes an
    empty string. Columns come out as `LabTextifier` gives them.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import NoteSectionizer
    >>> note = "Chief Complaint: chest pain\nHospital Course: he died\nMedical History: stroke"
    >>> X = pd.DataFrame({"note": [note, "No headings here", None]})
    >>> NoteSectionizer(hide_terms=("stroke",)).fit_transform(X)["note"].tolist()
    ['Chief Complaint: chest pain\nMedical History: ', 'No headings here', None]
    """

    def __init__(self, column="note", *, sections=None, max_words=None, hide_terms=()):
        self.column = column
        self.sections = sections
        self.max_words = max_words
        self.hide_terms = hide_terms

    def fit(self, X, y=None):
        """Check the parameters; nothing is learned.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : NoteSectionizer
        """
        if self.max_words is not None:
            check_scalar(self.max_words, "max_words", Integral, min_val=2)
        for name in ("sections", "hide_terms"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a tuple of str, got one str; put it in brackets.")
        self._check_column(X)
        self._remember(X)
        return self

    def _check_column(self, X):
        _refuse_other_than_frame(X)
        if self.column not in X.columns:
            raise ValueError(f"X has no column {self.column!r}; name the column of the notes.")

    def transform(self, X):
        """Replace the column by what is kept of it; null stays null.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        X_out : DataFrame of shape (n_samples, n_columns)
            The columns of `get_feature_names_out`, without those that X lacks.
        """
        check_is_fitted(self)
        self._check_column(X)
        hidden, notes = _pattern(self.hide_terms), X[self.column]
        for row, (note, gone) in enumerate(zip(notes, notes.isna(), strict=True)):
            if not (gone or isinstance(note, str)):
                raise ValueError(
                    f"Column {self.column!r} needs text (str) or null; row {row} holds "
                    f"{describe(note)}. Convert the cell to str."
                )
        kept = [
            None if gone else self._shorten(self._keep(note), hidden)
            for note, gone in zip(notes, notes.isna(), strict=True)
        ]
        return self._with(X, self.column, kept)

    def _keep(self, note):
        sections = SECTIONS if self.sections is None else self.sections
        if not len(sections):
            return note
        note = _LINE_END.sub("\n", note).replace("\uff1a", ":")  # the full-width colon
        starts, kept = _headings(note, {_bare(section) for section in sections})
        if not starts:
            return note
        ends = starts[1:] + [len(note)]
        parts = [note[a:b].strip() for a, b in zip(starts, ends, strict=True) if a in kept]
        return "\n".join(parts)

    def _shorten(self, note, hidden):
        note = hidden.sub("", note) if hidden else note
        words = note.split() if self.max_words else []
        if len(words) <= (self.max_words or 0):
            return note
        half = self.max_words // 2
        return " ".join([*words[: self.max_words - half], *words[-half:]])

    def get_feature_names_out(self, input_features=None):
        """Names of the columns.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        names : array of str
        """
        check_is_fitted(self)
        return self.feature_names_in_


def _pattern(terms):
    """Any of the terms as whole words, the longest first; None for no term."""
    split = sorted((term.split() for term in terms), key=lambda words: -sum(map(len, words)))
    phrases = [r"\s+".join(map(re.escape, words)) for words in split if words]
    if not phrases:
        return None
    return re.compile("|".join(rf"(?<!\w){p}(?!\w)" for p in phrases), re.IGNORECASE)
