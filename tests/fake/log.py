"""What a script asked of the fake GPUs: reads and copies that wait, by place and step, and launches of kernels."""

import json
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = str(ROOT / "tests")


def place() -> str:
    """`file:line function` of the innermost frame of this repository outside of tests, as a message shows it."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and not name.startswith(TESTS) and "site-packages" not in name:
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the repository"


class Log:
    """Events, counted by (kind, operation, place), pass and step.

    A pass begins where a network changes between training and testing. Its steps end with an update of the weights, or
    with a loss where nothing is trained. Kinds: `read`, the host waits for a value; `upload`, it waits until a copy to
    the device is done; `wait`, it waits and says so.
    """

    def __init__(self):
        self.passes = [{"training": None, "steps": 0}]
        self.events = Counter()
        self.products = Counter()  # convolutions and matrix products: (device, place) -> how many
        self.launches = {}  # of our kernels, each kind once
        self.parameters = Counter()  # of optimizers: device -> tensors
        self.replays = self.depth = 0  # of graphs; of nested calls of Module.train
        self.notes = []  # warnings: what falls back to a slower way is a fault here

    def new_pass(self, training: bool):
        self.passes.append({"training": training, "steps": 0})

    def launch(self, **call):
        self.launches[json.dumps(call)] = call

    def step(self, training: bool):
        """A step of such a pass is done."""
        if self.passes[-1]["training"] is training:
            self.passes[-1]["steps"] += 1

    def add(self, kind: str, operation: str):
        self.events[kind, operation, place(), len(self.passes) - 1, self.passes[-1]["steps"]] += 1

    def report(self) -> dict:
        """Everything as plain values."""
        rows = [[*key, count] for key, count in self.events.items()]
        products = [[*key, count] for key, count in self.products.items()]
        return {"passes": self.passes, "events": rows, "products": products, "launches": list(self.launches.values()),
                "parameters": dict(self.parameters), "replays": self.replays, "notes": self.notes}  # fmt: skip


def steady(report: dict, training: bool) -> dict[str, float]:
    """Events in the middle of every pass: {"kind by operation at place": how often per step}."""
    found, middle = Counter(), _middle(report, training)
    for kind, operation, where, index, step, count in report["events"]:
        if step in middle.get(index, ()):
            found[f"{kind} by {operation} at {where}"] += count
    return {name: count / steady_steps(report, training) for name, count in found.items()}


def steady_steps(report: dict, training: bool) -> int:
    """How many steps `steady` looked at."""
    return sum(map(len, _middle(report, training).values()))


def _middle(report, training):
    """By pass: its steps after the first one, which may set something up or print, and before the end of the last."""
    return {index: range(2, each["steps"]) for index, each in enumerate(report["passes"])
            if each["training"] is training}  # fmt: skip
