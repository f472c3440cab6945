"""The shared-basis convolution and the blocks of the ResNets (arXiv 2006.05066, Sec. 3).

A 3x3 convolution becomes r = u + s basis filters, batch norm over the r maps, and a 1x1 convolution that combines them.
Of the basis, u filters are the layer's own and s belong to the whole group of layers. A shared convolution is a
submodule of every block that uses it, so the state dict repeats its tensor under every name, as the original's does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


class BasisConv(nn.Module):
    """3x3 convolution, stride 1, with filters that other modules own: own filters first, then the shared ones.

    One convolution over the joined filters equals the concatenation of two, without copying feature maps.
    """

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """x: (N, C, H, W). weights: (r_i, C, 3, 3) each. Returns (N, sum r_i, H, W)."""
        return F.conv2d(x, weights[0] if len(weights) == 1 else torch.cat(weights), padding=1)


def zero_padded_shortcut(x: Tensor, out_channels: int, stride: int) -> Tensor:
    """Option A of He et al.: every stride-th pixel, new channels zero, half of them on each side."""
    added = out_channels - x.shape[1]
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added // 2, added - added // 2))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Option B: 1x1 convolution with batch norm; empty (identity) where the shape does not change."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. option: "A", a shortcut without parameters (CIFAR-10), or "B", a projection."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, option: str = "B"):
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.shortcut = projection(in_channels, channels, stride) if option == "B" else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut is not None:
            return F.relu(y + self.shortcut(x))
        return F.relu(y + (x if x.shape == y.shape else zero_padded_shortcut(x, y.shape[1], self.stride)))


class BasisBlock(nn.Module):
    """BasicBlock of stride 1 whose convolutions are linear combinations of a basis  (Sec. 3.1).

    shared: no basis (own filters only), one that both convolutions use, or one for each of the two.
    unique_rank: own filters of each convolution; 0 for none.
    """

    def __init__(self, channels: int, shared: Sequence[nn.Conv2d], unique_rank: int):
        super().__init__()
        self.shared_names = ("shared_basis",) * 2 if len(shared) == 1 else ("shared_basis_1", "shared_basis_2")
        for name, basis in zip(self.shared_names, shared, strict=False):
            self.add_module(name, basis)
        self.has_shared, self.has_unique = bool(shared), unique_rank > 0
        rank = unique_rank + (shared[0].out_channels if shared else 0)
        for index in (1, 2):
            if unique_rank:
                self.add_module(f"basis_conv{index}", conv3x3(channels, unique_rank))
            self.add_module(f"basis_bn{index}", nn.BatchNorm2d(rank))
            self.add_module(f"coeff_conv{index}", conv1x1(rank, channels))
            self.add_module(f"bn{index}", nn.BatchNorm2d(channels))
        self.basis = BasisConv()

    def _filters(self, index: int) -> list[Tensor]:
        names = [f"basis_conv{index}"] * self.has_unique + [self.shared_names[index - 1]] * self.has_shared
        return [getattr(self, name).weight for name in names]

    def forward(self, x: Tensor) -> Tensor:
        # No activation between a basis and its coefficients.
        y = self.basis_bn1(self.basis(x, *self._filters(1)))
        y = F.relu(self.bn1(self.coeff_conv1(y)))
        y = self.basis_bn2(self.basis(y, *self._filters(2)))
        return F.relu(x + self.bn2(self.coeff_conv2(y)))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv1x1(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, channels * self.expansion)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)
        self.shortcut = projection(in_channels, channels * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class SharedBottleneck(nn.Module):
    """Bottleneck of stride 1 that shares whole convolutions with its group: the 3x3, or the 3x3 and the last 1x1.

    shared: [3x3] or [3x3, 1x1].
    """

    def __init__(self, channels: int, shared: Sequence[nn.Conv2d]):
        super().__init__()
        wide = channels * Bottleneck.expansion
        self.conv1 = conv1x1(wide, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.spatial_name = "shared_basis" if len(shared) == 1 else "shared_basis_1"
        self.add_module(self.spatial_name, shared[0])
        self.bn2 = nn.BatchNorm2d(channels)
        self.last_name = "conv3" if len(shared) == 1 else "shared_basis_2"
        self.add_module(self.last_name, conv1x1(channels, wide) if len(shared) == 1 else shared[1])
        self.bn3 = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(getattr(self, self.spatial_name)(y)))
        return F.relu(self.bn3(getattr(self, self.last_name)(y)) + x)
