"""log.log, in the original's format: written by training runs, read by compressModel.py.

[1121 10:10:00 @training.py:95] Epoch 10 (global_step 3900) finished, time:60.00 sec.
[1121 10:10:01 @training.py:97] res1.2/is_discarded: 1
"""

import logging
import re
import shlex
from pathlib import Path

ANSI = re.compile(r"\x1b\[[0-9;]*m")
BRACKET = re.compile(r"^\[\d{4} \d\d:\d\d:\d\d @[^\]]*\]\s?")
FINISHED = re.compile(r"\(global_step (\d+)\)")
STATISTIC = re.compile(r"^(\S+): (\S+)$")


def open_log(path: Path) -> logging.Logger:
    """A logger that appends lines in the original's format to `path`; close it with `close_log`."""
    logger = logging.Logger(str(path), logging.INFO)
    handler = logging.FileHandler(path)
    handler.setFormatter(_Formatter("[%(asctime)s @%(filename)s:%(lineno)d] %(message)s", "%m%d %H:%M:%S"))
    logger.addHandler(handler)
    return logger


def close_log(logger: logging.Logger):
    for handler in logger.handlers:
        handler.close()


class _Formatter(logging.Formatter):
    def formatMessage(self, record):
        record.message = ("WRN " if record.levelno >= logging.WARNING else "") + record.message
        return super().formatMessage(record)


def messages(text: str) -> list[str]:
    """The lines of a log without colours, time stamps and the mark of a warning."""
    lines = (BRACKET.sub("", ANSI.sub("", line)) for line in text.splitlines())
    return [line.removeprefix("WRN ").rstrip() for line in lines]


def steps_in_log(lines: list[str]) -> list[int]:
    """Global steps whose statistics the log has."""
    return [int(match[1]) for match in map(FINISHED.search, lines) if match]


def statistics_at(lines: list[str], step: int) -> list[tuple[str, float, str]]:
    """(name, value, line) of every statistic printed after `(global_step <step>)`, up to the next such line.

    lines: from `messages`. Names and the step match exactly: 390 is not 3900, side_output/…/val_error no val_error.
    Raises ValueError if the log has no such step; of several such blocks the last counts.
    """
    found = None
    for line in lines:
        if match := FINISHED.search(line):
            if int(match[1]) == step:
                found = []
            elif found is not None:
                return found
        elif found is not None and (match := STATISTIC.match(line)):
            try:
                found.append((match[1], float(match[2]), line))
            except ValueError:
                continue  # a message that happens to have a colon
    if found is None:
        raise ValueError(f"no statistics of step {step}")
    return found


def network_in_log(lines: list[str]) -> tuple[str, int | None, str]:
    """(architecture, n or depth, data set) of the run, from its Argv line; size None if it was left out there.

    The family comes from the script's own name alone: paths in the flags may say anything.
    Raises ValueError if there is no such line or the script is not one of this paper.
    """
    argv = next((line for line in lines if line.startswith("Argv: ")), None)
    if argv is None:
        raise ValueError("it has no Argv line")
    script, *words = shlex.split(argv.removeprefix("Argv: "))
    name = Path(script).name
    family = next((family for family in ("cifar", "svhn", "imagenet") if name.startswith(family)), None)
    if family is None:
        raise ValueError("the dataset is unknown")
    names = ("-d", "--depth") if family == "imagenet" else ("-n", "--num_units")
    size = _value_of(words, names) or {"imagenet": 18}.get(family, 18)
    dataset = family if family != "cifar" else "cifar100" if "--cifar100" in words else "cifar10"
    return "imagenet" if family == "imagenet" else "cifar", size, dataset


def _value_of(words, names):
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag not in names:
            flag, value = (word[:2], word[2:]) if word[:2] in names and len(word) > 2 else (None, "")
        if flag in names:
            value = value or (words[index + 1] if index + 1 < len(words) else "")
            if not value.isdigit():
                raise ValueError("N could not be figured out in log.log")
            return int(value)
    return None


def discarded_in_log(lines: list[str], step: int) -> tuple[list[str], list[float], list[str]]:
    """(discarded blocks, val_error, matched lines) at `step`: blocks whose printed is_discarded is 1, network order.

    val_error: of CIFAR and SVHN, or [top-1, top-5] of ImageNet. Raises ValueError if step or states are missing.
    """
    statistics = statistics_at(lines, step)
    states = [(name.removesuffix("/is_discarded"), value, line) for name, value, line in statistics
              if name.endswith("/is_discarded")]  # fmt: skip
    if not states:
        raise ValueError(f"no is_discarded states at step {step}: it is not the log of a network with gates")
    errors = [(value, line) for name, value, line in statistics
              if name in ("val_error", "val-error-top1", "val-error-top5")]  # fmt: skip
    blocks = sorted((name for name, value, _ in states if value == 1.0), key=network_order)
    return blocks, [value for value, _ in errors], [line for *_, line in states + errors]


def network_order(block: str) -> list[int]:
    """Sort key of block names: by group, then by number, where the log is alphabetical."""
    return [int(number) for number in re.findall(r"\d+", block)]
