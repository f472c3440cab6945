"""Run every benchmark that this machine can, then plot the kernels against their floors.

    python benchmarks/run.py                  # on the CPU, about 15 minutes on two quiet cores
    python benchmarks/run.py --device cuda    # on a GPU
    python benchmarks/run.py --only bench_bitshift
    python benchmarks/run.py --plot           # plot again from benchmarks/results/, measure nothing

Tables go to the screen, numbers to benchmarks/results/*.csv (of a GPU: *_cuda.csv), the plot to
benchmarks/results/kernels.png and .svg. A benchmark that fails does not stop the others; the exit status is then 1.
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
KERNELS = ("bench_shift", "bench_bitshift")  # those with floors
ON_ANY_DEVICE = (*KERNELS, "bench_deepshift_training", "bench_s3_training")
CPU_ONLY = ("bench_loader",)
OURS = re.compile(r"shift2d|bitshift|packed")  # rows of our kernels, not of what they are compared with


def commands(names: list[str], device: str) -> list[list[str]]:
    """The command of each benchmark."""
    return [[sys.executable, str(HERE / f"{name}.py"), *([] if name in CPU_ONLY else ["--device", device])]
            for name in names]  # fmt: skip


def read_bars(path: Path) -> list[tuple[str, float]]:
    """(what, share of the floor's speed) of our kernels in a results file; a file without floors has none."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("floor_ms") and OURS.match(row["name"])]
    return [(f"{row['comparison']}: {row['name']}", float(row["floor_ms"]) / float(row["median_ms"])) for row in rows]


def plot(paths: list[Path], target: Path) -> bool:
    """Bars of all kernels in the files, as target.png and .svg. False if there are none."""
    bars = [bar for path in paths if path.exists() for bar in read_bars(path)]
    if not bars:
        return False
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kernels"  # the same file from the same records
    import matplotlib.pyplot as plt

    names, shares = zip(*reversed(bars), strict=True)
    figure, axes = plt.subplots(figsize=(10, 1 + 0.2 * len(bars)), layout="constrained")
    axes.barh(names, [100 * share for share in shares], color="#4477aa", height=0.7)
    axes.axvline(100, color="black", linewidth=1)
    axes.set(xlabel="speed in percent of the floor's: every byte moved once by copy_, or the matrix product's rate")
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)
    for suffix in ("png", "svg"):
        figure.savefig(target.with_suffix(f".{suffix}"), dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)
    return True


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = (*ON_ANY_DEVICE, *CPU_ONLY)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=known, default=None, help="these benchmarks (default: all)")
    parser.add_argument("--plot", action="store_true", help="plot again, measure nothing")
    args = parser.parse_args(argv)
    names = args.only or (ON_ANY_DEVICE if args.device.startswith("cuda") else known)
    failed = []
    for command in () if args.plot else commands(list(names), args.device):
        print(f"\n$ python benchmarks/{Path(command[1]).name} {' '.join(command[2:])}", flush=True)
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(Path(command[1]).name)
    suffix = "_cuda" if args.device.startswith("cuda") else ""
    target = RESULTS / f"kernels{suffix}"
    if plot([RESULTS / f"{name}{suffix}.csv" for name in KERNELS], target):
        print(f"\n{target}.png, .svg")
    if failed:
        print(f"error: failed: {', '.join(failed)}; their output is above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
