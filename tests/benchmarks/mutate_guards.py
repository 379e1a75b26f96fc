"""Take every leak guard out, one by one, and see that a test fails.

A guard that no test misses is a comment. Works on a copy; prints a table and ends with 1 if a
mutant survives. ``python tests/benchmarks/mutate_guards.py [--only WORD]``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Guard(NamedTuple):
    """What keeps something out, the line that does it, that line without it, and its tests."""

    name: str
    file: str
    line: str
    without: str
    tests: str
    chosen: str = ""


BASE, RECTIFIER = "ehrfuse/_estimator.py", "ehrfuse/rectifier.py"
MEDFUSE = "ehrfuse/methods/medfuse.py"
RISK, TASKS = "ehrfuse/methods/knowledge_risk.py", "ehrfuse/nn/visit_tasks.py"
GUARDS = (
    Guard(
        "scales and vocabularies: training rows",
        BASE, "self._fit_modalities(X_train, declared)", "self._fit_modalities(X, declared)",
        "tests/test_base.py", "validation",
    ),
    Guard(
        "pretraining: training rows",
        BASE, "self._fit_pretrained(X_train, declared, seed)",
        "self._fit_pretrained(X, declared, seed)", "tests/test_base.py", "pretraining",
    ),
    Guard(
        "validation rows: other patients",
        BASE, "groups = pd.factorize(X[self.groups])[0][rows]", "groups = np.arange(len(rows))",
        "tests/test_base.py", "patient",
    ),
    Guard(
        "class counts and scale of y: training rows",
        BASE, "y = self.target_.relearn(y, rows)", "pass", "tests/test_base.py", "validation",
    ),
    Guard(
        "null cells: neither value nor gradient",
        "ehrfuse/nn/core.py", "encoder({key: blank(t, keep) for key, t in",
        "encoder({key: t for key, t in",
        "tests/test_common.py", "FusionClassifier-null_content",
    ),
    Guard(
        "rectifier: rows its model has not seen",
        RECTIFIER, "for train, _ in parts]", "for train in [np.arange(len(code))] * len(parts)]",
        "tests/test_rectifier.py", "leak or held_out",
    ),
    Guard(
        "rectifier: patients whole",
        RECTIFIER, "np.arange(len(X)) if groups is None else _codes(X, groups)",
        "np.arange(len(X))",
        "tests/test_rectifier.py", "leak or group or patient",
    ),
    Guard(
        "stage-1 features: out of fold",
        RISK, "score[test] = self._score(model, frame.iloc[test])",
        "score[test] = self._score(two.fit_one(self.reader, frame, y), frame.iloc[test])",
        "tests/methods/test_knowledge_risk.py", "own_label or chance",
    ),
    Guard(
        "stage-1 folds: patients whole",
        RISK, "folds = two.folds_of(y, groups, self.n_splits, seed)",
        "folds = two.folds_of(y, None, self.n_splits, seed)",
        "tests/methods/test_knowledge_risk.py", "patient",
    ),
    Guard(
        "knowledge: nothing of the day of the cut-off or later",
        "ehrfuse/knowledge/graph.py", "(self.date < _tables.first_day(cutoff))",
        "(self.date <= _tables.first_day(cutoff))", "tests/knowledge/test_graph.py", "cutoff",
    ),
    Guard(
        "reasonability: donors are other patients",
        TASKS, "others = len(row) - own", "others = len(row) - own * 0",
        "tests/methods/test_rapt.py", "donor",
    ),
    Guard(
        "masked visits: not carried forward",
        TASKS, "value=torch.where(observed, line.value, 0.0),", "value=line.value,",
        "tests/methods/test_rapt.py", "masked",
    ),
    Guard(
        "alignment: rows of a patient are no wrong answers",
        "ehrfuse/methods/_clip_ehr.py",
        "groups = None if batch.groups is None else batch.groups[both]",
        "groups = None", "tests/methods/test_clip_ehr.py", "patient",
    ),
    Guard(
        "retrieval: a patient's own notes are not found",
        "ehrfuse/methods/clip_ehr.py",
        "cosine[self._same_patient(X, memory, rows, memory_row)] = -np.inf", "pass",
        "tests/methods/test_clip_ehr.py", "notes_of_others",
    ),
    Guard(
        "two stages: scores of notes out of fold",
        MEDFUSE, "self._fit_part(fold, rows.at(inside), **validation)",
        "self._fit_part(fold, rows, **validation)",
        "tests/methods/test_medfuse.py", "never_saw or own_text_score or not_seen_the_patient",
    ),
    Guard(
        "two stages: patients whole",
        MEDFUSE, "people, kind = pd.factorize(rows.X[self.groups])[0], StratifiedGroupKFold",
        "pass", "tests/methods/test_medfuse.py", "patient",
    ),
    Guard(
        "two stages and thresholds: rows of weight 0",
        MEDFUSE, "Rows(X, y, encoded, weight).at(np.flatnonzero(weight))",
        "Rows(X, y, encoded, weight + 1)",
        "tests/methods/test_medfuse.py", "weight_zero",
    ),
    Guard(
        "hidden terms: across line breaks",
        "ehrfuse/methods/lab_text.py", r'r"\s+".join(map(re.escape, words))',
        '" ".join(map(re.escape, words))', "tests/methods/test_lab_text.py", "hidden",
    ),
    Guard(
        "thresholds: validation rows",
        MEDFUSE, "self._infer(self.module_, validation))",
        "self._infer(self.module_, data))", "tests/methods/test_medfuse.py", "threshold",
    ),
    Guard(
        "linear path: log-odds of training rows out of fold",
        "ehrfuse/methods/_linear_path.py",
        "_solve(features[inside], y[inside], weight[inside], target)",
        "_solve(features, y, weight, target)",
        "tests/methods/test_medfuse.py", "never_saw",
    ),
    Guard(
        "cohorts: what is stored later does not count",
        "ehrfuse/datasets/_cohort.py", " AND e.known <= k.landmark", "",
        "tests/datasets/test_time_travel.py", "mimic",
    ),
    Guard(
        "events: nothing after the prediction",
        "ehrfuse/modalities/_streams.py", "if late:", "if False:",
        "tests/modalities/test_sequences.py", "after_the_prediction",
    ),
    Guard(
        "vocabulary: words of few notes are not kept",
        "ehrfuse/modalities/_words.py",
        "found[n_notes >= min_count], n_notes[n_notes >= min_count]",
        "found, n_notes", "tests/modalities/test_text.py", "rare",
    ),
)  # fmt: skip


def main():
    """Mutate, test, print."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", default="", help="guards whose name holds this word")
    only = options.parse_args().only
    guards = [guard for guard in GUARDS if only in guard.name]
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "ehrfuse-copy"
        leave = shutil.ignore_patterns(".*", "results", "build", "_build", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=leave)
        for guard in guards:
            found = survives(copy, guard)
            alive += [guard.name] * found
            print(f"{'SURVIVES' if found else 'found   '}  {guard.name}", flush=True)
    sys.exit(f"{len(alive)} of {len(guards)} mutants survive." if alive else None)


def survives(copy, guard):
    """Whether the tests pass without the guard; they must pass with it."""
    path = copy / guard.file
    source = path.read_text(encoding="utf-8")
    if source.count(guard.line) != 1:
        sys.exit(f"{guard.file} holds {source.count(guard.line)} times: {guard.line}")
    if not passes(copy, guard):
        sys.exit(f"{guard.name}: its tests fail with the guard in place, or there are none.")
    try:
        path.write_text(source.replace(guard.line, guard.without), encoding="utf-8")
        return passes(copy, guard)
    finally:
        path.write_text(source, encoding="utf-8")


def passes(copy, guard):
    """Whether the tests of a guard pass; data lie where they lie for this checkout."""
    data = os.environ.get("EHRFUSE_DATA", str(ROOT.parent / "shared" / "data"))
    env = os.environ | {"PYTHONPATH": str(copy), "EHRFUSE_DATA": data}
    chosen = ["-k", guard.chosen] if guard.chosen else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    return (
        subprocess.run(
            [*command, guard.tests, *chosen], cwd=copy, env=env, capture_output=True
        ).returncode
        == 0
    )


if __name__ == "__main__":
    main()
