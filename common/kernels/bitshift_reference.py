"""What bitshift computes, in plain PyTorch: the definition, for tests and for where there are no kernels."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.bitshift_pack import output_size, unpack_codes, unpack_integers
from common.kernels.shift2d import memory_format_of

MOST_TERMS = 2**22  # of one fixed-point sum: below this, 32-bit terms add up exactly in float64


class Weights(NamedTuple):
    """What a kernel needs of PackedShiftWeights."""

    codes: Tensor
    shape: tuple[int, ...]
    bits: int
    base: int
    zero: bool


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def linear_reference(x, weights, bias):
    """Float arithmetic of bitshift_linear: unpacked weights, the library's product in at least float32."""
    return F.linear(x.to(wide(x.dtype)), unpack_codes(*weights).to(wide(x.dtype)), as_wide(bias, x)).to(x.dtype)


def conv2d_reference(x, weights, bias, *geometry):
    """Float arithmetic of bitshift_conv2d. geometry: stride, padding, dilation, groups."""
    weight = unpack_codes(*weights).to(wide(x.dtype))
    y = F.conv2d(x.to(wide(x.dtype)), weight, as_wide(bias, x), *geometry)
    return y.to(x.dtype, memory_format=memory_format_of(x))


def as_wide(bias, x):
    return None if bias is None else bias.to(wide(x.dtype))


def shift_and_add(x, weights, product):
    """Exact int64 sums of the fixed-point path: for each exponent, shift x, then add and subtract by product(x, signs).

    x: int32. product: a linear operation in float64, which adds these integers exactly: terms are below 2**31 and
    fewer than 2**22.
    """
    negative, magnitude = unpack_integers(weights.codes, weights.shape, weights.bits)
    total = 0
    for m in range(2 ** (weights.bits - 1)):
        exponent = weights.base + m
        signs = torch.where(magnitude == m, 1.0 - 2.0 * negative.double(), 0.0)
        if (weights.zero and m == 0) or not signs.any():
            continue
        terms = product((x >> min(31, max(0, -exponent))).double(), signs)
        total = total + (terms.long() << max(0, exponent))
    return total


def linear_fixed_reference(x, weights):
    """int32 x (..., in) -> int64 (..., out), exact."""
    total = shift_and_add(x, weights, F.linear)
    return total if isinstance(total, Tensor) else x.new_zeros((*x.shape[:-1], weights.shape[0]), dtype=torch.int64)


def linear_int8_reference(x, weights):
    """int8 x (rows, in) -> int32 (rows, out): exact sums of x * w / (smallest magnitude of w). For sums below 2**31."""
    negative, magnitude = unpack_integers(weights.codes, weights.shape, weights.bits)
    sizes = torch.ones_like(magnitude) << magnitude >> int(weights.zero)
    return F.linear(x.double(), torch.where(negative.bool(), -sizes, sizes).double()).int()


def conv2d_fixed_reference(x, weights, *geometry):
    """int32 x (N, in, H, W) -> int64 (N, out, H', W'), exact."""

    def product(x, signs):
        with torch.backends.cudnn.flags(enabled=False):  # no algorithm that transforms its input
            return F.conv2d(x, signs, None, *geometry)

    total = shift_and_add(x, weights, product)
    shape = output_size(x.shape, weights.shape, *geometry[:3])
    return total if isinstance(total, Tensor) else x.new_zeros(shape, dtype=torch.int64)
