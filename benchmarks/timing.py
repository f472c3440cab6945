"""Side-by-side timing for the benchmark scripts: what is compared runs alternately, in one process.

inputs = rotated(args, make)
candidates = {"shift2d": lambda run: shift2d(inputs[run % len(inputs)]), "clone": ...}
comparison = Comparison(args, "fp32 NCHW", candidates, moved_bytes)
comparison.ratio("shift2d / clone: time ratio", "shift2d", "clone")
write_csv(args, "bench_shift", [comparison])
"""

import argparse
import csv
import itertools
import platform
import random
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from common.kernels import threads

RESULTS = Path(__file__).with_name("results")
FALLBACK_CACHE_BYTES = 32 * 2**20
LEAST_RUNS = 3
COPY_ELEMENTS = 2**26  # 256 MiB
MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}


def parser(doc):
    """Argument parser with the options that every benchmark has; `doc` is the script's docstring."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    options.add_argument("--repeats", type=_positive, default=50, help="timed runs of each candidate (default: 50)")
    options.add_argument("--warmup", type=_positive, default=5, help="untimed runs of each candidate (default: 5)")
    help_seconds = "a candidate too slow for all its runs in this time makes fewer, at least 3 (default: 60)"
    options.add_argument("--max-seconds", type=_positive, default=60, help=help_seconds)
    options.add_argument("--threads", type=_positive, help="torch.set_num_threads (default: torch's own choice)")
    options.add_argument("--no-rotate", action="store_true", help="the same buffer each time, cached if it fits")
    options.add_argument("--no-csv", action="store_true", help="print only; do not write a CSV file")
    help_results = "folder of the CSV file (default: benchmarks/results)"
    options.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=help_results)
    return options


def parse(options, argv=None):
    """Parse, set the number of threads, and check the device: exits with status 2 and one line where there is none."""
    args = options.parse_args(argv)
    try:
        args.device = torch.device(args.device)
        # torch.cuda.set_device wants the number, which "cuda" leaves out; the tensor has it.
        args.device = torch.empty(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:
        options.error(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def cache_bytes(device):
    """Size of the last-level cache in bytes: L2 of a GPU."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", FALLBACK_CACHE_BYTES)
    return threads.cache_bytes()


def rotated(args, make):
    """Buffers from make(), called often enough that the set exceeds the last-level cache twice (GPU: four times).

    Returns a list of the tensors; a single one with --no-rotate.
    """
    first = make()
    size = first.numel() * first.element_size()
    room = (4 if args.device.type == "cuda" else 2) * cache_bytes(args.device)
    return [first] if args.no_rotate else [first, *(make() for _ in range(min(64, room // max(1, size))))]


def hardware(device):
    """Name of the processor or GPU, and the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def versions():
    """Versions of what the measured code runs on, in one line."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for name in ("numba", "cupy"):
        if name in sys.modules:
            parts.append(f"{name} {sys.modules[name].__version__}")
    return ", ".join(parts)


class Rates(NamedTuple):
    """What the machine does at most: bytes per second of copy_ (read and written), operations per second of matmul."""

    bytes: float
    operations: float


def machine_rates(args):
    """Rates of this device, in fp32, measured on first use and then kept in args: the floor of what is timed beside."""
    if not hasattr(args, "rates"):
        count, side = COPY_ELEMENTS, MATMUL_SIDE[args.device.type]
        source, target = torch.randn(count, device=args.device), torch.empty(count, device=args.device)
        matrix = torch.randn(side, side, device=args.device)
        candidates = {"copy_": lambda run: target.copy_(source), "matmul": lambda run: matrix @ matrix}
        times = (_time_on_gpu if args.device.type == "cuda" else _time_on_cpu)(candidates, args)
        copy, product = (statistics.median(times[name]) for name in candidates)
        args.rates = Rates(8 * count / copy, 2 * side**3 / product)
        print(
            f"copy_ {args.rates.bytes / 1e9:.1f} GB/s, matrix product {args.rates.operations / 1e9:.0f} GFLOP/s, fp32"
        )
    return args.rates


class Comparison:
    """Times candidates against each other and prints a table row for each.

    candidates: name -> function of the call's number, which chooses among rotated buffers. moved_bytes: what one
    run has to read and write at least; gives the GB/s. operations: additions and multiplications that it has to do.
    Both over the machine's rates give the floor, in seconds. times: name -> seconds of each run.
    """

    def __init__(self, args, title, candidates, moved_bytes, operations=0):
        self.title, self.moved_bytes, self.operations, self.device = title, moved_bytes, operations, args.device
        self.ratios, self.rates = [], machine_rates(args)
        self.floor = max(moved_bytes / self.rates.bytes, operations / self.rates.operations)
        timer = _time_on_gpu if args.device.type == "cuda" else _time_on_cpu
        self.times = timer(candidates, args)
        counted = f", {operations / 1e6:.1f} MFLOP" if operations else ""
        print(f"\n{title}   ({moved_bytes / 2**20:.1f} MiB moved{counted}, floor {self.floor * 1e3:.3f} ms)")
        print(f"  {'':34} {'median ms':>10} {'quartiles':>17} {'GB/s':>8} {'of floor':>8} {'runs':>5}")
        for name in candidates:
            low, middle, high = self.quartiles(name)
            rate = moved_bytes / middle / 1e9
            times = f"{middle * 1e3:10.3f} {low * 1e3:8.3f} {high * 1e3:8.3f}"
            print(f"  {name:34} {times} {rate:8.1f} {self.floor / middle:8.0%} {len(self.times[name]):5}")

    def quartiles(self, name):
        """First quartile, median and third quartile of a candidate's times, in seconds."""
        times = self.times[name]
        return statistics.quantiles(times, n=4) if len(times) > 1 else times * 3

    def ratio(self, text, numerator, denominator):
        """Print `text N.NNx`, the ratio of two candidates' median times, and return it."""
        value = self.quartiles(numerator)[1] / self.quartiles(denominator)[1]
        self.record(f"{self.title} {text}", value, text)
        return value

    def record(self, line, value, text=None):
        """Print `line N.NNx` and keep the ratio, under `text` if given: for what is computed elsewhere."""
        print(f"  {line} {value:.2f}x")
        self.ratios.append((text or line, value))


def _seconds_per_run(function, warmup, seconds, clock):
    durations = []
    while len(durations) < warmup and sum(durations) <= seconds:
        start = clock()
        function(len(durations))
        durations.append(clock() - start)
    return min(durations)


def _schedule(candidates, args, clock):
    """Warm up, then yield (number of the call, name, function), alternating. A slow one sits out to keep its time.

    Every call has a number of its own, so that no candidate finds in the cache what the one before it has read. Rounds
    differ in their order, so that none always finds the memory for its result as the same other one has left it.
    """
    every = {}
    for name, function in candidates.items():
        seconds = _seconds_per_run(function, args.warmup, args.max_seconds, clock)
        runs = min(args.repeats, max(LEAST_RUNS, int(args.max_seconds / max(1e-9, seconds))))
        every[name] = -(-args.repeats // runs)
    number, shuffled = itertools.count(), random.Random(0)
    for run in range(args.repeats):
        for name in shuffled.sample(list(candidates), len(candidates)):
            if run % every[name] == 0:
                yield next(number), name, candidates[name]


def _time_on_cpu(candidates, args):
    times = {name: [] for name in candidates}
    for run, name, function in _schedule(candidates, args, time.perf_counter):
        start = time.perf_counter()
        function(run)
        times[name].append(time.perf_counter() - start)
    return times


def _time_on_gpu(candidates, args):
    def clock():
        torch.cuda.synchronize(args.device)
        return time.perf_counter()

    # No synchronisation between the timed runs: host overhead hides behind the work that is queued, as in training.
    events = {name: [] for name in candidates}
    for run, name, function in _schedule(candidates, args, clock):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function(run)
        end.record()
        events[name].append((start, end))
    torch.cuda.synchronize(args.device)
    return {name: [start.elapsed_time(end) / 1e3 for start, end in pairs] for name, pairs in events.items()}


def of_each_part(parts):
    """Comparisons of all parts, an iterable of iterables. A part that fails does not stop the next; its error is last.

    A GPU may be there for minutes only: a kernel that is wrong must not cost the figures of the others.
    """
    errors = []
    for part in parts:
        try:
            yield from part
        except Exception as error:
            traceback.print_exc()
            errors.append(error)
    if errors:
        raise errors[0]


def row_writer(path, columns):
    """Function that writes a dict as the next row of a new CSV file, at once; does nothing where path is None."""
    if path is None:
        return lambda row: None
    file = open(path, "w", newline="", encoding="utf-8", buffering=1)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    return writer.writerow


def write_csv(args, script, comparisons):
    """Write <script>.csv in --results: one row per candidate and one per ratio, with hardware and versions.

    Of a GPU <script>_cuda.csv, so that the CPU's stay. comparisons: an iterable; the rows of each are in the file
    before the next is measured.
    """
    args.results.mkdir(parents=True, exist_ok=True)
    path, count = args.results / f"{script}{'_cuda' if args.device.type == 'cuda' else ''}.csv", 0
    columns = ["comparison", "name", "median_ms", "q1_ms", "q3_ms", "floor_ms", "bytes", "operations", "gb_per_s",
               "ratio", "runs", "copy_gb_per_s", "matmul_gflop_per_s", "hardware", "versions"]  # fmt: skip
    write = row_writer(path, columns)
    for row in itertools.chain.from_iterable(map(_rows, comparisons)):
        write(row)
        count += 1
    print(f"\n{count} rows in {path}")


def _rows(comparison):
    common = {
        "comparison": comparison.title,
        "copy_gb_per_s": f"{comparison.rates.bytes / 1e9:.2f}",
        "matmul_gflop_per_s": f"{comparison.rates.operations / 1e9:.1f}",
        "hardware": hardware(comparison.device),
        "versions": versions(),
    }
    work = {
        "bytes": comparison.moved_bytes,
        "operations": comparison.operations,
        "floor_ms": f"{comparison.floor * 1e3:.4f}",
    }
    for name, times in comparison.times.items():
        low, middle, high = comparison.quartiles(name)
        measured = {"median_ms": f"{middle * 1e3:.4f}", "q1_ms": f"{low * 1e3:.4f}", "q3_ms": f"{high * 1e3:.4f}"}
        rate = f"{comparison.moved_bytes / middle / 1e9:.2f}"
        yield {**common, **work, "name": name, **measured, "gb_per_s": rate, "runs": len(times)}
    for text, value in comparison.ratios:
        yield {**common, "name": text, "ratio": f"{value:.3f}"}
