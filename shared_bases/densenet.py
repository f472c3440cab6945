"""DenseNet121 for CIFAR-100, ordinary and with shared bases in the 3x3 convolutions. PyTorch's initialisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_bases.modules import BasisConv, conv1x1, conv3x3

DEPTHS = (6, 12, 24, 16)
GROWTH = 32
BOTTLENECK = 4 * GROWTH


class DenseLayer(nn.Module):
    """Adds GROWTH channels: batch norm, 1x1 to 128 channels, batch norm, 3x3."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.residual_function = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(),
            conv1x1(in_channels, BOTTLENECK),
            nn.BatchNorm2d(BOTTLENECK),
            nn.ReLU(),
            conv3x3(BOTTLENECK, GROWTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.residual_function(x)], 1)


class SharedDenseLayer(nn.Module):
    """DenseLayer whose 3x3 convolution combines own and shared basis filters."""

    def __init__(self, in_channels: int, shared: nn.Conv2d, unique_rank: int):
        super().__init__()
        rank = unique_rank + shared.out_channels
        self.shared_basis = shared
        self.bn0 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, BOTTLENECK)
        self.bn1 = nn.BatchNorm2d(BOTTLENECK)
        self.basis_conv2 = conv3x3(BOTTLENECK, unique_rank)
        self.basis_bn2 = nn.BatchNorm2d(rank)
        self.coeff_conv2 = conv1x1(rank, GROWTH)
        self.basis = BasisConv()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(F.relu(self.bn0(x)))))
        y = self.basis_bn2(self.basis(y, self.basis_conv2.weight, self.shared_basis.weight))
        return torch.cat([x, self.coeff_conv2(y)], 1)


class Transition(nn.Module):
    """Half of the channels, half of the size; no activation."""

    def __init__(self, channels: int):
        super().__init__()
        self.down_sample = nn.Sequential(
            nn.BatchNorm2d(channels), conv1x1(channels, channels // 2), nn.AvgPool2d(2, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_sample(x)


class DenseNet(nn.Module):
    """DenseNet121, growth 32. shared_rank, unique_rank: basis filters, the same in every group; 0: ordinary.

    As in the original: the last dense block uses the third basis; the fourth is regularised and decayed, never used.
    """

    def __init__(self, num_classes: int = 100, shared_rank: int = 0, unique_rank: int = 0):
        super().__init__()
        bases = [conv3x3(BOTTLENECK, shared_rank) for _ in DEPTHS] if shared_rank else []
        channels = 2 * GROWTH
        self.conv1 = conv3x3(3, channels)
        self.features = nn.Sequential()
        for index, depth in enumerate(DEPTHS):
            block = nn.Sequential()
            for layer in range(depth):
                basis = bases[min(index, 2)] if bases else None
                module = SharedDenseLayer(channels, basis, unique_rank) if bases else DenseLayer(channels)
                block.add_module(f"bottle_neck_layer_{layer}", module)
                channels += GROWTH
            is_last = index == len(DEPTHS) - 1
            self.features.add_module("dense_block3" if is_last and not bases else f"dense_block_layer_{index}", block)
            if not is_last:
                self.features.add_module(f"transition_layer_{index}", Transition(channels))
                channels //= 2
        self.features.add_module("bn", nn.BatchNorm2d(channels))
        self.features.add_module("relu", nn.ReLU())
        for group, basis in enumerate(bases, 1):
            self.add_module(f"shared_basis_{group}", basis)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) floating, normalised. Returns logits (N, num_classes)."""
        return self.linear(self.avgpool(self.features(self.conv1(x))).flatten(1))
