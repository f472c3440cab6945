"""The papers' published tables: with our numbers beside them, and the networks that their rows are of."""

import re
import shlex
from dataclasses import dataclass

from reporting.records import OTHER_TABLES, Run

ACCURACIES = {  # metric of published.csv: (measure, whether it counts errors, what 100% is divided by)
    "top1": ("top1", False, 1),
    "top1_acc_percent": ("top1", False, 1),
    "top1_error_percent": ("top1", True, 1),
    "val_error_percent": ("top1", True, 1),
    "top1_error": ("top1", True, 100),
    "val_error": ("top1", True, 100),
    "top5": ("top5", False, 1),
    "top5_error_percent": ("top5", True, 1),
    "top5_error": ("top5", True, 100),
}
PARAMETERS = ("params_millions", "params_million")
DATA_SETS = {"CIFAR-10": "cifar10", "CIFAR10": "cifar10", "CIFAR-100": "cifar100", "ILSVRC2012": "imagenet"}


def data_set(row: dict) -> str:
    """The data set of a row, under the name that runs use."""
    return DATA_SETS.get(row["dataset"], row["dataset"].lower())


def accuracy(row: dict) -> float | None:
    """Published top-1 accuracy in percent; None if the row has another metric or no number."""
    try:
        value = float(row["value"])
    except ValueError:
        return None
    measure, is_error, scale = ACCURACIES.get(row["metric"], ("", False, 1))
    if measure != "top1":
        return None
    return 100 - scale * value if is_error else scale * value


def command_of(row: dict) -> str:
    """The row's command as headers of runs name it in `reproduces`."""
    return row["command"].removeprefix("python3 ").removeprefix("python ")


@dataclass(frozen=True)
class Line:
    """A row of the page's table: published cells and our cells by metric; runs: those that repeat its commands."""

    model: str
    method: str
    setting: str
    published: dict
    ours: dict
    command: str
    runs: list


@dataclass(frozen=True)
class Table:
    """One published table."""

    title: str
    dataset: str
    metrics: list
    lines: list


def tables(rows: list[dict], runs: list[Run], params) -> list[Table]:
    """The tables of a published.csv, rows of one network joined, with the runs that repeat a row's command.

    params: gives the parameters that are counted here for a row's network, None if it is not known.
    """
    grouped = {}
    for row in rows:
        grouped.setdefault((row["table"], row["dataset"]), []).append(row)
    return [_table(title, dataset, members, runs, params) for (title, dataset), members in grouped.items()]


def _table(title, dataset, rows, runs, params):
    lines, metrics = [], list(dict.fromkeys(row["metric"] for row in rows))
    for row in rows:
        key = row["model"], row["method"], row["setting"]
        same = [members for members in lines if _key(members[0]) == key]
        if same and row["metric"] not in {member["metric"] for member in same[-1]}:
            same[-1].append(row)
        else:
            lines.append([row])
    return Table(title, dataset, metrics, [_line(members, runs, params) for members in lines])


def _key(row):
    return row["model"], row["method"], row["setting"]


def _line(rows, runs, params):
    first = next((row for row in rows if row["metric"] in ACCURACIES), rows[0])
    commands = {command_of(row) for row in rows if row["metric"] in ACCURACIES and row["command"]}
    matching = [run for run in runs if run.result is not None and run.reproduces in commands]
    published = {row["metric"]: row["value"] for row in rows}
    ours = {metric: [text for run in matching if (text := our_number(metric, run))] for metric in published}
    for metric in published.keys() & set(PARAMETERS):
        counted = params(first)
        ours[metric] = [] if counted is None else [f"{counted / 1e6:.3f}"]
    return Line(*_key(first), published, ours, first["command"], matching)


def our_number(metric: str, run: Run) -> str:
    """What a run gives for an accuracy, in the metric's own convention; "" if it does not."""
    measure, is_error, scale = ACCURACIES.get(metric, ("", False, 1))
    last = run.epochs[-1] if run.epochs else {}
    right = {"top1": run.result["top1"], "top5": last.get("test_top5")}.get(measure)
    if not isinstance(right, (int, float)):
        return ""
    return f"{(100 - right if is_error else right) / scale:.{2 if scale == 1 else 4}f}"


def progress(rows: list[dict], runs: list[Run]) -> tuple[int, int, int]:
    """(commands with a published accuracy, of these run at full length, run short)."""
    commands = {command_of(row) for row in rows if row["command"] and accuracy(row) is not None and _counts(row)}
    by_command = {}
    for run in runs:
        if run.result is not None and run.reproduces in commands:
            by_command.setdefault(run.reproduces, []).append(run)
    full = sum(any(not run.is_short for run in same) for same in by_command.values())
    return len(commands), full, len(by_command) - full


def _counts(row):
    return not any(word in row["table"] for word in OTHER_TABLES)


def networks(paper: str, rows: list[dict]) -> list[tuple[str, dict, float]]:
    """(data set, config, top-1 in percent) of the published accuracies whose network is known, each once."""
    found, seen = [], set()
    for row in rows:
        right = accuracy(row)
        config = config_of(paper, row) if right is not None and _counts(row) else None
        key = data_set(row), repr(config), right
        if config is not None and key not in seen:
            seen.add(key)
            found.append((data_set(row), config, right))
    return found


def config_of(paper: str, row: dict) -> dict | None:
    """The network of a row, as headers of runs describe theirs; None if the row does not say which it is."""
    try:
        return CONFIGS[paper](row)
    except (ImportError, IndexError, KeyError, ValueError):
        return None


def _flags(command):
    """{flag: value} of `--flag=value`, `--flag value` and `-f value`."""
    words, flags = shlex.split(command), {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("-"):
            name, _, value = word.partition("=")
            flags[name.lstrip("-")] = value or after
    return flags


def _shiftresnet(row):
    flags = _flags(row["command"])
    if "arch" not in flags:
        return None
    return {"arch": flags["arch"], "expansion": float(flags.get("expansion", 1)),
            "reduction": float(flags.get("reduction", 1)), "reduction_mode": flags.get("reduction-mode", "net"),
            "num_classes": 100 if data_set(row) == "cifar100" else 10}  # fmt: skip


def _deepshift(row):
    flags, dataset = _flags(row["command"]), data_set(row)
    arch = flags.get("arch") or ("simple_conv" if flags.get("type") == "conv" else "simple_linear")
    is_shift = "shift-depth" in flags
    return {"dataset": dataset, "arch": arch, "shift_type": flags.get("shift-type"), "layers": ["all"] * is_shift,
            "count": 10**6 * is_shift, "convert_all_linear": arch != "simple_linear",
            "weight_bits": int(flags.get("wb", 5)), "activation_bits": [16, 16]}  # fmt: skip


def _s3(row):
    method = {"FP32": "float", "S3 (ours)": "s3", "S3 checkpoint": "s3"}.get(row["method"])
    if method is None or "progress" in row["table"]:
        return None
    return {"dataset": "imagenet", "arch": row["model"], "classes": 1000, "method": method, "bits": 3}


def _shared_bases(row):
    from shared_bases.models import Config
    from shared_bases.runs import command_flags

    script, flags = command_flags(row["command"])
    ranks = {name: int(flags[name]) for name in ("shared_rank", "unique_rank") if name in flags}
    return Config(script.removeprefix("train_").removesuffix(".py"), flags["model"], **ranks).as_dict()


def _epsilon_resnet(row):
    depth, units = re.search(r"-d (\d+)", row["command"]), re.search(r"\bn=(\d+)", row["model"])
    if "compressed" in row["method"] or not (depth or units):
        return None  # which blocks are left is not published
    cifar = data_set(row).startswith("cifar")
    return {"arch": "cifar" if cifar else "imagenet", "size": int((units if cifar else depth)[1]),
            "num_classes": 10 if cifar else 1000, "gated": row["method"].startswith("epsilon")}  # fmt: skip


CONFIGS = {
    "shiftresnet": _shiftresnet,
    "deepshift": _deepshift,
    "s3": _s3,
    "shared_bases": _shared_bases,
    "epsilon_resnet": _epsilon_resnet,
}
