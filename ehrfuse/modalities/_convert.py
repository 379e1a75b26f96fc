"""Events to visits and back: transformers between the two ways to write a history."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ehrfuse._runtime import check_option
from ehrfuse.modalities._base import check_count
from ehrfuse.modalities._streams import Records, encode_strings, read_records
from ehrfuse.modalities._summary import code_ids, event_values, learn_codes
from ehrfuse.modalities._visits import bin_events, check_width

HOURS = {"min": 1 / 60, "h": 1.0, "d": 24.0, "w": 168.0}
OTHER = "codes"  # field of codes that name no field themselves


class _Converter(TransformerMixin, BaseEstimator):
    """What both share: a column replaced in place, units checked."""

    def _check(self, X):
        for name in ("time_unit", "visit_unit"):
            if name == "time_unit" or self.visit_unit is not None:
                check_option(getattr(self, name), name, tuple(HOURS))
        if self.column not in X.columns:
            raise ValueError(f"X has no column {self.column!r}; it has {list(X.columns)[:8]}.")

    def _factor(self):
        """Units of the events per unit of the visits."""
        return HOURS[self.visit_unit or self.time_unit] / HOURS[self.time_unit]

    def _replaced(self, X, lists):
        column = pd.Series(pd.arrays.ArrowExtensionArray(lists), index=X.index)
        return X.assign(**{self.column: column})

    def get_feature_names_out(self, input_features=None):
        """Names of the columns of `transform`, those of X.

        Parameters
        ----------
        input_features : ignored

        Returns
        -------
        names : array of str
        """
        check_is_fitted(self, "feature_names_in_")
        return self.feature_names_in_

    def _remember(self, X):
        self.feature_names_in_ = np.asarray(X.columns, dtype=object)
        self.n_features_in_ = X.shape[1]

    def __sklearn_tags__(self):
        """Tags: frames with holes in, no array checks."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.no_validation = True
        return tags


def _lists(records, count, present):
    """Struct array and records per row as a list array with nulls."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(count)]).astype(np.int32))
    kind = pa.list_(pa.field("element", records.type))
    return pa.ListArray.from_arrays(offsets, records, type=kind, mask=pa.array(~present))


def visits_column(time, numbers, names, count):
    """Arrow cells of visits from their times (v,), numbers (v, f) with NaN, and visits per row."""
    parts = [pa.array(time.astype("float32"))]
    parts += [pa.array(x, mask=np.isnan(x)) for x in numbers.T.astype("float32")]
    visits = pa.StructArray.from_arrays(parts, ["time", *names])
    return pd.arrays.ArrowExtensionArray(_lists(visits, count, np.ones(len(count), bool)))


class EventsToVisits(_Converter):
    """Cut coded events into visits: one record per bin of time in which anything happened.

    Parameters
    ----------
    column : str
        Column of X whose cells are lists of ``{"time", "code", "value"}``.
    bin : float, default=1.0
        Width of a bin, in `time_unit`. Bins are counted backwards from `now`.
    time_unit : {"h", "d", "w", "min"}, default="h"
        Unit of the events' times, of `bin` and of `now`.
    visit_unit : {"h", "d", "w", "min"} or None, default=None
        Unit of the visits' times; None is `time_unit`.
    now : float, default=0.0
        Time of the prediction.
    max_visits : int or None, default=None
        The latest visits of a row are kept; None keeps all.
    max_codes : int, default=200
        Codes kept, the most frequent in `fit`.
    min_count : int, default=1
        Training rows that must hold a code for it to be kept; raise it where codes are free text.

    Attributes
    ----------
    numbers_ : list of str
        Codes that carry values, each a field of numbers: its mean over the bin.
    fields_ : dict of str to list of str
        Fields of code lists, and the codes of each. A code ``"dx:250"`` without values becomes the
        code ``"250"`` of the field ``"dx"``, others go to the field ``"codes"``.

    See Also
    --------
    VisitsToEvents : The way back.

    Notes
    -----
    A visit stands at the end of its bin, the edge next to `now`. The networks of
    `RAPTClassifier` and `SequenceClassifier` bin `Events` themselves in the same way.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import EventsToVisits
    >>> stay = [
    ...     {"time": -5.5, "code": "HR", "value": 80.0},
    ...     {"time": -5.0, "code": "HR", "value": 90.0},
    ...     {"time": -1.0, "code": "dx:I50", "value": None},
    ... ]
    >>> X = pd.DataFrame({"events": [stay, None]})
    >>> EventsToVisits("events", bin=2.0).fit_transform(X)["events"][0]
    [{'time': -4.0, 'HR': 85.0, 'dx': []}, {'time': 0.0, 'HR': None, 'dx': ['I50']}]
    """

    def __init__(
        self,
        column,
        *,
        bin=1.0,
        time_unit="h",
        visit_unit=None,
        now=0.0,
        max_visits=None,
        max_codes=200,
        min_count=1,
    ):
        self.column = column
        self.bin = bin
        self.time_unit = time_unit
        self.visit_unit = visit_unit
        self.now = now
        self.max_visits = max_visits
        self.max_codes = max_codes
        self.min_count = min_count

    def fit(self, X, y=None):
        """Learn the codes.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : EventsToVisits
        """
        self._check(X)
        check_width(self.bin)
        check_count(self.max_codes, "max_codes")
        check_count(self.min_count, "min_count")
        if self.max_visits is not None:
            check_count(self.max_visits, "max_visits")
        records = self._records(X)
        values = event_values(records)
        codes, valued = learn_codes(records, values, self.max_codes, self.min_count)
        self.numbers_ = [code for code in codes if code in valued]
        self.fields_ = {}
        for code in codes:
            if code not in valued:
                field, word = self._field(code)
                self.fields_.setdefault(field, []).append(word)
        self._remember(X)
        return self

    def _field(self, code):
        field, colon, word = code.partition(":")
        taken = field == "time" or field in self.numbers_
        return (field, word) if colon and field and word and not taken else (OTHER, code)

    def _records(self, X):
        records = read_records(X[self.column], ("time", "code"))
        records.refuse_future(self.now)
        return records

    def transform(self, X):
        """Cut the events into visits.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        X : DataFrame of shape (n_samples, n_columns)
            The column holds lists of visits; a null cell stays null, an empty list empty.
        """
        check_is_fitted(self)
        self._check(X)
        records, words = self._records(X), {}
        for field, codes in self.fields_.items():
            words |= {code if field == OTHER else f"{field}:{code}": field for code in codes}
        codes = self.numbers_ + list(words)
        code, values = code_ids(records, codes), event_values(records)
        bare = code >= len(self.numbers_)
        limit = self.max_visits or max(1, len(records.time))
        age, table, offsets = bin_events(
            records, code, np.where(bare, 1.0, values), len(codes), self.bin, self.now, limit
        )
        time = (self.now - age.astype("float64")) / self._factor()
        parts = [pa.array(time.astype("float32"))]
        parts += [pa.array(x, mask=np.isnan(x)) for x in table[:, : len(self.numbers_)].T]
        for field in self.fields_:
            parts.append(_words(table, codes, [c for c in words if words[c] == field], field))
        visits = pa.StructArray.from_arrays(parts, ["time", *self.numbers_, *self.fields_])
        return self._replaced(
            X, _lists(visits, np.diff(offsets), X[self.column].notna().to_numpy())
        )


def _words(table, codes, own, field):
    """The codes of one field that each visit had, as an array of string lists."""
    happened = ~np.isnan(table[:, [codes.index(code) for code in own]])
    names = [code if field == OTHER else code.removeprefix(f"{field}:") for code in own]
    found = np.array(names, dtype=object)[happened.nonzero()[1]]
    offsets = np.concatenate([[0], np.cumsum(happened.sum(1))]).astype("int32")
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(found, pa.string()))


class VisitsToEvents(_Converter):
    """Write visits as coded events: one event per number and per code of a visit.

    Parameters
    ----------
    column : str
        Column of X whose cells are lists of ``{"time", field, ...}``.
    time_unit : {"h", "d", "w", "min"}, default="d"
        Unit of the events' times.
    visit_unit : {"h", "d", "w", "min"} or None, default=None
        Unit of the visits' times; None is `time_unit`.
    max_events : int or None, default=None
        The latest events of a row are kept; None keeps all.

    Attributes
    ----------
    feature_names_in_ : array of str

    See Also
    --------
    EventsToVisits : The way there.

    Notes
    -----
    A number's code is the name of its field. A code of a list has the code ``"field:code"`` and no
    value; in the field ``"codes"`` it keeps its own name. Nulls give no event.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import VisitsToEvents
    >>> X = pd.DataFrame({"visits": [[{"time": -7.0, "sbp": 130.0, "dx": ["I10"]}], None]})
    >>> VisitsToEvents("visits").fit_transform(X)["visits"][0]
    [{'time': -7.0, 'code': 'dx:I10', 'value': None}, {'time': -7.0, 'code': 'sbp', 'value': 130.0}]
    """

    def __init__(self, column, *, time_unit="d", visit_unit=None, max_events=None):
        self.column = column
        self.time_unit = time_unit
        self.visit_unit = visit_unit
        self.max_events = max_events

    def fit(self, X, y=None):
        """Check the parameters; nothing is learned.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)
        y : ignored

        Returns
        -------
        self : VisitsToEvents
        """
        self._check(X)
        if self.max_events is not None:
            check_count(self.max_events, "max_events")
        self._remember(X)
        return self

    def transform(self, X):
        """Write the visits as events.

        Parameters
        ----------
        X : DataFrame of shape (n_samples, n_columns)

        Returns
        -------
        X : DataFrame of shape (n_samples, n_columns)
            The column holds lists of events; a null cell stays null, an empty list empty.
        """
        check_is_fitted(self, "feature_names_in_")
        self._check(X)
        records = read_records(X[self.column], ("time",))
        visit, code, value = _events_of(records)
        row, time = records.row[visit], records.time[visit].astype("float64") * self._factor()
        order = np.lexsort((code, time, row))
        row, time, code, value = row[order], time[order], code[order], value[order]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(X)))])
        kept, offsets = Records(offsets.astype("int64"), {}, time).latest(
            self.max_events or max(1, len(time))
        )
        words = pd.Categorical(code[kept])
        events = pa.StructArray.from_arrays(
            [
                pa.array(time[kept].astype("float32")),
                pa.DictionaryArray.from_arrays(
                    pa.array(words.codes.astype("int32")),
                    pa.array(list(words.categories), pa.string()),
                ),
                pa.array(value[kept].astype("float32"), mask=np.isnan(value[kept])),
            ],
            ["time", "code", "value"],
        )
        present = X[self.column].notna().to_numpy()
        return self._replaced(X, _lists(events, np.diff(offsets), present))


def _events_of(records):
    """Visit number, code and value of every number and code, field by field."""
    visits, codes, values = [], [], []
    for name, field in records.fields.items():
        if name == "time" or pa.types.is_null(field.type):
            continue
        if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
            lengths = pc.fill_null(pc.list_value_length(field), 0).to_numpy(zero_copy_only=False)
            number, words = encode_strings(field.flatten())
            visit = np.repeat(np.arange(len(field)), lengths)[number >= 0]
            labels = [word if name == OTHER else f"{name}:{word}" for word in words]
            code = np.array(labels, dtype=object)[number[number >= 0]]
            value = np.full(len(code), np.nan)
        elif pa.types.is_string(field.type) or pa.types.is_dictionary(field.type):
            number, words = encode_strings(field)
            visit = np.flatnonzero(number >= 0)
            code = np.array([f"{name}:{word}" for word in words], dtype=object)[number[visit]]
            value = np.full(len(code), np.nan)
        else:
            value = records.number(name).astype("float64")
            visit = np.flatnonzero(~np.isnan(value))
            code, value = np.full(len(visit), name, dtype=object), value[visit]
        visits.append(visit)
        codes.append(code)
        values.append(value)
    if not visits:
        return np.empty(0, int), np.empty(0, object), np.empty(0)
    return np.concatenate(visits), np.concatenate(codes), np.concatenate(values)
