"""Objects as typed JSON and named arrays, and back: a closed set of types and no other.

A value is null, a bool, a number, a string, a list, or an object of one key that says what it is:
``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``. What has an identity stands once in the
table `objects`, after everything it is made of, and values point there: ``{"ref": 3}``. So nothing
nests deeply and nothing can hold itself.
"""

import datetime
import math
import types
from collections.abc import Callable, Mapping
from numbers import Number
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.utils import Bunch

from ehrfuse._archive import LoadError

MAX_DEPTH = 60
TENSOR_KINDS = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
}  # fmt: skip
TYPES = {t.__name__: t for t in (bool, int, float, str, object)}
TYPES |= {
    f"numpy.{t.__name__}": t for t in (np.number, np.integer, np.floating, np.float32, np.float64)
}
SPARSE = {t.__name__: t for t in (sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix)}
RUNTIME = {"_skl_callbacks", "_skl_callbacks_to_teardown", "_callback_fit_ctx"}  # of a running fit

# A part that only another library can write: object and its place to bytes, or None.
Writer = Callable[[Any, str], "tuple[str, bytes] | None"]
Reader = Mapping[str, Callable[[bytes], Any]]


def state_of(x: Any) -> dict[str, Any] | None:
    """What an object is made of, as pickle sees it; None where that is no dict of attributes."""
    state = x.__getstate__()
    state = {} if state is None else state
    if type(state) is not dict or not all(isinstance(name, str) for name in state):
        return None
    return {name: value for name, value in state.items() if name not in RUNTIME}


# ---------------------------------------------------------------- writing


class Encoder:
    """Collects the objects and arrays of one model.

    Parameters
    ----------
    names : dict of class to str
        Classes that may be written, with the name under which they are known.
    write_part : callable
        Writes what only another library can.
    state_of : callable
        What an object is made of.
    """

    def __init__(
        self,
        names: dict[type, str],
        write_part: Writer,
        state_of: Callable[[Any], dict[str, Any] | None] = state_of,
    ) -> None:
        self.names, self.write_part, self.state_of = names, write_part, state_of
        self.objects: list[dict[str, Any]] = []
        self.tensors: dict[str, np.ndarray] = {}
        self._places: dict[int, int | None] = {}  # None while it is being written
        self._alive: list[Any] = []  # an id is only good while its object lives

    def value(self, x: Any, where: str, depth: int = 0) -> Any:
        """The value in JSON."""
        kind = type(x)
        if x is None or kind in (bool, int, str):
            return x
        if kind is float:
            return x if math.isfinite(x) else {"float": repr(x)}
        if depth > MAX_DEPTH:
            raise ValueError(f"{where or 'The estimator'} nests more than {MAX_DEPTH} containers.")
        if kind in (list, tuple, set, frozenset):
            items = [self.value(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(x)]
            if kind in (set, frozenset):
                items = sorted(items, key=repr)  # the order of a set differs from run to run
            return items if kind is list else {kind.__name__: items}
        if kind in (dict, Bunch):
            pairs = [
                [
                    self.value(k, f"{where} (key)", depth + 1),
                    self.value(v, _at(where, k), depth + 1),
                ]
                for k, v in x.items()
            ]
            return {"dict" if kind is dict else "bunch": pairs}
        plain = _plain(x)
        return self._reference(x, where, depth) if plain is None else plain

    def _reference(self, x: Any, where: str, depth: int) -> dict[str, int]:
        place = self._places.get(id(x), -1)
        if place is None:
            raise ValueError(f"{where} holds an object that holds it; cut one of the two links.")
        if place < 0:
            self._alive.append(x)
            self._places[id(x)] = None
            entry = self._object(x, where, depth + 1)
            self.objects.append(entry)
            place = self._places[id(x)] = len(self.objects) - 1
        return {"ref": place}

    def _object(self, x: Any, where: str, depth: int) -> dict[str, Any]:
        if isinstance(x, np.ndarray) and type(x) in (np.ndarray, np.memmap):
            return self._array(x, where, depth)
        if type(x) is np.ma.MaskedArray:
            parts = {"data": np.asarray(x.data), "mask": np.ma.getmaskarray(x)}
            return {"masked": self._parts(parts, where, depth)}
        if isinstance(x, pd.Index | pd.Series | pd.DataFrame | pd.CategoricalDtype):
            return self._frame(x, where, depth)
        if type(x) in SPARSE.values():
            parts = {"data": x.data, "indices": x.indices, "indptr": x.indptr, "shape": x.shape}
            return {"sparse": type(x).__name__, "parts": self._parts(parts, where, depth)}
        if type(x) is np.random.RandomState:
            return {"random_state": self.value(x.get_state(legacy=False), where, depth)}
        if type(x) in self.names:
            state = self.state_of(x)
            if state is None:
                raise ValueError(_refusal(x, where, "its state is no dict of attributes"))
            state = dict(sorted(state.items()))  # else an earlier, stopped fit would show in it
            return {"class": self.names[type(x)], "state": self._parts(state, where, depth)}
        written = self.write_part(x, where)
        if written is None:
            raise ValueError(_refusal(x, where))
        name = self._tensor(where, np.frombuffer(written[1], "uint8"))
        return {"part": written[0], "tensor": name}

    def _parts(self, parts: Mapping[str, Any], where: str, depth: int) -> dict[str, Any]:
        dot = f"{where}." if where else ""
        return {name: self.value(v, f"{dot}{name}", depth + 1) for name, v in parts.items()}

    def _tensor(self, where: str, x: np.ndarray, ending: str = "") -> str:
        """Keep an array under the name of its place; returns that name."""
        name, n = where, 1
        while name + ending in self.tensors:
            name, n = f"{where}#{n}", n + 1
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("=")).reshape(x.shape)
        self.tensors[name + ending] = x
        return name

    def _array(self, x: np.ndarray, where: str, depth: int) -> dict[str, Any]:
        # The layout decides the order of sums in BLAS, and predictions shall be equal to the bit.
        fortran = x.ndim > 1 and x.flags.f_contiguous and not x.flags.c_contiguous
        entry: dict[str, Any] = {"shape": list(x.shape)} | ({"order": "F"} if fortran else {})
        if x.dtype.name in TENSOR_KINDS:
            return {"array": self._tensor(where, x), "dtype": x.dtype.name, **entry}
        if x.dtype.kind in "mM":
            name = self._tensor(where, np.ascontiguousarray(x).view("int64"))
            return {"array": name, "dtype": x.dtype.name, **entry}
        items = x.ravel().tolist()
        if x.dtype.kind == "U" or (x.dtype == object and all(type(i) is str for i in items)):
            encoded = [item.encode("utf-8", "surrogatepass") for item in items]
            name = self._tensor(where, np.frombuffer(b"".join(encoded), "uint8"), ".utf8")
            self.tensors[f"{name}.ends"] = np.cumsum([len(e) for e in encoded], dtype="int64")
            kind = "object" if x.dtype == object else f"U{x.dtype.itemsize // 4}"
            return {"words": name, "dtype": kind, **entry}
        if x.dtype == object:
            cells = [self.value(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(items)]
            return {"cells": cells, **entry}
        raise ValueError(_refusal(x, where, f"its dtype is {x.dtype}"))

    def _frame(self, x: Any, where: str, depth: int) -> dict[str, Any]:
        def part(y: Any, name: str) -> Any:
            return self.value(y, f"{where}.{name}", depth + 1)

        if isinstance(x, pd.RangeIndex):
            return {"range": [x.start, x.stop, x.step], "name": part(x.name, "name")}
        if isinstance(x, pd.MultiIndex):
            levels = [x.get_level_values(i) for i in range(x.nlevels)]
            return {"multiindex": [part(v, f"level{i}") for i, v in enumerate(levels)]}
        if isinstance(x, pd.CategoricalDtype):
            return {"categories": part(x.categories, "categories"), "ordered": bool(x.ordered)}
        if isinstance(x, pd.DataFrame):
            columns = [
                self._column(x.iloc[:, j], f"{where}.column{j}", depth) for j in range(x.shape[1])
            ]
            labels = {"columns": part(x.columns, "columns"), "index": part(x.index, "index")}
            return {"frame": columns, **labels}
        values = self._column(x, where, depth)
        name = part(x.name, "name")
        if isinstance(x, pd.Series):
            return {"series": values, "name": name, "index": part(x.index, "index")}
        return {"index": values, "name": name}

    def _column(self, x: Any, where: str, depth: int) -> dict[str, Any]:
        """Values of a Series or Index with their dtype."""
        kind = x.dtype
        if isinstance(kind, np.dtype):
            return {"numpy": self.value(np.array(x.to_numpy()), f"{where}.values", depth)}
        if isinstance(kind, pd.CategoricalDtype):
            codes = np.asarray(x.codes if isinstance(x, pd.Index) else x.cat.codes)
            parts = {"codes": codes, "dtype": kind}
            return {"categorical": self._parts(parts, where, depth)}
        values = [None if v is pd.NA or v != v else v for v in x.astype(object)]
        if isinstance(kind, pd.StringDtype):
            missing = "NA" if kind.na_value is pd.NA else "nan"
            return {"strings": self.value(values, where, depth), "missing": missing}
        if kind.name in NULLABLE:
            return {"nullable": self.value(values, where, depth), "dtype": kind.name}
        raise ValueError(_refusal(x, where, f"its dtype is {kind}"))


NULLABLE = {
    "boolean", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64",
    "Float32", "Float64",
}  # fmt: skip


def _at(where: str, key: Any) -> str:
    return f"{where}[{key!r}]" if isinstance(key, str | Number) else f"{where}[...]"


def _plain(x: Any) -> dict[str, Any] | None:
    """Small things without identity."""
    if x is pd.NA or x is pd.NaT:
        return {"pandas": "NA" if x is pd.NA else "NaT"}
    if isinstance(x, np.generic):
        if x.dtype.kind in "mM":
            return {"numpy": [x.dtype.name, int(x.view("int64"))]}
        if x.dtype.name in TENSOR_KINDS:
            item = x.item()
            item = item if not isinstance(item, float) or math.isfinite(item) else repr(item)
            return {"numpy": [x.dtype.name, item]}
        return {"numpy": ["str", str(x)]} if type(x) is np.str_ else None
    if isinstance(x, pd.Timestamp):
        return {"timestamp": [x.isoformat(), x.unit]} if x.tz is None else None
    if type(x) in (datetime.date, datetime.datetime) and getattr(x, "tzinfo", None) is None:
        return {type(x).__name__: x.isoformat()}
    if type(x) is slice:
        ends = [x.start, x.stop, x.step]
        return {"slice": ends} if all(e is None or type(e) is int for e in ends) else None
    if isinstance(x, np.dtype):
        return {"dtype": x.str} if x.names is None and len(x.str) < 20 else None
    if isinstance(x, PurePath):
        return {"path": str(x)}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    if isinstance(x, type):
        return next(({"type": name} for name, kind in TYPES.items() if kind is x), None)
    return None


def _refusal(x: Any, where: str, why: str = "") -> str:
    kind = type(x)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    place = where or "The estimator itself"
    if isinstance(x, types.FunctionType | types.MethodType | types.BuiltinFunctionType):
        return (
            f"{place} is the function {getattr(x, '__qualname__', '?')!r}, and a saved model holds "
            "no code; give what it returns (such as a list of columns) instead of the function."
        )
    remedy = "set it to None or leave it out before saving"
    if not why and hasattr(x, "get_params"):
        remedy = (
            f"if {kind.__name__} is yours and holds plain values, give classes=[{kind.__name__}] "
            "to save and to load"
        )
    return f"{place} is of type {name}, which cannot be saved{why and f' ({why})'}; {remedy}."


# ---------------------------------------------------------------- reading


class Decoder:
    """Builds the objects of a manifest again, each from those before it.

    Parameters
    ----------
    tensors : dict of str to array
    classes : dict of str to class
        The only classes that can come out, besides those of this module.
    readers : dict of str to callable
        Reads what another library wrote.
    set_state : callable
        Gives a bare object its state.
    """

    def __init__(
        self,
        tensors: dict[str, np.ndarray],
        classes: dict[str, type],
        readers: Reader,
        set_state: Callable[[Any, dict[str, Any]], None],
    ) -> None:
        self.tensors, self.classes, self.readers = dict(tensors), classes, readers
        self.set_state = set_state
        self.built: list[Any] = []

    def model(self, objects: Any, root: Any) -> Any:
        """The object that `root` is, with every entry and every array used."""
        _need(isinstance(objects, list), "its table of objects is missing")
        for entry in objects:
            _need(isinstance(entry, dict), "an object is not described")
            self.built.append(self._object(entry))
        found = self.value(root)
        _need(not self.tensors, f"it has {len(self.tensors)} arrays that belong to nothing")
        return found

    def value(self, x: Any) -> Any:
        """The value of JSON."""
        if x is None or isinstance(x, bool | int | float | str):
            return x
        if isinstance(x, list):
            return [self.value(item) for item in x]
        _need(isinstance(x, dict) and len(x) == 1, "a value is neither plain nor of one kind")
        ((kind, content),) = x.items()
        if kind == "ref":
            _need(type(content) is int and 0 <= content < len(self.built), "a reference is wrong")
            return self.built[content]
        if kind in ("tuple", "set", "frozenset"):
            _need(isinstance(content, list), f"a {kind} is no list")
            items = (self.value(item) for item in content)
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)
        if kind in ("dict", "bunch"):
            pairs = [(self.value(key), self.value(item)) for key, item in content]
            found = dict(pairs)
            _need(len(found) == len(pairs), "a key stands twice")
            return found if kind == "dict" else Bunch(**found)
        _need(kind in SIMPLE, f"{kind!r} is no kind of value")
        return SIMPLE[kind](content)

    def _object(self, entry: dict[str, Any]) -> Any:
        if "class" in entry:
            return self._of_class(entry["class"], self._state(entry["state"]))
        if "part" in entry:
            _need(entry["part"] in self.readers, f"{entry['part']!r} is no kind of part")
            return self.readers[entry["part"]](self._take(entry["tensor"]).tobytes())
        for kind, build in (
            ("array", self._array), ("words", self._words), ("cells", self._cells),
            ("masked", self._masked), ("sparse", self._sparse), ("random_state", self._random),
            ("range", self._range), ("multiindex", self._multiindex),
            ("categories", self._categories), ("frame", self._frame), ("series", self._series),
            ("index", self._index),
        ):  # fmt: skip
            if kind in entry:
                return build(entry)
        raise LoadError("an object is of no known kind")

    def _of_class(self, name: Any, state: dict[str, Any]) -> Any:
        if not isinstance(name, str) or name not in self.classes:
            raise LoadError(
                f"it names the class {str(name)[:80]!r}, which is none of those that load builds "
                "(a class of your own, if you trust its code: load(..., classes=[TheClass]))"
            )
        kind = self.classes[name]
        x = kind.__new__(kind)
        self.set_state(x, state)
        return x

    def _state(self, parts: Any) -> dict[str, Any]:
        _need(isinstance(parts, dict), "a state is no dict")
        _need(not any(name.startswith("__") for name in parts), "a state sets what is no state")
        return {name: self.value(x) for name, x in parts.items()}

    def _take(self, name: Any) -> np.ndarray:
        _need(isinstance(name, str) and name in self.tensors, f"the array {name!r} is missing")
        return self.tensors.pop(name)

    def _array(self, entry: dict[str, Any]) -> np.ndarray:
        raw, kind = self._take(entry["array"]), _dtype(entry["dtype"])
        stored = np.dtype("int64") if kind.kind in "mM" else kind
        _need(
            raw.dtype == stored and list(raw.shape) == entry["shape"],
            f"the array {entry['array']!r} has another shape or dtype than the manifest says",
        )
        return self._laid_out(raw.view(kind), entry)

    def _laid_out(self, x: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
        shape = entry["shape"]
        _need(math.prod(shape) == x.size, "an array has another size than the manifest says")
        return np.array(x.reshape(shape), order="F" if entry.get("order") == "F" else "C")

    def _words(self, entry: dict[str, Any]) -> np.ndarray:
        flat = self._take(f"{entry['words']}.utf8").tobytes()
        ends = self._take(f"{entry['words']}.ends")
        rising = ends.ndim == 1 and ends.dtype == "int64" and (np.diff(ends, prepend=0) >= 0).all()
        _need(rising and (ends[-1] if len(ends) else 0) == len(flat), "a list of words is broken")
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        found = [
            flat[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)
        ]
        if entry["dtype"] == "object":
            return self._laid_out(_objects(found), entry)
        width = str(entry["dtype"]).removeprefix("U")
        _need(width.isdigit() and len(width) < 7, "a list of words has no width")
        longest = max(map(len, found), default=0)
        _need(longest <= int(width) <= max(64, 4 * longest), "words are wider than they say")
        return self._laid_out(np.array(found, dtype=f"U{width}"), entry)

    def _cells(self, entry: dict[str, Any]) -> np.ndarray:
        return self._laid_out(_objects([self.value(x) for x in entry["cells"]]), entry)

    def _masked(self, entry: dict[str, Any]) -> Any:
        parts = self._state(entry["masked"])
        return np.ma.MaskedArray(parts["data"], parts["mask"])

    def _sparse(self, entry: dict[str, Any]) -> Any:
        parts = self._state(entry["parts"])
        table = SPARSE[entry["sparse"]](
            (parts["data"], parts["indices"], parts["indptr"]), shape=parts["shape"]
        )
        table.check_format(full_check=True)  # indices out of range would be read by C code
        return table

    def _random(self, entry: dict[str, Any]) -> np.random.RandomState:
        stream = np.random.RandomState()
        stream.set_state(self.value(entry["random_state"]))
        return stream

    def _range(self, entry: dict[str, Any]) -> pd.Index:
        return pd.RangeIndex(*entry["range"], name=self.value(entry["name"]))

    def _multiindex(self, entry: dict[str, Any]) -> pd.Index:
        return pd.MultiIndex.from_arrays([self.value(x) for x in entry["multiindex"]])

    def _categories(self, entry: dict[str, Any]) -> pd.CategoricalDtype:
        return pd.CategoricalDtype(self.value(entry["categories"]), entry["ordered"])

    def _frame(self, entry: dict[str, Any]) -> pd.DataFrame:
        index = self.value(entry["index"])
        columns = [self._column(x) for x in entry["frame"]]
        # With its dtype, or pandas would read words of an object column as its own strings.
        table = {j: pd.Series(x, index, x.dtype) for j, x in enumerate(columns)}
        return pd.DataFrame(table, index=index).set_axis(self.value(entry["columns"]), axis=1)

    def _series(self, entry: dict[str, Any]) -> pd.Series:
        values, name = self._column(entry["series"]), self.value(entry["name"])
        return pd.Series(values, self.value(entry["index"]), values.dtype, name)

    def _index(self, entry: dict[str, Any]) -> pd.Index:
        values = self._column(entry["index"])
        return pd.Index(values, dtype=values.dtype, name=self.value(entry["name"]))

    def _column(self, x: dict[str, Any]) -> Any:
        if "numpy" in x:
            return self.value(x["numpy"])
        if "categorical" in x:
            parts = self._state(x["categorical"])
            return pd.Categorical.from_codes(parts["codes"], dtype=parts["dtype"])
        if "strings" in x:
            missing = pd.NA if x["missing"] == "NA" else np.nan
            values = [missing if v is None else v for v in self.value(x["strings"])]
            return pd.array(values, dtype=pd.StringDtype(na_value=missing))
        _need(x.get("dtype") in NULLABLE, "a column is of no known kind")
        return pd.array([pd.NA if v is None else v for v in self.value(x["nullable"])], x["dtype"])


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise LoadError(what)


def _objects(items: list[Any]) -> np.ndarray:
    """One item a cell, whatever the items are."""
    x = np.empty(len(items), dtype=object)
    x[:] = items if not any(isinstance(i, list | tuple | np.ndarray) for i in items) else None
    for place, item in enumerate(items):
        x[place] = item
    return x


def _dtype(text: Any) -> np.dtype:
    _need(isinstance(text, str) and len(text) < 20, "a dtype is not named")
    return np.dtype(text)


def _scalar(content: Any) -> Any:
    kind, item = content
    if kind == "str":
        _need(isinstance(item, str), "a word is no word")
        return np.str_(item)
    found = _dtype(kind)
    _need(found.kind in "biufmM", f"{kind!r} is no kind of number")
    return np.array(item).astype(found)[()]


SIMPLE: dict[str, Callable[[Any], Any]] = {
    "float": lambda x: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[x],
    "pandas": lambda x: {"NA": pd.NA, "NaT": pd.NaT}[x],
    "numpy": _scalar,
    "timestamp": lambda x: pd.Timestamp(x[0]).as_unit(x[1]),
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "slice": lambda x: slice(*x),
    "dtype": _dtype,
    "path": Path,
    "device": torch.device,
    "type": lambda x: TYPES[x],
}
