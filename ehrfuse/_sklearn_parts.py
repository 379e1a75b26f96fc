"""Parts that only other libraries can write: plain scikit-learn by skops, xgboost by itself.

What scikit-learn's meta-estimators hold may be ours, so those are taken apart like our own classes;
see `containers`. All else of scikit-learn is skops bytes, made to depend on its content alone.
"""

import hashlib
import importlib
import io
import json
from typing import Any

import numpy as np
from sklearn.utils.metadata_routing import MetadataRequest

from ehrfuse._archive import LoadError, pack, parse_json, unpack
from ehrfuse._runtime import import_optional

SCHEMA = "schema.json"
# Beside what skops trusts by itself. Trees are read by C code that checks nothing, so load does.
TREES = "sklearn.tree._tree.Tree"
PREDICTORS = "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"
TRUSTED = ("numpy.dtype", TREES, PREDICTORS)
PACKAGES = ("builtins", "collections", "functools", "numpy", "scipy", "sklearn")

# What may hold our estimators, and is plain otherwise.
CONTAINERS = {
    "pipeline": ("Pipeline", "FeatureUnion"),
    "compose": ("ColumnTransformer", "TransformedTargetRegressor", "make_column_selector"),
    "calibration": ("CalibratedClassifierCV", "_CalibratedClassifier", "_SigmoidCalibration"),
    "ensemble": (
        "StackingClassifier", "StackingRegressor", "VotingClassifier", "VotingRegressor",
        "BaggingClassifier", "BaggingRegressor",
    ),
    "frozen": ("FrozenEstimator",),
    "model_selection": ("FixedThresholdClassifier", "TunedThresholdClassifierCV"),
    "multiclass": ("OneVsRestClassifier", "OneVsOneClassifier", "OutputCodeClassifier"),
    "multioutput": (
        "MultiOutputClassifier", "MultiOutputRegressor", "ClassifierChain", "RegressorChain",
    ),
    "feature_selection": ("RFE", "RFECV", "SelectFromModel", "SequentialFeatureSelector"),
    "semi_supervised": ("SelfTrainingClassifier",),
}  # fmt: skip


REQUESTS = (MetadataRequest, type(MetadataRequest("owner").fit))


def containers() -> list[type]:
    """Classes of scikit-learn that are taken apart as our own are."""
    found: list[type] = []
    for name, kinds in CONTAINERS.items():
        module = importlib.import_module(f"sklearn.{name}")
        found += [getattr(module, kind) for kind in kinds if hasattr(module, kind)]
    return [*found, *REQUESTS]


def write_part(x: Any, where: str) -> tuple[str, bytes] | None:
    """Kind and bytes of a part of scikit-learn or xgboost; None for anything else."""
    package = type(x).__module__.partition(".")[0]
    if package == "xgboost" and type(x).__name__ == "Booster":
        return "xgboost", bytes(x.save_raw("ubj"))
    return ("skops", _to_skops(x, where)) if package == "sklearn" else None


# ---------------------------------------------------------------- skops


def _to_skops(x: Any, where: str) -> bytes:
    place, kind = where or "The estimator", type(x).__name__
    if hasattr(x, "best_estimator_"):
        raise ValueError(f"{place} is a {kind}, which holds functions; save its best_estimator_.")
    skops = import_optional("skops.io", "save")
    try:
        raw = skops.dumps(x)
        unknown = set(skops.get_untrusted_types(data=raw)) - set(TRUSTED)
    except Exception as error:  # skops raises errors of many kinds for what it does not know
        raise ValueError(
            f"{place} is a {kind} that holds what skops cannot save; leave it out, or hold it in "
            "a Pipeline or StackingClassifier."
        ) from error
    if unknown:
        raise ValueError(
            f"{place} is a {kind} that holds {', '.join(sorted(unknown)[:4])}, which load would "
            "not trust; use another estimator, or names instead of functions."
        )
    return _without_memory(raw)


def _without_memory(raw: bytes) -> bytes:
    """The same parts, arrays named by their content; skops names them by their place in memory."""
    files = unpack(io.BytesIO(raw), len(raw))
    kept: dict[str, bytes] = {}

    def tidy(x: Any) -> Any:
        if isinstance(x, list):
            return [tidy(item) for item in x]
        if not isinstance(x, dict):
            return x
        x = {k: tidy(item) for k, item in x.items() if k != "__id__" or type(item) is not int}
        if isinstance(x.get("file"), str) and x["file"] in files:
            content, ending = files[x["file"]], x["file"].rpartition(".")[2]
            content = _without_padding(content) if ending == "npy" else content
            x["file"] = f"{hashlib.sha256(content).hexdigest()[:16]}.{ending}"
            kept[x["file"]] = content
        return x

    schema = json.dumps(tidy(json.loads(files[SCHEMA]))).encode()
    target = io.BytesIO()
    pack({SCHEMA: schema} | dict(sorted(kept.items())), target)
    return target.getvalue()


def _without_padding(content: bytes) -> bytes:
    """An array of records with zeros between its fields, where memory holds whatever was there."""
    x = np.load(io.BytesIO(content), allow_pickle=False)
    if x.dtype.names is None:
        return content
    clean = np.zeros(x.shape, x.dtype)
    for name in x.dtype.names:
        clean[name] = x[name]
    target = io.BytesIO()
    np.save(target, clean, allow_pickle=False)
    return target.getvalue()


def read_skops(raw: bytes) -> Any:
    """What `_to_skops` wrote, if it holds trusted types alone."""
    skops = import_optional("skops.io", "save")
    files = unpack(io.BytesIO(raw), len(raw))
    schema = parse_json(files.get(SCHEMA, b""), SCHEMA)
    _check_modules(schema)
    for name, content in files.items():
        if name.endswith(".npy"):
            _check_npy(content)
        elif not name.endswith(".npz") and name != SCHEMA:
            raise LoadError("a part of scikit-learn holds a file of an unknown kind")
    try:
        found = skops.loads(raw, trusted=list(TRUSTED))
        _check_trees(found, set())
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(
            f"a part of scikit-learn cannot be read by skops ({type(error).__name__})"
        ) from error
    if not type(found).__module__.startswith("sklearn."):
        raise LoadError("a part of scikit-learn is something else")
    return found


def _check_modules(x: Any) -> None:
    """Names of modules that could be imported at all, before skops looks at any."""
    if isinstance(x, list):
        for item in x:
            _check_modules(item)
    elif isinstance(x, dict):
        module = x.get("__module__", "builtins")
        if isinstance(module, str) and module.partition(".")[0] not in PACKAGES:
            raise LoadError(f"a part of scikit-learn names the module {module[:80]!r}")
        for item in x.values():
            _check_modules(item)


def _check_npy(content: bytes) -> None:
    """An array that is as long as it says, and holds no objects."""
    file = io.BytesIO(content)
    try:
        major, _ = np.lib.format.read_magic(file)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, kind = read[major](file)
        size = kind.itemsize * int(np.prod(np.array(shape, dtype=object)))
    except Exception as error:
        raise LoadError("a part of scikit-learn holds a broken array") from error
    if kind.hasobject or size != len(content) - file.tell():
        raise LoadError("a part of scikit-learn holds an array that is not what it says")


def _check_trees(x: Any, seen: set[int]) -> None:
    """Every tree leads down to leaves, within its own nodes and the features of its model."""
    if id(x) in seen or isinstance(x, str | int | float | bool | type(None)):
        return
    seen.add(id(x))
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if kind == TREES:
        if x.node_count != x.capacity:
            raise LoadError("a tree has another number of nodes than it says")
        leaf = x.children_left == -1
        _check_nodes(x.children_left, x.children_right, x.feature, leaf, x.n_features)
    elif kind == PREDICTORS:
        nodes = x.nodes
        leaf = nodes["is_leaf"].astype(bool)
        _check_nodes(nodes["left"], nodes["right"], nodes["feature_idx"], leaf, 2**31)
        split = nodes["bitset_idx"][~leaf & nodes["is_categorical"].astype(bool)]
        if len(split) and split.max() >= len(x.raw_left_cat_bitsets):
            raise LoadError("a tree leads out of itself")
    elif isinstance(x, list | tuple | set):
        for item in x:
            _check_trees(item, seen)
    elif isinstance(x, dict):
        for item in x.values():
            _check_trees(item, seen)
    elif isinstance(x, np.ndarray):
        for item in x.ravel() if x.dtype == object else ():
            _check_trees(item, seen)
    else:
        _check_width(x)
        _check_trees(getattr(x, "__dict__", None), seen)


def _check_nodes(left: Any, right: Any, feature: Any, leaf: Any, n_features: int) -> None:
    place = np.arange(len(left))
    for child in (left, right):
        child = child.astype("int64")
        if not ((child > place) & (child < len(left)))[~leaf].all():
            raise LoadError("a tree leads out of itself")
    feature = feature.astype("int64")[~leaf]
    if len(left) == 0 or ((feature < 0) | (feature >= n_features)).any():
        raise LoadError("a tree asks for a feature that there is not")


def _check_width(x: Any) -> None:
    """Boosted and random trees ask for no feature that their model does not have."""
    width = getattr(x, "n_features_in_", None)
    asked = [
        predictor.nodes["feature_idx"][predictor.nodes["is_leaf"] == 0].max(initial=0) + 1
        for predictors in getattr(x, "_predictors", ())
        for predictor in predictors
    ]
    asked += [x.tree_.n_features] if hasattr(x, "tree_") else []
    if asked and not max(asked) <= width:
        raise LoadError("a tree asks for a feature that there is not")


# ---------------------------------------------------------------- xgboost


def read_xgboost(raw: bytes) -> Any:
    """A booster, by the reader of xgboost."""
    booster = import_optional("xgboost", "boost").Booster()
    booster.load_model(bytearray(raw))
    return booster


READERS = {"skops": read_skops, "xgboost": read_xgboost}
