"""CUDA kernels of bitshift: which kernel of bitshift.cu, on how many threads. CuPy is imported on first use.

x of 16 bits: bitshift_half_cuda.py, where it can decode the weights to x's dtype; everything else in float32.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.kernels import bitshift_half_cuda as half
from common.kernels import launch
from common.kernels.bitshift_pack import BLOCK, GROUP, in_order, output_size
from common.kernels.shift2d import memory_format_of

WARPS = 16  # per thread block of a linear layer, at most: the kernel's shared memory is as large
THREADS = 256
MAX_GRID = 65535
MOST_ROWS = 32  # of x; beyond, unpacking for the library's product is faster


def plan_linear(rows, inputs, outputs, bits, fixed):
    """(kernel name, grid, block, int arguments) for x (rows, inputs), inputs a multiple of 8."""
    tile = 4 if fixed or rows > 1 else 1
    name = f"bitshift_linear_fixed_{bits}" if fixed else f"bitshift_linear_{bits}_{tile}"
    blocks = inputs // 8
    grid = (-(-outputs // GROUP), min(MAX_GRID, -(-rows // tile)), 1)
    return name, grid, (32, max(1, min(WARPS, blocks)), 1), (rows, blocks, outputs)


def plan_unpack(blocks, bits):
    """(kernel name, grid, block) for so many blocks of codes."""
    return f"bitshift_unpack_{bits}", (max(1, min(MAX_GRID, -(-blocks // 8))), 1, 1), (32, 8, 1)


def plan_outputs(count):
    """(grid, block) with a thread per output."""
    return (max(1, min(MAX_GRID, -(-count // THREADS))), 1, 1), (THREADS, 1, 1)


def load():
    """Raises ImportError, or what CuPy raises, where kernels cannot be compiled and launched here."""
    launch.load("bitshift", "bitshift_linear_4_1", torch.cuda.current_device())


def _int32(*values):
    return tuple(map(np.int32, values))


def _run_linear(x, weights, y, fixed):
    name, grid, block, sizes = plan_linear(*x.shape, y.shape[1], weights.bits, fixed)
    if y.numel():
        arguments = _int32(*sizes, weights.base, weights.zero)
        launch.launch("bitshift", name, grid, block, weights.codes, x, y, *arguments)
    return y


def linear(x, weights, bias=None):
    """x (rows, in) @ weights.T + bias -> (rows, out), in x's dtype, float32, bfloat16 or float16; sums are float32.

    weights: of shape (out, in), on x's device; bias: (out,), floating, or None.
    """
    if half.usable(x.dtype, weights):
        return half.linear(x, weights, bias)
    y = _linear_float32(x.float(), weights)
    return (y if bias is None else y + bias).to(x.dtype)


def _linear_float32(x, weights):
    x, outputs = _padded(x), weights.shape[0]
    if len(x) > MOST_ROWS and x.shape[1] and outputs:
        return x @ _unpack_transposed(weights)[:, :outputs]
    return _run_linear(x, weights, x.new_empty(len(x), outputs), fixed=False)


def _padded(x):
    return (F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x).contiguous()


def linear_fixed(x, weights):
    """int32 x (rows, in) -> exact int64 sums of shifted inputs, (rows, out)."""
    x = _padded(x)
    return _run_linear(x, weights, x.new_empty(len(x), weights.shape[0], dtype=torch.int64), fixed=True)


def _unpack(weights, y, blocks, step, stride):
    count = weights.codes.numel() // (GROUP * weights.bits)
    name, grid, block = plan_unpack(count, weights.bits)
    sizes = np.int64(count), np.int32(blocks), np.int64(step), np.int64(stride)
    if count:
        launch.launch("bitshift", name, grid, block, weights.codes, y, *sizes, *_int32(weights.base, weights.zero))
    return y


def _unpack_transposed(weights):
    """Weights of a linear layer, (in up to a multiple of 8, out up to one of 32)."""
    panels, blocks = -(-weights.shape[0] // GROUP), -(-weights.shape[1] // 8)
    y = torch.empty(blocks * 8, panels * GROUP, dtype=torch.float32, device=weights.codes.device)
    return _unpack(weights, y, blocks, GROUP, panels * GROUP)


def unpack(weights):
    """The weights of a convolution, float32, shape weights.shape, channels-last."""
    blocks = weights.codes.numel() // (GROUP * weights.bits)
    y = torch.empty(blocks * BLOCK, dtype=torch.float32, device=weights.codes.device)
    return in_order(_unpack(weights, y, 1, BLOCK, GROUP), weights.shape)


def conv2d(x, weights, bias, *geometry):
    """x (N, in, H, W) -> (N, out, H', W'), in x's dtype and memory format. geometry: from stride to groups."""
    if half.usable(x.dtype, weights):
        dtype, weight = x.dtype, half.unpack_flat(weights, x.dtype)
    else:
        dtype, weight = torch.float32, unpack(weights)
    y = F.conv2d(x.to(dtype), weight, None if bias is None else bias.to(dtype), *geometry)
    return y.to(x.dtype, memory_format=memory_format_of(x))  # one channels-last argument has made it so


def conv2d_fixed(x, weights, stride, padding, dilation, groups):
    """int32 x (N, in, H, W) -> exact int64 sums (N, out, H', W')."""
    shape = output_size(x.shape, weights.shape, stride, padding, dilation)
    y = torch.empty(shape, dtype=torch.int64, device=x.device)
    if y.numel():
        sizes = conv2d_sizes(x.shape, weights.shape, shape, stride, padding, dilation, groups)
        grid, block = plan_outputs(y.numel())
        arguments = _int32(*sizes, weights.base, weights.zero)
        name = f"bitshift_conv2d_fixed_{weights.bits}"
        launch.launch("bitshift", name, grid, block, weights.codes, x.contiguous(), y, *arguments)
    return y


def conv2d_sizes(x_shape, weight_shape, y_shape, stride, padding, dilation, groups):
    """Sizes as the convolution kernels take them."""
    batch, _, height, width = x_shape
    outputs, inputs, *kernel = weight_shape
    return batch, inputs, height, width, outputs, *y_shape[2:], *kernel, *stride, *padding, *dilation, groups
