"""Count parameters and FLOPs of the networks, and compare with the published tables.

    python shared_bases/count.py                       # every row of the README's tables
    python shared_bases/count.py --dataset=cifar10 --model=ResNet32_SingleShared --shared_rank=8

Parameters: each shared tensor once. FLOPs of the README (September 2020): twice
the count of one image, 32x32 for CIFAR and 224x224 for ILSVRC2012, where the
count is (ptflops 0.6)

  convolution, linear     multiply-adds, plus one per output with a bias
  batch norm              2 per element
  ReLU, ReLU6, pooling    1 per element (ReLU: of the output, pooling: of the
                          input), only where the original has it as a module
  all else                0 (functional ReLU and pooling, additions, joining)

The README of May 2021 prints the count itself under the same heading. MACs
are multiply-adds of convolutions and linear layers, nothing else. A shared
convolution is counted at every use.
"""

import argparse
import copy
import csv
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from shared_bases.models import IMAGE_SIZES, MODELS, Config, build_model, model_key
from shared_bases.modules import BasisConv
from shared_bases.runs import command_flags

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
ACTIVATIONS = (nn.ReLU, nn.ReLU6)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
PUBLISHED = Path(__file__).with_name("published.csv")


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers, each shared tensor once."""
    return sum(parameter.numel() for parameter in model.parameters())


class FreeBatchNorm(nn.Identity):
    """Stands for a batch norm while shapes are traced."""


@dataclass(frozen=True)
class Call:
    """One use of a layer: its name, multiply-adds of convolution or linear, and the count by the rule at the top."""

    name: str
    macs: int
    count: int


def _cost(layer, inputs, output) -> tuple[int, int] | None:
    """(macs, count) of one call of a layer; None for modules that only contain others or cost nothing."""
    if isinstance(layer, BasisConv):
        return (output.numel() * inputs[1][0].numel(),) * 2
    if isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        macs = output.numel() * layer.weight[0].numel()
        return macs, macs + (output.numel() if layer.bias is not None else 0)
    if isinstance(layer, FreeBatchNorm):
        return 0, 2 * inputs[0].numel()
    if isinstance(layer, ACTIVATIONS):
        return 0, output.numel()
    if isinstance(layer, POOLS):
        return 0, inputs[0].numel()
    return None


def layer_calls(model: nn.Module, image_size: int) -> list[Call]:
    """All uses of layers for one (3, image_size, image_size) image, in order. The model is left as it was."""
    calls = []

    def hook(name):
        def record(layer, inputs, output):
            cost = _cost(layer, inputs, output)
            if cost is not None:
                calls.append(Call(name, *cost))

        return record

    shapes_only = copy.deepcopy(model).to("meta").eval()
    for name, layer in list(shapes_only.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):  # keeps the shape, and takes most of the time here
            layer = FreeBatchNorm()
            shapes_only.set_submodule(name, layer)
        layer.register_forward_hook(hook(name))
    with torch.no_grad():
        shapes_only(torch.empty(1, 3, image_size, image_size, device="meta"))
    return calls


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of convolutions and linear layers for one image."""
    return sum(call.macs for call in layer_calls(model, image_size))


def count_ptflops(model: nn.Module, image_size: int) -> int:
    """The count of the rule at the top for one image; the README's FLOPs are twice this."""
    return sum(call.count for call in layer_calls(model, image_size))


@dataclass(frozen=True)
class Row:
    """One row of a published table: its numbers as printed, and the network that they belong to."""

    table: str
    label: str
    config: Config
    params: str
    flops: str
    flops_factor: int


def published_rows() -> list[Row]:
    """Every row of the README's tables, in their order."""
    cells, commands = {}, {}
    with open(PUBLISHED, newline="") as file:
        for row in csv.DictReader(file):
            key = (row["table"], row["model"])
            cells.setdefault(key, {})[row["metric"]] = row["value"]
            commands[key] = row["command"]
    rows = []
    for (table, label), values in cells.items():
        script, flags = command_flags(commands[table, label])
        ranks = {name: int(flags[name]) for name in ("shared_rank", "unique_rank") if name in flags}
        config = Config(script.removeprefix("train_").removesuffix(".py"), flags["model"], **ranks)
        factor = 1 if table.startswith("last README") else 2
        rows.append(Row(table, label, config, values["params_million"], values["flops_giga"], factor))
    return rows


def compare(value: float, printed: str) -> str:
    """'' if `value` rounds to what was printed, else how that differs."""
    decimals = len(printed.partition(".")[2])
    rounded = f"{value:.{decimals}f}"
    if rounded == printed:
        return ""
    cut = f"{math.floor(value * 10**decimals) / 10**decimals:.{decimals}f}"
    return f"cut off, rounds to {rounded}" if cut == printed else f"wrong, is {rounded}"


def label_error(row: Row) -> str:
    """'' if the ranks in the row's label are those of its network, else which they are."""
    label, ranks = re.search(r"-S(\d+)U(\d+)", row.label), row.config.ranks()
    if not label or tuple(map(int, label.groups())) == (ranks["shared_rank"], ranks["unique_rank"]):
        return ""
    return "label: wrong, is S{shared_rank}U{unique_rank}".format(**ranks)


def remarks(row: Row, parameters: int, count: int) -> list[str]:
    """The cells of a row that the original printed wrongly, in words."""
    params, flops = compare(parameters / 1e6, row.params), compare(row.flops_factor * count / 1e9, row.flops)
    named = [f"params: {params}" if params else "", f"FLOPs: {flops}" if flops else "", label_error(row)]
    return [text for text in named if text]


def print_tables():
    """All published rows beside the counts of their networks."""
    shown = None
    for row in published_rows():
        if row.table != shown:
            shown = row.table
            rule = "2 x count" if row.flops_factor == 2 else "count"
            print(f"\n{row.table} (FLOPs: {rule})")
            print(f"{'row':20} {'network':44} {'params':>10} {'README':>7} {'FLOPs':>13} {'README':>7} {'MACs':>13}")
        with torch.device("meta"):
            model = build_model(row.config)
        calls = layer_calls(model, IMAGE_SIZES[row.config.dataset])
        parameters, count = count_parameters(model), sum(call.count for call in calls)
        macs = sum(call.macs for call in calls)
        ranks = "".join(f" {name[0]}={value}" for name, value in row.config.ranks().items())
        line = (
            f"{row.label:20} {row.config.model + ranks:44} {parameters:>10} {row.params + 'M':>7} "
            f"{row.flops_factor * count:>13} {row.flops + 'G':>7} {macs:>13}"
        )
        print("  ".join([line, "; ".join(remarks(row, parameters, count))]).rstrip())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", choices=tuple(MODELS), help="default: %(default)s")
    parser.add_argument("--model", help="name of a network, as in the training scripts (default: the tables)")
    parser.add_argument("--shared_rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--unique_rank", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--image-size", type=int, help="side in pixels (default: 32, ILSVRC2012 224)")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.model is None:
        print_tables()
        return
    if args.image_size is not None and args.image_size < 32:
        parser.error(f"--image-size must be at least 32, not {args.image_size}")
    try:
        config = Config(args.dataset, model_key(args.dataset, args.model), args.shared_rank, args.unique_rank)
    except ValueError as error:
        parser.error(str(error))
    with torch.device("meta"):
        model = build_model(config)
    calls = layer_calls(model, args.image_size or IMAGE_SIZES[args.dataset])
    count = sum(call.count for call in calls)
    print(f"{config.text()} ({args.dataset})")
    print(f"Parameters: {count_parameters(model)}")
    print(f"FLOPs: {2 * count} (README of September 2020), {count} (README of May 2021)")
    print(f"MACs: {sum(call.macs for call in calls)} (convolutions and linear layers)")


if __name__ == "__main__":
    main()
