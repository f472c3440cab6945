"""How orthogonal the shared bases are over training, with and without the term.

    python shared_bases/plot_orthogonality.py --runs checkpoint --output=orthogonality.png

Draws, for every run with shared filters, the term R (arXiv 2006.05066,
Sec. 3.2; 0: orthonormal) and the mean absolute cosine between the shared
filters of a group (0: orthogonal), after each epoch.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine
from shared_bases.figures import pyplot
from shared_bases.plot_tradeoff import find_logs
from shared_bases.runs import RunError

LOGS = Path(__file__).with_name("logs")
PANELS = {
    "similarity": ("Term R of the loss", "R (log scale)"),
    "mean_abs_cosine": ("Cosine between shared filters", "mean absolute cosine"),
}


@dataclass(frozen=True)
class Curve:
    """A run: network with ranks, lambdaR, data set, and by PANELS' keys the value after each epoch."""

    network: str
    weight: float
    dataset: str
    values: dict[str, list[float]]

    @property
    def label(self) -> str:
        return f"{self.network}, lambdaR = {self.weight:g}"


def read_curve(log: Path) -> Curve | None:
    """The curve of a log; None if it is of another paper or its network shares no filters. RunError if damaged."""
    try:
        header, *lines = [json.loads(line) for line in log.read_text().splitlines()]
        if header.get("paper") != "shared_bases":
            return None
        epochs = [line for line in lines if line["type"] == "epoch"]
        if not epochs or epochs[0]["similarity"] is None:
            return None
        config = header["config"]
        network = f"{config['model']} s{config['shared_rank']}u{config['unique_rank']}"
        values = {name: [epoch[name] for epoch in epochs] for name in PANELS}
        return Curve(network, header["args"]["lambdaR"], header["data"], values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{log} is not a log of a training run ({error}); remove it or leave it out of --runs") from None


def draw(curves: list[Curve], path: str):
    """Two panels over epochs: a colour per network, dashed where lambdaR is 0."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    colours = {network: f"C{index}" for index, network in enumerate(sorted({curve.network for curve in curves}))}
    for axes, (name, (title, ylabel)) in zip(panels, PANELS.items(), strict=True):
        for curve in curves:
            values = curve.values[name]
            style = {"color": colours[curve.network], "linestyle": "-" if curve.weight else "--"}
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=curve.label, **style)
        axes.set(title=title, xlabel="epoch", ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].set_ylim(0, None)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise RunError(f"cannot write {path}: {reason}; choose another --output") from None
    finally:
        plt.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[LOGS], metavar="DIR",
        help="folders of runs, or logs (default: the recorded ones)",
    )  # fmt: skip
    parser.add_argument("--output", default="orthogonality.png", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv=None) -> list[Curve]:
    args = build_parser().parse_args(argv)
    curves = [curve for log in find_logs(args.runs) if (curve := read_curve(log)) is not None]
    if not curves:
        raise RunError("no run with shared filters is there; train one first, or give --runs another folder")
    for curve in curves:
        last = {name: values[-1] for name, values in curve.values.items()}
        print(f"{curve.label} ({curve.dataset}): R {last['similarity']:.3g}, cosine {last['mean_abs_cosine']:.4f}")
    draw(sorted(curves, key=lambda curve: (curve.network, -curve.weight)), args.output)
    return curves


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
