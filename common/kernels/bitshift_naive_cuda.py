"""The naive CUDA kernels that DeepShift's paper compares, one with shifts, one with multiplications: baselines only."""

import numpy as np
import torch

from common.kernels import launch
from common.kernels.bitshift_pack import output_size, unpack_integers

SIDE = 16  # of a tile of pixels and outputs
MAX_GRID = 65535
NEGATIVE, NOTHING = 32, 64  # bits of a code; below: how far to shift right


def shift_codes(packed):
    """int32 codes of PackedShiftWeights of a convolution, shape packed.shape, as `conv2d` takes them with int32 x.

    Raises ValueError for weights above 1: DeepShift's kernels shift to the right.
    """
    negative, magnitude = unpack_integers(packed.codes, packed.shape, packed.bits)
    right, nothing = -packed.base - magnitude, (magnitude == 0) & packed.zero
    if (right.lt(0) & ~nothing).any():
        raise ValueError("naive convolution: a weight is above 1, and only shifts to the right are possible")
    codes = right.clamp(0, 31) + negative * NEGATIVE
    return torch.where(nothing, NOTHING, codes).int().contiguous()


def plan(x_shape, weight_shape, stride, padding):
    """(shape of y, grid, block, int arguments)."""
    shape = output_size(x_shape, weight_shape, (stride, stride), (padding, padding), (1, 1))
    pixels = -(-shape[0] * shape[2] * shape[3] // SIDE)
    grid = (min(pixels, 2**31 - 1), min(MAX_GRID, -(-shape[1] // SIDE)), 1)
    return shape, grid, (SIDE, SIDE, 1), (*x_shape, shape[1], *shape[2:], *weight_shape[2:], stride, padding)


def conv2d(x, weight, stride=1, padding=0):
    """Convolution of x (N, in, H, W) with weight (out, in, kh, kw), both float32, or int32 x with `shift_codes`.

    Contiguous CUDA tensors, none empty. Returns (N, out, H', W') in x's dtype; every shifted x is rounded down, int32
    sums wrap. stride, padding: one int each.
    """
    shape, *sizes, integers = plan(x.shape, weight.shape, stride, padding)
    name = {torch.int32: "bitshift_naive_shift", torch.float32: "bitshift_naive_multiply"}[x.dtype]
    y = x.new_empty(shape)
    launch.launch("bitshift_naive", name, *sizes, weight, x, y, *map(np.int32, integers))
    return y
