"""What no single paper shows: the five methods on common axes, one group for each data set."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from reporting import costs, published
from reporting.records import EMBEDDED, PAPERS, ReportError, Run

AXES = (  # attribute of a point, title, name of the axis, unit
    ("params", "Parameters", "parameters", ""),
    ("macs", "Multiply-adds", "multiply-adds of one image", ""),
    ("multiplications", "Multiplications", "multiplications of one image", ""),
    ("bits", "Model size", "bits of weights and statistics", ""),
    ("joules", "Arithmetic energy, estimated", "energy of one image", "J"),
    ("seconds", "Latency, measured", "median time of one image", "s"),
)


@dataclass(frozen=True)
class Point:
    """A trained network: what it is, how accurate, what it costs. latency_ms: None if it was not measured.

    run: its name, "" for a published accuracy.
    """

    paper: str
    label: str
    run: str
    data: str
    top1: float
    epochs: str
    is_short: bool
    is_plain: bool
    costs: costs.Costs
    latency_ms: float | None = None

    def value(self, axis: str) -> float | None:
        """Its coordinate on one of AXES; None if it was not measured."""
        if axis == "joules":
            return self.costs.microjoules * 1e-6
        if axis == "seconds":
            return None if self.latency_ms is None else self.latency_ms * 1e-3
        return getattr(self.costs, axis)


class Measured:
    """Costs and latencies, each network once. say: for one line per latency."""

    def __init__(self, say):
        self._costs, self._latencies, self._say = {}, {}, say

    def costs(self, paper: str, config: dict) -> tuple[costs.Network, costs.Costs]:
        """A network and its costs. Raises ReportError."""
        key = _key(paper, config)
        if key not in self._costs:
            network = costs.describe(paper, config)
            self._costs[key] = network, costs.count(network)
        return self._costs[key]

    def latency_ms(self, paper: str, config: dict) -> float:
        key = _key(paper, config)
        if key not in self._latencies:
            network = costs.describe(paper, config)
            self._latencies[key] = costs.latency_ms(network)
            self._say(f"{paper}: {network.label}: {self._latencies[key]:.2f} ms")
        return self._latencies[key]


def _key(paper, config):
    return paper, repr(sorted(config.items()))


def points_of_runs(runs: list[Run], measured: Measured, with_latency: bool) -> tuple[list[Point], list[str]]:
    """Finished runs, and the compressed networks beside them, as points; and one line per network without costs."""
    points, problems = [], []
    for run in runs:
        if run.result is None:
            continue
        try:
            own = run.header["config"], run.result["top1"], ""
            for config, top1, note in itertools.chain([own], compressed_networks(run)):
                network, counted = measured.costs(run.paper, config)
                latency = measured.latency_ms(run.paper, config) if with_latency else None
                epochs = f"{run.result['epochs']} / {run.result['epochs_in_paper']}{note}"
                is_short = run.is_short or run.data == EMBEDDED
                points.append(Point(run.paper, network.label, run.name, run.data, top1, epochs, is_short,
                                    network.is_plain, counted, latency))  # fmt: skip
        except ReportError as error:
            problems.append(str(error))
    return points, list(dict.fromkeys(problems))


def published_points(rows_by_paper: dict, measured: Measured) -> tuple[list[Point], list[str]]:
    """The papers' accuracies with the costs of their networks; and one line per network without costs."""
    points, problems = [], []
    for paper, rows in rows_by_paper.items():
        for data, config, top1 in published.networks(paper, rows):
            try:
                network, counted = measured.costs(paper, config)
                points.append(Point(paper, network.label, "", data, top1, "", False, network.is_plain, counted))
            except ReportError as error:
                problems.append(str(error))
    return points, list(dict.fromkeys(problems))


def compressed_networks(run: Run) -> Iterator[tuple[dict, float, str]]:
    """(config, top-1, note) of each network that compressModel.py wrote beside a run, with the run's accuracy there."""
    if run.paper != "epsilon_resnet" or not run.source.is_dir():
        return
    from epsilon_resnet.pruning import read_cfg
    from epsilon_resnet.runs import RunError

    for path in sorted(run.source.glob("compressed_model_*.cfg")):
        try:
            fields = read_cfg(path)
            top1 = 100 * (1 - fields["val_error"][0])
        except (RunError, OSError, LookupError, TypeError) as problem:
            raise ReportError(f"{path}: {problem}") from None
        if fields["discarded_block"] and fields["structure"] != run.header["config"].get("structure"):
            config = {**run.header["config"], "gated": False, "structure": fields["structure"],
                      "discard_first_block": fields["discard_first_block"]}  # fmt: skip
            yield config, top1, f", step {fields['step']}"


def by_data(points: list[Point]) -> dict[str, list[Point]]:
    """Points of each data set, the real ones first."""
    groups = {}
    for point in sorted(points, key=lambda point: (point.data == EMBEDDED, point.data, PAPERS.index(point.paper))):
        groups.setdefault(point.data, []).append(point)
    return groups
