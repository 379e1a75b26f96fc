"""save() and load(): a fitted estimator as manifest and arrays, in one zip or one folder.

What can come out of a file is what `registry` names, scikit-learn's parts that skops trusts, and
classes that the caller hands in; a name in a file is looked up there and never imported.
"""

import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from sklearn.base import BaseEstimator

from ehrfuse import _archive, _encoding, _estimator, _offsets, _sklearn_parts, _targets, methods
from ehrfuse._archive import LoadError
from ehrfuse._runtime import import_optional
from ehrfuse.knowledge import KnowledgeGraph
from ehrfuse.methods import _causal_notes, _note_generator, _two_stage, knowledge_risk, medfuse
from ehrfuse.modalities import _lab_tokens, _note_tokens, _numbers, _prompt, _summary, sequences
from ehrfuse.rectifier import Rectifier

from ehrfuse import modalities  # isort: skip

__all__ = ["LoadError", "load", "save"]

# What fitted estimators are made of, beside the public names. A name is part of the format: a class
# that gets another one keeps its old name here.
HELPERS: tuple[type, ...] = (
    _targets.ClassTarget, _targets.TaskTarget, _targets.ValueTarget,
    _numbers.RobustScale, _summary.SummaryPlan, sequences.EventVisits, _prompt.Prompt,
    _lab_tokens.QuantileScale, _lab_tokens.TableTokens, _lab_tokens.StreamTokens,
    _offsets.Calibration, _offsets.Offsets, _offsets.Rule, _offsets.Node,
    medfuse.NoteScores, _causal_notes.CausalNoteClassifier, knowledge_risk._Task,
    _two_stage.StructuredFeatures, _two_stage._Table, _two_stage.Words, _two_stage.EncodedText,
    _two_stage.Ones, _two_stage.RationaleVectors, _two_stage.Constant, _two_stage.Seen,
    _two_stage.Calibrator, _note_generator.PrefixWriter, _note_tokens.NoteTokens,
)  # fmt: skip
XGBOOST = ("XGBClassifier", "XGBRegressor")
PLACES = ("checkpoint", "memory", "cache")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def registry() -> dict[str, type]:
    """Classes that a file may name, by that name."""
    public = [getattr(methods, name) for name in methods.__all__]
    public += [getattr(modalities, name) for name in modalities.__all__]
    ours = [x for x in public if isinstance(x, type)]
    every = [*ours, Rectifier, KnowledgeGraph, *HELPERS, *_sklearn_parts.containers()]
    return {kind.__name__: kind for kind in every}


def save(estimator, path, *, classes=()):
    """Write a fitted estimator, or a scikit-learn pipeline or ensemble that holds some.

    Nothing in the file is code, and the same model gives the same bytes. What was learned is in
    it (weights, scales, vocabularies, names of columns and categories), cells of notes are not.

    Parameters
    ----------
    estimator : estimator
        Fitted or not.
    path : str or path
        A name ending in ``.zip`` gives one file; any other is a folder in the layout of the
        Hugging Face hub, with a model card. Endings of other files (``.pkl``, ``.safetensors``)
        are refused, and so is a folder that holds other things. What was saved there before is
        replaced, and stays whole if saving fails.
    classes : sequence of class, default=()
        Classes of your own that the estimator is made of. `load` needs the same.

    Raises
    ------
    ValueError
        If a part cannot be saved; the message names the part and what to do.

    See Also
    --------
    load : Read it again.

    Notes
    -----
    A frozen Hugging Face model is kept by name, commit and digest, a trained one with its weights.
    Plain parts of scikit-learn need ``pip install 'ehrfuse[save]'``.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> import ehrfuse
    >>> X, y = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 2
    >>> clf = ehrfuse.FusionClassifier(max_epochs=1, random_state=0).fit(X, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ehrfuse.save(clf, folder + "/model.zip")
    ...     again = ehrfuse.load(folder + "/model.zip")
    >>> np.array_equal(again.predict_proba(X), clf.predict_proba(X))
    True
    """
    if not isinstance(estimator, BaseEstimator):
        raise ValueError(f"{type(estimator).__name__} is no estimator; save one, or use pickle.")
    _archive.check_name(path)
    known = _with_own(registry(), classes)
    names = {kind: name for name, kind in known.items()} | _xgboost_names(estimator)
    encoder = _encoding.Encoder(names, _sklearn_parts.write_part, _state_of)
    root = encoder.value(estimator, "")
    packages = ("ehrfuse", "torch", "scikit-learn", "numpy", "pandas")
    manifest = {
        "class": type(estimator).__name__,
        "versions": {name: version(name) for name in packages},
        "objects": encoder.objects,
        "model": root,
    }
    _archive.write(Path(path), manifest, encoder.tensors, _card(estimator, encoder))


def load(path, *, classes=(), revision=None):
    """Read what `save` wrote. No code of the file is run, for there is none in it.

    Parameters
    ----------
    path : str or path
        A zip, a folder, or a repository of the Hugging Face hub such as ``"owner/name"``, if there
        is no folder of that name.
    classes : sequence of class, default=()
        Classes of your own that may come out of the file: your word that their ``__setstate__``
        may be run on what stands in it.
    revision : str or None, default=None
        Branch, tag or commit of a repository.

    Returns
    -------
    estimator : estimator
        On the CPU; its predictions are those of the saved one.

    Raises
    ------
    LoadError
        A ValueError: the file is damaged, foreign, of a newer format, or names what this version
        does not know.
    FileNotFoundError
        If there is nothing at `path`, nor on the hub, or the hub cannot be reached.

    Warns
    -----
    UserWarning
        If the model was fitted with another version of ehrfuse.

    See Also
    --------
    save : Write it.

    Notes
    -----
    The sums in the file show accidental damage. They are no signature: who can change the file can
    change them too. Load models from where you trust the numbers.
    """
    place = _local(path, revision)
    manifest, tensors = _archive.read(place)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = _build(place, manifest, tensors, classes)
        _estimator._warn_other_version(manifest["versions"])
    for message in {(w.category, str(w.message)): w for w in caught}.values():
        warnings.warn(message.message, message.category, stacklevel=2)
    return estimator


def _build(place, manifest, tensors, classes):
    """The estimator of a manifest; whatever goes wrong is the file's fault."""
    try:
        known = _with_own(registry(), classes)
        named = {entry.get("class") for entry in manifest["objects"]}
        if named & {*XGBOOST}:
            xgboost = import_optional("xgboost", "boost")
            known |= {name: getattr(xgboost, name) for name in XGBOOST}
        decoder = _encoding.Decoder(tensors, known, _sklearn_parts.READERS, _set_state)
        estimator = decoder.model(manifest["objects"], manifest["model"])
        if not isinstance(estimator, BaseEstimator) or not isinstance(manifest["versions"], dict):
            raise LoadError("it holds no estimator")
        manifest["versions"]["ehrfuse"].split(".")
        return estimator
    except ImportError:
        raise  # names the package and its pip line
    except Exception as error:  # crafted state can raise anything; none of it is run as code
        what = str(error) if isinstance(error, LoadError | OSError) else _told(error)
        raise LoadError(
            f"{str(place)!r} cannot be loaded: {what}. Save it again with this version, or get it "
            "again from where it came."
        ) from error


def _told(error):
    first = str(error).strip().splitlines() or [""]
    return f"its parts do not fit together ({type(error).__name__}: {first[0][:200]})"


def _with_own(known, classes):
    for kind in classes:
        if not isinstance(kind, type):
            raise ValueError(f"classes holds {kind!r}, which is no class; give classes themselves.")
        if known.get(kind.__name__, kind) is not kind:
            raise ValueError(
                f"A class {kind.__name__!r} is known already; give yours another name."
            )
        known = known | {kind.__name__: kind}
    return known


def _xgboost_names(estimator):
    """Its classes, where it is loaded; it is not loaded for this."""
    xgboost = sys.modules.get("xgboost")
    return {} if xgboost is None else {getattr(xgboost, name): name for name in XGBOOST}


# ---------------------------------------------------------------- state


def _graph_state(graph):
    derived = ("_place", "facts", "fingerprint")
    return {name: x for name, x in vars(graph).items() if name not in derived}


def _set_graph(graph, state):
    vars(graph).update(state)
    graph._place = {name: i for i, name in enumerate(graph.node_ids)}
    graph._lock()


def _state_of(x):
    if isinstance(x, KnowledgeGraph):
        return _graph_state(x)
    state = _encoding.state_of(x)
    if state is not None:
        # Folders of this machine say nothing elsewhere, and may name somebody.
        state = _without_places(state)
        if "built_with_" in state:
            # Gone, not None: what fit noted of a place depends on how it was written.
            state["built_with_"] = {
                k: v for k, v in state["built_with_"].items() if k not in PLACES
            }
    if state is not None and type(x).__name__ == "TunedThresholdClassifierCV":
        state.pop("_curve_scorer", None)  # holds functions, and only fit asks it
    if isinstance(x, _sklearn_parts.REQUESTS) and not isinstance(x.owner, str):
        state.pop("owner", None)  # the estimator whose part it is
    return state


def _without_places(params):
    return params | {k: None for k in PLACES if isinstance(params.get(k), str | os.PathLike)}


def _defaults(kind):
    parameters = inspect.signature(kind.__init__).parameters.values()
    known = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {name: default for name, default in known.items() if not hasattr(kind, name)}


def _set_state(x, state):
    if isinstance(x, BaseEstimator):
        for name, default in _defaults(type(x)).items():
            state.setdefault(name, default)  # a parameter that is younger than the file
    setter: Callable | None = getattr(x, "__setstate__", None)
    if isinstance(x, KnowledgeGraph):
        _set_graph(x, state)
    elif setter is not None:
        state.pop("_weights_at_hand", None)  # or a modality would ask the hub for weights
        setter(state)
    else:
        vars(x).update(state)
    request = vars(x).get("_metadata_request")
    for part in () if request is None else (request, *vars(request).values()):
        if isinstance(part, _sklearn_parts.REQUESTS):
            vars(part).setdefault("owner", x)


# ---------------------------------------------------------------- hub


def _local(path, revision):
    """The zip or folder; fetched where the name is neither but could be a repository's."""
    place = Path(path)
    if place.exists() or not REPOSITORY.fullmatch(str(path)):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for a repository of the hub; {str(path)!r} is a path."
            )
        return place
    hub = import_optional("huggingface_hub", "save")
    files = [_archive.MANIFEST, _archive.UNZIPPED]
    try:
        return Path(hub.snapshot_download(str(path), revision=revision, allow_patterns=files))
    except OSError as error:
        raise FileNotFoundError(
            f"There is no file or folder {str(path)!r} here, and the repository of that name could "
            f"not be fetched from the hub ({type(error).__name__}). Check the name; without a "
            f"connection, run huggingface_hub.snapshot_download({str(path)!r}) where there is one, "
            "and load the folder that it gives."
        ) from error


def _card(estimator, encoder):
    """A model card: what it is and how to load it; nothing that was learned."""
    kind = type(estimator).__name__
    reads = sorted({e["class"] for e in encoder.objects if e.get("class") in modalities.__all__})
    size = sum(x.nbytes for x in encoder.tensors.values())
    return f"""---
library_name: ehrfuse
tags:
- ehrfuse
- electronic-health-records
---

# {kind}

A `{kind}` saved by [ehrfuse](https://pypi.org/project/ehrfuse) {version("ehrfuse")}: {size:,} bytes
of arrays{", with the modalities " + ", ".join(reads) if reads else ""}.

```python
import ehrfuse

model = ehrfuse.load("path/to/this/folder")  # or "owner/name" on the hub
```

`{_archive.MANIFEST}` says how the model is built, `{_archive.UNZIPPED}` holds its numbers. Neither
holds code or cells of the data that it was fitted to. It does hold what was learned from them:
names of columns, categories and codes, words that enough notes share, scales and weights. Say here
for whom it was made, on whom it was fitted and tested, and who may use it.
"""
