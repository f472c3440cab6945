"""Draw test error against parameters and FLOPs: recorded runs beside the published points.

    python shared_bases/plot_tradeoff.py --runs checkpoint --output=tradeoff.png

--runs takes folders, searched for metrics.jsonl of finished runs, and recorded
logs (*.jsonl); by default shared_bases/logs. Error is the best over epochs, as
the paper reports it. FLOPs are those of the README of September 2020: twice
the count of count.py, for both kinds of points. Runs on the embedded digits
are not comparable and left out.
"""

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from shared_bases import engine
from shared_bases.count import count_parameters, count_ptflops, published_rows
from shared_bases.figures import pyplot
from shared_bases.models import IMAGE_SIZES, MODELS, Config, build_model
from shared_bases.runs import PUBLISHED, RunError

HERE = Path(__file__).resolve().parent
TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "ilsvrc": "ILSVRC2012"}


@dataclass(frozen=True)
class Point:
    """One network: its error, its size, and where the error is from ("published" or "here, 3 of 300 epochs")."""

    config: Config
    error: float
    parameters: int
    flops: int
    source: str
    weight: float | None = None
    is_short: bool = False  # trained for fewer epochs than the paper

    @property
    def row(self) -> str:
        """Title of the row of panels: short runs have one of their own, their errors are of another size."""
        return TITLES[self.config.dataset] + (", short runs here" if self.is_short else "")

    @property
    def series(self) -> str:
        return self.config.model

    def label(self) -> str:
        ranks = "".join(f"{name[0]}{value}" for name, value in self.config.ranks().items())
        return ranks + ("" if self.weight in (None, 10.0) else f" λ={self.weight:g}")


def _sized(config: Config, error: float, source: str, weight: float | None = None, is_short: bool = False) -> Point:
    with torch.device("meta"):
        model = build_model(config)
    flops = 2 * count_ptflops(model, IMAGE_SIZES[config.dataset])
    return Point(config, error, count_parameters(model), flops, source, weight, is_short)


def published_points() -> list[Point]:
    """Every network of the published tables; the newest table where it is in several."""
    with open(PUBLISHED, newline="") as file:
        errors = {
            (row["table"], row["model"]): float(row["value"])
            for row in csv.DictReader(file)
            if row["metric"] == "top1_error_percent"
        }
    newest_first = sorted(published_rows(), key=lambda row: row.table.startswith("first README"))
    points = {}
    for row in newest_first:
        points.setdefault(row.config, _sized(row.config, errors[row.table, row.label], "published"))
    return list(points.values())


def find_logs(places: list[Path]) -> list[Path]:
    """Logs of runs in the given folders and files. Raises RunError if a place does not exist."""
    logs = []
    for place in places:
        if place.is_file():
            logs.append(place)
        elif place.is_dir():
            logs += sorted({*place.rglob("metrics.jsonl"), *place.glob("*.jsonl")})
        else:
            raise RunError(f"{place} does not exist; give --runs a folder of runs or a log")
    return logs


def recorded_point(log: Path) -> Point | None:
    """The point of a finished run on real data; None for any other log. Raises RunError for a damaged one."""
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        header, result = lines[0], lines[-1]
        if header.get("paper") != "shared_bases" or result.get("type") != "result":
            return None
        if header["data"] not in MODELS:
            return None
        source = f"here, {result['epochs']} of {result['epochs_in_paper']} epochs"
        is_short = result["epochs"] < result["epochs_in_paper"]
        weight = header["args"]["lambdaR"]
        return _sized(Config(**header["config"]), 100 - result["best_top1"], source, weight, is_short)
    except IndexError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{log} is not a log of a training run ({error}); remove it or leave it out of --runs") from None


def draw(points: list[Point], path: str):
    """One row per data set, one more for its short runs: error against parameters and FLOPs; a colour per model."""
    plt = pyplot()
    rows = [row for title in TITLES.values() for row in (title, f"{title}, short runs here")]
    rows = [row for row in rows if any(point.row == row for point in points)]
    figure, panels = plt.subplots(len(rows), 2, figsize=(11, 3.8 * len(rows)), layout="constrained", squeeze=False)
    for (left, right), row in zip(panels, rows, strict=True):
        here = [point for point in points if point.row == row]
        _draw_row(left, here, lambda point: point.parameters / 1e6, "parameters (millions)")
        _draw_row(right, here, lambda point: point.flops / 1e9, "FLOPs (10⁹ per image, 2 x count)")
        left.set_title(row, loc="left")
        right.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}; choose another --output") from None
    finally:
        plt.close(figure)


def _draw_row(axes, points, size, xlabel):
    models = sorted({point.series for point in points})
    for series, source in sorted({(point.series, point.source) for point in points}):
        chosen = [point for point in points if (point.series, point.source) == (series, source)]
        chosen.sort(key=size)
        is_published = source == "published"
        axes.plot(
            [size(point) for point in chosen],
            [point.error for point in chosen],
            color=f"C{models.index(series) % 10}",
            marker="o" if is_published else "^",
            linestyle="-" if is_published else ":",
            fillstyle="full" if is_published else "none",
            label=f"{series}, {source}",
        )
        for point in chosen:
            axes.annotate(
                point.label(), (size(point), point.error), xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axes.set(xlabel=xlabel, ylabel="top-1 test error (%)")
    axes.grid(alpha=0.3)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="*", type=Path, metavar="PLACE", help="folders or logs (default: shared_bases/logs)"
    )
    parser.add_argument(
        "--output",
        default=str(HERE / "plots" / "tradeoff.png"),
        metavar="FILE",
        help="picture to write, .png, .svg or .pdf (default: shared_bases/plots/tradeoff.png)",
    )
    parser.add_argument("--dataset", choices=tuple(TITLES), help="this data set only (default: all)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv=None) -> list[Point]:
    args = build_parser().parse_args(argv)
    places = args.runs if args.runs is not None else [place for place in [HERE / "logs"] if place.is_dir()]
    recorded = [point for log in find_logs(places) if (point := recorded_point(log)) is not None]
    points = [*published_points(), *recorded]
    points = [point for point in points if args.dataset in (None, point.config.dataset)]
    for point in points:
        print(
            f"{TITLES[point.config.dataset]:10} {point.config.text():56} {point.error:6.2f}%  {point.parameters:>10} "
            f"parameters  {point.flops:>11} FLOPs  {point.source}"
            + ("" if point.weight in (None, 10.0) else f", lambdaR {point.weight:g}")
        )
    try:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write {args.output}: {error.strerror}; choose another --output") from None
    draw(points, args.output)
    print(f"{len(points)} points, {len(recorded)} of recorded runs: {args.output}")
    return points


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
