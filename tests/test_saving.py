"""save and load: every estimator comes back equal to the bit, and nothing that stands in a cell."""

import datetime
import hashlib
import inspect
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import tiny_models
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
)
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, TunedThresholdClassifierCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import Bunch
from test_common import NO_PAIR, SMALL, estimators

import ehrfuse
from ehrfuse import (
    ClinicalScoreClassifier,
    ClipEHRAligner,
    Events,
    EventsToVisits,
    EventSummary,
    FusionClassifier,
    KnowledgeAugmentedRiskModel,
    KnowledgeGraph,
    KnowledgeRetriever,
    LabTextifier,
    MaskedLabPretrainer,
    MEDFuseClassifier,
    MMNARFusionClassifier,
    NoteSectionizer,
    RAPTPretrainer,
    Rectifier,
    TabNetClassifier,
    TabNetPretrainer,
    Tabular,
    Text,
    VisitGAN,
    Visits,
    VisitsToEvents,
    _hub,
)
from ehrfuse.methods._causal_notes import CausalNoteClassifier

FAST = {"d_model": 8, "n_members": 2, "max_epochs": 1, "random_state": 0, "device": "cpu"}
SECRET = "Zebediah Quillfeather of Ormskirk swallowed xylophone"
TREES = HistGradientBoostingClassifier(max_iter=3, random_state=0)


@pytest.fixture(scope="module")
def cohort():
    """A cohort in whose free text a name stands once."""
    data = make_ehr_with_a_secret(72)
    data.X["history_text"] = data.X["note"]
    return data


def make_ehr_with_a_secret(n):
    data = ehrfuse.datasets.make_ehr(n, missing="mnar", random_state=0, as_bunch=True)
    row = int(np.flatnonzero(data.X["note"].notna())[3])
    data.X["note"] = data.X["note"].astype(object)
    data.X.iloc[row, data.X.columns.get_loc("note")] += f" {SECRET}."
    return data


def parts(cohort, *names):
    return {name: cohort.modalities[name] for name in names}


def graph():
    table = pd.DataFrame({
        "head": ["sepsis", "fever", "sepsis", "cough", "hypotension"],
        "relation": ["causes", "suggests", "treated_by", "suggests", "suggests"],
        "tail": ["fever", "sepsis", "fluids", "fever", "sepsis"],
        "date": ["2001", None, "2010-05-01", None, None],
        "evidence": ["pm1", "pm2", "pm3", "pm4", "pm5"],
    })  # fmt: skip
    return KnowledgeGraph.from_triples(table)


def small(kind, cohort):
    """A public estimator on all the modalities that it reads."""
    known = inspect.signature(kind).parameters
    options = {key: value for key, value in (SMALL | FAST).items() if key in known}
    return kind({n: m for n, m in cohort.modalities.items() if isinstance(m, kind._accepts)},
                **options)  # fmt: skip


def numbers_of(X):
    return X[["age", "heart_rate"]].fillna(0.0)


def risk_model(cohort, **options):
    chosen = parts(cohort, "vitals", "course", "history", "note")
    options = {"n_splits": 2, "random_state": 0, "groups": "subject_id"} | options
    return KnowledgeAugmentedRiskModel(chosen, **options)


def fusion(cohort, *names, **options):
    return FusionClassifier(parts(cohort, *(names or ("vitals", "note"))), **FAST | options)


def numeric(estimator):
    """The numbers alone, whatever else is in the frame."""
    columns = ["age", "heart_rate"]
    return make_pipeline(ColumnTransformer([("numbers", StandardScaler(), columns)]), estimator)


# What holds others, is no network, or is reached by a parameter alone: name -> fitted estimator.
OTHERS = {
    "rectifier of a network": lambda c: Rectifier(fusion(c), n_splits=2, random_state=0),
    "rectifier of trees": lambda c: make_pipeline(
        EventSummary("events"), ColumnTransformer([("n", "passthrough", ["age", "heart_rate"])]),
        Rectifier(TREES, n_splits=2, random_state=0),
    ),
    "rectified fusion": lambda c: MMNARFusionClassifier(
        parts(c, "vitals", "note", "cxr"), rectifier="crossfit", **FAST
    ),
    "event summary": lambda c: EventSummary("events"),
    "events to visits": lambda c: EventsToVisits("events"),
    "visits to events": lambda c: VisitsToEvents("visits"),
    "lab text": lambda c: LabTextifier(["sodium", "lactate"]),
    "note sections": lambda c: NoteSectionizer("note"),
    "retriever": lambda c: KnowledgeRetriever(graph()),
    "two stages": lambda c: risk_model(c, knowledge=graph()),
    "two stages, rationale": lambda c: risk_model(
        c, knowledge=KnowledgeRetriever(graph(), equivalence=equivalence()), stage2="lr",
        calibrate="isotonic", rationale="extractive", threshold="youden", rationale_dim=2,
    ),
    "two stages, xgboost": lambda c: risk_model(c, stage2="xgboost"),
    "score": lambda c: ClinicalScoreClassifier("column", columns={"score": "age"}),
    "generator of visits": lambda c: VisitGAN("visits", width=8, max_epochs=1, random_state=0),
    "pretrainer with generator": lambda c: RAPTPretrainer(
        parts(c, "history"), augment=VisitGAN("visits", width=8, max_epochs=1), **FAST
    ),
    "nested pretrainers": lambda c: TabNetClassifier(
        parts(c, "vitals", "note"), n_d=8, max_epochs=1, random_state=0,
        pretrained=ClipEHRAligner(
            parts(c, "vitals", "note"), n_d=8, max_epochs=1,
            pretrained=TabNetPretrainer(parts(c, "vitals"), n_d=8, max_epochs=1),
        ),
    ),
    "frozen pretrainer": lambda c: MEDFuseClassifier(
        parts(c, "labs", "note"), n_layers=1, lab_layers=1, width=16, **FAST,
        pretrained=FrozenEstimator(MaskedLabPretrainer(
            parts(c, "labs"), d_model=8, width=16, n_layers=1, n_heads=4, max_epochs=1,
            random_state=0,
        ).fit(c.X)),
    ),
    "text scores first": lambda c: MEDFuseClassifier(
        parts(c, "labs", "note"), n_layers=1, width=16, cross_fit=2, thresholds="f1",
        **FAST | {"n_members": 1},
    ),
    "pipeline": lambda c: make_pipeline(LabTextifier(["sodium"]), fusion(c)),
    "calibrated": lambda c: CalibratedClassifierCV(fusion(c), cv=2, ensemble=False),
    "calibrated, isotonic": lambda c: CalibratedClassifierCV(fusion(c), cv=2, method="isotonic"),
    "threshold": lambda c: TunedThresholdClassifierCV(fusion(c), cv=2, thresholds=5),
    "stacked": lambda c: StackingClassifier(
        [("net", fusion(c)), ("trees", numeric(TREES)),
         ("forest", numeric(RandomForestClassifier(3, random_state=0)))],
        LogisticRegression(), cv=2,
    ),
    "plain scikit-learn": lambda c: numeric(make_pipeline(SimpleImputer(), LogisticRegression())),
    "callable columns": lambda c: FusionClassifier(
        {"table": Tabular(make_column_selector("^(?:age|heart)"))}, **FAST
    ),
    "routed weights": lambda c: routed(fusion(c)),
}  # fmt: skip


def routed(estimator):
    with config_context(enable_metadata_routing=True):
        return estimator.set_fit_request(sample_weight=False)


def equivalence():
    return pd.DataFrame({"icd_9": ["4280", "99591"], "icd_10": ["I509", "A419"],
                         "flags": ["00000", "10000"]}, dtype="str")  # fmt: skip


def everything():
    for estimator in estimators():
        kind = type(estimator)
        yield pytest.param(partial(small, kind), id=kind.__name__)
    for name, make in OTHERS.items():
        yield pytest.param(make, id=name)


def fitted(estimator, cohort):
    if isinstance(estimator, VisitGAN | EventSummary) or not hasattr(estimator, "predict"):
        return estimator.fit(cohort.X)
    return estimator.fit(cohort.X, cohort.y)


def results(estimator, X):
    """Whatever the estimator gives, as something to compare."""
    if isinstance(estimator, VisitGAN):
        return estimator.sample(7)
    for name in ("predict_proba", "transform", "predict"):
        if hasattr(estimator, name):
            return getattr(estimator, name)(X)
    raise AssertionError(f"{estimator} gives nothing")


def assert_same(one, other):
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    else:
        np.testing.assert_array_equal(one, other)


def same_parameters(one, other):
    one, other = one.get_params(), other.get_params()
    assert list(one) == list(other)
    assert _described(one) == _described(other)


def _described(params):
    return re.sub("at 0x[0-9a-f]+", "", repr(params))


@NO_PAIR
@pytest.mark.parametrize("make", list(everything()))
def test_round_trip(make, cohort, tmp_path):
    estimator = fitted(make(cohort), cohort)
    expected = results(estimator, cohort.X)
    first, second = tmp_path / "first.zip", tmp_path / "second.zip"
    ehrfuse.save(estimator, first)
    loaded = ehrfuse.load(first)
    assert type(loaded) is type(estimator)
    assert_same(results(loaded, cohort.X), expected)
    same_parameters(loaded, estimator)
    clone(loaded)
    ehrfuse.save(loaded, second)
    assert first.read_bytes() == second.read_bytes()
    pickled = pickle.dumps(loaded)
    assert_same(results(pickle.loads(pickled), cohort.X), expected)
    for raw in (first.read_bytes(), pickled):
        lowered = raw.lower()
        assert not [w for w in SECRET.lower().split() if len(w) > 3 and w.encode() in lowered]
        assert cohort.X["note"].dropna().iloc[0].encode() not in raw


# ---------------------------------------------------------------- models of the hub


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.write_bert(tmp_path_factory.mktemp("models") / "bert")


def test_a_causal_model_keeps_its_adapters_alone(cohort, tmp_path):
    pytest.importorskip("peft")
    llama = tiny_models.write_llama(tmp_path / "llama")
    clf = CausalNoteClassifier(llama, lora_rank=2, max_length=96, max_epochs=1, random_state=0)
    few = Bunch(X=cohort.X.head(24), y=cohort.y[:24])
    clf.fit(few.X, few.y)
    ehrfuse.save(clf, tmp_path / "model.zip")
    loaded = ehrfuse.load(tmp_path / "model.zip")
    assert_same(loaded.predict_proba(few.X), clf.predict_proba(few.X))
    names = json.loads(zipfile.ZipFile(tmp_path / "model.zip").read("manifest.json"))["objects"]
    weights = [e["array"] for e in names if "weights_" in str(e.get("array"))]
    assert weights
    assert all("lora_" in name for name in weights)
    shutil.rmtree(llama)
    with pytest.raises(ehrfuse.LoadError, match="llama"):
        ehrfuse.load(tmp_path / "model.zip")


def test_a_search_saves_its_best(cohort, tmp_path):
    search = GridSearchCV(net(), {"lr": [1e-3]}, cv=2).fit(cohort.X, cohort.y)
    with pytest.raises(ValueError, match="save its best_estimator_"):
        ehrfuse.save(search, tmp_path / "m.zip")
    ehrfuse.save(search.best_estimator_, tmp_path / "m.zip")


@pytest.mark.parametrize("how", ["frozen", "trained", "adapters"])
def test_language_models(how, bert, cohort, tmp_path):
    pytest.importorskip("peft")
    options = {"frozen": {}, "trained": {"trainable": True}, "adapters": {"lora_rank": 2}}[how]
    options |= {"trainable": True} if how == "adapters" else {}
    text = Text("note", model=bert, chunk_length=16, max_length=16, **options)
    clf = FusionClassifier({"note": text}, **FAST | {"n_members": 1}).fit(cohort.X, cohort.y)
    ehrfuse.save(clf, tmp_path / "model.zip")
    loaded = ehrfuse.load(tmp_path / "model.zip")
    X = cohort.X.head(12)
    assert_same(loaded.predict_proba(X), clf.predict_proba(X))
    size = (tmp_path / "model.zip").stat().st_size
    weights = Path(bert, "model.safetensors").stat().st_size
    if how == "frozen":
        assert size < weights  # by name, commit and digest
        assert loaded.modalities_["note"].fingerprint_ == clf.modalities_["note"].fingerprint_
    else:  # needs nothing from the hub any more
        assert size > weights
        loaded.modalities_["note"].model = "nobody/nothing"
        assert_same(loaded.predict_proba(X), clf.predict_proba(X))


def test_a_tuned_language_model_needs_no_hub(bert, cohort, tmp_path, monkeypatch):
    text = Text("note", model=bert, chunk_length=16, max_length=16, trainable=True)
    clf = FusionClassifier({"note": text}, **FAST | {"n_members": 1})
    clf.fit(cohort.X.head(24), cohort.y[:24])
    expected = clf.predict_proba(cohort.X.head(24))
    ehrfuse.save(clf, tmp_path / "model.zip")

    def gone(*args):
        raise AssertionError("the hub was asked")

    for name in ("inspect_model", "reopen", "copy_model"):
        monkeypatch.setattr(_hub, name, gone)
    assert_same(ehrfuse.load(tmp_path / "model.zip").predict_proba(cohort.X.head(24)), expected)


# ---------------------------------------------------------------- what cannot be saved


class Doubler(BaseEstimator):
    """A class of the user's own."""

    def __init__(self, factor=2.0):
        self.factor = factor

    def fit(self, X, y=None):
        self.offset_ = np.asarray(X).mean()
        return self

    def transform(self, X):
        return np.asarray(X) * self.factor + self.offset_


def net(**options):
    return FusionClassifier(**{"modalities": {"table": Tabular(["age"])}} | FAST | options)


def by_code(X):
    return ["age"]


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (net(modalities={"t": Tabular(by_code)}), r"^modalities\['t'\]\.columns is the function"),
        (net(memory=sys.stdout), r"memory is of type .*; set it to None or leave it out before"),
        (net(pretrained=Doubler()), r"pretrained .*classes=\[Doubler\] to save and to load"),
        (make_pipeline(Doubler(), net()), r"steps\[0\]\[1\] .*classes=\[Doubler\] to save"),
        (net(random_state=np.random.default_rng(0)), r"random_state is of type numpy.*Generator"),
        (net(class_weight={object: 1}).set_params(freeze=(b"x",)), r"freeze\[0\] is of type bytes"),
        (Rectifier(RandomForestClassifier(criterion=lambda y: y)), r"^estimator is a RandomForest"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_named(estimator, message, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(b"the model of before")
    with pytest.raises(ValueError, match=message):
        ehrfuse.save(estimator, path)
    assert path.read_bytes() == b"the model of before"
    assert list(tmp_path.iterdir()) == [path]


def test_cycles_and_depth(tmp_path):
    loop = net()
    loop.memory = loop
    with pytest.raises(ValueError, match="memory holds an object that holds it"):
        ehrfuse.save(loop, tmp_path / "m.zip")
    deep = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(ValueError, match="nests more than"):
        ehrfuse.save(net(memory=deep), tmp_path / "m.zip")
    with pytest.raises(ValueError, match="no estimator"):
        ehrfuse.save({"a": 1}, tmp_path / "m.zip")


def test_classes_of_ones_own(cohort, tmp_path):
    X = cohort.X[["age"]].fillna(0)
    pipe = make_pipeline(Doubler(3.0), FusionClassifier(**FAST)).fit(X, cohort.y)
    path = tmp_path / "model.zip"
    ehrfuse.save(pipe, path, classes=[Doubler])
    with pytest.raises(ehrfuse.LoadError, match="names the class 'Doubler'"):
        ehrfuse.load(path)
    loaded = ehrfuse.load(path, classes=[Doubler])
    assert_same(loaded.predict_proba(X), pipe.predict_proba(X))
    impostor = type("Tabular", (), {})
    with pytest.raises(ValueError, match="known already"):
        ehrfuse.load(path, classes=[impostor])
    with pytest.raises(ValueError, match="no class"):
        ehrfuse.load(path, classes=["Doubler"])


def test_another_process(saved, tmp_path):
    """A fresh interpreter needs nothing but the file, and loads neither skops nor transformers."""
    code = (
        "import sys, ehrfuse, numpy, pandas; X = pandas.read_json('X.json');"
        f"numpy.save('p.npy', ehrfuse.load({str(saved.path)!r}).predict_proba(X));"
        "assert not {'skops', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    saved.X.to_json(tmp_path / "X.json", double_precision=15)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), saved.expected, atol=1e-12)


# ---------------------------------------------------------------- values


def rich_values():
    rng = np.random.RandomState(3)
    rng.rand(5)
    text = pd.Series(["a", None, "b"], index=["x", "y", "z"], name="s")
    return {
        "plain": [None, True, 1, 2**70, 1.5, "é\ud800", float("inf"), -float("inf")],
        "nan": float("nan"),
        "containers": ((1, [2]), {1, 2}, frozenset("ab"), {1: "a", (2, 3): "b"}, Bunch(a=1)),
        "scalars": [np.float32(0.1), np.int8(3), np.bool_(True), np.str_("s"), np.float64("nan"),
                    np.datetime64("2020-01-01"), np.timedelta64(3, "h")],
        "pandas": [pd.NA, pd.NaT, pd.Timestamp("2020-01-01 10:00")],
        "others": [slice(1, None), Path("a/b"), torch.device("cpu"), np.dtype("float32"), float,
                   np.number, datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1, 3)],
        "arrays": [np.arange(6.0).reshape(2, 3).T, np.array(3), np.zeros((0, 2), "int8"),
                   np.array(["a", "bcd"]), np.array(["ä", ""], object), np.array([1, None], object),
                   np.array([(1, 2), "x"], object), np.array(["2020-01-01"], "M8[D]"),
                   np.array([[True]]), np.ma.MaskedArray([1, 2], [True, False])],
        "sparse": sparse.random(4, 5, 0.5, "csr", random_state=0),
        "frames": [
            pd.DataFrame({"a": [1, 2], "b": ["x", None], "c": pd.Categorical(["u", "v"])}),
            pd.DataFrame({"n": pd.array([1, None], "Int64"), "o": np.array(["x", 3], object)}),
            text, text.astype("string"), pd.RangeIndex(2, 8, 3, name="r"),
            pd.Index(["a", 1], dtype=object), pd.MultiIndex.from_tuples([(1, "a"), (2, "b")]),
            pd.DatetimeIndex(["2020-01-01", None]), pd.CategoricalIndex(["a", "b", "a"]),
            pd.CategoricalDtype(["a", "b"], ordered=True),
        ],
        "stream": rng,
    }  # fmt: skip


def test_values_come_back(tmp_path):
    """Every kind of the closed set, in its type, dtype and layout, as pickle would give it."""
    values = rich_values()
    estimator = net(memory=values)
    ehrfuse.save(estimator, tmp_path / "a.zip")
    loaded = ehrfuse.load(tmp_path / "a.zip")
    ehrfuse.save(loaded, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert_alike(loaded.memory, values)
    assert loaded.memory["arrays"][0].flags.f_contiguous
    loaded.memory["arrays"][0][0, 0] = 5.0  # not read-only
    assert loaded.memory["stream"].rand() == rich_values()["stream"].rand()


def assert_alike(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert_alike(list(one.items()), list(other.items()))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    elif isinstance(one, pd.Series):
        pd.testing.assert_series_equal(one, other)
    elif isinstance(one, pd.Index):
        pd.testing.assert_index_equal(one, other)
    elif sparse.issparse(one):
        assert (one != other).nnz == 0
    elif not isinstance(one, np.random.RandomState):
        assert repr(one) == repr(other)


def test_one_object_stays_one(cohort, tmp_path):
    shared = graph()
    pipe = Pipeline([("a", KnowledgeRetriever(shared)), ("b", KnowledgeRetriever(shared))])
    ehrfuse.save(pipe, tmp_path / "m.zip")
    loaded = ehrfuse.load(tmp_path / "m.zip")
    assert loaded[0].graph is loaded[1].graph
    assert loaded[0].graph == shared
    assert loaded[0].graph.node("sepsis") == shared.node("sepsis")


# ---------------------------------------------------------------- hostile and broken files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model, its file, and rows to predict."""
    rng = np.random.default_rng(0)
    X = pd.DataFrame({"age": rng.normal(size=60), "sex": np.where(rng.random(60) < 0.5, "f", "m")})
    modalities = {"table": Tabular(["age", "sex"])}
    clf = FusionClassifier(modalities, **FAST).fit(X, np.arange(60) % 2)
    path = tmp_path_factory.mktemp("saved") / "model.zip"
    ehrfuse.save(clf, path)
    return Bunch(path=path, X=X, expected=clf.predict_proba(X), clf=clf)


class Trap:
    """Leaves a mark if anything runs it."""

    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


MARK = Path(tempfile.gettempdir()) / f"ehrfuse-trap-{os.getpid()}"


@pytest.fixture(autouse=True)
def nothing_ran():
    MARK.unlink(missing_ok=True)
    yield
    assert not MARK.exists()


def zipped(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def contents(saved):
    with zipfile.ZipFile(saved.path) as archive:
        return json.loads(archive.read("manifest.json")), archive.read("tensors.safetensors")


def forged(path, manifest, blob):
    """A file whose sums are right: what somebody who wants to harm would write."""
    manifest = {k: v for k, v in manifest.items() if k != "sha256"}
    manifest["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    body = json.dumps(manifest, separators=(",", ":")).encode()
    manifest["sha256"] = hashlib.sha256(body).hexdigest()
    files = [("manifest.json", json.dumps(manifest)), ("tensors.safetensors", blob)]
    return zipped(path, files)


def refuse(path, message=None):
    with pytest.raises(ehrfuse.LoadError, match=message) as caught:
        ehrfuse.load(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def foreign_files():
    yield "pickle", pickle.dumps(Trap())
    yield "pickle after a zip's mark", b"PK\x03\x04" + pickle.dumps(Trap())
    yield "nothing", b""
    yield "text", b"age,sex\n1,f\n"
    yield "npy", b"\x93NUMPY\x01\x00" + b"\x00" * 64


@pytest.mark.parametrize(("kind", "content"), list(foreign_files()), ids=lambda x: str(x)[:20])
def test_foreign_files(kind, content, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(content)
    refuse(path)


def test_archives_that_save_never_writes(saved, tmp_path):
    manifest, blob = contents(saved)
    good = [("manifest.json", json.dumps(manifest)), ("tensors.safetensors", blob)]
    path = tmp_path / "model.zip"
    trap = pickle.dumps(Trap())
    refuse(zipped(path, [*good, ("model.pkl", trap)]), "must hold")
    refuse(zipped(path, [("data.pkl", trap)]), "must hold")
    refuse(zipped(path, [good[0], ("tensors.safetensors", trap)]), "not those that were saved")
    refuse(zipped(path, [("manifest.json", trap), good[1]]), "no JSON")
    refuse(zipped(path, [*good, ("../../escaped", b"x")]), "must hold")
    assert not (tmp_path.parent.parent / "escaped").exists()
    bomb = [("manifest.json", b" " * 10**7), good[1]]
    refuse(zipped(path, bomb, compression=zipfile.ZIP_DEFLATED), "larger than it is")
    with pytest.warns(UserWarning, match="Duplicate"):
        zipped(path, [*good, good[0]])
    refuse(path, "twice")
    refuse(forged(path, manifest, trap), "arrays cannot be read")
    torch.save({"a": Trap()}, path)
    refuse(path)


def test_a_zip_that_lies_about_sizes(saved, tmp_path):
    raw = bytearray(saved.path.read_bytes())
    place = raw.rfind(b"PK\x01\x02")  # the last entry of the directory
    raw[place + 20 : place + 28] = (2**31).to_bytes(4, "little") * 2
    path = tmp_path / "model.zip"
    path.write_bytes(raw)
    refuse(path, "larger than it is|broken")


def changed(manifest, place, value):
    """A copy with one thing exchanged."""
    manifest = json.loads(json.dumps(manifest))
    target = manifest
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return manifest


def entry_of(manifest, name):
    return next(i for i, e in enumerate(manifest["objects"]) if e.get("class") == name)


def test_forged_manifests(saved, tmp_path):
    manifest, blob = contents(saved)
    path = tmp_path / "model.zip"
    own, table = entry_of(manifest, "FusionClassifier"), entry_of(manifest, "Tabular")
    state = ("objects", own, "state")
    array = next(i for i, e in enumerate(manifest["objects"]) if "array" in e)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    cases = [
        (("objects", own, "class"), "os.system", "names the class 'os.system'"),
        (("objects", own, "class"), "builtins.eval", "names the class"),
        (("objects", own, "class"), "ehrfuse.FusionClassifier", "names the class"),
        (("objects", own, "class"), "TorchEstimator", "names the class"),
        (("objects", own, "class"), ["FusionClassifier"], "cannot be loaded"),
        (("objects", table, "class"), "KnowledgeGraph", "do not fit together"),
        (("model",), {"eval": "1"}, "no kind of value"),
        (("model",), {"ref": len(manifest["objects"])}, "reference is wrong"),
        (("model",), {"ref": -1}, "reference is wrong"),
        (("model",), 3, "no estimator"),
        (("model",), {"ref": 0, "list": []}, "neither plain nor of one kind"),
        (("objects",), {}, "cannot be loaded"),
        (("objects", array, "shape"), [10**9], "another shape"),
        (("objects", array, "array"), "nowhere", "is missing"),
        (("objects", array, "dtype"), "float16", "another shape or dtype"),
        (("objects", array, "dtype"), "O", "another shape or dtype"),
        ((*state, "built_with_"), {"dict": []}, "do not fit together"),
        ((*state, "__class__"), "x", "sets what is no state"),
        ((*state, "modalities_"), None, "cannot be loaded"),
        ((*state, "versions_"), {"dict": []}, "cannot be loaded"),
        ((*state, "lr"), {"float": "import os"}, "cannot be loaded"),
        ((*state, "lr"), {"dtype": "O" * 99}, "dtype"),
        ((*state, "lr"), {"type": "os.system"}, "cannot be loaded"),
        (("format",), 2, "newer ehrfuse"),
        (("format",), True, "states no format"),
        (("format",), "1", "states no format"),
        (("versions",), None, "cannot be loaded"),
        (("versions",), {}, "cannot be loaded"),
    ]  # fmt: skip
    for place, value, message in cases:
        refuse(forged(path, changed(manifest, place, value), blob), message)
    text = json.dumps(manifest)
    for body in (
        text.replace('"lr": 0.002', '"lr": NaN'), text.replace('"lr": 0.002', '"lr": Infinity'),
        text.replace('"lr": 0.002', '"lr": ' + "9" * 5000), "[" * 100_000 + "]" * 100_000,
        '{"format": 1, ' + text[1:], "null", "[]", "{}",
    ):  # fmt: skip
        refuse(zipped(path, [("manifest.json", body), ("tensors.safetensors", blob)]))


def nodes(x, place=()):
    """Every place of a manifest."""
    items = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from nodes(value, (*place, key))


def test_forged_at_random(saved, tmp_path):
    """With sums that are right, any part may be anything: a model or one LoadError."""
    manifest, blob = contents(saved)
    places = list(nodes(manifest))
    rng = np.random.default_rng(0)
    odd = [
        None,
        True,
        -1,
        0,
        3,
        1.5,
        "x",
        [],
        [[]],
        {},
        {"ref": 0},
        {"tuple": [1]},
        {"dict": [[1]]},
    ]
    refused = 0
    for _ in range(150):
        value = odd[rng.integers(len(odd))]
        path = forged(
            tmp_path / "model.zip",
            changed(manifest, places[rng.integers(len(places))], value),
            blob,
        )
        try:
            ehrfuse.load(path)
        except ehrfuse.LoadError:
            refused += 1
    assert refused > 50


def test_forged_arrays(saved, tmp_path):
    manifest, blob = contents(saved)
    path = tmp_path / "model.zip"
    arrays = safetensors.numpy.load(blob)
    name = next(n for n in arrays if "weights_" in n and arrays[n].ndim == 2)
    place = next(i for i, e in enumerate(manifest["objects"]) if e.get("array") == name)

    def saved_as(new):
        return safetensors.numpy.save(new)

    other = arrays | {name: arrays[name][:, :-1].copy()}
    refuse(forged(path, manifest, saved_as(other)), "another shape")
    smaller = changed(manifest, ("objects", place, "shape"), list(other[name].shape))
    refuse(forged(path, smaller, saved_as(other)), "do not fit together")  # strict weights
    refuse(forged(path, manifest, saved_as({k: v for k, v in arrays.items() if k != name})),
           "is missing")  # fmt: skip
    refuse(forged(path, manifest, saved_as(arrays | {"more": np.zeros(3)})), "belong to nothing")
    length = int.from_bytes(blob[:8], "little")
    for header in (2**63, 2**40, 0, length - 1, length + 8):
        refuse(forged(path, manifest, header.to_bytes(8, "little") + blob[8:]), "cannot be read")
    head = json.loads(blob[8 : 8 + length])
    for lie in ({"data_offsets": [0, 2**40]}, {"shape": [10**12]}, {"dtype": "F7"},
                {"data_offsets": [0, 4], "shape": [1]}):  # fmt: skip
        text = json.dumps(head | {name: head[name] | lie}).encode()
        broken = len(text).to_bytes(8, "little") + text + blob[8 + length :]
        refuse(forged(path, manifest, broken), "cannot be read")


def test_flipped_and_cut_bytes(saved, tmp_path):
    """Two hundred places: an equal model or one LoadError, and never anything else."""
    raw = saved.path.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "model.zip"
    edges = [0, 4, 10, 30, len(raw) - 22, len(raw) - 1]
    loaded = 0
    for place in [*edges, *rng.integers(len(raw), size=120).tolist()]:
        broken = bytearray(raw)
        broken[place] ^= 1 << int(rng.integers(8))
        loaded += loads_equal_or_not(path, bytes(broken), saved)
    for place in [0, 1, 22, len(raw) - 1, *rng.integers(len(raw), size=80).tolist()]:
        loaded += loads_equal_or_not(path, raw[:place], saved)
    assert loaded < 100


def loads_equal_or_not(path, raw, saved):
    path.write_bytes(raw)
    try:
        loaded = ehrfuse.load(path)
    except ehrfuse.LoadError:
        return False
    np.testing.assert_array_equal(loaded.predict_proba(saved.X), saved.expected)
    return True


def test_flipped_bytes_in_a_folder(saved, tmp_path):
    """The same without a zip around it, whose own sums would find most of them."""
    folder = tmp_path / "model"
    ehrfuse.save(saved.clf, folder)
    rng = np.random.default_rng(1)
    for name in ("manifest.json", "model.safetensors"):
        raw = (folder / name).read_bytes()
        for place in rng.integers(len(raw), size=60):
            broken = bytearray(raw)
            broken[place] ^= 1 << int(rng.integers(8))
            loads_equal_or_not_folder(folder, name, bytes(broken), saved)
        (folder / name).write_bytes(raw)
    assert_same(ehrfuse.load(folder).predict_proba(saved.X), saved.expected)


def loads_equal_or_not_folder(folder, name, raw, saved):
    (folder / name).write_bytes(raw)
    try:
        loaded = ehrfuse.load(folder)
    except ehrfuse.LoadError:
        return
    np.testing.assert_array_equal(loaded.predict_proba(saved.X), saved.expected)


# ---------------------------------------------------------------- parts of scikit-learn


def skops_of(estimator):
    from ehrfuse import _sklearn_parts

    return _sklearn_parts.write_part(estimator, "here")[1]


def read_part(raw):
    from ehrfuse import _sklearn_parts

    return _sklearn_parts.read_skops(raw)


def exchanged(raw, change):
    """skops bytes with another schema or other arrays."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files = change(files)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def trees(kind=TREES):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 3))
    return clone(kind).fit(X, (X[:, 0] > 0).astype(int))


def with_nodes(field, value):
    """Change one field of the first node of every tree."""

    def change(files):
        for name in [n for n in files if n.endswith(".npy")]:
            nodes = np.load(io.BytesIO(files[name]))
            if nodes.dtype.names and field in nodes.dtype.names:
                nodes[field][0] = value
                target = io.BytesIO()
                np.save(target, nodes)
                files[name] = target.getvalue()
        return files

    return change


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (TREES, "left", 10**6),
        (TREES, "right", 0),  # round and round
        (TREES, "feature_idx", 3),
        (RandomForestClassifier(2, random_state=0), "left_child", 10**6),
        (RandomForestClassifier(2, random_state=0), "right_child", -7),
        (RandomForestClassifier(2, random_state=0), "feature", 3),
    ],
)
def test_trees_that_lead_astray(kind, field, value):
    """C code would read what lies outside, or never come back."""
    raw = skops_of(trees(kind))
    read_part(raw)
    with pytest.raises(ehrfuse.LoadError, match="a tree"):
        read_part(exchanged(raw, with_nodes(field, value)))


def test_skops_parts_that_are_not_trusted():
    raw = skops_of(trees(LogisticRegression()))

    def renamed(module, name):
        def change(files):
            text = files["schema.json"].decode()
            old = (
                '"__class__": "LogisticRegression", "__module__": "sklearn.linear_model._logistic"'
            )
            assert old in text
            new = f'"__class__": "{name}", "__module__": "{module}"'
            return files | {"schema.json": text.replace(old, new).encode()}

        return change

    for module, name in (("os", "system"), ("builtins", "eval"), ("subprocess", "Popen"),
                         ("sklearn.utils", "Bunch"), ("numpy", "load")):  # fmt: skip
        with pytest.raises(ehrfuse.LoadError, match="part of scikit-learn"):
            read_part(exchanged(raw, renamed(module, name)))
    trap = pickle.dumps(Trap())
    for change in (
        lambda files: files | {"more.pkl": trap},
        lambda files: {n: trap if n.endswith(".npy") else c for n, c in files.items()},
        lambda files: {n: c[:-1] if n.endswith(".npy") else c for n, c in files.items()},
        lambda files: files | {"schema.json": b"[" * 10**5},
        lambda files: {"schema.json": b"{}"},
        lambda files: {n: c for n, c in files.items() if n != "schema.json"},
    ):
        with pytest.raises(ehrfuse.LoadError):
            read_part(exchanged(raw, change))
    for other in (b"", trap, raw[:-30], b"PK\x03\x04"):
        with pytest.raises(ehrfuse.LoadError):
            read_part(other)


# ---------------------------------------------------------------- versions


def test_versions(saved, tmp_path, monkeypatch):
    manifest, blob = contents(saved)
    assert manifest["format"] == 1
    assert manifest["versions"]["ehrfuse"] == ehrfuse.__version__
    older = changed(manifest, ("versions", "ehrfuse"), "0.0.1")
    with pytest.warns(UserWarning, match=r"fitted with ehrfuse 0\.0\.1") as caught:
        loaded = ehrfuse.load(forged(tmp_path / "older.zip", older, blob))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_same(loaded.predict_proba(saved.X), saved.expected)


FORMAT_1 = Path(__file__).parent / "data" / "format1.zip"


@pytest.mark.filterwarnings("ignore:The model was fitted with ehrfuse")
def test_a_file_of_format_1():
    """Written on 2026-11-24; every later version reads it."""
    clf = ehrfuse.load(FORMAT_1)
    X = pd.DataFrame({"age": [-1.0, None, 2.0], "note": ["no pain", "fever", None]})
    expected = np.array(json.loads(FORMAT_1.with_suffix(".json").read_text()))
    np.testing.assert_allclose(clf.predict_proba(X), expected, atol=1e-6)
    assert clf[1].modalities_["note"].vocabulary_ == ["pain", "and", "cough"]


def test_a_parameter_that_is_younger_than_the_file(saved, tmp_path):
    manifest, blob = contents(saved)
    for entry in manifest["objects"]:
        if entry.get("class") == "Tabular":
            del entry["state"]["min_count"]
    loaded = ehrfuse.load(forged(tmp_path / "older.zip", manifest, blob))
    assert loaded.modalities["table"].min_count == 2
    assert_same(loaded.predict_proba(saved.X), saved.expected)


# ---------------------------------------------------------------- no cell of text


def test_categories_and_codes_of_one_patient_are_not_kept(cohort, tmp_path):
    """What one row alone holds in a category, a code or a typed word is in no file."""
    X = cohort.X.copy()
    row = int(np.flatnonzero(X["events"].notna() & X["visits"].notna() & X["sex"].notna())[0])
    X["sex"] = X["sex"].astype(object)
    X.iloc[row, X.columns.get_loc("sex")] = SECRET
    for column, record in (("events", {"time": -1.0, "code": SECRET, "value": None}),
                           ("visits", {"time": -1.0, "codes": [SECRET]})):  # fmt: skip
        cells = [c if c is None or c is pd.NA else list(c) for c in X[column].astype(object)]
        cells[row] = [*cells[row], record]
        X[column] = pd.Series(cells, X.index, dtype=object)
    modalities = {
        "vitals": Tabular(["age", "sex"]), "course": Events("events", min_count=2),
        "history": Visits("visits", min_count=2), "note": cohort.modalities["note"],
    }  # fmt: skip
    makers = [
        FusionClassifier(modalities, **FAST),
        KnowledgeAugmentedRiskModel(modalities, n_splits=2, random_state=0),
        MaskedLabPretrainer({"course": modalities["course"]}, d_model=8, width=16, max_epochs=1),
        EventSummary(["events"], min_count=2), EventsToVisits("events", min_count=2),
        TabNetClassifier({"vitals": modalities["vitals"]}, max_epochs=1),
    ]  # fmt: skip
    for estimator in makers:
        estimator = fitted(estimator, Bunch(X=X, y=cohort.y))
        ehrfuse.save(estimator, tmp_path / "m.zip")
        for raw in ((tmp_path / "m.zip").read_bytes(), pickle.dumps(estimator)):
            assert b"Quillfeather" not in raw, type(estimator)


# ---------------------------------------------------------------- folders and the hub


def test_folder_is_a_repository_of_the_hub(saved, tmp_path):
    folder = tmp_path / "repository"
    ehrfuse.save(saved.clf, folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "manifest.json", "model.safetensors"]  # fmt: skip
    assert_same(ehrfuse.load(folder).predict_proba(saved.X), saved.expected)
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "ehrfuse"
    assert "FusionClassifier" in card.text
    assert "age" not in card.text.split()
    (folder / "README.md").write_text("My own words.")
    (folder / "LICENSE").write_text("All mine.")
    before = (folder / "model.safetensors").read_bytes()
    ehrfuse.save(saved.clf, folder)
    assert (folder / "README.md").read_text() == "My own words."
    assert (folder / "LICENSE").exists()
    assert (folder / "model.safetensors").read_bytes() == before


def test_folders_of_other_things_are_left_alone(saved, tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other things"):
        ehrfuse.save(saved.clf, tmp_path)
    other = tmp_path / "other"  # the clone of somebody's model
    (other / ".git").mkdir(parents=True)
    (other / "manifest.json").write_text('{"my": "own"}')
    (other / "model.safetensors").write_bytes(b"MY BERT")
    with pytest.raises(ValueError, match="holds other things"):
        ehrfuse.save(saved.clf, other)
    assert (other / "model.safetensors").read_bytes() == b"MY BERT"
    with pytest.raises(ValueError, match="is a file"):
        ehrfuse.save(saved.clf, tmp_path / "thesis.txt")
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        ehrfuse.save(saved.clf, tmp_path / "folder.zip")
    with pytest.raises(FileNotFoundError, match="no folder"):
        ehrfuse.save(saved.clf, tmp_path / "nowhere" / "m.zip")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        ehrfuse.load(tmp_path / "nothing.zip")
    refuse(tmp_path / "folder.zip", "has no manifest")
    assert not list(tmp_path.rglob("*.part"))


def test_folders_of_this_machine_stay_here(tmp_path):
    X, y = ehrfuse.datasets.make_ehr(n_samples=40, random_state=0)
    place = tmp_path / "of-somebody"
    note = ehrfuse.Text("note", min_count=2, cache=str(place / "vectors"))
    clf = ehrfuse.FusionClassifier(
        {"note": note}, max_epochs=1, checkpoint=str(place), memory=str(place), random_state=0
    ).fit(X, y)
    ehrfuse.save(clf, tmp_path / "model.zip")
    assert b"of-somebody" not in (tmp_path / "model.zip").read_bytes()
    again = ehrfuse.load(tmp_path / "model.zip")
    assert (again.checkpoint, again.memory, again.modalities["note"].cache) == (None, None, None)
    assert_same(again.predict_proba(X), clf.predict_proba(X))
    assert clf.checkpoint == str(place)  # the one at hand keeps its own


def test_folders_of_other_parts_stay_here_too(tmp_path):
    place = str(tmp_path / "of-somebody")
    retriever = KnowledgeRetriever(graph(), cache=place)
    pipe = Pipeline([("facts", retriever), ("rest", "passthrough")], memory=place)
    ehrfuse.save(pipe, tmp_path / "model.zip")
    assert b"of-somebody" not in (tmp_path / "model.zip").read_bytes()
    again = ehrfuse.load(tmp_path / "model.zip")
    assert (again.memory, again.steps[0][1].cache) == (None, None)
    assert (pipe.memory, retriever.cache) == (place, place)


def test_a_failed_write_leaves_the_model_of_before(saved, tmp_path, monkeypatch):
    path, folder = tmp_path / "model.zip", tmp_path / "model"
    ehrfuse.save(saved.clf, path)
    ehrfuse.save(saved.clf, folder)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = clone(saved.clf).set_params(random_state=1).fit(saved.X, np.arange(60) % 2)
    for target in (path, folder):
        with pytest.raises(OSError, match="No space"):
            ehrfuse.save(other, target)
    assert path.read_bytes() == before
    assert_same(ehrfuse.load(folder).predict_proba(saved.X), saved.expected)
    assert not list(tmp_path.rglob("*.part"))


def test_links(saved, tmp_path):
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    ehrfuse.save(saved.clf, folder)
    elsewhere.mkdir()
    target = (folder / "model.safetensors").rename(elsewhere / "model.safetensors")
    (folder / "model.safetensors").symlink_to(target)
    refuse(folder, "leads out of the folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refuse(folder, "no regular file")
    (folder / "model.safetensors").rmdir()
    os.mkfifo(folder / "model.safetensors")
    refuse(folder, "no regular file")
    os.mkfifo(tmp_path / "fifo.zip")
    refuse(tmp_path / "fifo.zip", "no regular file")


def test_from_the_hub(saved, tmp_path, monkeypatch):
    """As huggingface_hub lays its cache out: links from the snapshot into blobs."""
    cache = tmp_path / "models--ward--model"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    blobs.mkdir(parents=True)
    ehrfuse.save(saved.clf, snapshot)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"blob{i}")
        file.symlink_to(Path("../../blobs") / f"blob{i}")
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(snapshot)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    loaded = ehrfuse.load("ward/model", revision="v1")
    assert asked == [("ward/model", "v1", ["manifest.json", "model.safetensors"])]
    assert_same(loaded.predict_proba(saved.X), saved.expected)
    with pytest.raises(ValueError, match="repository of the hub"):
        ehrfuse.load(saved.path, revision="v1")
    (Path("ward")).mkdir()
    ehrfuse.save(saved.clf, "ward/model")  # a folder of that name comes first
    ehrfuse.load("ward/model")
    assert len(asked) == 1


def test_a_repository_that_cannot_be_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(name, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("outgoing traffic is disabled")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    words = (
        r"no file or folder 'ward/model' here.*huggingface_hub.snapshot_download\('ward/model'\)"
    )
    with pytest.raises(FileNotFoundError, match=words):
        ehrfuse.load("ward/model")


@pytest.mark.parametrize("name", ["m.pkl", "m.joblib", "m.SAFETENSORS", "m.tar.gz"])
def test_endings_of_other_files_are_refused(saved, tmp_path, name):
    with pytest.raises(ValueError, match=r"save writes a file ending in '.zip' or a folder"):
        ehrfuse.save(saved.clf, tmp_path / name)
    assert not list(tmp_path.iterdir())
    ehrfuse.save(saved.clf, tmp_path / "v1.2")  # a version is no ending
    assert (tmp_path / "v1.2").is_dir()
    with pytest.raises(ValueError, match=r"path is None; give the name of a folder"):
        ehrfuse.save(saved.clf, None)
