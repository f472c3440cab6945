"""Blocks of ShiftResNet and of the networks it is compared with (Wu et al., CVPR 2018, arXiv 1711.08141, Sec. 3, 4.1).

Attribute names are those of the original repository, so that its state dicts load. Every block maps
(N, in_planes, H, W) to (N, out_planes, H / stride, W / stride).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from common.kernels import gains_from_tap_order, shift2d, shift_conv1x1, tap_order


def reduced(planes: int, reduction: float) -> int:
    """Channels left of `planes` after division by `reduction`, in the order of the original: int((1 / r) * planes).

    Raises ValueError if nothing is left.
    """
    channels = int((1 / reduction) * planes)
    if channels < 1:
        raise ValueError(f"reduction {reduction:g} leaves 0 of {planes} channels; choose at most {planes}")
    return channels


def projection(in_planes: int, out_planes: int, stride: int) -> nn.Sequential:
    """Shortcut of a block that changes shape: 1x1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(in_planes, out_planes, 1, stride, bias=False), nn.BatchNorm2d(out_planes))


def shortcut(in_planes: int, out_planes: int, stride: int) -> nn.Sequential:
    """Identity (an empty Sequential) where shapes allow it, else the projection."""
    if stride == 1 and in_planes == out_planes:
        return nn.Sequential()
    return projection(in_planes, out_planes, stride)


class Shift2d(nn.Module):
    """Shift as a layer: each channel moves by its own offset, zeros come in from outside (Sec. 3.1). No parameters."""

    def __init__(self, kernel_size: int = 3, dilation: int = 1):
        super().__init__()
        self.kernel_size = kernel_size
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), any floating dtype. Returns the same shape, dtype and memory format."""
        return shift2d(x, self.kernel_size, self.dilation)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}"


class BasicBlock(nn.Module):
    """3x3 - 3x3 residual block of He et al. (2016), its middle width divided by `reduction` (block reduction).

    project_on_mid: the rule of 10 Nov 2017 to 19 Jan 2018, a projection wherever in_planes differs from the *middle*
    width.
    """

    def __init__(self, in_planes, out_planes, stride=1, reduction=1.0, project_on_mid=False):
        super().__init__()
        mid = reduced(out_planes, reduction)
        self.conv1 = nn.Conv2d(in_planes, mid, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, out_planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        if project_on_mid and in_planes != mid:
            self.shortcut = projection(in_planes, out_planes, stride)
        else:
            self.shortcut = shortcut(in_planes, out_planes, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ShiftConv(nn.Module):
    """Conv-shift-conv: 1x1 to `expansion` times the output width, shift, 1x1 back (the CSC module of Sec. 3.2)."""

    def __init__(self, in_planes, out_planes, stride=1, expansion=1.0):
        super().__init__()
        self.fused = None
        mid = int(out_planes * expansion)
        if mid < 1:
            raise ValueError(
                f"expansion {expansion:g} leaves 0 of {out_planes} channels; choose at least {1 / out_planes:g}"
            )
        self.conv1 = nn.Conv2d(in_planes, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.shift2 = Shift2d(kernel_size=3)
        self.conv2 = nn.Conv2d(mid, out_planes, 1, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.shortcut = shortcut(in_planes, out_planes, stride)

    @torch.no_grad()
    def fuse(self):
        """From now on run the shift and the convolution after it in one pass, with the weights of now: for inference.

        Batch norms are folded into the convolutions; the middle channels are in `tap_order` where that is faster.
        Results differ in the last bits. `unfuse` ends it. Raises ValueError in training mode, where batch norms depend
        on the batch.
        """
        if self.training:
            raise ValueError("ShiftConv.fuse: call eval() first")
        folded = [
            fuse_conv_bn_weights(conv.weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
            for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2))
        ]
        (weight1, bias1), (weight2, bias2) = folded
        sizes = self.shift2.kernel_size, self.shift2.dilation
        by_tap = gains_from_tap_order(weight2, *sizes)
        if by_tap:
            order = tap_order(len(weight1), self.shift2.kernel_size)
            weight1, bias1, weight2 = weight1[order], bias1[order], weight2[:, order]
        sizes = self.conv2.stride[0], *sizes, by_tap
        self.fused = (weight1, bias1), (weight2, bias2, *sizes)

    def unfuse(self):
        """Run layer by layer again."""
        self.fused = None

    def forward(self, x):
        # As in the original: ReLU before the addition and none after it, unlike the other blocks.
        if self.fused:
            expand, shift_and_project = self.fused
            y = shift_conv1x1(F.conv2d(x, *expand).relu_(), *shift_and_project)
            return y.relu_().add_(self.shortcut(x))  # in place: on a CPU new pages cost more than the arithmetic
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(self.shift2(y))))
        return y + self.shortcut(x)


class DepthWiseBlock(nn.Module):
    """1x1 - 3x3 depthwise - 1x1 without a shortcut: `--reduction-mode depthwise`, of 25 to 28 March 2018."""

    def __init__(self, in_planes, out_planes, stride=1, reduction=1.0):
        super().__init__()
        mid = reduced(out_planes, reduction)
        self.conv1 = nn.Conv2d(in_planes, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.depth = nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_planes, 1, stride, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)

    def residual(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.depth(y))  # As in the original: no ReLU between the depthwise and the second 1x1 convolution.
        return self.bn3(self.conv3(y))

    def forward(self, x):
        return F.relu(self.residual(x))


class DepthWiseWithSkipBlock(DepthWiseBlock):
    """The same with a shortcut: the block of the `depthwiseresnet*` architectures."""

    def __init__(self, in_planes, out_planes, stride=1, reduction=1.0):
        super().__init__(in_planes, out_planes, stride, reduction)
        self.shortcut = shortcut(in_planes, out_planes, stride)

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))


class ChannelShuffle(nn.Module):
    """Interleave `groups` groups of channels (ShuffleNet, Zhang et al. 2018, Sec. 3.1)."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleBlock(nn.Module):
    """Grouped 1x1 - channel shuffle - 3x3 depthwise - grouped 1x1: `--reduction-mode shuffle`, January to March 2018.

    The middle width is rounded down to a multiple of the groups.
    """

    GROUPS = 4

    def __init__(self, in_planes, out_planes, stride=1, reduction=1.0):
        super().__init__()
        groups = self.GROUPS
        mid = int((1 / reduction) * out_planes // groups * groups)
        if mid < groups:
            raise ValueError(
                f"reduction {reduction:g} leaves fewer than {groups} of {out_planes} channels in a shuffle block; "
                f"choose at most {out_planes / groups:g}"
            )
        self.conv1 = nn.Conv2d(in_planes, mid, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.shuffle1 = ChannelShuffle(groups)
        self.depth = nn.Conv2d(mid, mid, 3, stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_planes, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(out_planes)
        self.shortcut = shortcut(in_planes, out_planes, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.depth(self.shuffle1(y))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class MobileNetLikeBlock(nn.Module):
    """Two depthwise-separable convolutions without a shortcut: `--reduction-mode mobile`, 26 March 2018."""

    def __init__(self, in_planes, out_planes, stride=1, reduction=1.0):
        super().__init__()
        mid = reduced(out_planes, reduction)
        self.depth1 = nn.Conv2d(in_planes, in_planes, 3, stride, padding=1, groups=in_planes, bias=False)
        self.depth_bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.depth2 = nn.Conv2d(mid, mid, 3, padding=1, groups=mid, bias=False)
        self.depth_bn2 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, out_planes, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)

    def forward(self, x):
        y = F.relu(self.depth_bn1(self.depth1(x)))
        y = F.relu(self.bn1(self.conv1(y)))
        y = F.relu(self.depth_bn2(self.depth2(y)))
        return F.relu(self.bn2(self.conv2(y)))
