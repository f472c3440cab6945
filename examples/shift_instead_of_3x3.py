"""Replace the 3x3 convolutions of a torchvision network by shift modules, and train both on digits for a while.

    python examples/shift_instead_of_3x3.py --arch resnet18 --expansion 2 --steps 100

A shift module: 1x1 convolution, shift of each channel by its own offset, 1x1 convolution (ShiftResNet, Sec. 3.2). The
digits need no download; after so few steps the accuracies say that both networks train, not which is better.
"""

import argparse
import copy
import itertools
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoints import CheckpointError
from common.data import TensorLoader, load_digits_set
from deepshift.checkpoints import load_into, read_weights
from deepshift.runs import RunError
from shiftresnet.modules import Shift2d


def shift_module(conv: nn.Conv2d, expansion: float) -> nn.Sequential:
    """What stands in place of a 3x3 convolution: same input and output shapes, new weights."""
    middle = max(1, round(expansion * conv.out_channels))
    return nn.Sequential(
        nn.Conv2d(conv.in_channels, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        Shift2d(kernel_size=3, dilation=conv.dilation[0]),
        nn.Conv2d(middle, conv.out_channels, 1, conv.stride, bias=conv.bias is not None),
    )


def replace_3x3(model: nn.Module, expansion: float) -> tuple[nn.Module, int]:
    """A copy of the network with shift modules, and the number of them. Grouped convolutions stay."""
    model = copy.deepcopy(model)
    convolutions = [(name, module) for name, module in model.named_modules() if type(module) is nn.Conv2d]
    found = [(name, conv) for name, conv in convolutions if conv.kernel_size == (3, 3) and conv.groups == 1
             and conv.padding == conv.dilation == conv.dilation[::-1]]  # fmt: skip
    for name, conv in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, shift_module(conv, expansion))
    return model, len(found)


def count_multiply_adds(model: nn.Module) -> int:
    """Of convolutions and linear layers, for one image."""
    counted, model = [], copy.deepcopy(model).eval()  # the hooks stay with the copy

    def count(layer, inputs, output):  # output: (1, C, H, W) or (1, C)
        counted.append(layer.weight.numel() * (output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1))

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    return sum(counted)


def train(model: nn.Module, loader: TensorLoader, steps: int):
    """This many steps of Adam."""
    optimizer = torch.optim.Adam(model.train().parameters())
    batches = (batch for epoch in itertools.count() for batch in (loader.set_epoch(epoch), loader)[1])
    for images, targets in itertools.islice(batches, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: TensorLoader) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == targets).sum()) for images, targets in loader)
    return 100 * right / len(loader.targets)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", default="resnet18", help="any network of torchvision with 3x3 convolutions (default: %(default)s)")
    add("--expansion", type=float, default=1, help="channels between the 1x1 convolutions (default: %(default)s)")
    add("--weights", metavar="FILE", help="start from a state dict or checkpoint (default: random weights)")
    add("--pretrained", action="store_true", help="start from torchvision's weights, downloaded")
    add("--steps", type=int, default=40, metavar="N", help="training steps of 32 images (default: %(default)s)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(args.arch, weights="DEFAULT" if args.pretrained else None)
    if args.weights:
        load_into(model, read_weights(args.weights))
    shifted, count = replace_3x3(model, args.expansion)
    loader, test_loader = (TensorLoader(load_digits_set(split, channels=3, size=32), 32, train=split == "train")
                           for split in ("train", "test"))  # fmt: skip
    print(f"{args.arch}: {count} of its convolutions replaced, expansion {args.expansion:g}")
    print(f"{'':16}{'parameters':>14}{'multiply-adds':>16}{'seconds':>10}{'top-1 (%)':>11}")
    for name, network in (("3x3 convolution", model), ("shift modules", shifted)):
        parameters, multiply_adds = sum(p.numel() for p in network.parameters()), count_multiply_adds(network)
        start = time.perf_counter()
        train(network, loader, args.steps)
        seconds = time.perf_counter() - start
        print(f"{name:16}{parameters:14,}{multiply_adds:16,}{seconds:10.1f}{accuracy(network, test_loader):11.2f}")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, RunError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
