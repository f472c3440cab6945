"""TensorBoard's event files, where a library that writes them is there; a run goes on without.

The same text in all five papers: each stands alone, and a test keeps the copies equal.
"""

import functools
import importlib
import logging

_log = logging.getLogger("effnets")
LIBRARIES = ("tensorboardX", "torch.utils.tensorboard")  # both write the same files; the first that imports is taken


class _NoEvents:
    """Stands in for a SummaryWriter where nothing can write events."""

    def add_scalar(self, name, value, step):
        pass

    def flush(self):
        pass

    def close(self):
        pass


@functools.cache
def _writer():
    """A library's SummaryWriter, or None: then the log says so, once, and why.

    Whatever is wrong with an optional library must not stop the run: one that is older than protobuf or NumPy raises
    more than ImportError.
    """
    reasons = []
    for name in LIBRARIES:
        try:
            return importlib.import_module(name).SummaryWriter
        except Exception as error:
            reasons.append(str(error).partition("\n")[0])
    _log.warning("no TensorBoard events, metrics.jsonl has the same numbers: %s", "; ".join(reasons))
    return None


def open_events(directory, purge_step=None):
    """Writer of event files in a folder, with add_scalar(name, value, step), flush() and close().

    purge_step: TensorBoard forgets what earlier files there say of this step and later ones. Without a library that
    writes events, the same methods do nothing.
    """
    writer = _writer()
    return _NoEvents() if writer is None else writer(str(directory), purge_step=purge_step)
