"""ResNeXt50 32x4d for CIFAR-100, ordinary and with shared bases in the grouped 3x3 convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_bases.modules import conv1x1, conv3x3, projection

DEPTHS = (3, 4, 6, 3)
PLANES = (64, 128, 256, 512)
CARDINALITY = 32


class ResNextBlock(nn.Module):
    """1x1 to 2 * planes, 3x3 in 32 groups, 1x1 to 4 * planes."""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        width, out_channels = 2 * planes, 4 * planes
        self.residual_function = nn.Sequential(
            conv1x1(in_channels, width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv3x3(width, width, stride, groups=CARDINALITY),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            conv1x1(width, out_channels),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + self.shortcut(x))


class SharedResNextBlock(nn.Module):
    """ResNextBlock of stride 1 whose 3x3 convolution is a basis, own and shared filters in groups of their own."""

    def __init__(self, planes: int, shared: nn.Conv2d, unique_rank: int):
        super().__init__()
        width, out_channels, rank = 2 * planes, 4 * planes, unique_rank + shared.out_channels
        self.shared_basis = shared
        self.conv1 = conv1x1(out_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.basis_conv2 = conv3x3(width, unique_rank, groups=unique_rank // 4)
        self.bn2 = nn.BatchNorm2d(rank)
        self.conv3 = conv1x1(rank, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = torch.cat([self.basis_conv2(y), self.shared_basis(y)], 1)
        y = F.relu(self.bn2(y))  # only here is there an activation between a basis and its coefficients
        return F.relu(self.bn3(self.conv3(y)) + x)


def check_ranks(shared_rank: int, unique_rank: int):
    """Raises ValueError unless every group of layers can split its channels into rank / 4 groups."""
    for name, rank, doubles in (("shared_rank", shared_rank, False), ("unique_rank", unique_rank, True)):
        for index, planes in enumerate(PLANES):
            filters = rank * 2**index
            groups = (filters if doubles else rank) // 4
            if groups == 0 or (2 * planes) % groups or filters % groups:
                raise ValueError(
                    f"ResNext50_SingleShared cannot have {name} {rank}: its 3x3 convolutions are split into rank/4 "
                    "groups; use 4 times a power of two, 4 to 512 (published: --shared_rank=64 --unique_rank=4)"
                )


class ResNext(nn.Module):
    """ResNeXt50 32x4d. shared_rank, unique_rank: basis filters of the first group, doubled from group to group.

    Rank 0: ordinary blocks only. Raises ValueError for ranks that cannot be split into groups.
    """

    def __init__(self, num_classes: int = 100, shared_rank: int = 0, unique_rank: int = 0):
        super().__init__()
        if shared_rank:
            check_ranks(shared_rank, unique_rank)
        channels = 64
        self.conv1 = conv3x3(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        for index, (depth, planes) in enumerate(zip(DEPTHS, PLANES, strict=True)):
            blocks = [ResNextBlock(channels, planes, 2 if index else 1)]
            channels = 4 * planes
            if shared_rank:
                basis = conv3x3(2 * planes, shared_rank * 2**index, groups=shared_rank // 4)
                nn.init.orthogonal_(basis.weight)
                self.add_module(f"shared_basis_{index + 1}", basis)
                blocks += [SharedResNextBlock(planes, basis, unique_rank * 2**index) for _ in range(depth - 1)]
            else:
                blocks += [ResNextBlock(channels, planes, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) floating, normalised. Returns logits (N, num_classes)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        # The original pools 4x4, which is all of a 32x32 image's last map; this takes other sizes too.
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))
