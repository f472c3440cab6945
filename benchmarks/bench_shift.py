"""shift2d against a copy of the same size, and against the depthwise convolution that computes the same.

    python benchmarks/bench_shift.py [--device cuda] [--dtypes fp32 bf16] [--shape 64 144 32 32]

Targets on the CPU, (64, 144, 32, 32) fp32 NCHW: shift2d at most 1.2x the time of x.clone(), and the depthwise
convolution at least 2x that of shift2d, forward and backward (gradient of the input). Takes a few minutes, most of them
for the convolution in bf16, which some processors emulate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import timing
from common.kernels import shift2d

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def build_parser():
    options = timing.parser(__doc__)
    options.add_argument("--shape", type=int, nargs=4, default=[64, 144, 32, 32], metavar=("N", "C", "H", "W"))
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    options.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    options.add_argument("--copy-only", action="store_true", help="leave the convolutions out")
    return options


def one_hot_weight(channels, dtype, device):
    """(C, 1, 3, 3) weight of the depthwise convolution that equals shift2d with kernel_size 3."""
    moved = channels // 9 * 9
    tap = torch.where(torch.arange(channels) < moved, torch.arange(channels) % 9, 4)
    return F.one_hot(tap, 9).view(channels, 1, 3, 3).to(device, dtype)


def input_gradient(operation, inputs, gradients):
    """Function of the repetition's number: gradient of operation(x) with respect to x, the forward pass left out."""
    x = inputs[0].detach().requires_grad_()
    output = operation(x)
    return lambda run: torch.autograd.grad(output, x, gradients[run % len(gradients)], retain_graph=True)


def forward_backward(operation, inputs, gradients):
    def run_both(run):
        x = inputs[run % len(inputs)].detach().requires_grad_()
        torch.autograd.grad(operation(x), x, gradients[run % len(gradients)])

    return run_both


def compare_layout(args, dtype_name, layout_name):
    """The comparisons of one dtype and layout."""
    layout, dtype = LAYOUTS[layout_name], DTYPES[dtype_name]

    def make():
        return torch.randn(args.shape).to(args.device, dtype, memory_format=layout)

    inputs, target = timing.rotated(args, make), make()
    moved = 2 * target.numel() * target.element_size()
    weight = one_hot_weight(args.shape[1], dtype, args.device).to(memory_format=layout)

    def convolve(x):
        return F.conv2d(x, weight, padding=1, groups=x.shape[1])

    assert torch.equal(shift2d(inputs[0]), convolve(inputs[0])), "shift2d and the convolution disagree"
    title = f"{dtype_name} {layout_name}"
    copies = {
        "shift2d": lambda run: shift2d(inputs[run % len(inputs)]),
        "clone": lambda run: inputs[run % len(inputs)].clone(),
        "copy_ into a ready tensor": lambda run: target.copy_(inputs[run % len(inputs)]),
    }
    with torch.no_grad():
        comparison = timing.Comparison(args, f"{title} forward", copies, moved)
    comparison.ratio("shift2d / clone: time ratio", "shift2d", "clone")
    comparison.ratio("shift2d / copy_ into a ready tensor: time ratio", "shift2d", "copy_ into a ready tensor")
    return [comparison, *([] if args.copy_only else compare_convolutions(args, title, convolve, inputs, moved))]


def forward(operation, inputs, _):
    def run(number):
        with torch.no_grad():
            operation(inputs[number % len(inputs)])

    return run


PASSES = {"forward": (forward, 1), "backward": (input_gradient, 1), "forward+backward": (forward_backward, 2)}


def compare_convolutions(args, title, convolve, inputs, moved):
    """Each pass against the depthwise convolution's, apart from the copies: a slow candidate disturbs the next one."""
    comparisons = []
    gradients = inputs[::-1]
    for name, (make_run, factor) in PASSES.items():
        candidates = {
            "shift2d": make_run(shift2d, inputs, gradients),
            "depthwise conv": make_run(convolve, inputs, gradients),
        }
        comparison = timing.Comparison(args, f"{title} {name}, convolution", candidates, factor * moved)
        comparison.ratio("depthwise conv / shift2d: time ratio", "depthwise conv", "shift2d")
        comparisons.append(comparison)
    return comparisons


def main(argv=None):
    options = build_parser()
    args = timing.parse(options, argv)
    if min(args.shape) < 1:
        options.error(f"--shape must be four positive sizes, not {args.shape}")
    print(f"shape {tuple(args.shape)} on {timing.hardware(args.device)}; {timing.versions()}")
    comparisons = []
    for dtype_name in args.dtypes:
        for layout_name in args.layouts:
            comparisons += compare_layout(args, dtype_name, layout_name)
    if not args.no_csv:
        timing.write_csv(args, "bench_shift", comparisons)


if __name__ == "__main__":
    main()
