"""A simulator of patients with holes, of which the truth is known.

One standard normal latent severity ``u`` drives every modality, the outcome and, where asked for,
what is missing. Given ``u`` all cells are independent with likelihoods in closed form, so that the
best possible prediction ``E[y | observed cells, pattern]`` is one integral over one dimension.
"""

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, log_expit
from sklearn.utils import Bunch, check_random_state

from ehrfuse._runtime import check_option
from ehrfuse.datasets._simulated import GRID, LABS, MAKERS, People, gaussian

PRIOR = np.exp(-(GRID**2) / 2) / np.exp(-(GRID**2) / 2).sum()

PATIENT_SHARE = 0.7  # of the variance of u: what the rows of one patient have in common
AGE_LOADING = 0.3  # correlation of age with u
# How severity (mnar) or age (mar) moves the log-odds of a modality's presence, at strength 1.
PRESENCE_SLOPES = {
    "labs": 1.0,
    "course": 0.8,
    "history": -0.7,
    "note": -0.9,
    "film": 1.2,
    "cxr": 0.6,
}
# What the presence of a modality adds to the log-odds of the outcome, at pattern_effect 1.
PATTERN_OFFSETS = {
    "labs": 1.0,
    "course": -0.5,
    "history": 0.5,
    "note": -1.0,
    "film": 0.8,
    "cxr": -0.8,
}
MODALITIES = ("vitals", *PRESENCE_SLOPES)
TASKS = ("death", "readmission", "icu_transfer", "kidney_injury", "sepsis")


def make_ehr(
    n_samples=1000,
    *,
    n_tasks=1,
    missing="mnar",
    strength=1.0,
    missing_rate=0.3,
    cell_missing=0.1,
    pattern_effect=0.0,
    prevalence=0.3,
    label_missing=0.0,
    modalities=None,
    rows_per_patient=1.5,
    random_state=None,
    as_bunch=False,
):
    r"""Make records of every modality kind with holes in them, and know the best prediction.

    Parameters
    ----------
    n_samples : int, default=1000
        Rows; one row is one prediction.
    n_tasks : int, default=1
        Binary outcomes.
    missing : {"mnar", "mar", "mcar", "none"}, default="mnar"
        What decides whether a modality is there: the latent severity itself, age (which is always
        seen), a coin, or nothing (all are there).
    strength : float, default=1.0
        How strongly it decides; at 0 ``"mnar"`` and ``"mar"`` are ``"mcar"``.
    missing_rate : float, default=0.3
        Expected share of rows that lack a modality, in [0, 1); the same for all but ``vitals``.
    cell_missing : float, default=0.1
        Share of single numbers missing within a modality that is there, completely at random,
        in [0, 1).
    pattern_effect : float, default=0.0
        Log-odds of the outcome that depend on the pattern alone, as a multiple of
        ``PATTERN_OFFSETS``: what a rectifier should find.
    prevalence : float, default=0.3
        Expected share of positive labels where `pattern_effect` is 0.
    label_missing : float, default=0.0
        Share of labels that are NaN, completely at random; needs two tasks or more.
    modalities : list of str, default=None
        Which to make, of ``"vitals", "labs", "course", "history", "note", "film", "cxr"``;
        ``"vitals"`` is always made. By default all. What is left out changes nothing else.
    rows_per_patient : float, default=1.5
        Mean number of rows of a patient, at least 1; they share age, sex and most of the severity.
    random_state : int, RandomState instance or None, default=None
        One seed with other options gives the same patients with other holes.
    as_bunch : bool, default=False
        Return a Bunch with the truth, instead of ``(X, y)``.

    Returns
    -------
    (X, y) : DataFrame of shape (n_samples, n_columns), array or DataFrame
        X has ``subject_id``; ``age``, ``heart_rate``, ``sex`` (vitals); ``sodium``, ``lactate``,
        ``creatinine``, ``wbc`` (labs); ``events`` (course, hours); ``visits`` (history, days);
        ``note``; ``image`` (film, 16 x 16 uint8); ``cxr`` (8 float32 numbers). y is an int array,
        or a DataFrame with one column per task.
    data : :class:`~sklearn.utils.Bunch`
        If `as_bunch` is True, with X, y and

        groups : int array of shape (n_samples,)
            Patient of every row, as ``subject_id``.
        modalities : dict of str to Modality
            Ready for any estimator.
        oracle : array of shape (n_samples,), or DataFrame as y
            ``E[y | observed cells of the row, pattern]``; no model that sees the row alone can do
            better in expectation.
        oracle_no_pattern : as oracle
            The same without looking at what is missing: neither the likelihood of the pattern nor
            its offset. Its loss minus the oracle's is what the pattern is worth.
        latent : array of shape (n_samples,)
            The severity u.
        present : DataFrame of bool, shape (n_samples, n_modalities)
            Which modalities a row has.
        pattern_offset : array of shape (n_samples,)
            What the pattern adds to the log-odds.
        description : str
            What was simulated.

    See Also
    --------
    load_physionet2012 : Real stays with real holes.

    Notes
    -----
    With z the standardised age, :math:`u \sim N(0, 1)` and logistic :math:`\sigma`,

    .. math::
        P(\delta_m = 1) &= \sigma(a_m + s\, b_m u) \text{ (mnar) or }
            \sigma(a_m + s\, b_m z) \text{ (mar)}, \\
        P(y_t = 1) &= \sigma\big(\alpha_t + \beta_t u + \gamma_t z
            + e \textstyle\sum_m o_m (\delta_m - \rho)\big),

    where s is `strength`, e `pattern_effect` and :math:`\rho` one minus `missing_rate`;
    :math:`a_m` and :math:`\alpha_t` give the rates that were asked for. Numbers are normal or
    log-normal around a multiple of u, words and codes multinomial and Bernoulli, counts of events
    Poisson, pixels normal and rounded; the oracle takes each exactly as it is. Under ``"mar"`` and
    ``"mcar"`` with `pattern_effect` 0 both oracles are equal. One note or stream in a hundred is
    an empty string or list, as are some histories: present, with nothing in them.

    Examples
    --------
    >>> from ehrfuse.datasets import make_ehr
    >>> X, y = make_ehr(n_samples=200, random_state=0)
    >>> X.shape, y.shape
    ((200, 13), (200,))
    >>> data = make_ehr(n_samples=200, missing="mcar", random_state=0, as_bunch=True)
    >>> bool(abs(data.oracle - data.oracle_no_pattern).max() < 1e-12)
    True
    """
    made = _check(
        n_samples, n_tasks, missing, missing_rate, cell_missing, prevalence, label_missing,
        modalities, rows_per_patient,
    )  # fmt: skip
    seed = check_random_state(random_state).randint(2**31 - 1)

    def stream(part):  # a stream of its own for every part: leaving one out changes no other
        return np.random.default_rng([seed, part])

    people = _patients(stream(0), n_samples, rows_per_patient)
    rate = 0.0 if missing == "none" else missing_rate
    present, pattern = _presence(stream(1), people, made, missing, strength, rate)
    columns = {"subject_id": people.subject}
    evidence = gaussian(people.age[:, None], [AGE_LOADING])
    for part, name in enumerate(MODALITIES):
        if name in made:
            there = present[name].to_numpy()
            cells, known = MAKERS[name](stream(10 + part), people, there, cell_missing)
            columns |= cells
            evidence += np.where(there[:, None], known, 0.0)

    offset = pattern_effect * _pattern_offset(present, rate)
    tasks = [_task(number, prevalence) for number in range(n_tasks)]
    X = pd.DataFrame(columns)
    y = _labels(stream(2), people, offset, tasks, label_missing)
    if not as_bunch:
        return X, y
    return Bunch(
        X=X,
        y=y,
        groups=people.subject,
        modalities=_declare(made),
        oracle=_oracle(evidence + pattern, people, offset, tasks),
        oracle_no_pattern=_oracle(evidence, people, 0.0 * offset, tasks),
        latent=people.u,
        present=present,
        pattern_offset=offset,
        description=f"Simulated records: {', '.join(made)}; missing={missing!r}.",
    )


def _check(
    n_samples, n_tasks, missing, missing_rate, cell_missing, prevalence, label_missing,
    modalities, rows_per_patient,
):  # fmt: skip
    """Check the options; return the modalities to make."""
    check_option(missing, "missing", ("mnar", "mar", "mcar", "none"))
    for name, value in {"n_samples": n_samples, "n_tasks": n_tasks}.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}; give a whole number of at least 1.")
    rates = {"missing_rate": missing_rate, "cell_missing": cell_missing}
    for name, value in (rates | {"label_missing": label_missing}).items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value!r}; give a share from 0 to below 1.")
    if not 0 < prevalence < 1:
        raise ValueError(f"prevalence={prevalence!r}; give a share above 0 and below 1.")
    if not rows_per_patient >= 1:
        raise ValueError(f"rows_per_patient={rows_per_patient!r}; give a number of at least 1.")
    if label_missing and n_tasks == 1:
        raise ValueError(
            f"label_missing={label_missing!r} needs n_tasks of at least 2; "
            "a single outcome must be known in every row."
        )
    wanted = MODALITIES if modalities is None else modalities
    for name in [wanted] if isinstance(wanted, str) else wanted:
        check_option(name, "modalities", MODALITIES)
    return [name for name in MODALITIES if name == "vitals" or name in wanted]


# ---------------------------------------------------------------- patients, holes, outcomes


def _patients(rng, n_rows, rows_per_patient):
    """Draw the patients and spread them over the rows."""
    size = 1 + rng.poisson(rows_per_patient - 1, n_rows)
    subject = rng.permutation(np.repeat(np.arange(n_rows), size)[:n_rows])
    shared, own, row = rng.normal(size=(3, n_rows))
    sex = rng.choice(np.array(["F", "M"], dtype=object), n_rows)
    u = np.sqrt(PATIENT_SHARE) * shared[subject] + np.sqrt(1 - PATIENT_SHARE) * row
    # Age is the patient's, so it can follow only the patient's share of the severity.
    loading = AGE_LOADING / np.sqrt(PATIENT_SHARE)
    age = loading * shared[subject] + np.sqrt(1 - loading**2) * own[subject]
    return People(subject, u, age, sex[subject])


def _solve(target, slope):
    """Intercept with which the mean of sigmoid(intercept + slope * N(0, 1)) is `target`."""
    return brentq(lambda a: PRIOR @ expit(a + slope * GRID) - target, -60, 60, xtol=1e-12)


def _presence(rng, people, made, missing, strength, rate):
    """Draw which modality is there; with it the log-likelihood of that on the grid."""
    present = pd.DataFrame(index=range(len(people.u)))
    known = np.zeros((len(people.u), len(GRID)))
    coins = rng.random((len(MODALITIES), len(people.u)))
    for coin, name in zip(coins, MODALITIES, strict=True):
        if name not in made:
            continue
        if name == "vitals" or rate == 0:
            present[name] = True
            continue
        slope = 0.0 if missing == "mcar" else strength * PRESENCE_SLOPES[name]
        level = _solve(1 - rate, slope)
        there = coin < expit(level + slope * (people.age if missing == "mar" else people.u))
        present[name] = there
        if missing == "mnar":  # otherwise the same for every u: it cancels
            sign = np.where(there, 1.0, -1.0)[:, None]
            known += log_expit(sign * (level + slope * GRID))
    return present, known


def _pattern_offset(present, rate):
    effects = np.array([PATTERN_OFFSETS.get(name, 0.0) for name in present])
    return ((present - (1 - rate)) @ effects).to_numpy()


def _task(number, prevalence):
    """Intercept of a task, and its weights of severity and age."""
    beta, gamma = 1.5 * 0.85**number, 0.5 * (-1) ** number
    spread = np.sqrt(beta**2 + gamma**2 + 2 * beta * gamma * AGE_LOADING)
    return _solve(prevalence, spread), beta, gamma


def _labels(rng, people, offset, tasks, label_missing):
    labels = []
    for level, beta, gamma in tasks:
        risk = expit(level + beta * people.u + gamma * people.age + offset)
        label = (rng.random(len(risk)) < risk).astype(int)
        hidden = rng.random(len(risk)) < label_missing
        labels.append(np.where(hidden, np.nan, label) if label_missing else label)
    return _shaped(labels)


def _oracle(evidence, people, offset, tasks):
    """Average the risk over what the evidence leaves open of u."""
    posterior = PRIOR * np.exp(evidence - evidence.max(axis=1, keepdims=True))
    posterior /= posterior.sum(axis=1, keepdims=True)
    risks = []
    for level, beta, gamma in tasks:
        other = level + gamma * people.age + offset
        risks.append((posterior * expit(beta * GRID + other[:, None])).sum(axis=1))
    return _shaped(risks)


def _shaped(parts):
    """One task: an array. Several: a DataFrame with the names of the tasks."""
    if len(parts) == 1:
        return parts[0]
    names = [*TASKS, *(f"task_{i + 1}" for i in range(len(TASKS), len(parts)))]
    return pd.DataFrame(dict(zip(names, parts, strict=False)))


def _declare(made):
    from ehrfuse.modalities import Embedding, Events, Image, Labs, Tabular, Text, Visits

    every = {
        "vitals": Tabular(["age", "heart_rate", "sex"]),
        "labs": Labs(list(LABS)),
        "course": Events("events", time_unit="h"),
        "history": Visits("visits", time_unit="d"),
        "note": Text("note"),
        "film": Image("image"),
        "cxr": Embedding("cxr"),
    }
    return {name: modality for name, modality in every.items() if name in made}
