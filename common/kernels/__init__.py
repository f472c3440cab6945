"""Operations that PyTorch lacks, as torch operators: plain PyTorch reference, numba on the CPU, CUDA through CuPy."""

from common.kernels.bitshift import bitshift_conv2d, bitshift_linear, overflow_count
from common.kernels.bitshift_pack import PackedShiftWeights, pack_shift_weights
from common.kernels.multiply import multiply_conv2d, multiply_linear
from common.kernels.precision import without_tf32
from common.kernels.shift2d import shift2d, shift2d_reference
from common.kernels.shift_conv1x1 import gains_from_tap_order, shift_conv1x1, shift_conv1x1_reference, tap_order

__all__ = [
    "PackedShiftWeights",
    "bitshift_conv2d",
    "bitshift_linear",
    "gains_from_tap_order",
    "multiply_conv2d",
    "multiply_linear",
    "overflow_count",
    "pack_shift_weights",
    "shift2d",
    "shift2d_reference",
    "shift_conv1x1",
    "shift_conv1x1_reference",
    "tap_order",
    "without_tf32",
]
