"""A shift fused into the 1x1 convolution that follows it, against that convolution alone.

    python benchmarks/bench_shift_conv1x1.py [--expansions 1 3 6 9] [--batch 50]

All shapes of ShiftResNet20, 56 and 110 (inputs x expansion -> outputs), channels-last, fp32, the batch of
shiftresnet/eval.py on a CPU, the channels in the order in which eval.py has them (by tap where that is faster), and in
shift2d's; then whole networks as eval.py runs them: shifts fused, batch norms folded. Target: 1.10x the 1x1 convolution
alone.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import timing
from common.kernels import gains_from_tap_order, shift2d, shift_conv1x1, tap_order
from shiftresnet.engine import TEST_BATCH_SIZE, fused_shifts
from shiftresnet.models import DEPTHS, Config, build_model

# Width of the middle over the expansion, outputs, stride, size of the image; how often, per number of blocks per stage.
SHAPES = [
    (16, 16, 1, 32, lambda blocks: blocks),
    (32, 32, 2, 32, lambda blocks: 1),
    (32, 32, 1, 16, lambda blocks: blocks - 1),
    (64, 64, 2, 16, lambda blocks: 1),
    (64, 64, 1, 8, lambda blocks: blocks - 1),
]
NETWORKS = (20, 56, 110)


def build_parser():
    options = timing.parser(__doc__)
    options.add_argument("--batch", type=int, default=TEST_BATCH_SIZE["cpu"], help="images (default: %(default)s)")
    options.add_argument("--expansions", type=int, nargs="+", default=[1, 3, 6, 9], help="default: 1 3 6 9")
    options.add_argument("--no-networks", action="store_true", help="leave whole networks out")
    return options


def compare_shape(args, channels, outputs, stride, size):
    """The comparison of one layer."""

    def make():
        return torch.randn(args.batch, channels, size, size, device=args.device).to(memory_format=torch.channels_last)

    inputs, weight = timing.rotated(args, make), torch.randn(outputs, channels, 1, 1, device=args.device)
    x = inputs[0]
    order, by_tap = tap_order(channels).to(args.device), gains_from_tap_order(weight)
    given = weight[:, order] if by_tap else weight
    expected = F.conv2d(shift2d(x).double(), weight.double(), None, stride)
    ordered = shift_conv1x1(x[:, order], weight[:, order], None, stride, by_tap=True)
    for y in (shift_conv1x1(x, weight, None, stride), ordered):
        wrong = (y - expected).abs().max() / expected.abs().max()
        assert wrong < 1e-5, f"shift_conv1x1 is wrong by {wrong:.1e}"
    candidates = {
        "shift_conv1x1": lambda run: shift_conv1x1(inputs[run % len(inputs)], given, None, stride, by_tap=by_tap),
        "shift_conv1x1 in shift2d's order": lambda run: shift_conv1x1(inputs[run % len(inputs)], weight, None, stride),
        "1x1 alone": lambda run: F.conv2d(inputs[run % len(inputs)], weight, None, stride),
        "shift2d, then 1x1": lambda run: F.conv2d(shift2d(inputs[run % len(inputs)]), weight, None, stride),
    }
    pixels = expected[:, 0].numel()
    title = f"shift + 1x1, {channels} -> {outputs}, stride {stride}, {size}x{size}, batch {args.batch}"
    # An output has one input of each channel, whatever the stride.
    moved, operations = 4 * pixels * (channels + outputs), 2 * pixels * outputs * channels
    comparison = timing.Comparison(args, title, candidates, moved, operations)
    comparison.ratio("shift_conv1x1 / 1x1 alone: time ratio", "shift_conv1x1", "1x1 alone")
    comparison.ratio("shift_conv1x1 in shift2d's order / 1x1 alone: time ratio", [*candidates][1], "1x1 alone")
    comparison.ratio("shift2d, then 1x1 / shift_conv1x1: time ratio", "shift2d, then 1x1", "shift_conv1x1")
    return comparison


def compare_layers(args, expansion):
    """The comparisons of all layers, the slowest of them, and their sums over the networks."""
    comparisons, seconds = [], []
    for width, outputs, stride, size, count in SHAPES:
        comparison = compare_shape(args, width * expansion, outputs, stride, size)
        comparisons.append(comparison)
        seconds.append((count, {name: comparison.quartiles(name)[1] for name in comparison.times}))
    slowest = max(times["shift_conv1x1"] / times["1x1 alone"] for _, times in seconds)
    text = f"slowest of the layers, expansion {expansion}: shift_conv1x1 / 1x1 alone"
    comparisons[-1].record(f"{text}: time ratio", slowest)
    for depth in NETWORKS:
        sums = {name: sum(count(DEPTHS[depth]) * times[name] for count, times in seconds) for name in seconds[0][1]}
        text = f"all layers of ShiftResNet{depth}, expansion {expansion}: shift_conv1x1 / 1x1 alone"
        comparisons[-1].record(f"{text}: time ratio", sums["shift_conv1x1"] / sums["1x1 alone"])
    return comparisons


def compare_network(args, depth, expansion):
    """One batch through the whole network: as it trains, in both layouts, and as eval.py runs it."""
    model = build_model(Config(f"shiftresnet{depth}", expansion=expansion)).to(args.device).eval()
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    last, fused = x.to(memory_format=torch.channels_last), copy.deepcopy(model)
    with fused_shifts(fused) as memory_format:
        candidates = {
            "shift_conv1x1": lambda run: fused(x.to(memory_format=memory_format)),
            "unfused NCHW": lambda run: model(x),
            "unfused": lambda run: model(last),
        }
        title = f"ShiftResNet{depth}, expansion {expansion}, batch {args.batch}"
        comparison = timing.Comparison(args, title, candidates, 0)
    comparison.ratio("unfused, NCHW / shift_conv1x1: time ratio", "unfused NCHW", "shift_conv1x1")
    comparison.ratio("unfused, channels-last / shift_conv1x1: time ratio", "unfused", "shift_conv1x1")
    return comparison


def main(argv=None):
    args = timing.parse(build_parser(), argv)
    print(f"{timing.hardware(args.device)}; {timing.versions()}")
    torch.manual_seed(0)
    comparisons = []
    with torch.no_grad():
        for expansion in args.expansions:
            comparisons += compare_layers(args, expansion)
        for depth in () if args.no_networks else NETWORKS[:2]:
            comparisons.append(compare_network(args, depth, 3))
    if not args.no_csv:
        timing.write_csv(args, "bench_shift_conv1x1", comparisons)


if __name__ == "__main__":
    main()
