"""Packed power-of-two layers against the library's layers with ordinary weights.

    python benchmarks/bench_bitshift.py [--bits 4 5] [--batches 1 8 64] [--layers vgg square conv] [--device cuda]

Linear layers 4096 x 4096 (square) and 25088 -> 4096 (vgg: the largest of VGG16) against F.linear in fp32 and bf16, with
weights rotated past the cache; ResNet18's convolutions at 224 x 224, batch 1, against F.conv2d. Targets on the CPU, two
cores: vgg, batch 1, 4 bits at least 4x fp32 and 1.8x bf16; batch 64 at least 1x fp32, although F.linear is spared the
unpacking here. Ratios above 1 mean that the packed layer is faster. Some processors emulate bf16: then its ratio says
nothing about packing.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import timing
from common.kernels import bitshift_conv2d, bitshift_linear, pack_shift_weights

LINEAR = {"square": (4096, 4096), "vgg": (25088, 4096)}
# ResNet18 at 224 x 224: inputs, outputs, kernel, stride, size of the input image, how many layers are like it.
CONVOLUTIONS = [
    (3, 64, 7, 2, 224, 1),
    (64, 64, 3, 1, 56, 4),
    (64, 128, 3, 2, 56, 1),
    (64, 128, 1, 2, 56, 1),
    (128, 128, 3, 1, 28, 3),
    (128, 256, 3, 2, 28, 1),
    (128, 256, 1, 2, 28, 1),
    (256, 256, 3, 1, 14, 3),
    (256, 512, 3, 2, 14, 1),
    (256, 512, 1, 2, 14, 1),
    (512, 512, 3, 1, 7, 3),
]


def build_parser():
    options = timing.parser(__doc__)
    options.add_argument("--bits", type=int, nargs="+", choices=range(2, 7), default=[4, 5])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="of the linear layers")
    options.add_argument("--layers", nargs="+", choices=[*LINEAR, "conv"], default=["vgg", "square", "conv"])
    options.add_argument("--no-bf16", action="store_true", help="leave F.linear in bf16 out")
    return options


def random_weights(shape, bits, device):
    """Rounded weights of DeepShift-PS, every exponent and zero as likely."""
    exponent = torch.randint(2 - 2 ** (bits - 1), 1, shape, device=device)
    return torch.randint(-1, 2, shape, device=device) * torch.exp2(exponent.float())


def copies(args, size, make):
    """[make(), ...], so many that weights of `size` bytes are not in the cache when their turn comes."""
    room = (4 if args.device.type == "cuda" else 1) * timing.cache_bytes(args.device)
    return [make() for _ in range(1 if args.no_rotate else min(32, 1 + -(-room // size)))]


def packed_copies(args, weight, bits):
    packed = pack_shift_weights(weight, bits, "PS")
    return copies(args, packed.nbytes, lambda: dataclasses.replace(packed, codes=packed.codes.clone()))


def compare_linear(args, name, bits):
    """The comparisons of one layer and code width, all batch sizes."""
    inputs, outputs = LINEAR[name]
    weight = random_weights((outputs, inputs), bits, args.device)
    packed = packed_copies(args, weight, bits)
    fp32 = copies(args, weight.numel() * 4, weight.clone)
    bf16 = [] if args.no_bf16 else copies(args, weight.numel() * 2, lambda: weight.to(torch.bfloat16))
    for batch in args.batches:
        x = torch.randn(batch, inputs, device=args.device)
        half = x.bfloat16()
        candidates = {
            "bitshift_linear": lambda run, x=x: bitshift_linear(x, packed[run % len(packed)]),
            "F.linear fp32": lambda run, x=x: F.linear(x, fp32[run % len(fp32)]),
        }
        if bf16:
            candidates["F.linear bf16"] = lambda run, x=half: F.linear(x, bf16[run % len(bf16)])
        expected = F.linear(x.double(), weight.double())
        wrong = (bitshift_linear(x, packed[0]) - expected).abs().max() / expected.abs().max()
        assert wrong < 1e-5, f"bitshift_linear is wrong by {wrong:.1e}"
        title = f"{inputs} -> {outputs}, {bits} bits, batch {batch}"
        with torch.no_grad():
            comparison = timing.Comparison(args, title, candidates, packed[0].nbytes + 4 * batch * (inputs + outputs))
        for other in list(candidates)[1:]:
            comparison.ratio(f"{other} / bitshift_linear: time ratio", other, "bitshift_linear")
        yield comparison


def convolution_runs(x, packed, fp32, geometry):
    last = [weight.contiguous(memory_format=torch.channels_last) for weight in fp32]
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "bitshift_conv2d": lambda run: bitshift_conv2d(x, packed[run % len(packed)], None, *geometry),
        "F.conv2d": lambda run: F.conv2d(x, fp32[run % len(fp32)], None, *geometry),
        "F.conv2d channels-last": lambda run: F.conv2d(x_last, last[run % len(last)], None, *geometry),
    }


def compare_convolutions(args, bits):
    """The comparisons of ResNet18's convolutions, batch 1, and the sum over the network."""
    totals = {}
    for inputs, outputs, kernel, stride, size, count in CONVOLUTIONS:
        weight = random_weights((outputs, inputs, kernel, kernel), bits, args.device)
        packed, fp32 = packed_copies(args, weight, bits), copies(args, weight.numel() * 4, weight.clone)
        x = torch.randn(1, inputs, size, size, device=args.device)
        candidates = convolution_runs(x, packed, fp32, (stride, kernel // 2))
        title = f"conv {inputs} -> {outputs}, {kernel}x{kernel}, stride {stride}, {size}x{size}, {bits} bits"
        with torch.no_grad():
            comparison = timing.Comparison(args, title, candidates, packed[0].nbytes + 4 * x.numel())
        better = min(list(candidates)[1:], key=lambda name: comparison.quartiles(name)[1])
        comparison.ratio("the better F.conv2d / bitshift_conv2d: time ratio", better, "bitshift_conv2d")
        for name in candidates:
            totals[name] = totals.get(name, 0) + count * comparison.quartiles(name)[1]
        yield comparison
    ratio = min(value for name, value in totals.items() if name != "bitshift_conv2d") / totals["bitshift_conv2d"]
    print(f"\nall 20 convolutions of ResNet18, {bits} bits: { ({k: round(v * 1e3, 2) for k, v in totals.items()}) } ms")
    print(f"  all convolutions, the better F.conv2d / bitshift_conv2d: time ratio {ratio:.2f}x")


def main(argv=None):
    args = timing.parse(build_parser(), argv)
    print(f"{timing.hardware(args.device)}; {timing.versions()}")
    torch.manual_seed(0)
    comparisons = []
    for bits in args.bits:
        for name in args.layers:
            found = compare_convolutions(args, bits) if name == "conv" else compare_linear(args, name, bits)
            comparisons += list(found)
    if not args.no_csv:
        timing.write_csv("bench_bitshift", comparisons)


if __name__ == "__main__":
    main()
