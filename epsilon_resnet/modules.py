"""Layers of epsilon-ResNet (arXiv 1804.01661): the strict-identity gate, TensorFlow's padding, pre-activation blocks.

Every block's forward returns (F(x), shortcut(x)); the network adds them through the gate. A block that was discarded
returns (None, shortcut(x)).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# relu(relu(-C*s + 1) * (-C) + 1) with C = 1e6 is 0 below s = 1e-6 and 1 above, but for a ramp 1e-12 wide.
GATE_SLOPE = 1e6


def gate_weight(excess: Tensor) -> Tensor:
    """The paper's gate as a formula of four ReLUs: 0 where no response exceeds epsilon, else 1  (Sec. 3.1).

    excess: any shape, floating, s = max(max|F| - epsilon, 0). Returns the same shape and dtype. This is the definition;
    `strict_identity` computes it by one comparison.
    """
    return F.relu(F.relu(-GATE_SLOPE * excess + 1) * (-GATE_SLOPE) + 1)


def is_closed(peak: Tensor, epsilon: float) -> Tensor:
    """Whether blocks whose largest response is `peak` (any shape, floating) are identities; a NaN leaves them open."""
    return peak - epsilon < 1 / GATE_SLOPE


def strict_identity(residual: Tensor, shortcut: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """shortcut + S(residual): S gives 0 if all responses of the *batch* lie in [-epsilon, epsilon], else the residual.

    residual, shortcut: (N, C, H, W), same shape and dtype. Returns the sum and max|residual| (float32, no axes), both
    without waiting for the device. Gradient: that of w * residual + shortcut with w constant, so a closed block's
    parameters get zeros, not None, and weight decay acts on them. Responses are compared in float32: 1e6 overflows
    float16.
    """
    low, high = torch.aminmax(residual.detach())  # on a CPU ten times faster than an infinity norm
    peak = torch.maximum(high, -low).float()
    weight = (~is_closed(peak, epsilon)).to(residual.dtype)
    return torch.addcmul(shortcut, residual, weight), peak


def same_padding(size: int, kernel_size: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) one axis so that the output has ceil(size / stride) values, as TensorFlow's SAME has."""
    total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, kernel_size: int, stride: int, value: float = 0.0) -> Tensor:
    """(N, C, H, W) padded for a window of `kernel_size`; with stride 2 even sizes get one more at the end."""
    height, width = (same_padding(size, kernel_size, stride) for size in x.shape[2:])
    return F.pad(x, (*width, *height), value=value)


class SameConv2d(nn.Conv2d):
    """Convolution without bias under TensorFlow's SAME padding; initialised as the original (fan-out)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        if stride > 1:
            self.padding = (0, 0)  # done by pad_same: not the same before and after

    def reset_parameters(self):
        truncated_normal(self.weight, self.kernel_size[0] * self.kernel_size[1] * self.out_channels)

    def forward(self, x):
        size, stride = self.kernel_size[0], self.stride[0]
        return super().forward(pad_same(x, size, stride) if 1 < size and 1 < stride else x)


def truncated_normal(weight: Tensor, fan: int):
    """Fill with the original's initial values: normal of variance 1.3 * 2 / fan, cut at two standard deviations."""
    sigma = math.sqrt(1.3 * 2 / fan)
    nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma)


def classifier(in_features: int, num_classes: int) -> nn.Linear:
    """Linear layer with bias 0 and the original's initial weights (fan-in)."""
    layer = nn.Linear(in_features, num_classes)
    truncated_normal(layer.weight, in_features)
    nn.init.zeros_(layer.bias)
    return layer


def head(x: Tensor, norm: nn.BatchNorm2d, linear: nn.Linear) -> Tensor:
    """BN, ReLU, global average, linear: (N, C, H, W) -> logits (N, classes)."""
    return linear(F.relu(norm(x)).mean((2, 3)))


class SideOutput(nn.Module):
    """Side supervision in the middle of the network (Sec. 3.3): a second classifier, used in training only."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.bnlast = nn.BatchNorm2d(channels)
        self.linear = classifier(channels, num_classes)

    def forward(self, x):
        return head(x, self.bnlast, self.linear)


def cifar_shortcut(x: Tensor, out_channels: int) -> Tensor:
    """x itself, or 2x2 averages of it with zero channels before and behind where the number of channels doubles."""
    extra = out_channels - x.shape[1]
    if extra == 0:
        return x
    return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, extra // 2, extra - extra // 2))


class CifarBlock(nn.Module):
    """Pre-activation block of the CIFAR and SVHN networks. first: of the whole network, whose input is activated."""

    last_convolution = "conv2"

    def __init__(self, in_channels: int, channels: int, first: bool = False):
        super().__init__()
        self.preact = None if first else nn.BatchNorm2d(in_channels)
        self.conv1 = SameConv2d(in_channels, channels, 3, stride=channels // in_channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = SameConv2d(channels, channels, 3)

    def forward(self, x):
        activated = x if self.preact is None else F.relu(self.preact(x))
        residual = self.conv2(F.relu(self.bn1(self.conv1(activated))))
        return residual, cifar_shortcut(x, residual.shape[1])


class CifarShortcut(nn.Module):
    """What is left of a group's first CifarBlock once it is discarded."""

    def __init__(self, in_channels: int, channels: int, first: bool = False):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return None, cifar_shortcut(x, self.channels)


class ImagenetBlock(nn.Module):
    """Basic pre-activation block of ResNet-18 and 34. first: of the network; opens_group: of groups 1 to 3.

    A block that opens a group takes its shortcut from the activated input, the others from the input itself.
    """

    last_convolution = "conv2"
    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, first: bool, opens_group: bool):
        super().__init__()
        self.opens_group = opens_group
        self.preact = None if first else nn.BatchNorm2d(in_channels)
        self._add_convolutions(in_channels, width, stride)
        out_channels = width * self.expansion
        self.convshortcut = (
            None if in_channels == out_channels else SameConv2d(in_channels, out_channels, 1, stride=stride)
        )

    def _add_convolutions(self, in_channels, width, stride):
        self.conv1 = SameConv2d(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = SameConv2d(width, width, 3)

    def residual(self, activated):
        return self.conv2(F.relu(self.bn1(self.conv1(activated))))

    def forward(self, x):
        activated = x if self.preact is None else F.relu(self.preact(x))
        shortcut = activated if self.opens_group else x
        if self.convshortcut is not None:
            shortcut = self.convshortcut(shortcut)
        return self.residual(activated), shortcut


class BottleneckBlock(ImagenetBlock):
    """1x1, 3x3 (with the stride), 1x1 block of ResNet-50, 101 and 152."""

    last_convolution = "conv3"
    expansion = 4

    def _add_convolutions(self, in_channels, width, stride):
        self.conv1 = SameConv2d(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = SameConv2d(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = SameConv2d(width, width * self.expansion, 1)

    def residual(self, activated):
        y = F.relu(self.bn1(self.conv1(activated)))
        return self.conv3(F.relu(self.bn2(self.conv2(y))))


class ImagenetShortcut(nn.Module):
    """What is left of a group's first block once it is discarded: its shortcut, with the activation that feeds it."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, opens_group: bool):
        super().__init__()
        self.preact = nn.BatchNorm2d(in_channels) if opens_group else None
        self.convshortcut = (
            None if in_channels == out_channels else SameConv2d(in_channels, out_channels, 1, stride=stride)
        )

    def forward(self, x):
        if self.preact is not None:
            x = F.relu(self.preact(x))
        return None, x if self.convshortcut is None else self.convshortcut(x)
