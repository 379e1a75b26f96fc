"""Progress of long fits: scikit-learn's own callbacks where they exist, else a quiet bar."""

import multiprocessing
import sys
from contextlib import contextmanager

from tqdm.auto import tqdm

from ehrfuse._runtime import world

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # scikit-learn below 1.9

    class CallbackSupportMixin:
        """Stands in where scikit-learn has no callbacks."""

    def with_callbacks(fit):
        """Leave `fit` as it is."""
        return fit


LONG = 10.0  # seconds before a fit is worth a bar

with_progress = with_callbacks


class ProgressMixin(CallbackSupportMixin):
    """Gives `_progress`, which reports every epoch to callbacks, to a bar or to a line of text."""

    @contextmanager
    def _progress(self):
        """Yield ``report(record) -> stop`` for the training loop."""
        name, n_epochs = type(self).__name__, self.max_epochs
        context = None
        if getattr(self, "_skl_callbacks", None):
            context = self._init_callback_context(max_subtasks=n_epochs)
            context.call_on_fit_task_begin(estimator=self)
        quiet = self.verbose is not None or context is not None or not _watched()
        bar = None  # even a disabled bar starts a thread
        if not quiet:
            bar = tqdm(total=n_epochs, desc=name, unit="epoch", delay=LONG, leave=False)

        def report(record):
            if bar is not None:
                bar.update(record["epoch"] + 1 - bar.n)  # a fit may go on in the middle
            if self.verbose and world()[0] == 0:
                terms = ", ".join(f"{k} {v:.4g}" for k, v in record.items() if k != "epoch")
                print(f"{name} epoch {record['epoch']}: {terms}", flush=True)
            if context is None:
                return False
            epoch = context.subcontext(task_name="epoch")
            epoch.call_on_fit_task_begin(estimator=self)
            return bool(epoch.call_on_fit_task_end(estimator=self))

        try:
            yield report
        finally:
            if bar is not None:
                bar.close()
            if context is not None:
                context.call_on_fit_task_end(estimator=self)


def progress_bar(total, name, unit, verbose=None):
    """Bar over many fits: None shows it at a terminal or in a notebook, True always, False never.

    None where there is nothing to show: even a disabled bar starts a thread.
    """
    shown = _watched() if verbose is None else bool(verbose)
    return tqdm(total=total, desc=name, unit=unit, leave=False) if shown else None


def _watched():
    """Whether somebody looks: a terminal or a notebook, and not a worker process."""
    if multiprocessing.parent_process() is not None or world()[0]:
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules
