"""A simulated prenatal cohort: short histories of visits by gestational week, full of holes.

Blood pressure, glucose and weight drift with two latent risks; who is at risk comes more often and
has more taken. It stands in for records that cannot be shared and shows no more than itself.
"""

from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import expit
from sklearn.utils import Bunch, check_random_state

from ehrfuse._runtime import check_option
from ehrfuse.datasets._engine import records_series

TASKS = ("diabetes", "hypertension", "outcome", "weekly_risk")
ROUTINE = ("sbp", "dbp", "weight", "girth")  # mmHg, mmHg, kg, cm; taken at nearly every visit
LABS = ("glucose", "hba1c", "protein", "uric_acid", "platelets", "alt", "haemoglobin", "tsh")
SCHEDULE = np.array([8, 12, 16, 20, 24, 28, 30, 32, 34, 36, 37, 38, 39, 40.0])
EXTRA = np.array([10, 14, 18, 22, 26, 31, 33, 35.0])  # more for who is at risk
LAST_WEEK = 42.0
HORIZON = 4.0  # weeks ahead of the weekly risk
UNTIL = {"diabetes": 24.0, "hypertension": 28.0, "outcome": LAST_WEEK, "weekly_risk": LAST_WEEK}


def make_prenatal(n_samples=1000, *, task="hypertension", random_state=None, as_bunch=False):
    r"""Make prenatal visits of weeks 6 to 42 for one of four tasks.

    Parameters
    ----------
    n_samples : int, default=1000
        Women.
    task : {"diabetes", "hypertension", "outcome", "weekly_risk"}, default="hypertension"
        ``"diabetes"``: gestational diabetes, from visits up to week 24. ``"hypertension"``: from
        visits up to week 28; it is diagnosed later. ``"outcome"``: the four routine measurements
        of the last visit, from those before it. ``"weekly_risk"``: one row per woman and visit
        from week 16 on before a diagnosis, whether hypertension is diagnosed in the next four
        weeks.
    random_state : int, RandomState instance or None, default=None
        One seed gives the same women for every task.
    as_bunch : bool, default=False
        Return a Bunch instead of ``(X, y)``.

    Returns
    -------
    (X, y) : DataFrame, and Series or DataFrame
        X has ``subject_id``, ``age`` (years), ``bmi`` (kg/m2), ``parity``, ``smoker`` and
        ``visits``: an Arrow column of records with ``time`` (gestational week), the routine
        ``sbp``, ``dbp`` (mmHg), ``weight`` (kg), ``girth`` (cm), and laboratory values ``glucose``,
        ``hba1c``, ``protein``, ``uric_acid``, ``platelets``, ``alt``, ``haemoglobin``, ``tsh``,
        null where not taken. y is 0 or 1, or for ``"outcome"`` one column per routine measurement.
    data : :class:`~sklearn.utils.Bunch`
        If `as_bunch` is True, with X, y and

        groups : int array of shape (n_rows,)
            Woman of every row, as ``subject_id``.
        modalities : dict of str to Modality
            ``static`` and ``visits``, ready for any estimator.
        risk : DataFrame of shape (n_rows, 2)
            The latent risks of hypertension and diabetes.
        description : str
            What was simulated.

    See Also
    --------
    make_ehr : Records of every kind, with the best possible prediction.

    Notes
    -----
    Latent risks h (hypertension) and g (diabetes) are normal with correlation 0.3 and go with body
    mass and age. Systolic pressure dips until mid-pregnancy and rises from an onset near week 20 on
    by :math:`0.3 e^{0.6 h}` mmHg a week; glucose drifts by 0.012 g mmol/l a week; weight and girth
    rise faster with g; uric acid rises and platelets fall with h after week 20. A laboratory value
    is taken with log-odds that rise by 0.6 per unit of its risk; an extra visit by 0.9 per unit of
    the higher risk. Labels are Bernoulli with log-odds :math:`-2 + 1.6 h + 0.3 z_{bmi}` and
    :math:`-1.8 + 1.6 g + 0.3 z_{age}`. Times are gestational weeks, so the modality has ``now=42``.

    Examples
    --------
    >>> from ehrfuse.datasets import make_prenatal
    >>> X, y = make_prenatal(200, random_state=0)
    >>> X.shape, y.name
    ((200, 6), 'hypertension')
    >>> rows = make_prenatal(50, task="weekly_risk", random_state=0, as_bunch=True)
    >>> len(rows.X) > 200, len(set(rows.groups))
    (True, 50)
    """
    if not isinstance(n_samples, int | np.integer) or n_samples < 1:
        raise ValueError(f"n_samples={n_samples!r}; give a whole number of at least 1.")
    check_option(task, "task", TASKS)
    rng = np.random.default_rng(check_random_state(random_state).randint(2**31 - 1))
    women = _women(rng, n_samples)
    visits = _visits(rng, women)
    rows, shown, y = {
        "diabetes": _by_woman, "hypertension": _by_woman, "outcome": _last_visit,
        "weekly_risk": _by_week,
    }[task](women, visits, task)  # fmt: skip
    X = women.loc[rows, ["age", "bmi", "parity", "smoker"]].reset_index(drop=True)
    X.insert(0, "subject_id", rows)
    X["visits"] = _column(visits, rows, shown)
    if not as_bunch:
        return X, y
    return Bunch(
        X=X,
        y=y,
        groups=X["subject_id"].to_numpy(),
        modalities=_modalities(),
        risk=women.loc[rows, ["hypertension_risk", "diabetes_risk"]].reset_index(drop=True),
        description=f"Simulated prenatal visits; task {task!r}.",
    )


def _women(rng, n):
    """Descriptors, latent risks, labels and the week of diagnosis, one line per woman."""
    z_age, z_bmi, own_h, own_g, common = rng.normal(size=(5, n))
    h = 0.55 * common + 0.3 * z_bmi + 0.15 * z_age + 0.76 * own_h
    g = 0.55 * common + 0.3 * z_bmi + 0.25 * z_age + 0.74 * own_g
    hypertension = rng.random(n) < expit(-2.0 + 1.6 * h + 0.3 * z_bmi)
    diabetes = rng.random(n) < expit(-1.8 + 1.6 * g + 0.3 * z_age)
    own = rng.normal(size=(3, n))
    onset = 20 + 3 * rng.normal(size=n) - 1.5 * h
    diagnosed = np.clip(onset + 10 + rng.exponential(4, n), 28.5, 41)
    return pd.DataFrame(
        {
            "age": (30 + 5 * z_age).clip(16, 48).round(),
            "bmi": (24 + 4 * z_bmi).clip(15, 50).round(1),
            "parity": rng.poisson(0.8, n),
            "smoker": np.where(rng.random(n) < 0.1, np.nan, rng.random(n) < 0.15),
            "hypertension_risk": h,
            "diabetes_risk": g,
            "hypertension": hypertension.astype(int),
            "diabetes": diabetes.astype(int),
            "onset": onset,
            "week": np.where(hypertension, diagnosed, np.inf),
            **dict(zip(("own_sbp", "own_weight", "own_girth"), own, strict=True)),
        }
    )


def _visits(rng, women):
    """Long table of all visits in time order: woman, time, and every measurement with NaN."""
    n = len(women)
    h, g = women["hypertension_risk"].to_numpy(), women["diabetes_risk"].to_numpy()
    engaged = rng.normal(size=(n, 1))
    booked = 6 + rng.exponential(3, (n, 1))
    planned = rng.random((n, len(SCHEDULE))) < expit(1.3 + 0.7 * engaged)
    extra = rng.random((n, len(EXTRA))) < expit(-2 + 0.9 * np.maximum(h, g)[:, None])
    week = np.tile(np.concatenate([SCHEDULE, EXTRA]), (n, 1))
    week = (week + rng.normal(0, 0.6, week.shape)).clip(6, LAST_WEEK).round(1)
    attended = np.concatenate([planned, extra], 1) & (week >= booked)
    attended[:, [0, 4, 5]] |= attended.sum(1, keepdims=True) < 3  # nobody without a history
    woman, place = attended.nonzero()
    table = pd.DataFrame({"woman": woman, "time": week[woman, place]})
    table = table.sort_values(["woman", "time"], kind="stable", ignore_index=True)
    return pd.concat([table, _measured(rng, women.loc[table["woman"]], table["time"])], axis=1)


def _measured(rng, of, week):
    """Every measurement of every visit, with holes that depend on the risks."""
    h, g = of["hypertension_risk"].to_numpy(), of["diabetes_risk"].to_numpy()
    w, bmi = week.to_numpy(), (of["bmi"].to_numpy() - 24) / 4
    n = len(w)
    base = of[["own_sbp", "own_weight", "own_girth"]].to_numpy()
    late = np.maximum(0, w - 20)
    rise = np.maximum(0, w - of["onset"].to_numpy())
    noise = rng.normal(size=(12, n))
    sbp = 112 + 3 * bmi + 6 * base[:, 0] - 4 * np.sin(np.pi * (w - 6) / 34)
    sbp = sbp + 0.3 * np.exp(0.6 * h) * rise + 7 * noise[0]
    values = {
        "sbp": sbp,
        "dbp": 70 + 0.55 * (sbp - 112) + 5 * noise[1],
        "weight": 65 + 10 * bmi + 4 * base[:, 1] + (0.38 + 0.06 * g) * (w - 6) + 0.8 * noise[2],
        "girth": 72 + 4 * bmi + (0.75 + 0.06 * g) * (w - 6) + 2.5 * base[:, 2] + 1.5 * noise[3],
        "glucose": 4.6 + 0.15 * g + 0.012 * g * (w - 6) + 0.35 * noise[4],
        "hba1c": 5.1 + 0.12 * g + 0.2 * noise[5],
        "protein": np.maximum(0, 0.1 + 0.02 * h * late + 0.2 * noise[6]),
        "uric_acid": 240 + 2.5 * h * late + 35 * noise[7],
        "platelets": 220 - 2.0 * h * late + 40 * noise[8],
        "alt": np.exp(2.9 + 0.3 * noise[9]),
        "haemoglobin": 125 - 0.4 * late + 8 * noise[10],
        "tsh": np.exp(0.5 + 0.4 * noise[11]),
    }
    drive = dict.fromkeys(("glucose", "hba1c"), g)
    drive |= dict.fromkeys(("protein", "uric_acid", "platelets"), h)
    for name in values:
        odds = 3.0 if name in ROUTINE else -0.9 + 0.6 * drive.get(name, 0.0)
        taken = rng.random(n) < expit(odds)
        values[name] = np.where(taken, values[name], np.nan).round(2)
    return pd.DataFrame(values)


def _by_woman(women, visits, task):
    """One row per woman: visits up to a week, and her label."""
    shown = visits["time"].to_numpy() <= UNTIL[task]
    picks = [own[shown[own]] for own in _own(visits, len(women))]
    return np.arange(len(women)), picks, women[task].rename(task)


def _last_visit(women, visits, task):
    """One row per woman: visits before the last complete one, and its routine measurements."""
    whole = visits[list(ROUTINE)].notna().all(axis=1).to_numpy()
    rows, picks, last = [], [], []
    for woman, own in enumerate(_own(visits, len(women))):
        complete = own[whole[own]]
        if len(complete) and complete[-1] > own[0]:
            rows.append(woman)
            last.append(complete[-1])
            picks.append(own[own < complete[-1]])
    y = visits.loc[last, list(ROUTINE)].reset_index(drop=True)
    return np.array(rows, int), picks, y


def _by_week(women, visits, task):
    """One row per visit from week 16 on and before a diagnosis, with all visits up to it."""
    time = visits["time"].to_numpy()
    rows, picks, labels = [], [], []
    for woman, own in enumerate(_own(visits, len(women))):
        week = women["week"].iat[woman]
        for i, place in enumerate(own):
            if 16 <= time[place] < week:
                rows.append(woman)
                picks.append(own[: i + 1])
                labels.append(int(week <= time[place] + HORIZON))
    return np.array(rows, int), picks, pd.Series(labels, name=task, dtype="int64")


def _own(visits, n):
    """For each woman, the places of her visits; visits are sorted by woman."""
    ends = np.searchsorted(visits["woman"].to_numpy(), np.arange(n + 1))
    return [np.arange(a, b) for a, b in pairwise(ends)]


def _column(visits, rows, picks):
    """Arrow cells of the visits picked for every row."""
    flat = np.concatenate([np.empty(0, int), *picks])
    names = ["time", *ROUTINE, *LABS]
    parts = [visits[name].to_numpy()[flat].astype("float32") for name in names]
    records = pa.StructArray.from_arrays([pa.array(p, mask=np.isnan(p)) for p in parts], names)
    count = np.array([len(p) for p in picks])
    return records_series(records, count, np.ones(len(rows), bool))


def _modalities():
    from ehrfuse.modalities import Tabular, Visits

    return {
        "static": Tabular(["age", "bmi", "parity", "smoker"]),
        "visits": Visits("visits", time_unit="w", now=LAST_WEEK),
    }
