"""Count a network's parameters, operations and bits, float and as DeepShift.

    python deepshift/count.py cifar10 --arch resnet20 --shift-type PS

prints one line per kind of layer (--layers: per layer) and the totals:

    multiplications   products of two numbers
    shifts            bitwise shifts that take their place: one per weight used
    additions         sums of products, and of biases
    sign flips        negations: a shift weight may be -2^s
    bits              of weights and biases as they are stored

Counted are convolutions and linear layers for one image of the script's input
size; batch norm, activations and pooling are free, as usual for MACs. A shift
layer's convolution costs shifts, additions and sign flips; PS weights that are
zero are counted like others, since which ones are zero depends on training.
Depth and bits are as in the training scripts. --csv FILE writes the table.
"""

import argparse
import copy
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from deepshift.convert import PS_LAYERS, Q_LAYERS, SHIFT_TYPES, convert_to_shift, shift_layers
from deepshift.modules_unoptimized import UnoptimizedConv2d, UnoptimizedLinear
from deepshift.summary import FLOAT_BITS, layer_size
from deepshift.zoo import DATASETS, INPUT_SHAPES, architectures, build_model

COUNTED = (nn.Linear, nn.Conv2d, UnoptimizedLinear, UnoptimizedConv2d, *PS_LAYERS, *Q_LAYERS)
COLUMNS = ("parameters", "MACs", "multiplications", "shifts", "additions", "sign flips", "bits")


def count_parameters(model: nn.Module) -> int:
    """Numbers in all parameters; a PS layer has two per weight, as in the original's checkpoints."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-adds (or shift-adds) of each convolution and linear layer for one image (C, H, W), by module name."""
    macs, shadow = {}, copy.deepcopy(model).to("meta").eval()

    def hook(name):
        def record(layer, inputs, output):
            weight = layer.shift if isinstance(layer, PS_LAYERS) else layer.weight
            macs[name] = output.numel() * weight[0].numel()

        return record

    for name, layer in shadow.named_modules():
        if isinstance(layer, COUNTED):
            layer.register_forward_hook(hook(name))
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    return macs


def layer_costs(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, dict]:
    """{layer: {column: number}} for COLUMNS, and its kind, of one inference. (Abstract and Sec. 3 of the paper)"""
    modules, costs = dict(model.named_modules()), {}
    for name, macs in count_macs(model, input_shape).items():
        layer = modules[name]
        is_shift = isinstance(layer, (*PS_LAYERS, *Q_LAYERS))
        weight = layer.shift if isinstance(layer, PS_LAYERS) else layer.weight
        outputs = macs // weight[0].numel()
        # A sum of n products takes n - 1 additions; with a bias, n.
        additions = macs - outputs * (layer.bias is None)
        costs[name] = {
            "kind": type(layer).__name__,
            "parameters": sum(parameter.numel() for parameter in layer.parameters()),
            "MACs": macs,
            "multiplications": 0 if is_shift else macs,
            "shifts": macs if is_shift else 0,
            "additions": additions,
            "sign flips": macs if is_shift else 0,
            "bits": layer_size(layer)[1],
        }
    return costs


def by_kind(model: nn.Module, input_shape: tuple[int, int, int]) -> list[dict]:
    """One row per kind of layer, one for all other tensors, and the total."""
    kinds = {}
    for cost in layer_costs(model, input_shape).values():
        row = kinds.setdefault(cost["kind"], {"layer": cost["kind"], "layers": 0, **dict.fromkeys(COLUMNS, 0)})
        row["layers"] += 1
        for column in COLUMNS:
            row[column] += cost[column]
    others = {"layer": "others (float)", "layers": 0, **dict.fromkeys(COLUMNS, 0)}
    for module in model.modules():
        if not isinstance(module, COUNTED):
            numbers = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            buffers = sum(tensor.numel() for name, tensor in module.named_buffers(recurse=False)
                          if name != "num_batches_tracked")  # fmt: skip
            others["layers"] += numbers > 0
            others["parameters"] += numbers
            others["bits"] += FLOAT_BITS * (numbers + buffers)
    return with_total([*kinds.values(), others])


def with_total(rows: list[dict]) -> list[dict]:
    total = {column: sum(row[column] for row in rows) for column in ("layers", *COLUMNS)}
    return [*rows, {"layer": "total", **total}]


def per_layer(model: nn.Module, input_shape: tuple[int, int, int]) -> list[dict]:
    """One row per convolution and linear layer, and the total of by_kind."""
    rows = [{"layer": f"{name} ({cost['kind']})", "layers": 1, **{column: cost[column] for column in COLUMNS}}
            for name, cost in layer_costs(model, input_shape).items()]  # fmt: skip
    return [*rows, *by_kind(model, input_shape)[-2:]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=DATASETS, nargs="?", default="cifar10", help="whose networks (default: %(default)s)")
    add("-a", "--arch", metavar="ARCH", help="network (default: simple_linear, resnet20 or resnet18)")
    add("-s", "--shift-depth", type=int, metavar="N", help="layers to convert, from the last one (default: all)")
    add("-st", "--shift-type", choices=SHIFT_TYPES, help="default: no conversion")
    add("-wb", "--weight-bits", type=int, default=5, metavar="N", help="2 to 6 (default: %(default)s)")
    add("--image-size", type=int, metavar="N", help="side of the image (default: 28, 32 or 224)")
    add("--layers", action="store_true", help="one line per layer")
    add("--csv", metavar="FILE", help="write the table to a file too (default: none)")
    return parser


def build_counted(parser, args) -> nn.Module:
    """The network that the flags name, its shapes only."""
    defaults = {"mnist": "simple_linear", "cifar10": "resnet20", "imagenet": "resnet18"}
    args.arch = args.arch or defaults[args.dataset]
    if args.arch not in architectures(args.dataset):
        names = ", ".join(architectures(args.dataset))
        parser.error(f"no network {args.arch} for {args.dataset}; choose from {names}")
    if not 2 <= args.weight_bits <= 6:
        parser.error(f"--weight-bits must be 2 to 6, not {args.weight_bits}")
    if args.shift_depth is not None and args.shift_depth < 0:
        parser.error(f"--shift-depth must be at least 0, not {args.shift_depth}")
    with torch.device("meta"):
        model = build_model(args.dataset, args.arch)
        depth = 10**6 if args.shift_depth is None else args.shift_depth
        if args.shift_type and depth:
            convert_to_shift(model, depth, args.shift_type, args.arch != "simple_linear", weight_bits=args.weight_bits)
    return model


def format_row(cells: list, widths: list[int]) -> str:
    texts = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells]
    return texts[0].ljust(widths[0]) + "".join(text.rjust(width + 2) for text, width in zip(texts[1:], widths[1:],
                                                                                          strict=True))  # fmt: skip


def main(argv=None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    model = build_counted(parser, args)
    channels, size, _ = INPUT_SHAPES[args.dataset]
    size = args.image_size or size
    rows = (per_layer if args.layers else by_kind)(model, (channels, size, size))
    names = ["layer", "layers", *COLUMNS]
    widths = [max(len(name), *(len(f"{row[name]:,}" if name != "layer" else row[name]) for row in rows))
              for name in names]  # fmt: skip
    what = f"{args.shift_type}, {args.weight_bits} bits, {len(shift_layers(model))} layers"
    print(f"{args.dataset} {args.arch}, {what if args.shift_type else 'float'}, one {channels}x{size}x{size} image")
    print(format_row(names, widths))
    for row in rows:
        print(format_row([row[name] for name in names], widths))
    print(f"Model size: {rows[-1]['bits']:,} bits, {rows[-1]['bits'] / 8e6:.3f} MB")
    if args.csv:
        try:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, names, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            print(f"error: cannot write {args.csv}: {error.strerror}; choose another file", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
