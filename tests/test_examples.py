"""Examples and the README's code run: with few rows and one epoch here, as they stand by hand."""

import re
import runpy
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import ehrfuse.datasets
from ehrfuse import _estimator

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """One epoch a fit, 300 real stays, and a folder of its own."""
    train, load = _estimator.train, ehrfuse.datasets.load_physionet2012

    def one_epoch(*args, max_epochs, **options):
        return train(*args, max_epochs=1, **options)

    def few_stays(**options):
        data = load(**options)
        data["X"], data["y"] = data.X.iloc[:300], data.y.iloc[:300]
        return data

    monkeypatch.setattr(_estimator, "train", one_epoch)
    monkeypatch.setattr(ehrfuse.datasets, "load_physionet2012", few_stays)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    plt.close("all")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example(path, small, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


# Packages of the extra `ecosystem`; .ci/ecosystem has them.
ECOSYSTEM = {"shap", "fairlearn", "optuna", "optuna_integration", "skore", "mlflow", "skops"}
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_of_a_page(page, small):
    if page == "docs/ecosystem.md":  # what other libraries warn of is theirs
        warnings.simplefilter("ignore")  # pytest takes it back after the test
    scope = {}
    for block in blocks(page):
        try:
            exec(compile(block, page, "exec"), scope)
        except ModuleNotFoundError as error:  # at the top of its block, so nothing ran
            if page != "docs/ecosystem.md" or error.name not in ECOSYSTEM:
                raise


def test_ci_runs_the_commands_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)[:2]
    assert first.strip().endswith("python examples/plot_quickstart.py")
    assert second.strip().endswith("pytest")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert second.strip() in ci
    assert "python -m venv .venv && . .venv/bin/activate" in first
    assert "python -m venv .venv && . .venv/bin/activate" in ci


def test_links_of_pages_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            if not target.startswith("http"):
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
