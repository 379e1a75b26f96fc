"""Every public object is documented the numpydoc way, every parameter of it included."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
from numpydoc.docscrape import ClassDoc, FunctionDoc
from numpydoc.validate import validate

import ehrfuse
from ehrfuse.base import TorchEstimator

MODULES = ["ehrfuse", "ehrfuse.datasets", "ehrfuse.evaluation", "ehrfuse.base"]
# Style rules of numpydoc that this house does not follow: extended summaries, See Also everywhere,
# and periods after one-word types.
SKIP = {"ES01", "SA01", "SA04", "EX01", "GL01", "GL08", "PR06", "PR07", "PR08", "PR09", "RT02",
        "RT03", "RT04", "RT05", "YD01", "SS06", "GL02", "GL03", "PR10", "SS05"}  # fmt: skip


def public_objects():
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{module_name}.{name}"


def public_methods():
    for path in public_objects():
        thing = resolve(path)
        if inspect.isclass(thing):
            for name, member in vars(thing).items():
                member = inspect.unwrap(member) if callable(member) else member
                if inspect.isfunction(member) and not name.startswith("_"):
                    yield f"{path}.{name}"


def resolve(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", [*public_objects(), *public_methods()])
def test_numpydoc(path):
    found = [(code, text) for code, text in validate(path)["errors"] if code not in SKIP]
    # Shared parameters are documented once, grouped in a line of names that refers to the base.
    found = [(code, text) for code, text in found if code not in {"PR01", "PR02", "PR03"}]
    assert not found


def documented(thing):
    doc = ClassDoc(thing) if inspect.isclass(thing) else FunctionDoc(thing)
    names = [name for entry in doc["Parameters"] for name in entry.name.split(",")]
    return {name.strip().lstrip("*") for name in names}


@pytest.mark.parametrize("path", list(public_objects()))
def test_every_parameter_is_documented(path):
    thing = resolve(path)
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        pytest.skip("has the parameters of its base")
    real = set(inspect.signature(thing).parameters) - {"self", "args", "kwargs"}
    assert documented(thing) == real


@pytest.mark.parametrize("path", list(public_objects()))
def test_defaults_in_docstrings_are_true(path):
    thing = resolve(path)
    if inspect.isclass(thing) and issubclass(thing, Exception):
        pytest.skip("takes a message alone")
    text = inspect.getdoc(thing)
    for name, parameter in inspect.signature(thing).parameters.items():
        stated = re.search(rf"^{re.escape(name)} : .*default=([^\n]+)$", text, re.MULTILINE)
        if stated and parameter.default is not inspect.Parameter.empty:
            value = stated.group(1).strip().rstrip("\\").strip()
            if "..." not in value and value != "":
                assert ast.literal_eval(value) == parameter.default, name


def test_shared_parameters_have_the_defaults_of_the_base():
    """Another default is allowed where the class documents it in an entry of its own."""
    base = inspect.signature(TorchEstimator).parameters
    for name in ehrfuse.__all__:
        kind = getattr(ehrfuse, name)
        if inspect.isclass(kind) and issubclass(kind, TorchEstimator):
            for key, parameter in inspect.signature(kind).parameters.items():
                if key in base and parameter.default != base[key].default:
                    own = re.search(rf"^{key} : .*default=", inspect.getdoc(kind), re.MULTILINE)
                    assert own, f"{name}.{key} has another default than the base; document it"


def test_marked_differences_stand_in_the_notes():
    """Where a method file marks a NOTE[DIFF], a public class of it lists differences in Notes."""
    for path in (Path(ehrfuse.__file__).parent / "methods").glob("*.py"):
        # A private file of the same name holds the torch side of a long one.
        texts = [p.read_text(encoding="utf-8") for p in (path, path.with_name(f"_{path.name}"))
                 if p.exists()]  # fmt: skip
        marks = "".join(texts).count("NOTE[DIFF]")
        if marks and not path.name.startswith("_"):
            module = importlib.import_module(f"ehrfuse.methods.{path.stem}")
            notes = "\n".join(
                "\n".join(ClassDoc(getattr(module, name))["Notes"]) for name in module.__all__
            )
            assert notes.count("* ") >= marks - 1, f"{path.name} marks {marks} differences"
