"""What moved one prediction: sensitivity to every value of a history, and a sentence about it."""

import re
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from sklearn.metrics import silhouette_score
from sklearn.utils import check_scalar

from ehrfuse.evaluation._inputs import check_frame, check_rows

COLUMNS = ("row", "column", "visit", "time", "feature", "value", "effect")


# ---------------------------------------------------------------- sensitivity


def sensitivity(estimator, X, columns=None, *, bin=1.0, output=None):
    """How far the prediction moves when one value is taken out, value by value.

    Every number, code and event of a history, and every cell beside it, is removed in turn and the
    estimator asked again. That holds for any estimator, and says what the model did, not what is
    true of the patient.

    Parameters
    ----------
    estimator : fitted classifier or regressor
    X : DataFrame of shape (n_samples, n_columns)
        A few rows; each costs as many predictions as it has values.
    columns : list of str, default=None
        Columns to go through; None takes those that the estimator has read, without its groups.
    bin : float, default=1.0
        Events of one code within one such stretch of time are removed together.
    output : int or str, default=None
        Which output: a class or task by name, or its place. None is the last class, task or value
        (the positive class of a yes-or-no outcome).

    Returns
    -------
    frame : DataFrame
        One line per row and value: ``row`` (position in X), ``column``, ``visit`` (position in the
        history, -1 for cells beside it), ``time`` as it stands in the cell, ``feature``,
        ``value``, and ``effect``: the prediction minus that without the value, so positive where
        the value raises it.

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse import FusionClassifier, Visits
    >>> from ehrfuse.datasets import make_ehr
    >>> from ehrfuse.evaluation import sensitivity
    >>> X, y = make_ehr(n_samples=60, modalities=["history"], random_state=0)
    >>> clf = FusionClassifier({"history": Visits("visits")}, max_epochs=2).fit(X, y)
    >>> list(sensitivity(clf, X.head(2)))
    ['row', 'column', 'visit', 'time', 'feature', 'value', 'effect']
    """
    X = check_frame(X)
    check_scalar(bin, "bin", (int, float), min_val=0, include_boundaries="neither")
    if columns is None:
        known = getattr(estimator, "feature_names_in_", X.columns)
        columns = [c for c in X if c in set(known) and c != getattr(estimator, "groups", None)]
    lost = [c for c in columns if c not in X]
    if lost:
        raise ValueError(f"X has no columns {lost}; it has {list(X.columns)[:8]}.")
    read = _reader(estimator, output)
    whole = read(X)
    found = []
    for row in range(len(X)):
        one = X.iloc[[row]]
        edits = [edit for c in columns for edit in _edits(c, one[c].iloc[0], bin)]
        if edits:
            without = read(_edited(one, edits))
            found += [
                (row, *edit[:-1], whole[row] - after)
                for edit, after in zip(edits, without, strict=True)
            ]
    return pd.DataFrame(found, columns=COLUMNS)


def _reader(estimator, output):
    """Function of a frame to one number per row."""
    proba = hasattr(estimator, "predict_proba")
    ask = estimator.predict_proba if proba else estimator.predict
    names = getattr(estimator, "target_names_", getattr(estimator, "classes_", []))
    names = np.asarray(names).tolist()  # plain numbers read better in a message

    def read(X):
        out = np.asarray(ask(X))
        out = out[:, None] if out.ndim == 1 else out
        place = -1 if output is None else names.index(output) if output in names else output
        if not isinstance(place, int | np.integer) or not -out.shape[1] <= place < out.shape[1]:
            raise ValueError(
                f"output={output!r} is none of {names or list(range(out.shape[1]))}; "
                "name a class or task, or give its place."
            )
        return out[:, place].astype(float)

    return read


def _edits(column, cell, width):
    """Tuples (column, visit, time, feature, value, the cell without it)."""
    if isinstance(cell, list | tuple | np.ndarray | pd.DataFrame | Mapping):
        records = _records(cell)
        if records and "time" in records[0]:
            coded = "code" in records[0]
            yield from (_event_edits if coded else _visit_edits)(column, records, width)
        return
    if not pd.isna(cell):
        yield column, -1, np.nan, column, cell, None


def _records(cell):
    """A cell of records as a list of dicts in time order."""
    if isinstance(cell, Mapping):
        cell = pd.DataFrame({name: list(values) for name, values in cell.items()})
    if isinstance(cell, pd.DataFrame):
        cell = cell.to_dict("records")
    records = [dict(record) for record in cell if isinstance(record, Mapping)]
    return sorted(records, key=lambda record: record.get("time", 0.0))


def _event_edits(column, records, width):
    """Events of one code and one stretch of time go together."""
    parts = {}
    for place, record in enumerate(records):
        key = int(np.floor(record["time"] / width + 1e-5)), str(record["code"])
        parts.setdefault(key, []).append(place)
    stretches = {stretch: i for i, stretch in enumerate(sorted({key[0] for key in parts}))}
    for (stretch, code), places in parts.items():
        own = [records[p].get("value") for p in places]
        known = [v for v in own if v is not None and not pd.isna(v)]
        value = float(np.mean(known)) if known else None
        rest = [record for p, record in enumerate(records) if p not in set(places)]
        yield column, stretches[stretch], records[places[-1]]["time"], code, value, rest


def _visit_edits(column, records, width):
    """Each number of a visit, and each code of its lists."""
    for visit, record in enumerate(records):
        for field, value in record.items():
            if field == "time" or value is None:
                continue
            many = isinstance(value, list | tuple | np.ndarray)
            for word in list(value) if many else [value]:
                if not many and pd.isna(value):
                    continue
                rest = [w for w in value if w != word] if many else None
                changed = [*records]
                changed[visit] = record | {field: rest}
                name, said = (f"{field}:{word}", None) if many else (field, value)
                yield column, visit, record["time"], name, said, changed


def _edited(one, edits):
    """One row once per edit, each with its changed cell."""
    frame = one.iloc[[0] * len(edits)].reset_index(drop=True)
    for column in dict.fromkeys(edit[0] for edit in edits):
        places = [i for i, edit in enumerate(edits) if edit[0] == column]
        cells = frame[column].astype(object)
        for i in places:
            cells.iat[i] = edits[i][-1]
        listed = any(isinstance(edits[i][-1], list) for i in places)
        kind = one[column].dtype
        # Whole numbers and truth values have no null of their own.
        kind = np.dtype(float) if isinstance(kind, np.dtype) and kind.kind in "iub" else kind
        frame[column] = cells if listed else cells.astype(kind)
    return frame


# ---------------------------------------------------------------- representations


def silhouette_report(stages, y, X=None, *, max_rows=2000, random_state=0):
    """Silhouette of the outcome's classes among patient vectors, stage by stage.

    Parameters
    ----------
    stages : mapping of str to array of shape (n_samples, n_features), or fitted estimator
        Vectors of the same rows; an estimator gives them by ``stages(X)``, as `RAPTClassifier` does
        before training, after pretraining and after fine-tuning.
    y : array of shape (n_samples,)
        Classes; rows without a known one are left out.
    X : DataFrame of shape (n_samples, n_columns), default=None
        Only with an estimator.
    max_rows : int, default=2000
        More rows are sampled down, the same for every stage.
    random_state : int, default=0

    Returns
    -------
    report : DataFrame
        Indexed by stage, with columns ``silhouette`` (from -1 to 1; near 0 the classes are mixed)
        and ``n``.

    Examples
    --------
    >>> import numpy as np
    >>> from ehrfuse.evaluation import silhouette_report
    >>> y = np.array([0, 0, 1, 1])
    >>> apart = np.array([[0.0], [0.1], [9.0], [9.1]])
    >>> silhouette_report({"mixed": apart[[0, 2, 1, 3]], "apart": apart}, y).round(2)
           silhouette  n
    stage
    mixed       -0.49  4
    apart        0.99  4
    """
    vectors = _stages(stages, X)
    y = np.asarray(y)
    check_rows(len(y), **{f"stages[{name!r}]": part for name, part in vectors.items()})
    kept = np.flatnonzero(~pd.isna(y))
    if len(kept) > max_rows:
        kept = np.random.default_rng(random_state).choice(kept, max_rows, replace=False)
    classes = np.unique(y[kept])
    if not 2 <= len(classes) < len(kept):
        raise ValueError(
            f"y has {len(classes)} known classes in {len(kept)} rows; a silhouette needs at least "
            "two classes and a class of several rows."
        )
    scores = {n: float(silhouette_score(part[kept], y[kept])) for n, part in vectors.items()}
    report = pd.DataFrame({"silhouette": scores, "n": len(kept)})
    return report.rename_axis("stage")


def _stages(stages, X):
    """Vectors by stage, as arrays."""
    if not isinstance(stages, Mapping):
        if not hasattr(stages, "stages") or X is None:
            raise ValueError(
                f"stages is {type(stages).__name__}; give a dict of arrays, or a fitted estimator "
                "with a method stages(X), such as RAPTClassifier, and X."
            )
        stages = stages.stages(X)
    return {str(name): np.asarray(part, dtype=float) for name, part in stages.items()}


# ---------------------------------------------------------------- words

NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve dozen twenty thirty "  # noqa: SIM905
    "forty fifty sixty seventy eighty ninety hundred thousand million half third quarter twice "
    "double thrice triple percent".split()
)


def explain_in_words(explanation, prediction, *, row=0, outcome="the outcome", unit="", top=3,
                     phrase=None):  # fmt: skip
    """Plain sentences on one prediction, from its explanation.

    Parameters
    ----------
    explanation : DataFrame
        Of `sensitivity`, or of an estimator's ``explain``.
    prediction : float
        What was predicted for the row: a probability if within 0 and 1, else a value.
    row : int, default=0
        Which row of the explanation.
    outcome : str, default="the outcome"
        What is predicted, in words.
    unit : str, or dict of str to str, default=""
        Unit of the times, e.g. ``"h"``; or of each column (modality, of an ``explain``).
    top : int, default=3
        Values named for and against.
    phrase : callable, default=None
        A language model: from a prompt to a text, such as a text-generation pipeline of
        transformers. It sees names for the numbers and features, never these themselves, and what
        it gives is taken only if it uses every name once and adds no number; otherwise the
        template is returned with a warning.

    Returns
    -------
    text : str

    Examples
    --------
    >>> import pandas as pd
    >>> from ehrfuse.evaluation import explain_in_words
    >>> found = pd.DataFrame({
    ...     "row": 0, "column": "visits", "visit": [0, 1], "time": [-8.0, -2.0],
    ...     "feature": ["sbp", "glucose"], "value": [151.0, 4.4], "effect": [0.12, -0.03],
    ... })
    >>> print(explain_in_words(found, 0.31, outcome="hypertension", unit="w"))
    The predicted probability of hypertension is 31.0%. It is raised most by sbp 151 at -8 w
    (+12.0 points). It is lowered most by glucose 4.4 at -2 w (-3.0 points).
    """
    score = "effect" if "effect" in explanation else "weight"
    if score not in explanation:
        raise ValueError(
            f"explanation has columns {list(explanation)}; it needs 'effect' (of sensitivity) or "
            "'weight' (of explain)."
        )
    own = explanation[(explanation["row"] == row) & (explanation["feature"] != "(rest)")]
    own = own[own[score] != 0].sort_values(score, key=abs, ascending=False, kind="stable")
    probability = 0 <= prediction <= 1
    text, facts = _template(own, score, prediction, probability, outcome, unit, top)
    filled = _fill(text, facts)
    if phrase is None:
        return filled
    said = _ask(phrase, text)
    if _is_faithful(said, facts):
        return _fill(said, facts)
    warnings.warn(
        "The language model left out a fact or added a number; the template is returned instead.",
        UserWarning,
        stacklevel=2,
    )
    return filled


def _template(own, score, prediction, probability, outcome, unit, top):
    """Text with names such as <A> in the place of facts, and the facts by name."""
    facts = {}

    def name(fact):
        letters = chr(ord("A") + len(facts) % 26) * (1 + len(facts) // 26)
        facts[f"<{letters}>"] = fact
        return f"<{letters}>"

    value = f"{100 * prediction:.1f}%" if probability else f"{prediction:.4g}"
    kind = "probability of" if probability else "value of"
    parts = [f"The predicted {kind} {name(outcome)} is {name(value)}."]
    sides = (("It is raised most by", own[own[score] > 0]),
             ("It is lowered most by", own[own[score] < 0]))  # fmt: skip
    if score == "weight" and "effect" not in own and (own[score] >= 0).all():
        sides = (("The model looked most at", own),)
    for lead, side in sides:
        found = [
            name(_fact(line, score, probability, unit)) for _, line in side.head(top).iterrows()
        ]
        if found:
            parts.append(f"{lead} {', '.join(found)}.")
    return " ".join(parts), facts


def _fact(line, score, probability, unit):
    """One value in words: what, how much, when, and how far it moves the prediction."""
    what = "the visit" if line["feature"] == "(visit)" else str(line["feature"])
    value = line.get("value")
    if isinstance(value, int | float | np.number) and not pd.isna(value):
        what += f" {value:.4g}"
    elif isinstance(value, str) and line["feature"] != value:
        what += f" {value}"
    if not pd.isna(line["time"]):
        if isinstance(unit, Mapping):
            unit = unit.get(line.get("column", line.get("modality")), "")
        what += f" at {line['time']:.4g} {unit}".rstrip()
    if score == "weight":
        return f"{what} (weight {line[score]:.3g})"
    size = f"{100 * line[score]:+.1f} points" if probability else f"{line[score]:+.3g}"
    return f"{what} ({size})"


PROMPT = (
    "Rewrite for a clinician in plain, friendly English. Keep every name in angle brackets exactly "
    "as it is, use each of them once, and write no number yourself.\n\n{text}\n\nRewritten:"
)


def _ask(phrase, text):
    prompt = PROMPT.format(text=text)
    said = phrase(prompt)
    if isinstance(said, list) and said and isinstance(said[0], Mapping):  # a pipeline
        said = said[0].get("generated_text", "")
    return str(said).removeprefix(prompt).strip()


def _is_faithful(said, facts):
    """Whether a text has every name once and no number of its own."""
    names = re.findall(r"<[A-Z]+>", said)
    rest = re.sub(r"<[A-Z]+>", " ", said)
    words = set(re.findall(r"[a-z]+", rest.lower()))
    return sorted(names) == sorted(facts) and not re.search(r"\d|%", rest) and not (
        words & NUMBER_WORDS
    )  # fmt: skip


def _fill(text, facts):
    return re.sub(r"<[A-Z]+>", lambda found: facts.get(found.group(), found.group()), text)
