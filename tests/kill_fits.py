"""Kill fits with SIGKILL at random moments, let them go on, and compare the weights they end with.

Run by test_checkpoint.py in a process of its own, which forks one child per attempt, so that the
packages are loaded once. Prints one JSON object: by case, how often a fit was hit, how many steps
its last attempt did and a whole one does, and whether all weights are equal bit by bit.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.base import is_classifier

import ehrfuse
import ehrfuse._checkpoint
from ehrfuse._checkpoint import Run
from ehrfuse.datasets import make_ehr

torch.set_num_threads(1)
N_KILLS = 3
COMMON = {"max_epochs": 3, "random_state": 0, "groups": "subject_id"}
SMALL = {"d_model": 8, "n_members": 2, **COMMON}
TABNET = {"n_d": 8, "n_a": 8, **COMMON}
CASES = {
    "fusion": (ehrfuse.FusionClassifier, SMALL | {"validation_fraction": 0.2, "patience": 3}),
    "mmnar": (
        ehrfuse.MMNARFusionClassifier,
        SMALL | {"pretrained": ehrfuse.MMNARPretrainer(d_model=8, n_members=2, max_epochs=2)},
    ),
    "tabnet": (
        ehrfuse.TabNetClassifier,
        TABNET | {"pretrained": ehrfuse.TabNetPretrainer(max_epochs=2)},
    ),
    "clip": (ehrfuse.ClipEHRAligner, TABNET),
    "masked_labs": (ehrfuse.MaskedLabPretrainer, COMMON | {"d_model": 8, "width": 16}),
    "rapt": (
        ehrfuse.RAPTClassifier,
        SMALL | {"pretrained": ehrfuse.RAPTPretrainer(d_model=8, n_members=2, max_epochs=2)},
    ),
    "medfuse": (ehrfuse.MEDFuseClassifier, SMALL | {"width": 16, "batch_size": 16}),
}
steps, pipe = 0, None


def fit(name, cohort, checkpoint=None):
    kind, params = CASES[name]
    read = {n: m for n, m in cohort.modalities.items() if isinstance(m, kind._accepts)}
    model = kind(read, checkpoint=checkpoint, **params)
    return model.fit(cohort.X, cohort.y) if is_classifier(model) else model.fit(cohort.X)


def save(model, path):
    np.savez(path, steps=steps, **{k: t.numpy() for k, t in model.module_.state_dict().items()})


def attempt(name, cohort, folder, n_steps=None, wait=0.0):
    """Fit in a child that is killed some time after some steps; answer whether it was at work."""
    global pipe
    reader, pipe = os.pipe()
    child = os.fork()
    if not child:
        save(fit(name, cohort, folder), folder / "weights.npz")
        os._exit(0)
    os.close(pipe)
    pipe = None
    if n_steps is not None:
        while n_steps and (done := os.read(reader, n_steps)):  # one byte a step, none at the end
            n_steps -= len(done)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reader)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"{name}: the child failed")
    return os.WIFSIGNALED(status)


def case(name, cohort, folder, rng):
    global steps
    folder.mkdir()
    steps = 0
    save(fit(name, cohort), folder / "whole.npz")
    whole, steps = steps, 0
    moments = [(rng.randint(1, whole // 2), rng.uniform(0.0, 0.02)) for _ in range(N_KILLS)]
    hits = sum(attempt(name, cohort, folder, *moment) for moment in moments)
    attempt(name, cohort, folder)
    one, other = (np.load(folder / f"{part}.npz") for part in ("whole", "weights"))
    names = [k for k in one.files if k != "steps"]
    return {
        "hits": hits, "steps": int(other["steps"]), "whole": whole,
        "equal": all(one[k].tobytes() == other[k].tobytes() for k in names),
    }  # fmt: skip


def main(folder):
    count = Run.count

    def counted(self, terms, rows):
        global steps
        steps += 1
        count(self, terms, rows)
        if pipe is not None:
            os.write(pipe, b".")

    Run.count = counted
    ehrfuse._checkpoint.EVERY, ehrfuse._checkpoint.SHARE = 0.0, np.inf  # save after every step
    cohort = make_ehr(n_samples=72, missing="mnar", random_state=0, as_bunch=True)
    rng = random.Random(0)
    print(json.dumps({name: case(name, cohort, folder / name, rng) for name in CASES}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
