"""Layers of DeepShift-Q: a trainable float weight, rounded to a power of two in every forward pass (Sec. 3.1)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from deepshift.geometry import ConvGeometry
from deepshift.quantizers import fixed_point, q_shift_range, q_weight


class _RoundedWeight(nn.Module):
    """What both layers share: `weight`, then `bias`."""

    shift_type = "Q"

    def _build(self, shape, bias, weight_bits, activation_bits, rounding):
        self.weight_bits, self.activation_bits, self.rounding = weight_bits, tuple(activation_bits), rounding
        self.shift_range = q_shift_range(weight_bits)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.kernel = None  # a PackedLayer while the integer kernels are in use
        self.reset_parameters()

    def reset_parameters(self):
        """Initialisation from scratch, that of nn.Linear and nn.Conv2d."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def rounded_weight(self) -> torch.Tensor:
        """The weights that the layer multiplies with, +-2**p. Clamps `weight` in place, as in the original."""
        rounding = self.rounding if self.training else "deterministic"
        return q_weight(self.weight, self.shift_range, rounding)


class LinearShiftQ(_RoundedWeight):
    """y = x W^T + bias with x rounded to activation_bits; the bias is not, as in the original.

    x: (..., in_features). Raises ValueError for fewer than 1 weight bit.
    """

    def __init__(self, in_features, out_features, bias=True, weight_bits=5, activation_bits=(16, 16),
                 rounding="deterministic"):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._build((out_features, in_features), bias, weight_bits, activation_bits, rounding)

    def forward(self, x):
        x = fixed_point(x, self.activation_bits)
        if self.kernel is not None:
            return self.kernel.linear(x, self.bias)
        return F.linear(x, self.rounded_weight(), self.bias)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.weight_bits}"


class Conv2dShiftQ(_RoundedWeight):
    """Convolution with Q weights; input and bias are rounded to activation_bits. Arguments as nn.Conv2d.

    x: (N, in_channels, H, W). Raises ValueError for fewer than 1 weight bit.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", weight_bits=5, activation_bits=(16, 16), rounding="deterministic"):  # fmt: skip
        super().__init__()
        self.geometry = ConvGeometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                                     padding_mode)  # fmt: skip
        self._build(self.geometry.weight_shape, bias, weight_bits, activation_bits, rounding)

    def forward(self, x):
        x = fixed_point(x, self.activation_bits)
        bias = None if self.bias is None else fixed_point(self.bias, self.activation_bits)
        if self.kernel is not None:
            return self.kernel.conv2d(x, bias, self.geometry)
        return self.geometry.convolve(x, self.rounded_weight(), bias)

    def extra_repr(self):
        return f"{self.geometry}, bias={self.bias is not None}, bits={self.weight_bits}"
