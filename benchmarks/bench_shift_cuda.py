"""shift2d, and the shift fused with the 1x1 convolution after it, on a GPU.

    python benchmarks/bench_shift_cuda.py --device cuda [--parts bandwidth small host compilations fused]

bandwidth: tensors of 256 MiB; shift2d at least 0.90 of the speed of copy_, forward and backward; the better depthwise
  3x3 at least 2x the time of shift2d forward, 4x forward and backward (of the image and of the convolution's weight).
small: CIFAR-10's sizes in a replayed CUDA graph; shift2d at most 1.3x the time of x.clone().
host: time of an eager call on the CPU; at most 15 us.
compilations: files that CuPy compiles over 50 shapes, at most 8, and in a second process, none.
fused: ShiftResNet's sizes in a replayed CUDA graph; shift_conv1x1 at most 1.10x the 1x1 convolution alone, and the
  depthwise 3x3 and the 1x1 convolution at least 1.5x shift_conv1x1. fp32 is TF32 for all of them, PyTorch's default.

Without a GPU (--device cpu) the same comparisons run, without graphs and compilations, and nothing is written.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.bench_shift import DTYPES, LAYOUTS, input_gradient, one_hot_weight
from common.kernels import shift2d, shift_conv1x1

PARTS = ("bandwidth", "small", "host", "compilations", "fused")
IMAGE = (144, 56, 56)  # of the large tensors
SMALL = [(48, 32), (144, 32), (288, 16), (576, 8)]  # channels, side
# ShiftResNet's with expansion 3 and 9: inputs, outputs, stride, side. A 1x1 convolution alone of stride 2 reads a
# quarter of the pixels, shifts all.
FUSED = [
    (expansion * width, outputs, stride, side)
    for expansion in (3, 9)
    for width, outputs, stride, side in (
        (16, 16, 1, 32),
        (32, 32, 2, 32),
        (32, 32, 1, 16),
        (64, 64, 2, 16),
        (64, 64, 1, 8),
    )
]
HOST_CALLS = 200
MANY_SHAPES = """
import torch
from common.kernels import shift2d, shift_conv1x1
for size in range(1, 51):
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8 * size, size, 60 - size, device="cuda").contiguous(memory_format=layout)
        shift2d(x), shift_conv1x1(x, torch.randn(size, 8 * size, 1, 1, device="cuda"))
torch.cuda.synchronize()
"""


def build_parser():
    options = timing.parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    options.add_argument("--mebibytes", type=int, default=256, help="of the large tensors (default: 256)")
    options.add_argument("--batches", type=int, nargs="+", default=[128, 1024], help="of the small ones")
    return options


def random_images(args, shape, dtype_name, layout_name):
    """Function that makes such a tensor."""
    dtype, layout = DTYPES[dtype_name], LAYOUTS[layout_name]
    return lambda: torch.randn(shape, device=args.device).to(dtype).contiguous(memory_format=layout)


def depthwise(weight, stride=1):
    return lambda x: F.conv2d(x, weight, None, stride, padding=1, groups=x.shape[1])


def trained(operation, inputs, weight=None):
    """Function of the repetition's number: forward, and gradients of the images and, if given, of the weight."""

    def run_both(run):
        x = inputs[run % len(inputs)].detach().requires_grad_()
        torch.autograd.grad(operation(x), [x] if weight is None else [x, weight], inputs[(run + 1) % len(inputs)])

    return run_both


def compare_bandwidth(args, dtype_name):
    """Forward, backward, and both, of shift2d and the depthwise convolution in both layouts, against copy_."""
    item = DTYPES[dtype_name].itemsize
    channels, height, width = IMAGE
    batch = -(-args.mebibytes * 2**20 // (channels * height * width * item))
    moved = 2 * batch * channels * height * width * item
    passes = {"forward": {}, "backward": {}, "forward+backward": {}}
    for layout in LAYOUTS:
        make = random_images(args, (batch, channels, height, width), dtype_name, layout)
        inputs = timing.rotated(args, make)
        weight = one_hot_weight(channels, DTYPES[dtype_name], args.device).contiguous(memory_format=LAYOUTS[layout])
        weight.requires_grad_()
        convolve = depthwise(weight)
        with torch.no_grad():
            torch.testing.assert_close(shift2d(inputs[0]), convolve(inputs[0]), rtol=1e-2, atol=1e-2)  # may use TF32
        for name, operation, trainable in (
            (f"shift2d {layout}", shift2d, None),
            (f"depthwise {layout}", convolve, weight),
        ):
            passes["forward"][name] = _without_gradient(operation, inputs)
            passes["backward"][name] = input_gradient(operation, inputs, inputs[::-1])
            passes["forward+backward"][name] = trained(operation, inputs, trainable)
    source, target = make(), make()
    for name, candidates in passes.items():
        candidates["copy_"] = lambda run: target.copy_(source)
        factor = 2 if "+" in name else 1
        comparison = timing.Comparison(args, f"{dtype_name} {name}, {args.mebibytes} MiB", candidates, factor * moved)
        _ratios_of_bandwidth(comparison, copies=name != "forward+backward")
        yield comparison


def _without_gradient(operation, inputs):
    def run_forward(run):
        with torch.no_grad():
            operation(inputs[run % len(inputs)])

    return run_forward


def _ratios_of_bandwidth(comparison, copies):
    better = min((f"depthwise {layout}" for layout in LAYOUTS), key=lambda name: comparison.quartiles(name)[1])
    for layout in LAYOUTS:
        if copies:
            comparison.ratio(f"copy_ / shift2d {layout}: time ratio", "copy_", f"shift2d {layout}")
        comparison.ratio(f"the better depthwise / shift2d {layout}: time ratio", better, f"shift2d {layout}")


def replayed(args, operation, inputs):
    """Function that runs operation(x) for every x of inputs: a CUDA graph, replayed; without a GPU, the calls."""

    def run_all():
        with torch.no_grad():
            return [operation(x) for x in inputs]

    if args.device.type != "cuda":
        return lambda run: run_all()
    side = torch.cuda.Stream(args.device)
    side.wait_stream(torch.cuda.current_stream(args.device))
    with torch.cuda.stream(side):
        run_all()  # compiles, and chooses the convolution's algorithm
    torch.cuda.current_stream(args.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run_all()
    return lambda run, outputs=outputs: graph.replay()  # the outputs stay allocated: none overwrites another


def compare_small(args, dtype_name, layout, batch, channels, side):
    make = random_images(args, (batch, channels, side, side), dtype_name, layout)
    inputs = timing.rotated(args, make)
    candidates = {"shift2d": replayed(args, shift2d, inputs), "clone": replayed(args, torch.clone, inputs)}
    title = f"{dtype_name} {layout} {batch}x{channels}x{side}x{side}, graph"
    moved = 2 * len(inputs) * inputs[0].numel() * inputs[0].element_size()
    comparison = timing.Comparison(args, title, candidates, moved)
    comparison.ratio("shift2d / clone: time ratio", "shift2d", "clone")
    yield comparison


class HostTimes(timing.Comparison):
    """Processor time of one eager call, the device's work left out, in the form of a comparison."""

    def __init__(self, args, title, candidates):
        self.title, self.moved_bytes, self.operations, self.device = title, 0, 0, args.device
        self.ratios, self.rates, self.floor = [], timing.machine_rates(args), 0
        self.times = {name: [] for name in candidates}
        for _ in range(args.warmup + args.repeats):
            for name, function in candidates.items():
                self.times[name].append(self._seconds_per_call(function))
        print(f"\n{title}")
        for name, times in self.times.items():
            del times[: args.warmup]
            print(f"  {name:34} {1e6 * statistics.median(times):10.2f} us")

    def _seconds_per_call(self, function):
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            function()
        elapsed = time.perf_counter() - start
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so few calls that the queue was not full
        return elapsed / HOST_CALLS


def compare_host(args):
    x, weight = torch.randn(2, 18, 8, 8, device=args.device), torch.randn(4, 20, 1, 1, device=args.device)
    leaf, wide = x.clone().requires_grad_(), torch.randn(2, 20, 8, 8, device=args.device)
    candidates = {
        "eager call: shift2d": lambda: shift2d(x),
        "eager call: shift2d with a gradient": lambda: shift2d(leaf),
        "eager call: shift_conv1x1": lambda: shift_conv1x1(wide, weight),
        "eager call: clone": lambda: x.clone(),
    }
    times = HostTimes(args, "host time of a call", candidates)
    times.ratio("shift2d / clone: host time ratio", "eager call: shift2d", "eager call: clone")
    yield times


def count_compilations():
    """Print the number of files that CuPy compiles over 50 shapes in a new process, and then in another.

    A part like the others, but nothing is compared.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = []
        for _ in range(2):
            environment = {**os.environ, "CUPY_CACHE_DIR": folder}
            subprocess.run([sys.executable, "-c", MANY_SHAPES], cwd=ROOT, env=environment, check=True)
            written.append({(path.name, path.stat().st_ino) for path in Path(folder).iterdir()})
    again = len(written[1] - written[0])
    print(f"\ncompiled over 50 shapes: {len(written[0])} files (at most 8), in a second process {again} (none)")
    yield from ()


def compare_fused(args, dtype_name, layout, batch, sizes):
    inputs, outputs, stride, side = sizes
    dtype = DTYPES[dtype_name]
    images = timing.rotated(args, random_images(args, (batch, inputs, side, side), dtype_name, layout))
    weight = (torch.randn(outputs, inputs, 1, 1, device=args.device) / inputs**0.5).to(dtype)
    depth = one_hot_weight(inputs, dtype, args.device).contiguous(memory_format=LAYOUTS[layout])
    operations = {
        "shift_conv1x1": lambda x: shift_conv1x1(x, weight, None, stride),
        "1x1 alone": lambda x: F.conv2d(x, weight, None, stride),
        "shift2d, then 1x1": lambda x: F.conv2d(shift2d(x), weight, None, stride),
        "depthwise 3x3, then 1x1": lambda x: F.conv2d(depthwise(depth, stride)(x), weight),
    }
    with torch.no_grad():
        results = [operations[name](images[0]) for name in ("shift_conv1x1", "depthwise 3x3, then 1x1")]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    candidates = {name: replayed(args, operation, images) for name, operation in operations.items()}
    pixels = len(images) * batch * side * side
    title = f"{dtype_name} {layout} {batch}x{inputs}x{side}x{side} -> {outputs}, stride {stride}, graph"
    moved = pixels * (inputs + outputs // stride**2) * dtype.itemsize
    comparison = timing.Comparison(args, title, candidates, moved)
    comparison.ratio("shift_conv1x1 / 1x1 alone: time ratio", "shift_conv1x1", "1x1 alone")
    name = "depthwise 3x3, then 1x1"
    comparison.ratio(f"{name} / shift_conv1x1: time ratio", name, "shift_conv1x1")
    yield comparison


def measure(args):
    """Generators of the comparisons of each part, the chosen ones, of one data type or of one layer."""
    if "bandwidth" in args.parts:
        yield from (compare_bandwidth(args, dtype) for dtype in args.dtypes)
    kinds = [(dtype, layout, batch) for dtype in args.dtypes for layout in LAYOUTS for batch in args.batches]
    if "small" in args.parts:
        yield from (compare_small(args, *kind, *sizes) for kind in kinds for sizes in SMALL)
    if "host" in args.parts:
        yield compare_host(args)
    if "compilations" in args.parts and args.device.type == "cuda":
        yield count_compilations()
    if "fused" in args.parts:
        yield from (compare_fused(args, *kind, sizes) for kind in kinds for sizes in FUSED)


def main(argv=None):
    options = build_parser()
    args = timing.parse(options, argv)
    if min(args.mebibytes, *args.batches) < 1:
        options.error("--mebibytes and --batches must be at least 1")
    torch.backends.cudnn.benchmark = True
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    print(f"{timing.hardware(args.device)}; {timing.versions()}")
    comparisons = timing.of_each_part(measure(args))
    if args.device.type == "cuda" and not args.no_csv:
        timing.write_csv(args, "bench_shift", comparisons)  # bench_shift_cuda.csv
    else:
        list(comparisons)


if __name__ == "__main__":
    main()
