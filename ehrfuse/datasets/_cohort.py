"""From a source and a task to X, y, groups and modalities: what all loaders share.

A source tells who could be predicted (`candidates`), and for every kind of input a query of facts:
whose they are (``key``), when they happened (``time``) and when they were known (``known``). Here,
and nowhere else, stands the rule of time: a fact counts if it was known, and had happened, by the
landmark of the row. The engine filters and sorts; the result arrives in batches and is scattered
with NumPy, so that no table is ever whole in memory.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sklearn.utils import Bunch

from ehrfuse._runtime import check_option
from ehrfuse.datasets import vocabulary
from ehrfuse.datasets._cache import Kept
from ehrfuse.datasets._engine import events_series, records_series
from ehrfuse.datasets.tasks import READY, resolve, select

MAX_VISITS = 50  # the latest ones; estimators read 64 at most
_COUNTS = "k.since <= e.time AND e.time <= k.landmark AND e.known <= k.landmark"


def build(source, task, labs="events", cache=None):
    """Build a data set.

    Parameters
    ----------
    source : Source
    task : str, Task or list of these
    labs : {"events", "values"}, default="events"
        Whether `modalities` reads the laboratory as panels of events or as latest values.
    cache : path, default=None
        Folder for finished inputs without texts.

    Returns
    -------
    data : Bunch
    """
    check_option(labs, "labs", ("events", "values"))
    tasks = resolve(task, source.defaults)
    unit, hours = tasks[0].unit, tasks[0].hours
    if unit not in source.units:
        ready = {name: make(**source.defaults.get(name, {})) for name, make in READY.items()}
        known = ", ".join(name for name, one in ready.items() if one.unit in source.units)
        raise ValueError(
            f"{type(source).__name__} has rows of {' and '.join(source.units)} only, and "
            f"{tasks[0].name!r} needs rows of {unit!r}; ready tasks that it can give: {known}."
        )
    candidates = source.candidates(unit, codes=any(task.codes for task in tasks))
    chosen, y, flow = select(candidates, tasks)
    if not chosen.any():
        raise ValueError(
            f"No row is left in the cohort of {', '.join(t.name for t in tasks)}:\n"
            f"{flow.to_string(index=False)}"
        )
    train = _train_rows(candidates, tasks, chosen)
    rows = Rows(source, candidates[chosen].reset_index(drop=True), unit, hours)
    hidden = {name for task in tasks for name in task.hidden}
    X, modalities = _inputs(source, rows, hidden, cache)
    y = y.set_axis(X.index)
    kept, others = _by_kind(modalities, labs)
    data = Bunch(
        X=X,
        y=y,
        groups=X["subject_id"].to_numpy(),
        modalities=kept,
        landmark=rows.landmark.to_numpy(),
        flow=flow,
        found=sorted(source.tables.files),
        missing=source.missing(),
        description=_describe(source, tasks, others),
    )
    return data if train is None else Bunch(**data, train=train)


def _train_rows(candidates, tasks, chosen):
    """Rows on which the labels of some task were chosen; None if no task chooses."""
    parts = [task.train(candidates)[chosen].to_numpy() for task in tasks if task.train]
    return np.logical_and.reduce(parts) if parts else None


def _by_kind(modalities, labs):
    """Modalities without the form of the laboratory that is not asked for."""
    out = set(_lab_panels(modalities)) if labs == "values" else {"labs"}
    kept = {name: m for name, m in modalities.items() if name not in out}
    return kept, sorted(set(modalities) & out)


def _lab_panels(modalities):
    of_labs = {analyte.panel for analyte in vocabulary.LABS}
    return [name for name in modalities if name in of_labs]


def _describe(source, tasks, others):
    told = ", ".join(f"{t.name} ({t.hours:g} h after the start of {t.unit!r})" for t in tasks)
    missing = ", ".join(source.missing()) or "none"
    text = f"{source.about}\nTasks: {told}.\nTables read by this loader that are absent: {missing}."
    if others:
        text += f"\nColumns of X that `modalities` does not read: those of {', '.join(others)}."
    return text + "".join(f"\n{remark}" for remark in source.remarks)


class Rows:
    """The chosen rows, and the table of keys that every query joins.

    Parameters
    ----------
    source : Source
    frame : DataFrame
        Candidates in the cohort, in their final order.
    unit : str
    hours : float
    """

    def __init__(self, source, frame, unit, hours):
        self.frame, self.unit = frame, unit
        self.n = len(frame)
        self.landmark = source.after(frame["start"], hours)
        self.keys = pd.DataFrame(
            {
                "row": np.arange(self.n, dtype="int32"),
                "key": frame["key"],
                "hospital": frame["admission"],
                "since": frame["since"],
                "landmark": self.landmark,
            }
        )
        source.tables.register("keys", self.keys)
        self._moment = _integers(self.landmark)
        self._per_hour = source.per_hour

    def hours_before(self, row, time):
        """Hours from the landmark of rows to times, as float32: zero or negative."""
        ticks = _integers(time) - self._moment[row]
        return (ticks / self._per_hour).astype("float32")


def _integers(times):
    """Times as integers of their own unit (microseconds of a clock, or minutes of an offset)."""
    if isinstance(times, pa.Array | pa.ChunkedArray):
        if pa.types.is_timestamp(times.type):
            times = times.cast(pa.timestamp("us"))
        times = times.cast(pa.int64())
        return times.to_numpy(zero_copy_only=False)
    times = np.asarray(times)
    return times.astype("datetime64[us]").astype("int64") if times.dtype.kind == "M" else times


# ---------------------------------------------------------------- all inputs


def _inputs(source, rows, hidden, cache):
    """Frame of all columns, and the modalities that read them."""
    kept = Kept(cache, source, rows, hidden)
    X, modalities = kept.load()
    if X is None:
        X, modalities = _structured(source, rows)
        kept.save(X, modalities)
    texts = source.texts(rows, hidden)
    if texts:
        X = pd.concat([X, pd.DataFrame(texts, index=X.index)], axis=1)
    modalities |= {name: {"kind": "Text", "columns": name} for name in texts}
    return X, {name: _make(spec) for name, spec in modalities.items()}


def _structured(source, rows):
    """Everything but texts."""
    static, modalities = source.static(rows)
    parts = [static]
    for columns, found in (
        _panels(source, rows),
        _medications(source, rows),
        source.history(rows),
        source.films(rows),
    ):
        parts.append(columns)
        modalities |= found
    X = pd.concat([part.set_axis(static.index) for part in parts if part is not None], axis=1)
    for name in ("height", "weight"):  # charted in this stay, else what was known before
        charted = f"body_{name}"
        if charted in X:
            X[name] = X.pop(charted).fillna(X[name])
    return X, modalities


def _make(spec):
    """A modality from its description."""
    import ehrfuse.modalities as kinds

    options = dict(spec)
    return getattr(kinds, options.pop("kind"))(options.pop("columns"), **options)


# ---------------------------------------------------------------- what was measured


def _panels(source, rows):
    """One events column per panel and one column per laboratory value at the landmark."""
    measured = source.measured()
    if not measured:
        return None, {}
    source.tables.register("units_of", vocabulary.conversions())
    parts, possible = [], set()
    for number, (facts, items) in enumerate(measured):
        source.tables.register(f"items_{number}", items)
        parts.append(_measure(source, rows, facts, f"items_{number}"))
        possible |= set(items["code"])
    row, time, code, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(parts) > 1:
        order = np.lexsort((value, code, time, row))
        row, time, code, value = row[order], time[order], code[order], value[order]
    return _scatter(rows, (row, time, code, value), possible)


def _measure(source, rows, facts, items):
    """Rows, hours, codes and values of one table of facts, sorted, each entry once."""
    parts = []
    sql = f"""
        SELECT CAST(k.row AS INTEGER) AS row, e.time AS time, CAST(i.code AS SMALLINT) AS code,
               e.value * i.factor * COALESCE(u.unit_factor, 1.0) + i.shift AS value
        FROM {facts} e
        JOIN {items} i ON e.item = i.item
        JOIN keys k ON e.key = k.key
        LEFT JOIN units_of u ON u.code = i.code AND u.unit = LOWER(e.unit)
        WHERE e.value IS NOT NULL AND {_COUNTS}
        ORDER BY 1, 2, 3, 4"""
    for batch in source.tables.stream(sql):
        row = batch["row"].to_numpy()
        code = batch["code"].to_numpy()
        value = batch["value"].to_numpy().astype("float32")
        parts.append((row, rows.hours_before(row, batch["time"]), code, _plausible(code, value)))
    row, time, code, value = _joined(parts)
    return _once(row, time, code, value)


def _joined(parts):
    kinds = ("int32", "float32", "int16", "float32")
    if not parts:
        return [np.empty(0, kind) for kind in kinds]
    return [
        np.concatenate(column).astype(kind, copy=False)
        for column, kind in zip(zip(*parts, strict=True), kinds, strict=True)
    ]


def _plausible(code, value):
    """Values in the unit of the vocabulary, null outside of the plausible range."""
    limit = vocabulary.limits()
    fraction = limit["fraction"].to_numpy()[code] & (value <= 1)
    value = np.where(fraction, value * 100, value)
    low, high = limit["low"].to_numpy()[code], limit["high"].to_numpy()[code]
    return np.where((value >= low) & (value <= high), value, np.nan).astype("float32")


def _once(row, time, code, value):
    """Leave out repeated entries of one result; they stand beside each other."""
    same = (np.diff(row) == 0) & (np.diff(time) == 0) & (np.diff(code) == 0)
    same &= (np.diff(value) == 0) | (np.isnan(value[1:]) & np.isnan(value[:-1]))
    new = np.concatenate([[True], ~same]) if len(row) else np.empty(0, bool)
    return (row, time, code, value) if new.all() else (row[new], time[new], code[new], value[new])


def _scatter(rows, measured, possible):
    row, time, code, value = measured
    columns, modalities = {}, {}
    panel_of = np.array([list(vocabulary.PANELS).index(a.panel) for a in vocabulary.ANALYTES])
    first = {name: vocabulary.NAMES.index(names[0]) for name, names in vocabulary.PANELS.items()}
    offset = np.array(list(first.values()))[panel_of]
    panel = panel_of[code]
    for number, (name, analytes) in enumerate(vocabulary.PANELS.items()):
        known = any(vocabulary.NAMES.index(analyte) in possible for analyte in analytes)
        if name == "body" or not known:
            continue
        at = panel == number
        codes = pd.Categorical.from_codes(code[at] - offset[code[at]], categories=analytes)
        columns[name] = events_series(row[at], time[at], codes, value[at], rows.n)
        modalities[name] = {"kind": "Events", "columns": name, "time_unit": "h"}
    X = pd.DataFrame(columns, index=range(rows.n))
    for name in vocabulary.PANELS["body"]:
        at = (code == vocabulary.NAMES.index(name)) & ~np.isnan(value)
        latest = np.full(rows.n, np.nan)
        latest[row[at]] = value[at]
        X[f"body_{name}"] = latest
    names = vocabulary.LAB_NAMES
    shift = vocabulary.NAMES.index(names[0])
    if any(c >= shift for c in possible):
        latest = np.full((rows.n, len(names)), np.nan, "float32")
        at = (code >= shift) & ~np.isnan(value)
        latest[row[at], code[at] - shift] = value[at]  # in time order: the last one stays
        labels = [f"lab_{name}" for name in names]
        X = pd.concat([X, pd.DataFrame(latest, columns=labels)], axis=1)
        modalities["labs"] = {"kind": "Labs", "columns": labels}
    return X, modalities


# ---------------------------------------------------------------- drugs, visits, texts


def _medications(source, rows):
    """One events column of what was ordered or given."""
    facts = source.drugs()
    if facts is None:
        return None, {}
    sql = f"""
        SELECT DISTINCT CAST(k.row AS INTEGER) AS row, e.time AS time, e.name AS name
        FROM {facts} e JOIN keys k ON e.key = k.key
        WHERE e.name IS NOT NULL AND e.name <> '' AND {_COUNTS}
        ORDER BY 1, 2, 3"""
    table = source.tables.query(sql)
    row = table["row"].to_numpy()
    names = table["name"].combine_chunks().dictionary_encode()
    # Names that nobody has by the landmark must not show: only what was found, in alphabet order.
    order = pc.array_sort_indices(names.dictionary).to_numpy()
    place = np.empty(len(order), "int64")
    place[order] = np.arange(len(order))
    codes = pd.Categorical.from_codes(
        place[names.indices.to_numpy()], categories=names.dictionary.take(order).to_pylist()
    )
    hours = rows.hours_before(row, table["time"])
    column = events_series(row, hours, codes, np.full(len(row), np.nan), rows.n)
    spec = {"kind": "Events", "columns": "medications", "time_unit": "h", "windows": 0}
    return pd.DataFrame({"medications": column}), {"medications": spec}


def visits(rows, past, codes, numbers):
    """A column of earlier stays.

    Parameters
    ----------
    rows : Rows
    past : DataFrame
        A line per row and earlier stay, with ``row``, ``time`` (days before the landmark), ``id``
        and the columns of `numbers`.
    codes : dict of str to (ids, words)
        By field: stays and their codes, sorted by stay.
    numbers : list of str

    Returns
    -------
    columns : DataFrame
    modalities : dict
    """
    past = past.sort_values(["row", "time", "id"], kind="stable")
    past = past.groupby("row").tail(MAX_VISITS)
    arrays = {"time": pa.array(past["time"].to_numpy("float32"))}
    for name in numbers:
        arrays[name] = pa.array(past[name].to_numpy("float32"), from_pandas=True)
    for name, (ids, words) in codes.items():
        known, begin = np.unique(ids, return_index=True)
        offsets = pa.array(np.append(begin, len(ids)).astype("int32"))
        kind = pa.list_(pa.field("element", pa.string()))
        lists = pa.ListArray.from_arrays(offsets, words, type=kind)
        lists = pa.concat_arrays([lists, pa.array([[]], kind)])  # the place of the uncoded
        place = pd.Index(known).get_indexer(past["id"])
        arrays[name] = lists.take(pa.array(np.where(place < 0, len(known), place)))
    count = np.bincount(past["row"], minlength=rows.n)
    records = pa.StructArray.from_arrays(list(arrays.values()), list(arrays))
    column = records_series(records, count, np.ones(rows.n, bool))
    spec = {"kind": "Visits", "columns": "history", "time_unit": "d"}
    return pd.DataFrame({"history": column}), {"history": spec}


def melted(table, key, time, known, columns, where=""):
    """Facts of a wide table, one per cell, in one pass over it.

    Parameters
    ----------
    table : str
        SQL of the table.
    key, time, known : str
        SQL of whose, when, and when it was known.
    columns : list of str
        They are the items.
    where : str
        Which rows.

    Returns
    -------
    facts : str
    """
    items = ", ".join(f"('{column}')" for column in columns)
    value = " ".join(f"WHEN '{column}' THEN t.{column}" for column in columns)
    return f"""(SELECT {key} AS key, {time} AS time, {known} AS known, c.item AS item,
        CASE c.item {value} END AS value, '' AS unit
        FROM {table} t CROSS JOIN (VALUES {items}) AS c(item) {where})"""


def read_texts(source, facts, rule=_COUNTS, separator="\n\n"):
    """Texts of every row that counted by the landmark, joined in time order; null without any.

    Parameters
    ----------
    source : Source
    facts : str
        Query of ``key``, ``time``, ``known`` and ``text``.
    rule : str
        What counts.
    separator : str

    Returns
    -------
    texts : Series
    """
    sql = f"""
        SELECT CAST(k.row AS INTEGER) AS row, e.time AS time, e.text AS text
        FROM {facts} e JOIN keys k ON e.key = k.key
        WHERE e.text IS NOT NULL AND {rule}
        ORDER BY 1, 2, 3"""
    table = source.tables.query(sql)
    return join_texts(table["row"].to_numpy(), table["text"].combine_chunks(), separator)


def join_texts(row, words, separator):
    """Join sorted texts by row.

    Parameters
    ----------
    row : int array, ascending
    words : pyarrow string array
    separator : str

    Returns
    -------
    texts : Series
        Indexed by row number; rows without a text are absent.
    """
    found, begin = np.unique(row, return_index=True)
    ends = np.append(begin, len(row))[1:]
    joined = [
        separator.join(words.slice(a, b - a).to_pylist())
        for a, b in zip(begin.tolist(), ends.tolist(), strict=True)
    ]
    return pd.Series(joined, index=found, dtype=object)


class Source:
    """What a loader supplies; a subclass a source.

    Attributes
    ----------
    tables : Tables
    units : tuple of str
        What can be a row.
    defaults : dict
        Parameters of named tasks that differ here.
    per_hour : float
        Ticks of this source's clock in an hour.
    about : str
        Name, page and licence.
    remarks : list of str
        What a user should know of this build.
    """

    units: tuple = ()
    defaults: dict = {}  # noqa: RUF012
    per_hour = 3.6e9  # microseconds
    about = ""

    def __init__(self, tables):
        self.tables = tables
        self.remarks = []

    def options(self):
        """What else, besides tables and rows, the inputs depend on."""
        return ()

    def missing(self):
        """Tables of the schema that are not there."""
        return sorted(set(self.tables.schema) - set(self.tables.files))

    def after(self, start, hours):
        """Times so many hours later, on this source's clock."""
        return start + pd.to_timedelta(hours, unit="h")

    def candidates(self, unit, codes=False):
        """Everybody who could be a row; see `tasks`, and ``key``, ``start`` and ``since``."""
        raise NotImplementedError

    def static(self, rows):
        """Frame of what is known from the start, and the modalities that read it."""
        raise NotImplementedError

    def measured(self):
        """Pairs of a query (key, time, known, item, value, unit) and the table of its items."""
        return []

    def drugs(self):
        """Query of key, time, known and name of drugs; None if there is no such table."""
        return None

    def history(self, rows):
        """Columns of earlier stays and their modality."""
        return None, {}

    def films(self, rows):
        """Columns of images and their modality."""
        return None, {}

    def texts(self, rows, hidden):
        """Text columns by name."""
        return {}
