"""The cells of `make_ehr`: every modality as columns, and how likely they are given severity.

Given a patient's latent severity u all cells are independent, with likelihoods in closed form, so
that each maker below can say exactly what its cells tell about u.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import expit, log_expit, log_ndtr, logsumexp, ndtr

from ehrfuse.datasets._engine import events_series, records_series

# Values of u at which likelihoods are known. Equal steps: for the smooth, fast falling integrands
# met here the error of the plain sum is far below that of float32 cells.
GRID = np.linspace(-6, 6, 61)

LABS = {  # centre, spread, loading on u, log scale
    "sodium": (138.0, 4.0, -0.3, False),
    "lactate": (0.5, 0.5, 0.5, True),
    "creatinine": (0.1, 0.45, 0.4, True),
    "wbc": (2.2, 0.4, 0.3, True),
}
STREAM = {  # centre, spread, loading at the start and its rise to the end, events per row
    "MAP": (78.0, 11.0, -0.1, -0.25, 4.0),
    "RR": (19.0, 5.0, 0.1, 0.2, 3.0),
    "SpO2": (96.0, 2.0, -0.05, -0.2, 3.0),
    "TEMP": (37.1, 0.7, 0.05, 0.1, 1.5),
}
DRUG = ("NOREPINEPHRINE", -0.8, 0.6)  # a code without a value: log rate and its slope in u
SILENT = 0.01  # share of streams and notes with nothing in them
VISIT_FIELDS = {  # centre, spread, loading
    "sbp": (134.0, 17.0, 0.25),
    "glucose": (118.0, 30.0, 0.3),
    "bmi": (27.0, 5.0, 0.1),
}
DIAGNOSES = {"I10": (0.0, 0.2), "E11": (-1.0, 0.4), "I50": (-1.5, 0.6), "J44": (-1.7, 0.3)}
ALARMING = (
    "worsening dyspnea",
    "required escalation overnight",
    "persistent hypotension",
    "new confusion",
    "mottled extremities",
    "poor urine output",
)
REASSURING = (
    "comfortable at rest",
    "tolerating diet",
    "walking with assistance",
    "alert and oriented",
    "afebrile overnight",
    "lungs clear",
)
NEUTRAL = (
    "family updated",
    "plan discussed with team",
    "home medication reviewed",
    "skin intact",
    "line site clean",
    "consult pending",
    "repeat labs in the morning",
    "no known allergies",
    "physiotherapy referral placed",
    "history taken from chart",
)
OPENINGS = ("Seen on rounds.", "Progress note.", "Chart reviewed.", "Interval history:")
CLOSINGS = ("Will follow.", "Continue current plan.", "Discussed with nursing.", "Reassess later.")

IMAGE_SHAPE = (16, 16)
GREY, NOISE, OPACITY = 110.0, 35.0, 0.115  # base level, spread of a pixel, loading of the opacity
EMBEDDING = np.array([0.3, -0.2, 0.25, 0.1, -0.3, 0.2, -0.1, 0.3])


@dataclass(frozen=True)
class People:
    """Who the rows are about.

    Attributes
    ----------
    subject : int array (n,)
    u : float array (n,)
        Severity, standard normal.
    age : float array (n,)
        Standard normal, the same in all rows of a patient.
    sex : array of str (n,)
    """

    subject: np.ndarray
    u: np.ndarray
    age: np.ndarray
    sex: np.ndarray


# Every maker takes (rng, people, present, cell_missing) and returns the columns with their holes,
# and the log-likelihood of the cells on the grid (n_rows, n_nodes), valid where present.


def _standard(rng, u, loading):
    """Draw standard normal numbers (n, k) that correlate with u by `loading`."""
    loading = np.asarray(loading)
    noise = rng.normal(size=(len(u), loading.shape[-1]))
    return loading * u[:, None] + np.sqrt(1 - loading**2) * noise


def gaussian(x, loading):
    """Give the log-likelihood on the grid of what `_standard` draws; NaN is not observed."""
    linear, square = _terms(x, np.asarray(loading))
    return _quadratic(linear.sum(axis=1), square.sum(axis=1))


def _terms(x, loading):
    """Coefficients of u and of -u^2 / 2 in the log-likelihood of every number."""
    weight = loading / (1 - loading**2)
    return np.nan_to_num(x * weight), np.where(np.isnan(x), 0.0, loading * weight)


def _quadratic(linear, square):
    return linear[:, None] * GRID - square[:, None] * GRID**2 / 2


def _make_vitals(rng, people, present, cell_missing):
    u = people.u
    loading = [0.4]
    rate = _standard(rng, u, loading)
    rate[rng.random(len(u)) < cell_missing] = np.nan
    cells = {"age": 61 + 12 * people.age, "heart_rate": 86 + 13 * rate[:, 0], "sex": people.sex}
    return cells, gaussian(rate, loading)


def _make_labs(rng, people, present, cell_missing):
    u = people.u
    centre, spread, loading, logarithmic = map(np.array, zip(*LABS.values(), strict=True))
    x = _standard(rng, u, loading)
    chance = rng.random(x.shape)
    lost = chance < cell_missing
    # A panel that was sent has a result; losing all of them would make it look not sent.
    lost &= chance != chance.max(axis=1, keepdims=True)
    x[lost] = np.nan
    values = centre + spread * np.where(present[:, None], x, np.nan)
    values = np.where(logarithmic, np.exp(values), values)
    return dict(zip(LABS, values.T, strict=True)), gaussian(x, loading)


def _make_course(rng, people, present, cell_missing):
    u = people.u
    centre, spread, start, rise, mean = map(np.array, zip(*STREAM.values(), strict=True))
    n_rows = len(u)
    drug, level, slope = DRUG
    counts = rng.poisson(mean, (n_rows, len(mean)))
    given = rng.poisson(np.exp(level + slope * u))
    silent = rng.random(n_rows) < SILENT
    counts[silent], given[silent] = 0, 0
    row, code = np.repeat(np.indices(counts.shape).reshape(2, -1), counts.ravel(), axis=1)
    time = rng.uniform(-24, 0, len(row))
    loading = start[code] + rise[code] * (1 + time / 24)
    x = loading * u[row] + np.sqrt(1 - loading**2) * rng.normal(size=len(row))
    linear, square = (np.bincount(row, t, n_rows) for t in _terms(x, loading))
    known = _quadratic(linear, square)
    rate = np.exp(level + slope * GRID)
    known += given[:, None] * np.log(rate) - rate
    none = counts.sum(axis=1) + given == 0  # by accident or because nothing was recorded
    known[none] = np.log(SILENT + (1 - SILENT) * np.exp(-mean.sum() - rate))

    row = np.concatenate([row, np.repeat(np.arange(n_rows), given)])
    code = np.concatenate([code, np.full(given.sum(), len(mean))])
    time = np.concatenate([time, rng.uniform(-24, 0, given.sum())])
    value = np.full(len(row), np.nan)
    value[: len(x)] = centre[code[: len(x)]] + spread[code[: len(x)]] * x
    kept = present[row]
    codes = pd.Categorical.from_codes(code[kept], categories=[*STREAM, drug])
    events = events_series(row[kept], time[kept], codes, value[kept], n_rows, present)
    return {"events": events}, known


def _make_history(rng, people, present, cell_missing):
    u = people.u
    centre, spread, loading = map(np.array, zip(*VISIT_FIELDS.values(), strict=True))
    level, slope = map(np.array, zip(*DIAGNOSES.values(), strict=True))
    n_rows = len(u)
    count = rng.poisson(2.0, n_rows)
    row = np.repeat(np.arange(n_rows), count)
    time = np.floor(rng.uniform(-900, 0, len(row)))
    time = time[np.lexsort((time, row))]
    x = _standard(rng, u[row], loading)
    x[rng.random(x.shape) < cell_missing] = np.nan
    coded = rng.random((len(row), len(level))) < expit(level + slope * u[row][:, None])

    linear, square = (np.bincount(row, t.sum(axis=1), n_rows) for t in _terms(x, loading))
    known = _quadratic(linear, square)
    positive = np.stack([np.bincount(row, c, n_rows) for c in coded.T], axis=1)
    lines = level[:, None] + slope[:, None] * GRID
    known += positive @ log_expit(lines) + (count[:, None] - positive) @ log_expit(-lines)

    kept = present[row]
    records = _visit_records(time[kept], (centre + spread * x)[kept], coded[kept])
    return {"visits": records_series(records, np.where(present, count, 0), present)}, known


def _visit_records(time, numbers, coded):
    """Struct array of visits: time, one number per field, list of diagnosis codes."""
    names = pa.array(list(DIAGNOSES)).take(pa.array(np.nonzero(coded)[1]))
    ends = np.concatenate([[0], np.cumsum(coded.sum(axis=1))]).astype(np.int32)
    kind = pa.list_(pa.field("element", pa.string()))
    parts = {"time": pa.array(time.astype(np.float32))}
    for name, column in zip(VISIT_FIELDS, numbers.T, strict=True):
        parts[name] = pa.array(column.astype(np.float32), mask=np.isnan(column))
    parts["codes"] = pa.ListArray.from_arrays(pa.array(ends), names, type=kind)
    return pa.StructArray.from_arrays(list(parts.values()), names=list(parts))


def _make_note(rng, people, present, cell_missing):
    u = people.u
    phrases = np.array([*ALARMING, *REASSURING, *NEUTRAL], dtype=object)
    slope = np.repeat([0.45, -0.45, 0.0], [len(ALARMING), len(REASSURING), len(NEUTRAL)])
    n_rows = len(u)
    count = np.where(rng.random(n_rows) < SILENT, 0, 3 + rng.poisson(3.0, n_rows))
    row = np.repeat(np.arange(n_rows), count)
    # The largest of independent Gumbel variables around the logits falls as the softmax says.
    said = np.argmax(slope * u[row][:, None] + rng.gumbel(size=(len(row), len(slope))), axis=1)
    tally = np.bincount(row * len(slope) + said, minlength=n_rows * len(slope))
    lines = slope[:, None] * GRID
    known = tally.reshape(n_rows, -1) @ (lines - logsumexp(lines, axis=0))

    first, last = rng.integers(len(OPENINGS), size=n_rows), rng.integers(len(CLOSINGS), size=n_rows)
    bodies = np.split(phrases[said], np.cumsum(count)[:-1])
    notes = [
        f"{OPENINGS[i]} {', '.join(body).capitalize()}. {CLOSINGS[j]}" if len(body) else ""
        for i, body, j in zip(first, bodies, last, strict=True)
    ]
    return {"note": [n if p else None for n, p in zip(notes, present, strict=True)]}, known


def _opacity():
    """Mask of the round region whose brightness follows u."""
    down, across = np.indices(IMAGE_SHAPE)
    return (down - 10) ** 2 + (across - 10) ** 2 <= 16


def _make_film(rng, people, present, cell_missing):
    u = people.u
    mask = _opacity()
    stripes = np.where(mask, 0.0, 20 * np.cos(np.arange(IMAGE_SHAPE[0]) * 1.2)[:, None])
    grey = GREY + stripes + NOISE * OPACITY * mask * u[:, None, None]
    grey = grey + NOISE * rng.normal(size=(len(u), *IMAGE_SHAPE))
    films = np.clip(np.rint(grey), 0, 255).astype(np.uint8)

    inside = films[:, mask].astype(np.int64)
    key = np.arange(len(u))[:, None] * 256 + inside
    tally = np.bincount(key.ravel(), minlength=len(u) * 256).reshape(len(u), 256)
    cells = [film if p else None for film, p in zip(films, present, strict=True)]
    return {"image": pd.Series(cells, dtype=object)}, tally @ _log_levels()


def _log_levels():
    """Log-probability of every grey level inside the opacity, (256, n_nodes)."""
    mean = GREY + NOISE * OPACITY * GRID
    edges = (np.arange(255)[:, None] + 0.5 - mean) / NOISE  # rounding puts the cuts at halves
    inner = np.log(np.diff(ndtr(edges), axis=0))
    return np.vstack([log_ndtr(edges[:1]), inner, log_ndtr(-edges[-1:])])  # the ends are clipped


def _make_cxr(rng, people, present, cell_missing):
    u = people.u
    x = _standard(rng, u, EMBEDDING)
    cells = [v if p else None for v, p in zip(x.astype(np.float32), present, strict=True)]
    return {"cxr": pd.Series(cells, dtype=object)}, gaussian(x, EMBEDDING)


MAKERS = {
    "vitals": _make_vitals,
    "labs": _make_labs,
    "course": _make_course,
    "history": _make_history,
    "note": _make_note,
    "film": _make_film,
    "cxr": _make_cxr,
}
