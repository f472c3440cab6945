"""Packed power-of-two layers against the library's layers with ordinary weights.

    python benchmarks/bench_bitshift.py [--bits 4 5 3] [--batches 1 8 64] [--layers vgg square conv network]

Linear layers 4096 x 4096 (square) and 25088 -> 4096 (vgg: the largest of VGG16) against F.linear in fp32 and bf16, with
weights rotated past the cache; ResNet18's convolutions at 224 x 224, batch 1, against F.conv2d; and the whole network.
Targets on the CPU, two cores, 4 bits, batch 1: vgg at least 6x fp32 and 3x bf16, square 4x fp32, two threads 1.7x one;
batch 8 at least 2x fp32, batch 64 at least 1x, although F.linear is spared the unpacking here; the network at least
0.95x. Ratios above 1 mean that the packed layer is faster. 3 bits are S3's weights, the others DeepShift's.
Some processors emulate bf16: then its ratio says nothing about packing.
"""

import copy
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
RESNET18_MACS = 1_814_073_344


def build_parser():
    options = timing.parser(__doc__)
    options.add_argument("--bits", type=int, nargs="+", choices=range(2, 7), default=[4, 5, 3])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="of the linear layers")
    kinds = [*LINEAR, "conv", "network"]
    options.add_argument("--layers", nargs="+", choices=kinds, default=["vgg", "square", "conv", "network"])
    options.add_argument("--no-bf16", action="store_true", help="leave F.linear in bf16 out")
    return options


def scheme(bits):
    return "S3" if bits == 3 else "PS"


def random_weights(shape, bits, device):
    """Rounded weights of DeepShift-PS, with 3 bits of S3, every exponent and zero as likely."""
    levels = 2 ** (bits - 1) - 1
    exponent = torch.randint(levels, shape, device=device) - (0 if scheme(bits) == "S3" else levels - 1)
    return torch.randint(-1, 2, shape, device=device) * torch.exp2(exponent.float())


def copies(args, size, make):
    """[make(), ...], so many that weights of `size` bytes are not in the cache when their turn comes."""
    room = (4 if args.device.type == "cuda" else 1) * timing.cache_bytes(args.device)
    return [make() for _ in range(1 if args.no_rotate else min(32, 1 + -(-room // size)))]


def packed_copies(args, weight, bits):
    packed = pack_shift_weights(weight, bits, scheme(bits))
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
            moved = packed[0].nbytes + 4 * batch * (inputs + outputs)
            comparison = timing.Comparison(args, title, candidates, moved, 2 * batch * inputs * outputs)
        for other in list(candidates)[1:]:
            comparison.ratio(f"{other} / bitshift_linear: time ratio", other, "bitshift_linear")
        yield comparison
    if args.device.type == "cpu" and torch.get_num_threads() > 1:
        yield compare_threads(args, f"{inputs} -> {outputs}, {bits} bits", inputs, packed)


def compare_threads(args, title, inputs, packed):
    """Batch 1 on one thread and on all."""
    x, threads = torch.randn(1, inputs), torch.get_num_threads()

    def run_on(count):
        def run(number):
            torch.set_num_threads(count)
            bitshift_linear(x, packed[number % len(packed)])

        return run

    candidates = {"bitshift_linear": run_on(threads), "bitshift_linear, one thread": run_on(1)}
    with torch.no_grad():
        comparison = timing.Comparison(args, f"{title}, batch 1, {threads} threads", candidates, packed[0].nbytes)
    torch.set_num_threads(threads)
    comparison.ratio(f"one thread / {threads} threads: time ratio", "bitshift_linear, one thread", "bitshift_linear")
    return comparison


def convolution_runs(x, packed, fp32, geometry):
    last = [weight.contiguous(memory_format=torch.channels_last) for weight in fp32]
    x_last = x.contiguous(memory_format=torch.channels_last)
    return {
        "bitshift_conv2d": lambda run: bitshift_conv2d(x, packed[run % len(packed)], None, *geometry),
        "bitshift_conv2d channels-last": lambda run: bitshift_conv2d(
            x_last, packed[run % len(packed)], None, *geometry
        ),
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
            pixels = outputs * (-(-size // stride)) ** 2
            operations = 2 * pixels * weight[0].numel()
            comparison = timing.Comparison(
                args, title, candidates, packed[0].nbytes + 4 * (x.numel() + pixels), operations
            )
        ours, theirs = (min((name for name in candidates if name.startswith(kind)),
                            key=lambda name: comparison.quartiles(name)[1]) for kind in ("bit", "F."))  # fmt: skip
        comparison.ratio("the better F.conv2d / the better bitshift_conv2d: time ratio", theirs, ours)
        for kind, name in (("bitshift_conv2d", ours), ("F.conv2d", theirs)):
            totals[kind] = totals.get(kind, 0) + count * comparison.quartiles(name)[1]
        yield comparison
    print(f"\nall 20 convolutions of ResNet18, {bits} bits: { ({k: round(v * 1e3, 2) for k, v in totals.items()}) } ms")
    ratio = totals["F.conv2d"] / totals["bitshift_conv2d"]
    print(f"  all convolutions, F.conv2d / bitshift_conv2d, the better layout each: time ratio {ratio:.2f}x")


class PackedConvolution(torch.nn.Module):
    """A convolution without bias on packed weights."""

    def __init__(self, conv, bits):
        super().__init__()
        weight = random_weights(conv.weight.shape, bits, conv.weight.device)
        self.packed, self.geometry = pack_shift_weights(weight, bits, scheme(bits)), (conv.stride, conv.padding)
        conv.weight.data.copy_(weight)

    def forward(self, x):
        return bitshift_conv2d(x, self.packed, None, *self.geometry)


def compare_networks(args, bits):
    """ResNet18, one image of 224 x 224: the float network in both layouts, and with all convolutions packed."""
    from torchvision.models import resnet18

    model = resnet18().to(args.device).eval()
    packed = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            parent, _, leaf = name.rpartition(".")
            setattr(packed.get_submodule(parent), leaf, PackedConvolution(module, bits))
    x = torch.randn(1, 3, 224, 224, device=args.device)
    last, x_last = copy.deepcopy(model).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    candidates = {
        "packed": lambda run: packed(x),
        "packed channels-last": lambda run: packed(x_last),
        "float": lambda run: model(x),
        "float channels-last": lambda run: last(x_last),
    }
    with torch.inference_mode():
        wrong = (packed(x_last) - model(x)).abs().max() / model(x).abs().max()
        assert wrong < 1e-4, f"the packed network is wrong by {wrong:.1e}"
        weights = sum(m.packed.nbytes for m in packed.modules() if isinstance(m, PackedConvolution))
        title = f"ResNet18, {bits} bits, one image of 224x224"
        comparison = timing.Comparison(args, title, candidates, weights + 4 * x.numel(), 2 * RESNET18_MACS)
    ours, theirs = (min(pair, key=lambda name: comparison.quartiles(name)[1])
                    for pair in (("packed", "packed channels-last"), ("float", "float channels-last")))  # fmt: skip
    comparison.ratio("float / packed, the better layout each: time ratio", theirs, ours)
    return [comparison]


COMPARE = {
    "vgg": lambda args, bits: compare_linear(args, "vgg", bits),
    "square": lambda args, bits: compare_linear(args, "square", bits),
    "conv": compare_convolutions,
    "network": compare_networks,
}


def main(argv=None):
    args = timing.parse(build_parser(), argv)
    print(f"{timing.hardware(args.device)}; {timing.versions()}")
    torch.manual_seed(0)
    comparisons = []
    for bits in args.bits:
        for name in args.layers:
            comparisons += COMPARE[name](args, bits)
    if not args.no_csv:
        timing.write_csv(args, "bench_bitshift", comparisons)


if __name__ == "__main__":
    main()
