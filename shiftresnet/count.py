"""Count parameters and FLOPs of a network and of the plain ResNet of its depth.

    python shiftresnet/count.py --arch=shiftresnet20 --expansion=3

prints

    Parameters: (new) 95642 (original) 272474 (reduction) 2.85
    FLOPs: (new) 17760896 (original) 42140288 (reduction) 2.37

A FLOP is one multiply-add. Only convolutions and the linear layer are counted;
batch norm, ReLU, additions, pooling, biases and the shift are free. Both
networks have 10 classes unless --num-classes says otherwise.

Rules (--flops-rule):
  final   the original's last version, with its two errors: the stem is counted
          with the last stage's width instead of the first's, and the depthwise
          convolution of a depthwiseresnet block at the block's output size
  readme  the same, the stem without its factor of 3 input channels: the rule
          behind the example outputs in the original README
  true    every multiply-add that is executed
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from shiftresnet.models import ARCHITECTURES, REDUCTION_MODES, Config, build_model
from shiftresnet.modules import DepthWiseWithSkipBlock

FLOPS_RULES = ("final", "readme", "true")
IMAGE_SIZE = 32


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers: weights, batch-norm scales and offsets, biases; no running statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_macs(model: nn.Module, image_size: int = IMAGE_SIZE) -> dict[str, int]:
    """Multiply-adds of each convolution and linear layer for one (3, image_size, image_size) image, by module name."""
    macs = {}

    def hook(name):
        def record(layer, inputs, output):
            per_output = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
            macs[name] = output.numel() * per_output

        return record

    shapes_only = copy.deepcopy(model).to("meta").eval()
    for name, layer in list(shapes_only.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(hook(name))
        elif isinstance(layer, nn.BatchNorm2d):  # free, keeps the shape, and takes most of the time here
            shapes_only.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], nn.Identity())
    shapes_only(torch.empty(1, 3, image_size, image_size, device="meta"))
    return macs


def count_flops(model: nn.Module, rule: str = "final", image_size: int = IMAGE_SIZE, macs=None) -> int:
    """FLOPs (multiply-adds) of one image under one of FLOPS_RULES, see the top of this file.

    macs: what layer_macs gave for this model, to count under several rules at once.
    """
    if rule not in FLOPS_RULES:
        raise ValueError(f"unknown FLOPs rule {rule!r}; choose from {', '.join(FLOPS_RULES)}")
    macs = dict(layer_macs(model, image_size) if macs is None else macs)
    if rule != "true":
        # As in the original: the stem's width came from an attribute that ends as the last stage's width.
        stem_inputs = 3 if rule == "final" else 1
        macs["conv1"] = image_size**2 * 9 * model.linear.in_features * stem_inputs
        for name, block in model.named_modules():
            if isinstance(block, DepthWiseWithSkipBlock):
                macs[f"{name}.depth"] //= block.conv3.stride[0] ** 2
    return sum(macs.values())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch",
        default="shiftresnet110",
        choices=ARCHITECTURES,
        metavar="ARCH",
        help=f"network, one of {', '.join(ARCHITECTURES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--expansion",
        type=float,
        default=1.0,
        help="shiftresnet*: middle width of a block over its output width (default: %(default)g)",
    )
    parser.add_argument(
        "--reduction",
        type=float,
        default=1.0,
        help="resnet*, depthwiseresnet*: how many times smaller; below 1 is larger (default: %(default)g)",
    )
    parser.add_argument(
        "--reduction-mode",
        default="net",
        choices=REDUCTION_MODES,
        help="resnet*: what --reduction makes smaller (default: %(default)s)",
    )
    extra = parser.add_argument_group("added in this repository")
    extra.add_argument("--flops-rule", default="final", choices=FLOPS_RULES, help="see above (default: %(default)s)")
    extra.add_argument("--num-classes", type=int, default=10, help="outputs of both networks (default: %(default)s)")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        config = Config(args.arch, args.expansion, args.reduction, args.reduction_mode, args.num_classes)
        with torch.device("meta"):  # shapes are enough
            new = build_model(config)
            original = build_model(Config(f"resnet{config.depth}", num_classes=args.num_classes))
    except ValueError as error:
        parser.error(str(error))
    if args.reduction != 1:
        print(f"==> {args.arch} with reduction {args.reduction:.2f}")
    counts = [
        ("Parameters", count_parameters(new), count_parameters(original)),
        ("FLOPs", count_flops(new, args.flops_rule), count_flops(original, args.flops_rule)),
    ]
    for label, ours, base in counts:
        print(f"{label}: (new) {ours} (original) {base} (reduction) {base / ours:.2f}")


if __name__ == "__main__":
    main()
