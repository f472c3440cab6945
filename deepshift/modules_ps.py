"""Layers of DeepShift-PS: weights 2**round(shift) * sign(round(sign)) with two trainable tensors (Sec. 3.2)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from deepshift.geometry import ConvGeometry
from deepshift.quantizers import fixed_point, ps_shift_range, ps_weight


class _ShiftAndSign(nn.Module):
    """What both layers share: the tensors `shift` and `sign`, in this order, then `bias`."""

    shift_type = "PS"

    def _build(self, shape, bias, weight_bits, activation_bits, rounding, freeze_sign):
        self.weight_bits, self.activation_bits, self.rounding = weight_bits, tuple(activation_bits), rounding
        self.shift_range = ps_shift_range(weight_bits)
        self.shift = nn.Parameter(torch.empty(shape))
        self.sign = nn.Parameter(torch.empty(shape), requires_grad=not freeze_sign)
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.kernel = None  # a PackedLayer while the integer kernels are in use
        self.reset_parameters()

    def reset_parameters(self):
        """Initialisation from scratch: sign uniform in (-1, 1), shift as each layer says, bias as in nn.Linear."""
        nn.init.uniform_(self.shift, *self._initial_range())
        nn.init.uniform_(self.sign, -1, 1)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.shift[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def rounded_weight(self) -> torch.Tensor:
        """The weights that the layer multiplies with, 0 or +-2**p. Clamps `shift` in place, as in the original."""
        # Random rounding is for training only; the original rounded at random in evaluation too.
        rounding = self.rounding if self.training else "deterministic"
        return ps_weight(self.shift, self.sign, self.shift_range, rounding)


class LinearShift(_ShiftAndSign):
    """y = x W^T + bias. As in the original, neither x nor bias is rounded: activation_bits have no effect here.

    x: (..., in_features). Raises ValueError for fewer than 2 weight bits.
    """

    def __init__(self, in_features, out_features, bias=True, weight_bits=5, activation_bits=(16, 16),
                 rounding="deterministic", freeze_sign=False):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._build((out_features, in_features), bias, weight_bits, activation_bits, rounding, freeze_sign)

    def _initial_range(self):
        return self.shift_range

    def forward(self, x):
        if self.kernel is not None:
            return self.kernel.linear(x, self.bias)
        return F.linear(x, self.rounded_weight(), self.bias)

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.weight_bits}"


class Conv2dShift(_ShiftAndSign):
    """Convolution with PS weights; input and bias are rounded to activation_bits. Arguments as nn.Conv2d.

    x: (N, in_channels, H, W). Raises ValueError for fewer than 2 weight bits.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True,
                 padding_mode="zeros", weight_bits=5, activation_bits=(16, 16), rounding="deterministic",
                 freeze_sign=False):  # fmt: skip
        super().__init__()
        self.geometry = ConvGeometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                                     padding_mode)  # fmt: skip
        shape = self.geometry.weight_shape
        self._build(shape, bias, weight_bits, activation_bits, rounding, freeze_sign)

    def _initial_range(self):
        return -10, -1  # whatever the weight bits, as in the original; the first forward pass clamps

    def forward(self, x):
        x = fixed_point(x, self.activation_bits)
        bias = None if self.bias is None else fixed_point(self.bias, self.activation_bits)
        if self.kernel is not None:
            return self.kernel.conv2d(x, bias, self.geometry)
        return self.geometry.convolve(x, self.rounded_weight(), bias)

    def extra_repr(self):
        return f"{self.geometry}, bias={self.bias is not None}, bits={self.weight_bits}"
