"""Prediction tasks: when is predicted, for whom, and what.

A `Task` is read against a frame of candidates, one row per stay, admission, discharge or arrival.
All its times are hours after the start of that unit, whatever the source, NaN where it did not
happen or is not known:

=====================  ===========================================================================
``subject, admission, stay``  identifiers; ``stay`` is the intensive-care stay
``age``                years at the start, 90 for all above 89
``hospital_in``        start of the hospital stay (zero or less)
``hospital_out``       its end
``icu_in, icu_out``    the intensive-care stay (of an admission: its first)
``death``              death, wherever it happened
``died_in_hospital``   1, 0 or NaN
``died_in_icu``        1, 0 or NaN
``later_icu``          the next intensive-care stay within the same hospital stay
``next_admission``     the next hospital stay of the patient
``next_unplanned``     the next one that was not elective
``next_icu``           the first intensive-care stay in a later hospital stay
``number``             first, second, ... unit of this kind of the patient
``codes``              diagnoses of the hospital stay (eICU: of the unit stay); only for tasks with
                       ``codes=True``
=====================  ===========================================================================
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ehrfuse._runtime import check_option

UNITS = ("icu", "admission", "discharge", "ed")


@dataclass(frozen=True)
class Task:
    """A prediction: its time, its label and who is in the cohort.

    Parameters
    ----------
    name : str
        Name of the label's column.
    unit : {"icu", "admission", "discharge", "ed"}
        What a row is, and where its clock starts: admission to intensive care, to hospital,
        discharge from hospital, or arrival at the emergency department.
    hours : float
        The prediction is made so many hours after the start; nothing that was stored later is
        read. Tasks after discharge have 0.
    label : callable
        ``label(candidates) -> Series`` of 0, 1 (or a number) and NaN where it is not defined. A
        frame gives several labels.
    rules : tuple of (str, callable), default=()
        Cohort rules, in this order: what is kept, in words, and
        ``rule(candidates) -> bool Series`` of rows to keep.
    codes : bool, default=False
        Whether `label` reads the column ``codes``.
    hidden : tuple of str, default=()
        Inputs that would tell the label, by the name of their raw table: they are left out.
    train : callable, default=None
        ``train(candidates) -> bool Series``: rows that the label was chosen on.

    See Also
    --------
    in_hospital_mortality, readmission_30d, icu_admission_90d, mortality_post_discharge,
    phenotyping, critical_outcome, later_icu_stay, length_of_stay : Ready tasks.

    Examples
    --------
    >>> from ehrfuse.datasets import Task
    >>> long_stay = Task(
    ...     name="over_a_week",
    ...     unit="icu",
    ...     hours=24,
    ...     label=lambda stays: (stays["icu_out"] > 7 * 24).astype(float),
    ...     rules=(
    ...         ("adult", lambda stays: stays["age"] >= 18),
    ...         ("in the unit at 24 hours", lambda stays: stays["icu_out"] > 24),
    ...     ),
    ... )
    >>> long_stay.hours
    24
    """

    name: str
    unit: str
    hours: float
    label: Callable
    rules: tuple = ()
    codes: bool = False
    hidden: tuple = ()
    train: Callable | None = field(default=None, compare=False)

    def __post_init__(self):
        check_option(self.unit, "unit", UNITS)
        if not np.isfinite(self.hours) or self.hours < 0:
            raise ValueError(f"hours={self.hours!r}; give a finite number from 0 on.")
        if self.unit == "discharge" and self.hours:
            raise ValueError(
                f"hours={self.hours!r}; a task after discharge is made at discharge, 0."
            )


# ---------------------------------------------------------------- rules


def _adult(min_age):
    return (f"at least {min_age} years old", lambda c: c["age"] >= min_age) if min_age else None


def _first(first_stay, what="stay"):
    return (f"first {what} of the patient", lambda c: c["number"] == 1) if first_stay else None


def _still_there(unit, hours):
    end = "icu_out" if unit == "icu" else "hospital_out"
    where = {"icu": "in the unit", "admission": "in hospital"}[unit]
    return (
        f"alive and {where} at {hours:g} hours",
        lambda c: (c[end] >= hours) & ~(c["hospital_out"] <= hours) & ~(c["death"] <= hours),
    )


def _left_alive():
    return ("left the hospital alive", lambda c: c["died_in_hospital"] == 0)


def _rules(*rules):
    return tuple(rule for rule in rules if rule is not None)


def _yes(condition):
    return condition.astype(float)


# ---------------------------------------------------------------- ready tasks


def in_hospital_mortality(hours=48, unit="icu", min_age=18, first_stay=True):
    """Death in hospital, predicted some hours after admission.

    Parameters
    ----------
    hours : float, default=48
        Prediction time; 24 and 48 are usual.
    unit : {"icu", "admission"}, default="icu"
        Rows are intensive-care stays or hospital admissions.
    min_age : int, default=18
        Younger patients are left out.
    first_stay : bool, default=True
        Keep the first unit of a patient only.

    Returns
    -------
    task : Task
    """
    check_option(unit, "unit", ("icu", "admission"))
    return Task(
        name="in_hospital_mortality",
        unit=unit,
        hours=hours,
        label=lambda c: c["died_in_hospital"],
        rules=_rules(_adult(min_age), _first(first_stay), _still_there(unit, hours)),
    )


def later_icu_stay(hours=24, min_age=0, first_stay=False):
    """Another intensive-care stay in the same hospitalisation; undefined for who dies in this one.

    Parameters
    ----------
    hours : float, default=24
        Prediction time after admission to the unit.
    min_age : int, default=0
        Younger patients are left out.
    first_stay : bool, default=False
        Keep the first unit stay of a patient only.

    Returns
    -------
    task : Task
    """
    return Task(
        name="later_icu_stay",
        unit="icu",
        hours=hours,
        label=lambda c: _yes(c["later_icu"].notna()).where(~(c["died_in_icu"] == 1)),
        rules=_rules(_adult(min_age), _first(first_stay), _still_there("icu", hours)),
    )


def length_of_stay(hours=24, unit="icu", longer_than=None, min_age=18, first_stay=False):
    """Days in the unit (or in hospital), as a number or as longer than a threshold.

    Parameters
    ----------
    hours : float, default=24
        Prediction time.
    unit : {"icu", "admission"}, default="icu"
        Days in intensive care, or in hospital.
    longer_than : float, default=None
        Days above which the label is 1; None gives the days themselves, for regressors.
    min_age : int, default=18
        Younger patients are left out.
    first_stay : bool, default=False
        Keep the first unit of a patient only.

    Returns
    -------
    task : Task

    Notes
    -----
    Death ends a stay too: a short stay is not a good sign by itself.
    """
    check_option(unit, "unit", ("icu", "admission"))
    end = "icu_out" if unit == "icu" else "hospital_out"

    def label(c):
        days = c[end] / 24
        return days if longer_than is None else _yes(days > longer_than).where(days.notna())

    return Task(
        name="length_of_stay",
        unit=unit,
        hours=hours,
        label=label,
        rules=_rules(_adult(min_age), _first(first_stay), _still_there(unit, hours)),
    )


def readmission_30d(days=30, planned=True, min_age=18, first_stay=False):
    """Another admission within 30 days of a discharge alive.

    Parameters
    ----------
    days : float, default=30
        Window after discharge.
    planned : bool, default=True
        Count elective readmissions too, as the papers do.
    min_age : int, default=18
        Younger patients are left out.
    first_stay : bool, default=False
        Keep the first admission of a patient only.

    Returns
    -------
    task : Task

    Notes
    -----
    Deaths in hospital are left out: who is dead cannot return. Death after discharge competes with
    readmission and counts as none.
    """
    column = "next_admission" if planned else "next_unplanned"
    return Task(
        name="readmission_30d",
        unit="discharge",
        hours=0,
        label=lambda c: _yes((c[column] > 0) & (c[column] <= 24 * days)),
        rules=_rules(_adult(min_age), _left_alive(), _first(first_stay, "admission")),
    )


def icu_admission_90d(days=90, min_age=18, first_stay=False):
    """Intensive care within 90 days of a discharge alive, in a later admission.

    Parameters
    ----------
    days : float, default=90
        Window after discharge.
    min_age : int, default=18
        Younger patients are left out.
    first_stay : bool, default=False
        Keep the first admission of a patient only.

    Returns
    -------
    task : Task
    """
    return Task(
        name="icu_admission_90d",
        unit="discharge",
        hours=0,
        label=lambda c: _yes((c["next_icu"] > 0) & (c["next_icu"] <= 24 * days)),
        rules=_rules(_adult(min_age), _left_alive(), _first(first_stay, "admission")),
    )


def mortality_post_discharge(days=180, min_age=18, first_stay=False):
    """Death within some days of a discharge alive.

    Parameters
    ----------
    days : float, default=180
        Window after discharge.
    min_age : int, default=18
        Younger patients are left out.
    first_stay : bool, default=False
        Keep the first admission of a patient only.

    Returns
    -------
    task : Task

    Notes
    -----
    Death after discharge is censored: MIMIC-IV knows it up to a year after the last discharge and
    for the region's registry only. A 0 means that no death is known.
    """
    return Task(
        name="mortality_post_discharge",
        unit="discharge",
        hours=0,
        label=lambda c: _yes(c["death"] <= 24 * days),
        rules=_rules(_adult(min_age), _left_alive(), _first(first_stay, "admission")),
    )


def critical_outcome(hours=1, icu_within=12, death_within=None, min_age=18):
    """Death in hospital, or intensive care within 12 hours of arriving at the emergency department.

    Parameters
    ----------
    hours : float, default=1
        Prediction time after arrival, about when triage is done.
    icu_within : float, default=12
        Hours from arrival within which intensive care counts.
    death_within : float, default=None
        The same for death; None counts every death in that hospital stay.
    min_age : int, default=18
        Younger patients are left out.

    Returns
    -------
    task : Task

    Notes
    -----
    The definition of the MIMIC-IV-ED benchmark [1]_. Without the module ``ed`` only arrivals that
    ended in an admission are known, so that the outcome is more frequent.

    References
    ----------
    .. [1] Xie F et al. Benchmarking emergency department prediction models with machine learning
       and public electronic health records. Scientific Data 2022;9:658.
    """

    def label(c):
        died = (c["died_in_hospital"] == 1) & (c["death"].fillna(c["hospital_out"]) >= 0)
        if death_within is not None:
            died &= c["death"].fillna(c["hospital_out"]) <= death_within
        return _yes(died | (c["icu_in"] <= icu_within))

    return Task(
        name="critical_outcome",
        unit="ed",
        hours=hours,
        label=label,
        rules=_rules(
            _adult(min_age),
            (
                f"not yet dead, in intensive care or gone at {hours:g} hours",
                lambda c: (
                    ~(c["death"] <= hours) & ~(c["icu_in"] <= hours) & ~(c["hospital_out"] <= hours)
                ),
            ),
        ),
    )


def phenotyping(k=10, codes=None, train=0.8, hours=24, unit="admission", min_age=18):
    """The most frequent diagnoses of a stay, several labels at once.

    Parameters
    ----------
    k : int, default=10
        How many diagnoses.
    codes : list of str, default=None
        The diagnoses themselves, such as ``"ICD9:4019"``, instead of the `k` most frequent ones.
    train : float or array-like, default=0.8
        The training part, on which alone frequencies are counted: a share of the patients, drawn
        by a hash of their number, or the numbers of the training patients. It comes back as
        ``data.train``: test on the other rows.
    hours : float, default=24
        Prediction time.
    unit : {"admission", "icu"}, default="admission"
        eICU has unit stays only.
    min_age : int, default=18
        Younger patients are left out.

    Returns
    -------
    task : Task

    Notes
    -----
    Diagnoses of the stay itself are labels and no inputs; those of earlier stays are inputs. A
    stay that nobody coded has no known label.
    """
    check_option(unit, "unit", ("admission", "icu"))

    def training(c):
        if np.ndim(train):
            return c["subject"].isin(set(np.asarray(train).tolist()))
        return _hashed(c["subject"]) < train

    def label(c):
        coded = c["codes"].map(len) > 0
        chosen = codes
        if chosen is None:
            counts = c.loc[training(c) & coded, "codes"].map(set).explode().value_counts()
            ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
            chosen = sorted(code for code, _ in ranked[:k])
        sets = c["codes"].map(set)
        found = {code: _yes(sets.map(lambda s, x=code: x in s)).where(coded) for code in chosen}
        return pd.DataFrame(found, index=c.index)

    return Task(
        name="phenotyping",
        unit=unit,
        hours=hours,
        label=label,
        rules=_rules(_adult(min_age), _still_there(unit, hours)),
        codes=True,
        hidden=("diagnosis", "admissiondx"),
        train=training,
    )


def _hashed(subjects):
    """A number from 0 to 1 per patient, the same on every machine."""
    unique = subjects.unique()

    def number(subject):
        digest = hashlib.blake2b(str(subject).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    return subjects.map(dict(zip(unique, map(number, unique), strict=True)))


READY = {
    task.__name__: task
    for task in (
        in_hospital_mortality,
        readmission_30d,
        icu_admission_90d,
        mortality_post_discharge,
        phenotyping,
        critical_outcome,
        later_icu_stay,
        length_of_stay,
    )
}


# ---------------------------------------------------------------- from tasks to a cohort


def resolve(task, defaults=None):
    """Turn names and tasks into a list of tasks made at one time.

    Parameters
    ----------
    task : str, Task, or list of these
    defaults : dict of str to dict, default=None
        Parameters of named tasks that differ in a source.

    Returns
    -------
    tasks : list of Task
    """
    given = [task] if isinstance(task, str | Task) else list(task)
    tasks = []
    for one in given:
        if isinstance(one, str):
            check_option(one, "task", list(READY))
            one = READY[one](**(defaults or {}).get(one, {}))
        if not isinstance(one, Task):
            raise TypeError(f"task holds a {type(one).__name__}; give names or Task objects.")
        tasks.append(one)
    if not tasks:
        raise ValueError(f"task is empty; choose from {', '.join(READY)} or give a Task.")
    moments = sorted({(one.unit, float(one.hours)) for one in tasks})
    if len(moments) > 1:
        told = " and ".join(f"{hours:g} h after the start of {unit!r}" for unit, hours in moments)
        raise ValueError(
            f"The tasks are predicted at different times ({told}); one row has one prediction "
            "time: give all tasks the same unit and hours."
        )
    names = [one.name for one in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Several tasks have the name {twice[0]!r}, and labels go by name; rename one: "
            "dataclasses.replace(task, name=...)."
        )
    return tasks


def select(candidates, tasks):
    """Apply the cohort rules.

    Parameters
    ----------
    candidates : DataFrame
    tasks : list of Task

    Returns
    -------
    rows : bool array of shape (n_candidates,)
        In the cohort of at least one task, with a label of it known.
    y : Series or DataFrame
        Of these rows; NaN where a task's own rules leave a row out.
    flow : DataFrame
        A line per step: task, step, rows and patients excluded and left.
    """
    labels, lines = [], []
    for task in tasks:
        kept, steps = _follow(candidates, task)
        label = task.label(candidates.loc[kept])  # who is left out does not choose the labels
        if isinstance(label, pd.Series):
            label = label.rename(task.name).to_frame()
        known = label.notna().any(axis=1).reindex(candidates.index, fill_value=False)
        steps.append((task.name, "outcome known", known))
        lines += steps
        labels.append(label.loc[known[kept].to_numpy()].reindex(candidates.index))
    y = pd.concat(labels, axis=1).astype("float64")
    rows = y.notna().any(axis=1)
    y = y[rows]
    if y.shape[1] == 1:
        y = y.iloc[:, 0]
        y = y.astype("int64") if y.isin((0, 1)).all() and len(y) else y
    return rows.to_numpy(), y, _flow(candidates, lines)


def _follow(candidates, task):
    kept = pd.Series(True, index=candidates.index)
    steps = [(task.name, f"all units: {task.unit}", kept)]
    for words, rule in task.rules:
        kept = kept & rule(candidates).fillna(False).astype(bool)
        steps.append((task.name, words, kept))
    return kept, steps


def _flow(candidates, steps):
    lines = []
    for task, words, kept in steps:
        rows, patients = int(kept.sum()), int(candidates.loc[kept, "subject"].nunique())
        new = words.startswith("all units: ")  # the first step of a task
        lost = 0 if new else lines[-1]["rows"] - rows
        lines.append(
            {"task": task, "step": words, "excluded": lost, "rows": rows, "patients": patients}
        )
    return pd.DataFrame(lines)
