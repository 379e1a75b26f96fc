"""Another source under a model's columns."""

import numpy as np
import pandas as pd
import pytest
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import roc_auc_score

from ehrfuse import ClipEHRAligner, TabNetClassifier, Tabular, Text
from ehrfuse.evaluation import map_columns

MAP = {"creatinine": "creat", "sex": "gender", "lactate": None}


def hospital(n, seed):
    rng = np.random.default_rng(seed)
    creatinine, sex = rng.normal(1.2, 0.4, n), rng.choice(["female", "male"], n)
    y = (creatinine + 0.3 * (sex == "male") + 0.1 * rng.normal(size=n) > 1.35).astype(int)
    words = np.where(creatinine > 1.2, "kidney injury", "kidneys normal")
    X = pd.DataFrame({"creatinine": creatinine, "sex": sex, "lactate": rng.normal(size=n)})
    return X.assign(note=words.astype(object)), y


def elsewhere(X):
    return pd.DataFrame({
        "gender": X["sex"].map({"female": "F", "male": "M"}),
        "creat": X["creatinine"] * 88.4, "note": X["note"],
    })  # fmt: skip


def test_fit_here_evaluate_there():
    """Units, spellings and a column that the other source lacks; no note there."""
    X, y = hospital(200, 0)
    there, y_there = hospital(150, 1)
    table = {"table": Tabular(["creatinine", "sex", "lactate"])}
    donor = ClipEHRAligner({**table, "note": Text("note", min_count=1)}, n_d=8, n_a=8, embed_dim=8,
                           n_topics=4, max_epochs=3, random_state=0).fit(X)  # fmt: skip
    clf = TabNetClassifier(
        table, pretrained=FrozenEstimator(donor), n_d=8, n_a=8, max_epochs=20, random_state=0
    ).fit(X, y)
    mapped = map_columns(
        elsewhere(there), MAP, scale={"creatinine": 1 / 88.4},
        values={"sex": {"F": "female", "M": "male"}},
    )  # fmt: skip
    pd.testing.assert_frame_equal(mapped[["creatinine", "sex"]], there[["creatinine", "sex"]],
                                  check_dtype=False)  # fmt: skip
    assert mapped["lactate"].isna().all()
    same = clf.predict_proba(there.assign(lactate=np.nan).drop(columns="note"))
    np.testing.assert_allclose(clf.predict_proba(mapped), same, atol=1e-6)
    assert roc_auc_score(y_there, clf.predict_proba(mapped)[:, 1]) > 0.8


def test_unknown_spellings_and_nulls_stay():
    there = pd.DataFrame({"gender": ["F", "X", None], "creat": [1.0, 2.0, 3.0]}, index=[4, 5, 6])
    mapped = map_columns(there, MAP, values={"sex": {"F": "female"}})
    assert list(mapped["sex"][:2]) == ["female", "X"]
    assert mapped["sex"].isna().to_list() == [False, False, True]
    assert list(mapped.columns) == list(MAP)
    assert list(mapped.index) == [4, 5, 6]


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"lacks the columns \['creat', 'gender'\]"):
        map_columns(pd.DataFrame({"a": [1]}), MAP)
    there = pd.DataFrame({"gender": ["F"], "creat": [1.0]})
    with pytest.raises(ValueError, match=r"\['lactate'\]"):
        map_columns(there, MAP, scale={"lactate": 2.0})
