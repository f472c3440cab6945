"""The commands of the stage smoke of tests/gpu.sh, and how what they left is judged. Standard library only."""

import json
import re
from pathlib import Path
from typing import NamedTuple


class Check(NamedTuple):
    """One command. folder: where its run writes metrics.jsonl; None for an evaluation."""

    name: str
    words: tuple[str, ...]
    folder: Path | None = None


def chains(runs: Path, device: str) -> list[list[Check]]:
    """Commands that need one another, in order. None says --device: what a user types first is what is tried."""
    plain = _plain_chains(runs)
    if device != "cuda":
        return plain
    # The same five papers once more with recorded steps, which only a GPU has.
    again = {"shiftresnet", "deepshift-cifar10-PS", "s3", "shared_bases", "epsilon_resnet"}
    graphs = [chain[0] for chain in plain if chain[0].name in again]
    return plain + [[_with_graph(check, runs)] for check in graphs]


def _with_graph(check: Check, runs: Path) -> Check:
    name = f"{check.name}-graph"
    words = [word for word in check.words if not word.startswith("--output-dir=")]
    return Check(name, (*words, "--cuda-graph", f"--output-dir={runs / name}"), runs / name)


def _plain_chains(runs: Path) -> list[list[Check]]:
    quick = ("--embedded-data", "--epochs=2", "--seed=1")

    def train(name, *words):
        return Check(name, (*words, *quick, f"--output-dir={runs / name}"), runs / name)

    shift = ("--shift-depth=1000", "--shift-type=PS", "--optimizer=radam"), ("--shift-depth=1000", "--shift-type=Q")
    mnist, cifar10 = ("deepshift/mnist.py", "--type=conv"), ("deepshift/cifar10.py", "--arch=resnet20")
    packed = runs / "deepshift-mnist-PS/mnist/simple_conv/shift_ps_all_wb_5/weights.packed"
    evaluation = ("--shift-type=PS", "-e", f"--resume={packed}", "--use-kernel=True")
    return [
        [
            train("shiftresnet", "shiftresnet/main.py", "--arch=shiftresnet20"),
            Check("shiftresnet-eval", ("shiftresnet/eval.py", f"--model={runs}/shiftresnet/*.t7", quick[0])),
        ],
        [
            train("deepshift-mnist-PS", *mnist, *shift[0]),
            Check("deepshift-eval", (*mnist, *evaluation, quick[0], f"--output-dir={runs / 'deepshift-eval'}")),
        ],
        [train("deepshift-mnist-Q", *mnist, *shift[1])],
        [train("deepshift-cifar10-PS", *cifar10, *shift[0])],
        [train("deepshift-cifar10-Q", *cifar10, *shift[1])],
        [train("s3", "s3/main.py", "--dataset=cifar10", "--arch=resnet20")],
        [train("shared_bases", "shared_bases/train_cifar10.py", "--model=ResNet32_DoubleShared")],
        [train("epsilon_resnet", "epsilon_resnet/cifarEpsilonResnet.py", "--cifar10", "-n=3", "-o=smoke")],
    ]


def recorded(folder: Path) -> tuple[str, str]:
    """(device, accuracy) that a training run's metrics.jsonl has; empty for what is not there."""
    try:
        path = next(folder.rglob("metrics.jsonl"))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        result = lines[-1].get("top1")
        return str(lines[0].get("device", "")), "" if result is None else f"{result:.2f}%"
    except (OSError, ValueError, StopIteration, IndexError):
        return "", ""


def judge(check: Check, log: Path, device: str) -> tuple[bool, str]:
    """(whether a result is there, and of this device; what was seen) of a command that has ended."""
    if check.folder is None:
        said = log.read_text(errors="replace") if log.exists() else ""
        accuracy = (re.findall(r"\d+(?:\.\d+)?%", said) or [""])[-1]
        return bool(accuracy), f"accuracy {accuracy or 'not printed'}"
    found, accuracy = recorded(check.folder)
    seen = f"device {found or 'not recorded'}, accuracy {accuracy or 'not recorded'}"
    return bool(accuracy) and found.split(":")[0] == device, seen
