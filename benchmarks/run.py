"""Run every benchmark that this machine can, then plot the kernels against their floors.

    python benchmarks/run.py                  # on the CPU, about 15 minutes on two quiet cores
    python benchmarks/run.py --device cuda    # on a GPU, its own benchmarks of the kernels; --quick: a minute
    python benchmarks/run.py --only bench_bitshift
    python benchmarks/run.py --plot           # plot and table again from benchmarks/results/, measure nothing

Tables go to the screen, numbers to benchmarks/results/*.csv (of a GPU: *_cuda.csv, row by row), the plot to
benchmarks/results/kernels.png and .svg, ratios to the table of common/kernels/README.md. With --results they all go
there, and no README is written. A benchmark that fails does not stop the others; the exit status is then 1.
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from reporting.figures import pyplot

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "common" / "kernels" / "README.md"
KERNELS = ("bench_shift", "bench_shift_conv1x1", "bench_bitshift")  # results with floors
TRAINING = ("bench_deepshift_training", "bench_s3_training")
ON_CPU = (*KERNELS, *TRAINING, "bench_loader")
ON_GPU = ("bench_shift_cuda", "bench_bitshift_cuda", *TRAINING)
ALL = tuple(dict.fromkeys((*ON_CPU, *ON_GPU)))
# A GPU waits for the host in the first steps, and for the clock in single ones.
TRAINING_ON_GPU = ("--arch", "resnet18", "--batch-size", "128", "--warmup", "10", "--steps", "20")
# Some rows of each kernel, for a GPU that is there for minutes; a later option wins over an earlier one.
QUICK = {
    "bench_shift_cuda": "--parts bandwidth small host fused --dtypes fp32 --batches 128 --mebibytes 64 --repeats 20 "
    "--max-seconds 2",
    "bench_bitshift_cuda": "--sizes 4096x4096 --bits 4 --batches 1 16 256 --int8-batches 1024 --image-batches 1 "
    "--repeats 20 --max-seconds 2",
    "bench_deepshift_training": "--repeats 2 --steps 10",
    "bench_s3_training": "--repeats 2 --steps 10",
}
OURS = re.compile(r"shift2d|shift_conv1x1|bitshift|packed")  # rows of our kernels, not of what they are compared with
# Measured for the comparison only.
ASIDE = re.compile(r"shift2d, then 1x1|in shift2d's order|, \d+ threads|forward, convolution")
DETAILS = re.compile(r"conv .*, [^4] bits\b|^shift \+ 1x1(?!.*(?:all|the) layers)")  # left to the results files
COLORS = ("#4477aa", "#ee6677", "#ccbb44", "#228833", "#66ccee")


def commands(names: list[str], device: str, results: Path = RESULTS, quick: bool = False) -> list[list[str]]:
    """The command of each benchmark. results: folder of the tables."""
    every = []
    for name in names:
        options = [] if name == "bench_loader" else ["--device", device]
        if name == "bench_loader":
            options += ["--output", str(results / f"{name}.csv")]
        elif name not in TRAINING:
            options += ["--results", str(results)]
        elif device.startswith("cuda"):
            options += [*TRAINING_ON_GPU, "--csv", str(results / f"{name}_cuda.csv")]
        options += QUICK.get(name, "").split() if quick else []
        every.append([sys.executable, str(HERE / f"{name}.py"), *options])
    return every


class Bar(NamedTuple):
    """One kernel's share of the floor's speed; family: a part of the plot, label: what, series: bits, or nothing."""

    family: str
    label: str
    series: str
    share: float


def read_bars(path: Path) -> list[Bar]:
    """Those of our kernels in a results file, of its layouts the better one; a file without floors has none."""
    best = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            is_aside = ASIDE.search(f"{row['comparison']} {row['name']}")
            if float(row.get("floor_ms") or 0) and OURS.match(row["name"]) and not is_aside:
                title = row["comparison"].replace(", convolution", "")
                bits = re.search(r", (\d bits)", title)
                label = title.replace(bits[0], "") if bits else title
                family = "bitshift_conv2d" if "packed" in row["name"] else row["name"].split()[0]
                key = family, label.removeprefix("shift + 1x1, "), bits[1] if bits else ""
                share = float(row["floor_ms"]) / float(row["median_ms"])
                best[key] = max(share, best.get(key, 0.0))
    return [Bar(*key, share) for key, share in best.items()]


def ratio_table(paths: list[Path]) -> str:
    """The ratios in the files, the script, the processor or GPU and the versions, as Markdown."""
    lines, conditions = ["| what | ratio of times | | `benchmarks/` |", "|---|---|---|---|"], {}
    for path in paths:
        if not path.exists():
            continue
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                conditions[f"{row['hardware']}; {row['versions']}"] = None
                text = row["name"].removesuffix(": time ratio")
                what, _, summed = text.rpartition(": ")
                if row["ratio"] and not DETAILS.search(f"{row['comparison']} {text}"):
                    line = f"{what or row['comparison']} | {summed} | {float(row['ratio']):.2f}x"
                    lines.append(f"| {line} | {path.stem.removesuffix('_cuda')}.py |")
    return "\n".join([*lines, "", "Measured on: " + " and ".join(conditions) + "."])


def write_table(paths: list[Path], readme: Path, name: str):
    """Put the ratios between the README's markers `<!-- name -->` and `<!-- /name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = readme.read_text(encoding="utf-8").split(start, 1)
    text = f"{before}{start}\n{ratio_table(paths)}\n{end}{rest.split(end, 1)[1]}"
    readme.write_text(text, encoding="utf-8")


def plot(paths: list[Path], target: Path) -> bool:
    """Bars of all kernels in the files, as target.png and .svg. False if there are none."""
    bars = [bar for path in paths if path.exists() for bar in read_bars(path)]
    if not bars:
        return False
    plt = pyplot(svg_hashsalt="kernels")  # the same file from the same records
    families = {
        family: [bar for bar in bars if bar.family == family] for family in dict.fromkeys(b.family for b in bars)
    }
    counts = [len({bar.label for bar in some}) for some in families.values()]
    figure, parts = plt.subplots(len(families), figsize=(9, 1 + 0.24 * sum(counts) + 0.5 * len(counts)), sharex=True,
                                 height_ratios=counts, layout="constrained", squeeze=False)  # fmt: skip
    for axes, (family, some) in zip(parts.flat, families.items(), strict=True):
        labels, series = (list(dict.fromkeys(getattr(bar, name) for bar in some)) for name in ("label", "series"))
        height = 0.8 / len(series)
        for which, color in zip(series, COLORS, strict=False):
            chosen = [bar for bar in some if bar.series == which]
            places = [
                labels.index(bar.label) + height * (series.index(which) - (len(series) - 1) / 2) for bar in chosen
            ]
            axes.barh(places, [100 * bar.share for bar in chosen], height, color=color, label=which)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
        axes.set_title(family, loc="left", fontsize=9)
        axes.axvline(100, color="black", linewidth=1)
        axes.grid(axis="x", alpha=0.3)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        if any(series):
            axes.legend(fontsize=7, loc="lower right")
    parts.flat[-1].set_xlabel("percent of the speed of the floor")
    for suffix in ("png", "svg"):
        figure.savefig(target.with_suffix(f".{suffix}"), dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)
    return True


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    help_only = "these benchmarks (default: the device's)"
    parser.add_argument("--only", nargs="+", choices=ALL, default=None, metavar="NAME", help=help_only)
    parser.add_argument("--plot", action="store_true", help="plot again, measure nothing")
    parser.add_argument("--quick", action="store_true", help="of a GPU's benchmarks: a few rows of each kernel")
    help_results = "folder of tables and plot (default: benchmarks/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=help_results)
    return parser


def main(argv=None) -> int:
    args = build_parser().parse_args(argv)
    names = args.only or (ON_GPU if args.device.startswith("cuda") else ON_CPU)
    failed, results = [], args.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    for command in () if args.plot else commands(list(names), args.device, results, args.quick):
        print(f"\n$ python benchmarks/{Path(command[1]).name} {' '.join(command[2:])}", flush=True)
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(Path(command[1]).name)
    suffix = "_cuda" if args.device.startswith("cuda") else ""
    target, paths = results / f"kernels{suffix}", [results / f"{name}{suffix}.csv" for name in KERNELS]
    if plot(paths, target):
        print(f"\n{target}.png, .svg")
        if results == RESULTS:
            write_table(paths, README, f"ratios{suffix}")
            print(README)
    if failed:
        print(f"error: failed: {', '.join(failed)}; their output is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
