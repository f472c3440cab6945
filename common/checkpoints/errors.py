"""The error that callers see, and the two that the readers raise inside, before the file's name is known."""

import os
import stat
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint cannot be read or written. `str()` is one line: the file, what is wrong, what to do."""


def failure(path, text):
    """The CheckpointError that says `text` of the file `path`."""
    return CheckpointError(f"{printable(path, 4096)}: {text}")


class Damaged(Exception):
    """The bytes are not what the format asks for."""


class Refused(Exception):
    """The bytes ask for something that a checkpoint has no need of."""


def printable(text, limit=160):
    """`text`, which may come from a hostile file, as one line of at most `limit` printable characters."""
    head = str(text)[: limit + 1]
    line = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in head)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def reason(error):
    """The first line of an exception's text; for an OSError the system's own words."""
    try:
        text = getattr(error, "strerror", None) or str(error)
    except RecursionError:  # it quotes something that nests deeply
        text = ""
    return printable(text.strip().split("\n")[0] or type(error).__name__)


def read_file(path):
    """Contents of a regular file as bytes. Raises Damaged (no such file, a folder, a pipe, unreadable, empty)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Damaged("it is not a file but a folder, pipe or device")
        data = Path(path).read_bytes()
    except OSError as error:
        raise Damaged(f"it cannot be read ({reason(error)})") from error
    if not data:
        raise Damaged("it is empty")
    return data
