"""One process at a time in a data folder: ranks of one run, or runs of a sweep, prepare a data set once."""

import contextlib
from pathlib import Path

from common.data.image_set import DataError


@contextlib.contextmanager
def locked(folder: Path, name: str):
    """Make `folder` if it is missing and hold the lock `folder/.<name>.lock`; waits for as long as another holds it.

    The lock ends with the process that holds it, however it ends. Raises DataError if the folder cannot be written.
    """
    from filelock import FileLock  # a requirement of torch itself

    lock = FileLock(str(folder / f".{name}.lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"cannot write in {folder} ({error.strerror or error}); give a writable --data-dir, or use --embedded-data"
        ) from None
    try:
        yield
    finally:
        lock.release()
