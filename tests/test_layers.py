"""Who may import whom: the table of docs/contributing.md, enforced by reading the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ehrfuse

PACKAGE = Path(ehrfuse.__file__).parent
HEAVY = {
    "transformers", "tokenizers", "pytorch_tabnet", "matplotlib", "duckdb", "PIL", "pooch", "peft",
    "bm25s", "graspologic_native", "ahocorasick", "rapidfuzz", "xgboost", "imblearn", "ibis",
    "skops", "huggingface_hub", "mapie", "accelerate", "datasketch", "sacrebleu",
    "rouge_score", "nltk",
}  # fmt: skip

# Layer -> what it may import: our own layers, then packages beside the standard library.
LAYERS = {
    "_runtime": (set(), {"torch"}),
    "_patterns": (set(), {"numpy", "pandas"}),
    "nn": ({"nn"}, {"torch"}),
    "_cache": ({"_runtime"}, {"numpy", "tqdm"}),
    "_hub": (
        {"_cache", "_runtime"},
        {"numpy", "torch", "transformers", "tokenizers", "tqdm", "safetensors", "peft", "joblib"},
    ),
    "knowledge": (
        {"_hub", "_hub_causal", "_runtime"},
        {
            "numpy",
            "scipy",
            "pandas",
            "pyarrow",
            "sklearn",
            "tqdm",
            "bm25s",
            "graspologic_native",
            "ahocorasick",
            "rapidfuzz",
        },
    ),
    "_hub_causal": ({"_hub", "_runtime"}, {"numpy", "torch", "transformers"}),
    "_data": (set(), {"numpy", "torch"}),
    "_targets": ({"_runtime", "nn"}, {"numpy", "pandas", "torch", "sklearn"}),
    "_distributed": ({"_data", "_runtime", "nn"}, {"numpy", "torch", "accelerate"}),
    "_checkpoint": ({"_data", "_distributed", "nn"}, {"numpy", "torch", "safetensors"}),
    "_train": ({"_checkpoint", "_data", "_distributed", "_runtime", "nn"}, {"numpy", "torch"}),
    "_progress": ({"_runtime"}, {"sklearn", "tqdm"}),
    "_offsets": (set(), {"numpy", "pandas", "sklearn", "scipy"}),
    "rectifier": ({"_offsets", "_patterns", "_runtime"}, {"numpy", "pandas", "sklearn", "scipy"}),
    "modalities": (
        {"_data", "_hub", "_hub_causal", "_patterns", "_runtime", "nn"},
        {"numpy", "pandas", "pyarrow", "sklearn", "scipy", "torch", "PIL"},
    ),
    "_frames": ({"_patterns", "modalities"}, {"pandas", "sklearn", "torch"}),
    "_handover": ({"_patterns"}, {"sklearn"}),
    "_estimator": (
        {
            "_frames",
            "_checkpoint",
            "_data",
            "_distributed",
            "_handover",
            "_patterns",
            "_progress",
            "_runtime",
            "_targets",
            "_train",
            "modalities",
        },
        {"numpy", "pandas", "sklearn", "torch"},
    ),
    "base": (
        {"_estimator", "_progress", "_runtime", "_targets", "_train"},
        {"numpy", "pandas", "sklearn"},
    ),
    "methods": (
        {"_hub", "_hub_causal", "_runtime", "base", "knowledge", "modalities", "nn", "rectifier"},
        {"numpy", "pandas", "scipy", "sklearn", "torch", "xgboost", "imblearn"},
    ),
    "_archive": (set(), {"numpy", "safetensors"}),
    "_encoding": ({"_archive"}, {"numpy", "pandas", "scipy", "sklearn", "torch"}),
    "_sklearn_parts": ({"_archive", "_runtime"}, {"numpy", "sklearn"}),
    "_saving": (
        {
            "_archive",
            "_encoding",
            "_estimator",
            "_offsets",
            "_runtime",
            "_sklearn_parts",
            "_targets",
            "knowledge",
            "methods",
            "modalities",
            "rectifier",
        },
        {"sklearn"},
    ),
    "evaluation": (
        {"_patterns", "_progress", "_runtime"},
        {"numpy", "pandas", "pyarrow", "sklearn", "scipy", "matplotlib", "datasketch"},
    ),
    "datasets": (
        {"_runtime", "modalities"},
        {"numpy", "pandas", "pyarrow", "scipy", "sklearn", "pooch", "duckdb", "tqdm"},
    ),
}
# On the CPU, TabNet's sparse projection sorts with NumPy, which is many times faster than torch.
MORE = {"nn/tabnet.py": {"numpy"}}
GROWING = {"methods", "modalities"}  # siblings do not import each other


def layer_of(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imports_of(path: Path):
    """Pairs (module, whether the import stands inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "ehrfuse":
                yield from ((f"ehrfuse.{alias.name}", id(node) in inside) for alias in node.names)
            else:
                yield node.module, id(node) in inside


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_up(path):
    layer = layer_of(path)
    ours, packages = LAYERS[layer]
    for module, inside in imports_of(path):
        top, *rest = module.split(".")
        if top in sys.stdlib_module_names:
            continue
        if top == "ehrfuse":
            target = rest[0] if rest else "(package)"
            assert target == layer or target in ours, f"{layer} imports {module}"
            if layer in GROWING and target == layer and path.name != "__init__.py":
                assert rest[1].startswith("_"), f"{path.name} imports its sibling {module}"
        else:
            more = MORE.get(path.relative_to(PACKAGE).as_posix(), set())
            assert top in packages | more, f"{layer} imports {module}"
            assert inside or top not in HEAVY, f"{path.name} imports {module} at import time"


def test_no_private_sklearn_import():
    for path in FILES:
        for module, _ in imports_of(path):
            private = any(part.startswith("_") for part in module.split("."))
            assert not (module.startswith("sklearn") and private), f"{path.name}: {module}"


def test_import_is_light():
    code = f"import sys, ehrfuse; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
