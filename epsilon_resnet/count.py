"""Count layers, parameters and multiply-adds of a network, with and without
the side branch, or of a compressed one from its .cfg.

    python epsilon_resnet/count.py -n 18
    python epsilon_resnet/count.py -n 18 --cifar100
    python epsilon_resnet/count.py -d 101
    python epsilon_resnet/count.py --cfg train_log.X/compressed_model_390.cfg

Parameters: weights, batch-norm scales and shifts, biases; no running
statistics. Multiply-adds: convolutions and the classifier, for one image
(32x32, or 224x224 with -d), the side branch left out; batch norm, ReLU,
pooling, additions, biases and the gate are not counted.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from epsilon_resnet.models import IMAGENET_BLOCKS, Config, ResNet, build_model


def count_parameters(model: nn.Module, side_branch: bool = True) -> int:
    """Trainable numbers, with or without those of the side branch."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if side_branch or not name.startswith("side_output.")
    )


def count_macs(model: ResNet, image_size: int | None = None) -> int:
    """Multiply-adds of convolutions and classifier for one image (default: of its own size), no side branch."""
    total = 0

    def record(layer, inputs, output):
        nonlocal total
        per_output = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        total += output.numel() * per_output

    shapes_only = copy.deepcopy(model).to("meta").eval()
    for name, layer in list(shapes_only.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.startswith("side_output."):
            layer.register_forward_hook(record)
        elif isinstance(layer, nn.BatchNorm2d):  # free, keeps the shape, and takes most of the time here
            shapes_only.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], nn.Identity())
    size = model.config.image_size if image_size is None else image_size
    shapes_only(torch.empty(1, 3, size, size, device="meta"))
    return total


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-n", "--num_units", type=int, metavar="N", help="blocks per group of a CIFAR/SVHN network")
    which.add_argument("-d", "--depth", type=int, choices=tuple(IMAGENET_BLOCKS), help="of an ImageNet network")
    which.add_argument("--cfg", metavar="FILE", help="compressed network, written by compressModel.py")
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--cifar10", action="store_true", help="10 classes (the default with -n)")
    classes.add_argument("--cifar100", action="store_true", help="100 classes")
    classes.add_argument("--num-classes", type=int, metavar="K", help="K classes (default with -d: 1000)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _config(args) -> Config:
    classes = args.num_classes or (100 if args.cifar100 else 10 if args.cifar10 or args.num_units else 1000)
    return Config("imagenet" if args.depth else "cifar", args.depth or args.num_units, classes)


def describe(config: Config) -> list[str]:
    """The counts of a network, one line each, and for a compressed one the same before pruning."""
    with torch.device("meta"):  # shapes are enough
        model = build_model(config)
    names = ("layers", "blocks", "parameters", "parameters without side branch", "multiply-adds")
    if config.gated:
        numbers = (config.layers, len(config.block_names), count_parameters(model), count_parameters(model, False),
                   count_macs(model))  # fmt: skip
        return [f"{name}: {number}" for name, number in zip(names, numbers, strict=True)]
    with torch.device("meta"):
        full = build_model(Config(config.arch, config.size, config.num_classes))
    return comparison(full, model)


def comparison(full: ResNet, compressed: ResNet) -> list[str]:
    """Layers, blocks, parameters (no side branch) and multiply-adds before and after compression, one line each."""
    before, after = full.config, compressed.config
    lines = [("layers", before.layers, after.layers), ("blocks", len(before.block_names), sum(after.structure))]
    lines.append(("parameters", count_parameters(full, side_branch=False), count_parameters(compressed)))
    lines.append(("multiply-adds", count_macs(full), count_macs(compressed)))
    return [f"{name}: {old} -> {new} ({old / max(new, 1):.2f}x fewer)" for name, old, new in lines] + [
        f"discarded blocks: {100 * (1 - lines[1][2] / lines[1][1]):.2f}%"
    ]


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.cfg:
        from epsilon_resnet.pruning import read_compressed

        config = read_compressed(args.cfg).config
    else:
        try:
            config = _config(args)
        except ValueError as error:
            parser.error(str(error))
    print("\n".join(describe(config)))


if __name__ == "__main__":
    from epsilon_resnet.engine import run_script

    sys.exit(run_script(main))
