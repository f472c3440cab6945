"""CUDA kernels of shift2d: which kernel of shift2d.cu, on how many threads. CuPy is imported on first use."""

import numpy as np

from common.kernels import launch

THREADS = 256
ROWS_PER_THREAD = 4  # NCHW: spreads a thread's index arithmetic over several loads that are in flight together
ROWS_PER_BLOCK = 8  # channels-last
MAX_GRID = 65535  # of the second and third dimension; the kernels stride by the grid, so smaller is correct too


def _power_of_two(n, most):
    """Smallest power of two >= n, at most `most` (a power of two)."""
    return min(most, 1 << max(0, n - 1).bit_length())


def plan(shape, item, alignment, kernel_size, dilation, direction, channels_last):
    """(kernel name, grid, block, int arguments) for a tensor of `shape` (N, C, H, W) with `item` bytes per element.

    alignment: a number of bytes that divides both tensors' addresses. None where a size exceeds the kernels' 32-bit
    indices (offsets into the tensor have 64 bits).
    """
    batch, channels, height, width = shape
    row, half = width * item, kernel_size // 2
    if max(batch, channels) >= 2**30 or max(1, half) * max(height, row) >= 2**30:
        return None
    steps = (kernel_size, direction * min(dilation, height), direction * min(dilation, width))
    if channels_last:
        x = _power_of_two(channels, 32)
        y = _power_of_two(width, THREADS // x)
        grid = (-(-channels // x), min(MAX_GRID, -(-height // ROWS_PER_BLOCK)), min(MAX_GRID, batch))
        return f"shift2d_rows_{item}", grid, (x, y, 1), (batch, channels, height, width, ROWS_PER_BLOCK, *steps)
    chunk = next(size for size in (16, 8, 4, 2, 1) if row % size == 0 and alignment % size == 0)
    x = _power_of_two(row // chunk, THREADS)
    y = _power_of_two(-(-height // ROWS_PER_THREAD), THREADS // x)
    z = _power_of_two(channels, min(64, THREADS // (x * y)))  # 64: the hardware's limit of the third dimension
    grid = (-(-channels // z), min(MAX_GRID, -(-height // (y * ROWS_PER_THREAD))), min(MAX_GRID, batch))
    return f"shift2d_planes_{chunk}", grid, (x, y, z), (batch, channels, height, row // chunk, item, *steps)


def load():
    """Raises ImportError, or what CuPy raises, where kernels cannot be compiled and launched here."""
    import torch

    launch.load("shift2d", "shift2d_planes_16", torch.cuda.current_device())


def shift2d_cuda(x, y, kernel_size, dilation, direction, channels_last):
    """Write the shifted x into y, both (N, C, H, W) on one CUDA device, dense in the same layout, not empty.

    Any dtype of 1, 2, 4 or 8 bytes. Returns False, and does nothing, for sizes beyond the kernels' 32-bit indices.
    """
    item = x.element_size()
    chosen = plan(x.shape, item, x.data_ptr() | y.data_ptr() | 16, kernel_size, dilation, direction, channels_last)
    if chosen is None:
        return False
    name, grid, block, sizes = chosen
    launch.launch("shift2d", name, grid, block, x, y, *map(np.int32, sizes))
    return True
