"""Packed power-of-two layers on a GPU against the library's layers in bf16, every candidate in a replayed CUDA graph.

    python benchmarks/bench_bitshift_cuda.py --device cuda [--parts linear int8 network naive]

linear: bf16 activations; 4 bits at least 3.2x F.linear up to batch 8 and 2.5x up to 32, 5 bits 2.5x up to 8, nothing
  below 0.97x, and at batch 1 at least 0.80 of the bandwidth of copy_.
int8: arithmetic="int8", from int8 to exact int32 at least 1.5x F.linear in bf16 from batch 1024; and from bf16 to bf16.
network: ResNet18 at 224 x 224, convolutions packed, against cuDNN, both bf16 channels-last; at least 1.0x at batch 1.
naive: ResNet18's 20 convolutions by shifts and by multiplications in DeepShift's form, whose latencies its paper
  compares (25 % less with shifts); bitshift_conv2d at least 20x the shifts.

A graph runs several calls one after the other, each with other weights, together more than the L2 cache holds; times
are those of all calls. Without a GPU (--device cpu) the same comparisons run, without graphs and naive kernels, and
nothing is written: give small --sizes and --image.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.bench_bitshift import CONVOLUTIONS, PackedConvolution, copies, packed_copies, random_weights
from benchmarks.bench_shift_cuda import replayed
from common.kernels import bitshift_conv2d, bitshift_linear, pack_shift_weights
from common.kernels.bitshift_reference import Weights, linear_int8_reference

PARTS = ("linear", "int8", "network", "naive")
SIZES = ["4096x4096", "8192x8192", "4096x14336"]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]
INT8_CODES = [("S3", 3), ("PS", 4)]
CALLS, CALLS_OF_MANY, MANY = 32, 8, 1024  # in a graph; with so many rows of x there are fewer
CHECKED = 64  # rows of a result
ROUNDING = 2.0**-7  # of a bf16 result, relative to the largest


def build_parser():
    options = timing.parser(__doc__)
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--bits", type=int, nargs="+", choices=range(2, 7), default=[4, 5])
    options.add_argument("--sizes", type=_size, nargs="+", default=[_size(text) for text in SIZES], metavar="INxOUT")
    options.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="of part linear")
    options.add_argument("--int8-batches", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    options.add_argument("--image-batches", type=int, nargs="+", default=[1, 32], help="of parts network and naive")
    options.add_argument("--image", type=int, default=224, help="pixels of a side, a multiple of 32 (default: 224)")
    return options


def _size(text):
    inputs, _, outputs = text.partition("x")
    if not (inputs.isdecimal() and outputs.isdecimal() and int(inputs) and int(outputs)):
        raise argparse.ArgumentTypeError(f"must be like 4096x14336, not {text}")
    return int(inputs), int(outputs)


def calls_of(batch):
    return CALLS if batch < MANY else CALLS_OF_MANY


def in_turn(batch, *lists):
    """Arguments of each call in a graph: tuples with the next of each list, from the start again at its end."""
    return [tuple(items[call % len(items)] for items in lists) for call in range(calls_of(batch))]


def target_of_linear(bits, batch):
    """Least ratio of times, F.linear in bf16 / bitshift_linear."""
    if bits == 4:
        return 3.2 if batch <= 8 else 2.5 if batch <= 32 else 0.97
    return 2.5 if bits == 5 and batch <= 8 else 0.97


def ratio(comparison, theirs, ours, target=None):
    goal = "" if target is None else f", target {target}x"
    return comparison.ratio(f"{theirs} / {ours}{goal}: time ratio", theirs, ours)


def compare_linear(args, size, bits):
    """One layer and code width, all batch sizes."""
    inputs, outputs = size
    weight = random_weights((outputs, inputs), bits, args.device)
    packed = packed_copies(args, weight, bits)
    plain = copies(args, weight.numel() * 2, lambda: weight.bfloat16())
    for batch in args.batches:
        images = timing.rotated(args, lambda batch=batch: torch.randn(batch, inputs, device=args.device).bfloat16())
        expected = F.linear(images[0][:CHECKED].double(), weight.double())
        wrong = (bitshift_linear(images[0], packed[0])[:CHECKED] - expected).abs().max() / expected.abs().max()
        assert wrong < ROUNDING, f"bitshift_linear is wrong by {wrong:.1e}"
        candidates = {
            "bitshift_linear": replayed(args, lambda pair: bitshift_linear(*pair), in_turn(batch, images, packed)),
            "F.linear bf16": replayed(args, lambda pair: F.linear(*pair), in_turn(batch, images, plain)),
        }
        moved = calls_of(batch) * (packed[0].nbytes + 2 * batch * (inputs + outputs))
        title = f"{inputs} -> {outputs}, {bits} bits, batch {batch}, bf16"
        comparison = timing.Comparison(args, title, candidates, moved)
        ratio(comparison, "F.linear bf16", "bitshift_linear", target_of_linear(bits, batch))
        if batch == 1:
            share = comparison.floor / comparison.quartiles("bitshift_linear")[1]
            text = "share of the bandwidth of copy_, target 0.80: time ratio"
            comparison.ratios.append((text, share))
            print(f"  {title} {text} {share:.2f}")
        yield comparison


def exactly(pair):
    return bitshift_linear(*pair, arithmetic="int8", activation_bits=(4, 4))


def compare_int8(args, size, scheme, bits):
    """Exact integers, one layer and code, all batch sizes."""
    inputs, outputs = size
    shift = torch.randint(0, 2 ** (bits - 1) - 1, (outputs, inputs), device=args.device)
    shift = shift - (int(shift.max()) if scheme == "PS" else 0)
    parts = shift, torch.randint(-1, 2, shift.shape, device=args.device)
    packed = pack_shift_weights(parts, bits, scheme)
    plain = copies(args, 2 * shift.numel(), lambda: (parts[1] * torch.exp2(shift.float())).bfloat16())
    weights = Weights(packed.codes, packed.shape, packed.bits, packed.base, packed.zero)
    for batch in args.int8_batches:
        integers = timing.rotated(
            args, lambda batch=batch: torch.randint(-128, 128, (batch, inputs), device=args.device).to(torch.int8)
        )
        y = bitshift_linear(integers[0], packed, arithmetic="int8")
        wanted = linear_int8_reference(integers[0][:CHECKED], weights)
        assert torch.equal(y[:CHECKED], wanted), "the int8 route is not exact"
        halves = [x.bfloat16() / 16 for x in integers]
        operations = {
            "bitshift int8 to int32": (exactly, integers, [packed]),
            "bitshift int8, bf16 to bf16": (exactly, halves, [packed]),
            "F.linear bf16": (lambda pair: F.linear(*pair), halves, plain),
        }
        candidates = {name: replayed(args, run, in_turn(batch, *lists)) for name, (run, *lists) in operations.items()}
        moved = calls_of(batch) * (packed.nbytes + batch * (inputs + 4 * outputs))
        title = f"{inputs} -> {outputs}, {scheme} {bits} bits, batch {batch}, int8"
        comparison = timing.Comparison(args, title, candidates, moved)
        ratio(comparison, "F.linear bf16", "bitshift int8 to int32", 1.5)
        ratio(comparison, "F.linear bf16", "bitshift int8, bf16 to bf16")
        yield comparison


def networks(args, bits):
    """([(packed, float)], bytes of codes): ResNet18 in bf16, channels-last, as often as the L2 cache calls for."""
    from torchvision.models import resnet18

    model = resnet18().to(args.device, torch.bfloat16).eval()
    packed = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(packed.get_submodule(parent), leaf, PackedConvolution(module, bits))
    pair = packed, model.to(memory_format=torch.channels_last)
    size = sum(conv.packed.nbytes for conv in packed.modules() if isinstance(conv, PackedConvolution))
    return copies(args, size, lambda: copy.deepcopy(pair)), size


def compare_networks(args, bits):
    pairs, size = networks(args, bits)
    for batch in args.image_batches:
        x = torch.randn(batch, 3, args.image, args.image, device=args.device).bfloat16()
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            ours, theirs = (model(x).float() for model in pairs[0])
        wrong = (ours - theirs).abs().max() / theirs.abs().max()
        assert wrong < 4 * ROUNDING, f"the packed network is wrong by {wrong:.1e}"
        candidates = {
            name: replayed(args, lambda model, x=x: model(x), [pair[i] for pair in pairs])
            for i, name in enumerate(("packed", "cuDNN bf16 channels-last"))
        }
        title = f"ResNet18, {bits} bits, batch {batch} of {args.image}x{args.image}, bf16"
        moved = len(pairs) * (size + 2 * x.numel())
        comparison = timing.Comparison(args, title, candidates, moved)
        ratio(comparison, "cuDNN bf16 channels-last", "packed", 1.0 if batch == 1 else None)
        yield comparison


def convolutions(args, bits, batch):
    """(candidate -> [function that runs one of ResNet18's convolutions], all of them, bytes that these move)."""
    runs, moved = {"bitshift_conv2d bf16": [], "F.conv2d bf16": []}, 0
    for inputs, outputs, kernel, stride, size, count in CONVOLUTIONS:
        geometry, size = (stride, kernel // 2), max(1, size * args.image // 224)
        for _ in range(count):
            weight = random_weights((outputs, inputs, kernel, kernel), bits, args.device)
            packed = pack_shift_weights(weight, bits, "PS")
            x = torch.randn(batch, inputs, size, size, device=args.device)
            last, half = (t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, weight))
            runs["bitshift_conv2d bf16"].append(lambda a=last, b=packed, g=geometry: bitshift_conv2d(a, b, None, *g))
            runs["F.conv2d bf16"].append(lambda a=last, b=half, g=geometry: F.conv2d(a, b, None, *g))
            moved += packed.nbytes + 2 * x.numel() + 2 * batch * outputs * (-(-size // stride)) ** 2
            if args.device.type == "cuda":
                add_naive(runs, x, weight, packed, geometry)
    return runs, moved


def add_naive(runs, x, weight, packed, geometry):
    """Both kernels of DeepShift's form, checked."""
    from common.kernels import bitshift_naive_cuda as naive

    integers, codes = (x * 2**16).int(), naive.shift_codes(packed)
    fixed = bitshift_conv2d(integers, packed, None, *geometry, arithmetic="fixed")
    assert torch.equal(naive.conv2d(integers, codes, *geometry), fixed), "the naive shifts are wrong"
    torch.testing.assert_close(
        naive.conv2d(x, weight, *geometry), F.conv2d(x, weight, None, *geometry), rtol=1e-2, atol=1e-1
    )  # which may use TF32
    runs.setdefault("naive shifts, int32", []).append(lambda: naive.conv2d(integers, codes, *geometry))
    runs.setdefault("naive multiplications, fp32", []).append(lambda: naive.conv2d(x, weight, *geometry))


def compare_naive(args, bits):
    for batch in args.image_batches:
        runs, moved = convolutions(args, bits, batch)
        candidates = {name: replayed(args, lambda run: run(), layers) for name, layers in runs.items()}
        title = f"ResNet18's 20 convolutions, {bits} bits, batch {batch} of {args.image}x{args.image}"
        comparison = timing.Comparison(args, title, candidates, moved)
        ratio(comparison, "F.conv2d bf16", "bitshift_conv2d bf16")
        if "naive shifts, int32" in candidates:
            ratio(comparison, "naive shifts, int32", "bitshift_conv2d bf16", 20)
            ratio(comparison, "naive multiplications, fp32", "naive shifts, int32")
        yield comparison


def measure(args):
    """Generators of the comparisons of each part, the chosen ones, of one layer and code or of one network."""
    for size in args.sizes:
        for bits in args.bits if "linear" in args.parts else ():
            yield compare_linear(args, size, bits)
        for scheme, bits in INT8_CODES if "int8" in args.parts else ():
            yield compare_int8(args, size, scheme, bits)
    for bits in args.bits:
        if "network" in args.parts:
            yield compare_networks(args, bits)
        if "naive" in args.parts:
            yield compare_naive(args, bits)


def main(argv=None):
    args = timing.parse(build_parser(), argv)
    torch.backends.cudnn.benchmark = True
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    print(f"{timing.hardware(args.device)}; {timing.versions()}")
    torch.manual_seed(0)
    comparisons = timing.of_each_part(measure(args))
    if args.device.type == "cuda" and not args.no_csv:
        timing.write_csv(args, "bench_bitshift", comparisons)  # bench_bitshift_cuda.csv
    else:
        list(comparisons)


if __name__ == "__main__":
    main()
