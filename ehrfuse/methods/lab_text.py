"""Text for MEDFuse: labs written out, and the sections of a note (Phan et al.; arXiv:2407.12309).

The paper's text branch reads four sections of a discharge summary and the abnormal labs, filled
into a template.
"""

import re
from numbers import Integral, Real

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_scalar
from sklearn.utils.validation import check_is_fitted

from ehrfuse.modalities._base import describe
from ehrfuse.modalities._numbers import _float64

__all__ = ["LabTextifier", "NoteSectionizer"]


def _refuse_other_than_frame(X):
    if not isinstance(X, pd.DataFrame):
        raise ValueError(f"X is {type(X).__name__}; it must be a pandas DataFrame.")
    twice = list(X.columns[X.columns.duplicated()])
    if twice:
        raise ValueError(f"X has columns of the same name: {twice[:5]}; every name must be unique.")


class LabTextifier(TransformerMixin, BaseEstimator):
    """Write the abnormal labs of every row out as a text column.

    The most abnormal first, with value, unit, direction and reference range, for a `Text` modality
    to read: ``"Abnormal results: lactate 6.1 mmol/L high (0.5-2.0); sodium 128 mmol/L low ..."``.

    Parameters
    ----------
    columns : list of str or None, default=None
        Numeric columns, one analyte each; None takes all numeric columns.
    output : str, default="lab_text"
        Name of the column added.
    reference_ranges : dict of str to (float, float), or None, default=None
        Lowest and highest normal value of analytes, in the unit of the column. Where none is given,
        the range is that of the middle of the training values, see `coverage`.
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
    value is, is its distance from the range in widths of the range.

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
        numeric = X.select_dtypes("number").columns
        self.columns_ = list(numeric if self.columns is None else self.columns)
        self.feature_names_in_ = np.array(X.columns, dtype=object)
        self._refuse_strange_keys(X)
        given = self.reference_ranges or {}
        tail = (1 - self.coverage) / 2
        self.ranges_ = {}
        for column, values in self._values(X).items():
            known = values[~np.isnan(values)]
            learned = np.quantile(known, [tail, 1 - tail]) if len(known) else (-np.inf, np.inf)
            low, high = given.get(column, learned)
            if not low <= high:
                raise ValueError(
                    f"reference_ranges[{column!r}] is ({low}, {high}); the lowest normal value "
                    "comes first."
                )
            self.ranges_[column] = float(low), float(high)
        return self

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
        X_out : DataFrame of shape (n_samples, n_columns + 1)
        """
        check_is_fitted(self)
        values = self._values(X)
        table = np.column_stack(list(values.values()))
        low, high = np.array([self.ranges_[c] for c in self.columns_]).T
        width = np.where(np.isfinite(high - low) & (high > low), high - low, 1.0)
        beyond = np.maximum(low - table, table - high) / width
        texts = [self._write(row, far, low, high) for row, far in zip(table, beyond, strict=True)]
        return X.assign(**{self.output: pd.Series(texts, index=X.index, dtype=object)})

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
        while value != passed and f"{value:.{digits}g}" == f"{passed:.{digits}g}":
            digits += 1  # or it would seem to lie on the bound that it lies beyond
        words = [name, f"{value:.{digits}g}"] + ([unit] if unit else [])
        if value != passed:
            words += ["low" if value < low else "high", f"({low:.{digits}g}-{high:.{digits}g})"]
        return " ".join(words)

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
        return np.append(self.feature_names_in_, self.output)


SECTIONS = (
    "chief complaint", "history of present illness", "present illness", "past medical history",
    "medical history", "medications on admission", "medication on admission",
)  # fmt: skip
# A heading: up to seven words before a colon, at the start of a line.
_HEADING = re.compile(
    r"^[ 	]*([A-Za-z][A-Za-z/&,\-]*(?: [A-Za-z/&,\-]+){0,6})[ 	]*:", re.MULTILINE
)


class NoteSectionizer(TransformerMixin, BaseEstimator):
    r"""Keep the sections of a note that may be read; a note of unknown layout stays whole.

    Nothing is learned. The defaults are the four sections that MEDFuse reads of a discharge
    summary: what follows them tells the course and the diagnoses.

    Parameters
    ----------
    column : str, default="note"
    sections : tuple of str or None, default=None
        Headings to keep, whatever their case: a line that starts with one and a colon. None keeps
        the chief complaint, the present illness, the medical history and the drugs on admission.
    max_words : int or None, default=None
        Cut longer texts in the middle: their start and their end stay.
    hide_terms : tuple of str, default=()
        Words and phrases to take out, whatever their case: those that name the label.

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
        _refuse_other_than_frame(X)
        self.feature_names_in_ = np.array(X.columns, dtype=object)
        return self

    def transform(self, X):
        """Replace the column by what is kept of it; null stays null.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        X_out : DataFrame of shape (n_samples, n_columns)
        """
        check_is_fitted(self)
        _refuse_other_than_frame(X)
        if self.column not in X.columns:
            raise ValueError(f"X has no column {self.column!r}; name the column of the notes.")
        terms = sorted(self.hide_terms, key=len, reverse=True)
        pattern = "|".join(rf"(?<!\w){re.escape(term)}(?!\w)" for term in terms)
        hidden = re.compile(pattern, re.IGNORECASE) if terms else None
        notes = X[self.column]
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
        return X.assign(**{self.column: pd.Series(kept, index=X.index, dtype=object)})

    def _keep(self, note):
        found = list(_HEADING.finditer(note))
        sections = SECTIONS if self.sections is None else self.sections
        wanted = {section.lower() for section in sections}
        if not found:
            return note
        ends = [match.start() for match in found[1:]] + [len(note)]
        parts = [
            note[match.start() : end].strip()
            for match, end in zip(found, ends, strict=True)
            if match[1].lower() in wanted
        ]
        return "\n".join(parts) if parts else note

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
