"""Plot accuracy, share of zeros and share of sign changes of runs over epochs.

    python s3/plot.py RUN_DIR [RUN_DIR ...] --output s3/plots/cifar10.png

RUN_DIR holds the metrics.jsonl of main.py, or is a .jsonl file of s3/logs/.
Runs that differ in the seed only are drawn as their mean. FILE.svg is written
beside FILE.png.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from s3.figures import pyplot
from s3.runs import read_metrics

# title, unit, scale of the axis, and per curve: key, factor, style, name
PANELS = (
    ("Test accuracy", "top-1 (%)", "linear", (("test_top1", 1, "-", "test"),)),
    ("Loss", "cross entropy (nats)", "log", (("train_loss", 1, "-", "training"), ("test_loss", 1, "--", "test"))),
    ("Zero weights", "share of weights (%)", "linear", (("zeros", 100, "-", "zeros"),)),
    ("Changes during an epoch", "share of weights (%)", "linear",
     (("sign_changes", 100, "-", "signs"), ("weight_changes", 100, ":", "discrete weights"))),
)  # fmt: skip


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """Header and epochs of a run. Raises ValueError if there is no epoch."""
    lines = read_metrics(path if path.suffix == ".jsonl" else path / "metrics.jsonl")
    epochs = [line for line in lines if line["type"] == "epoch"]
    if not epochs:
        raise ValueError(f"{path} has no metrics.jsonl with an epoch; give the directory of a training run")
    return lines[0], epochs


def label(header: dict) -> str:
    """Network and data in words."""
    config = header["config"]
    bits = "" if config["method"] == "float" else f", {config['bits']} bits"
    return f"{config['method']}{bits}, {config['arch']}, {header['data']}"


def grouped(paths: list[Path]) -> dict[str, list[list[dict]]]:
    """{label: epochs of each seed}."""
    groups = {}
    for path in paths:
        header, epochs = read_run(path)
        groups.setdefault(label(header), []).append(epochs)
    return groups


def curve(runs: list[list[dict]], key: str) -> list[float] | None:
    """Mean over seeds of every epoch that all have, None if the key is not measured."""
    if key not in runs[0][0]:
        return None
    return [statistics.fmean(line[key] for line in same) for same in zip(*runs, strict=False)]


def plot(groups: dict, output: Path):
    """Draw all panels to output (.png) and the same as .svg."""
    plt = pyplot(svg_hashsalt="s3")  # the same file from the same runs
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.6), layout="constrained")
    for ax, (title, unit, scale, series) in zip(axes, PANELS, strict=True):
        for index, runs in enumerate(groups.values()):
            for key, factor, style, _ in series:
                if values := curve(runs, key):
                    numbers = [line["epoch"] + 1 for line in runs[0][: len(values)]]
                    ax.plot(numbers, [factor * value for value in values], style, color=f"C{index}", marker=".")
        ax.set(title=title, xlabel="epoch", ylabel=unit, yscale=scale)
        ax.grid(alpha=0.3)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:
            for _, _, style, name in series:
                ax.plot([], [], style, color="grey", label=name)
            ax.legend(fontsize=7, frameon=False)
    names = [f"{name} ({len(runs)} seeds)" if len(runs) > 1 else name for name, runs in groups.items()]
    handles = [plt.Line2D([], [], color=f"C{index}", marker=".") for index in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output.with_suffix(".png"), dpi=120)
    figure.savefig(output.with_suffix(".svg"), metadata={"Date": None})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="directories of runs, or .jsonl logs")
    parser.add_argument("--output", type=Path, default=Path("s3.png"), metavar="FILE", help="default: %(default)s")
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    try:
        groups = grouped(args.runs)
        plot(groups, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, runs in groups.items():
        last = [epochs[-1] for epochs in runs]
        zeros = f", {100 * statistics.fmean(e['zeros'] for e in last):.2f}% zeros" if "zeros" in last[0] else ""
        print(f"{name}: {statistics.fmean(e['test_top1'] for e in last):.2f}% after {len(runs[0])} epochs{zeros}")
    print(f"plot: {args.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
