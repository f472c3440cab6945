"""Count an S3 network's parameters, operations, bits, and a checkpoint's zeros.

    python s3/count.py --arch resnet18
    python s3/count.py --checkpoint model_best.pth.tar --layers

    latent            numbers that training keeps: 4 per weight at 3 bits
    effective         numbers of the trained network, one per weight
    quantised         weights of 2 to 4 bits; the others are float
    MACs              multiply-adds of convolutions and linear layers
    shift MACs        of these with a shift and a sign flip for the product
    bits              of weights and batch norm statistics as they are stored
    zero weights      quantised ones that are 0    (with --checkpoint)
    additions saved   shift MACs whose weight is 0 (with --checkpoint)

Counted for one image. Batch norm, activations and pooling are free, as usual
for MACs. A checkpoint names its own network; FILE may be of main.py, of
convert.py or the original.
"""

import argparse
import copy
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from common.checkpoints import CheckpointError
from s3.network import Config
from s3.resnet import CLASSES, DATASETS, METHODS, architectures
from s3.s3conv2dshift import LatentConv2d, latent_layers

FLOAT_BITS = 32
COUNTED = (nn.Linear, nn.Conv2d)


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-adds (or shift-adds) of each convolution and linear layer for one image (C, H, W), by module name."""
    macs, shadow = {}, copy.deepcopy(model).to("meta").eval()

    def hook(name):
        def record(layer, inputs, output):
            macs[name] = output.numel() * layer.weight[0].numel()

        return record

    for name, layer in shadow.named_modules():
        if isinstance(layer, COUNTED):
            layer.register_forward_hook(hook(name))
    with torch.no_grad():
        shadow(torch.empty(1, *input_shape, device="meta"))
    return macs


def count_parameters(model: nn.Module) -> int:
    """Distinct numbers in all parameters: latent ones, an alias once."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe_counts(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Parameters, MACs and bits of a network for one image (C, H, W); bits with and without batch norm statistics."""
    layers = latent_layers(model)
    quantised = sum(layer.weight.numel() for layer in layers.values())
    bits = sum(layer.weight.numel() * layer.bits for layer in layers.values())
    latent = count_parameters(model)
    effective = latent - sum(layer.weight.numel() * (len(layer.latent_names) - 1) for layer in layers.values())
    buffers = sum(b.numel() for name, b in model.named_buffers() if not name.endswith("num_batches_tracked"))
    macs = count_macs(model, input_shape)
    shifts = sum(count for name, count in macs.items() if name in layers)
    numbers = effective - quantised
    return {
        "params_latent": latent,
        "params_effective": effective,
        "params_quantised": quantised,
        "params_fp32": numbers,
        "quantised_layers": len(layers),
        "bn_buffers": buffers,
        "macs": sum(macs.values()),
        "macs_quantised": shifts,
        "macs_fp32": sum(macs.values()) - shifts,
        "size_bits": bits + FLOAT_BITS * (numbers + buffers),
        "size_bits_no_buffers": bits + FLOAT_BITS * numbers,
        "size_bits_fp32": FLOAT_BITS * (effective + buffers),
    }


@torch.no_grad()
def layer_table(model: nn.Module, input_shape: tuple[int, int, int], with_values: bool) -> list[dict]:
    """One row per convolution and linear layer; with_values: also the share of each value of a quantised weight."""
    rows, modules = [], dict(model.named_modules())
    for name, macs in count_macs(model, input_shape).items():
        layer = modules[name]
        is_quantised = isinstance(layer, LatentConv2d)
        weights = layer.weight.numel()
        bits = weights * (layer.bits if is_quantised else FLOAT_BITS)
        bits += 0 if layer.bias is None else FLOAT_BITS * layer.bias.numel()
        row = {"layer": name, "shape": "x".join(map(str, layer.weight.shape)), "weights": weights, "MACs": macs,
               "shift MACs": macs if is_quantised else 0, "bits": bits}  # fmt: skip
        if with_values:
            weight = layer.discrete_weight() if is_quantised else None
            row["zeros"] = (weight == 0).double().mean().item() if is_quantised else None
            # Every weight of a layer is used equally often.
            row["additions saved"] = round(macs * row["zeros"]) if is_quantised else 0
            row["values"] = _shares(weight) if is_quantised else ""
        rows.append(row)
    return rows


def _shares(weight):
    values, counts = torch.unique(weight + 0.0, return_counts=True)  # -0 becomes 0
    return " ".join(f"{value:g}:{count / weight.numel():.3f}" for value, count in zip(values, counts, strict=True))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="count this network and its zeros (default: the one of the flags)")
    add("--dataset", default="imagenet", choices=DATASETS, help="whose network (default: %(default)s)")
    add("-a", "--arch", default="resnet18", metavar="ARCH", help="resnet18 to resnet152; CIFAR: resnet8 to resnet110")
    add("--method", default="s3", choices=METHODS, help="default: %(default)s")
    add("--weight-bits", type=int, default=3, choices=(2, 3, 4), metavar="N", help="2, 3 or 4 (default: %(default)s)")
    add("--num-classes", type=int, metavar="N", help="outputs (default: those of the data set)")
    add("--image-size", type=int, metavar="N", help="side of the image (default: 224, CIFAR: 32)")
    add("--layers", action="store_true", help="one line per layer")
    add("--csv", metavar="FILE", help="write the lines per layer to a file too (default: none)")
    return parser


def counted_network(parser, args) -> tuple[nn.Module, Config]:
    """The network that the flags name (shapes only), or that of --checkpoint with its weights."""
    if args.checkpoint:
        from s3.checkpoints import load_network

        return load_network(args.checkpoint)
    if args.arch not in architectures(args.dataset):
        parser.error(f"no {args.arch} for {args.dataset}; choose from {', '.join(architectures(args.dataset))}")
    classes = CLASSES[args.dataset] if args.num_classes is None else args.num_classes
    config = Config(args.dataset, args.arch, classes, args.method, args.weight_bits)
    with torch.device("meta"):
        return config.build(), config


def summary(counts: dict, rows: list[dict]) -> list[str]:
    """The totals as lines of text."""
    size, full = counts["size_bits"], counts["size_bits_fp32"]
    lines = [
        f"latent parameters     {counts['params_latent']:>16,}",
        f"effective parameters  {counts['params_effective']:>16,}",
        f"quantised weights     {counts['params_quantised']:>16,}   in {counts['quantised_layers']} layers",
        f"MACs                  {counts['macs']:>16,}",
        f"  shift and add       {counts['macs_quantised']:>16,}   multiplications avoided",
        f"  multiply and add    {counts['macs_fp32']:>16,}",
        f"bits                  {size:>16,}   {size / 8e6:.3f} MB, {full / size:.2f} times fewer than float",
        f"  without BN buffers  {counts['size_bits_no_buffers']:>16,}",
        f"float32 bits          {full:>16,}   {full / 8e6:.3f} MB",
    ]
    if counts["params_quantised"] and "zeros" in rows[0]:
        zeros = sum(row["weights"] * row["zeros"] for row in rows if row["zeros"] is not None)
        lines += [f"zero weights          {round(zeros):>16,}   {100 * zeros / counts['params_quantised']:.2f}%",
                  f"additions saved       {sum(row['additions saved'] for row in rows):>16,}"]  # fmt: skip
    return lines


def print_rows(rows: list[dict]):
    """The rows of layer_table as a table."""
    table = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = {"layer", "values"}
    for row in table:
        cells = zip(rows[0], row, widths, strict=True)
        print("  ".join(f"{cell:{'<' if name in left else '>'}{width}}" for name, cell, width in cells).rstrip())


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else value


def main(argv=None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        model, config = counted_network(parser, args)
        size = args.image_size or (224 if config.family == "imagenet" else 32)
        counts = describe_counts(model, (3, size, size))
        rows = layer_table(model, (3, size, size), with_values=bool(args.checkpoint))
        what = "float" if config.method == "float" else f"{config.method}, {config.bits} bits"
        print(f"{config.dataset} {config.arch}, {what}, {config.classes} classes, one 3x{size}x{size} image")
        if args.layers:
            print_rows(rows)
        print("\n".join(summary(counts, rows)))
        if args.csv:
            with open(args.csv, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError) as error:
        parser.error(f"--image-size {args.image_size}: {str(error).splitlines()[0]}")
    except OSError as error:
        print(f"error: cannot write {args.csv}: {error.strerror}; choose another file", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
