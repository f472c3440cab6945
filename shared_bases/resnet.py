"""The ResNets of CIFAR-10, CIFAR-100 and ILSVRC2012, ordinary and with shared bases, and their initialisation."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_bases.modules import BasicBlock, BasisBlock, Bottleneck, SharedBottleneck, conv1x1, conv3x3

NO_BASES = ()


class ResNet(nn.Module):
    """A stem, groups of blocks, average pooling, linear. The first block of every group is an ordinary one.

    depths, widths: blocks and channels of each group. first: (in_channels, channels, stride) -> ordinary block.
    repeated: (channels, bases, scale) -> block of the rest, where scale = 2^(group - 1) multiplies the ranks.
    bases: (channels, scale) -> shared convolutions of a group, which are registered before it.
    imagenet_stem: 7x7 with stride 2 and max pooling instead of 3x3.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        *,
        first: Callable,
        repeated: Callable,
        bases: Callable = lambda channels, scale: NO_BASES,
        imagenet_stem: bool = False,
    ):
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False) if imagenet_stem else conv3x3(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if imagenet_stem else None
        self.group_names = []
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            group, scale = index + 1, 2**index
            shared = bases(width, scale)
            for number, basis in enumerate(shared, 1):
                self.add_module(f"shared_basis_{group}" + (f"_{number}" if len(shared) > 1 else ""), basis)
            blocks = [first(channels, width, 2 if index else 1)]
            blocks += [repeated(width, shared, scale) for _ in range(depth - 1)]
            self.add_module(f"layer{group}", nn.Sequential(*blocks))
            self.group_names.append(f"layer{group}")
            channels = width * getattr(first, "expansion", 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) floating, normalised. Returns logits (N, num_classes)."""
        y = F.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            y = self.maxpool(y)
        for name in self.group_names:
            y = getattr(self, name)(y)
        return self.fc(self.avgpool(y).flatten(1))


def initialise(model: ResNet, joint: bool) -> ResNet:
    """He's initialisation (fan_out) of every convolution, then orthogonal shared bases; returns the model.

    joint: the two bases of a group are halves of one orthogonal tensor, so that they are orthogonal to each other too.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    bases = [module for name, module in model.named_children() if name.startswith("shared_basis_")]
    if not joint:
        for basis in bases:
            nn.init.orthogonal_(basis.weight)
        return model
    for first, second in zip(bases[::2], bases[1::2], strict=True):
        both = nn.init.orthogonal_(torch.cat([first.weight.detach(), second.weight.detach()]))
        with torch.no_grad():
            first.weight.copy_(both[: len(first.weight)])
            second.weight.copy_(both[len(first.weight) :])
    return model


def _first_cifar10(in_channels, channels, stride):
    return BasicBlock(in_channels, channels, stride, option="A")


LAYOUTS = {
    # dataset: widths, ordinary first block, keyword arguments of ResNet
    "cifar10": ((16, 32, 64), _first_cifar10, {"num_classes": 10}),
    "cifar100": ((64, 128, 256, 512), BasicBlock, {"num_classes": 100}),
    "ilsvrc": ((64, 128, 256, 512), BasicBlock, {"num_classes": 1000, "imagenet_stem": True}),
}


def basic_resnet(dataset: str, depths: Sequence[int]) -> ResNet:
    """The baseline: ordinary blocks only."""
    widths, first, options = LAYOUTS[dataset]
    model = ResNet(depths, widths, first=first, repeated=lambda c, shared, scale: first(c, c, 1), **options)
    return initialise(model, joint=False)


def basis_resnet(
    dataset: str, depths: Sequence[int], num_bases: int, shared_rank: int = 0, unique_rank: int = 0
) -> ResNet:
    """ResNet of BasisBlocks  (Sec. 3.1). num_bases of a group: 1 (single), 2 (double), 0 (own filters only).

    shared_rank, unique_rank: basis filters of the first group; they double with the channels from group to group.
    """
    widths, first, options = LAYOUTS[dataset]
    model = ResNet(
        depths,
        widths,
        first=first,
        repeated=lambda c, shared, scale: BasisBlock(c, shared, unique_rank * scale),
        bases=lambda c, scale: [conv3x3(c, shared_rank * scale) for _ in range(num_bases)],
        **options,
    )
    return initialise(model, joint=num_bases == 2)


def bottleneck_resnet(depths: Sequence[int], num_bases: int = 0) -> ResNet:
    """ILSVRC2012 ResNet of bottlenecks. num_bases: 0, 1 (shared 3x3) or 2 (also the last 1x1)."""
    widths, _, options = LAYOUTS["ilsvrc"]

    def bases(channels, scale):
        return [conv3x3(channels, channels), conv1x1(channels, channels * Bottleneck.expansion)][:num_bases]

    def repeated(channels, shared, scale):
        if shared:
            return SharedBottleneck(channels, shared)
        return Bottleneck(channels * Bottleneck.expansion, channels)

    model = ResNet(depths, widths, first=Bottleneck, repeated=repeated, bases=bases, **options)
    return initialise(model, joint=False)
