"""Shape arguments of a convolution, and the convolution itself: what PS, Q and unoptimized layers have in common."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair


class ConvGeometry:
    """Arguments of nn.Conv2d except the weights. Raises ValueError if groups do not divide the channels."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
                 padding_mode="zeros"):  # fmt: skip
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups ({groups}) must divide {in_channels} inputs and {out_channels} outputs")
        if isinstance(padding, str):
            raise ValueError(f"padding must be numbers, not {padding!r}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = map(
            _pair, (kernel_size, stride, padding, dilation)
        )
        self.padding_mode = padding_mode

    @classmethod
    def of(cls, conv) -> "ConvGeometry":
        """That of an nn.Conv2d."""
        return cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                   conv.groups, conv.padding_mode)  # fmt: skip

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """x and the zero padding that it still needs."""
        if self.padding_mode != "circular":  # as in the original, the other modes are treated as zeros
            return x, self.padding
        rows, columns = self.padding
        # As in the original (and PyTorch before 1.5): only half of the padding on each side.
        return F.pad(x, ((columns + 1) // 2, columns // 2, (rows + 1) // 2, rows // 2), mode="circular"), (0, 0)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.conv2d of this geometry. x: (N, in_channels, H, W)."""
        x, padding = self.padded(x)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def __repr__(self):
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}"
        )


class PackedLayer(NamedTuple):
    """Packed weights of one layer and the fixed point of its inputs: how a layer calls the integer kernels."""

    packed: object  # PackedShiftWeights
    activation_bits: tuple[int, int]

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from common.kernels import bitshift_linear

        return bitshift_linear(x, self.packed, bias, arithmetic="fixed", activation_bits=self.activation_bits)

    def conv2d(self, x: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
        from common.kernels import bitshift_conv2d

        x, padding = geometry.padded(x)
        return bitshift_conv2d(x, self.packed, bias, geometry.stride, padding, geometry.dilation, geometry.groups,
                               arithmetic="fixed", activation_bits=self.activation_bits)  # fmt: skip
