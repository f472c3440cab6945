"""CUDA kernels of shift2d: which kernel of shift2d.cu, on how many threads. CuPy is imported on first use."""

import functools

import numpy as np

from common.kernels import launch

THREADS = 256
ROWS_PER_THREAD = 4  # NCHW: as many as the kernel has loads of in flight together
ROWS_PER_BLOCK = 8  # channels-last: a thread walks down so many, and loads two more
RUN = 16  # bytes
ENOUGH_BLOCKS = 4096  # several per multiprocessor: beyond, a thread uses its masks for more than one image
MAX_GRID = 65535  # of the second and third dimension; the kernels stride by the grid, so smaller is correct too


def _power_of_two(n, most):
    """Smallest power of two >= n, at most `most` (a power of two)."""
    return min(most, 1 << max(0, n - 1).bit_length())


def _block_size(count):
    """Threads per block, whole warps, that leave the fewest idle over `count` pieces of work."""
    return min(range(THREADS, 0, -32), key=lambda threads: (-(-count // threads) * threads, -threads))


def plan(shape, item, alignment, kernel_size, dilation, direction, channels_last):
    """(kernel name, grid, block, int arguments) for a tensor of `shape` (N, C, H, W) with `item` bytes per element.

    alignment: a number of bytes that divides both tensors' addresses. None where a size exceeds the kernels' 32-bit
    indices (offsets into the tensor have 64 bits).
    """
    batch, channels, height, width = shape
    row, half = width * item, kernel_size // 2
    if max(batch, channels) >= 2**30 or max(1, half) * max(height, row) >= 2**29:
        return None
    steps = (direction * min(dilation, height), direction * min(dilation, width))
    if channels_last:
        chunks = channels * item // RUN
        small = height < 2**26 and width * chunks < 2**30
        if kernel_size == 3 and small and channels * item % RUN == 0 and alignment % RUN == 0:
            return _plan_runs((batch, channels, height, width, chunks), item, *steps)
        x = _power_of_two(channels, 32)
        y = _power_of_two(width, THREADS // x)
        grid = (-(-channels // x), min(MAX_GRID, -(-height // ROWS_PER_BLOCK)), min(MAX_GRID, batch))
        sizes = (batch, channels, height, width, ROWS_PER_BLOCK, kernel_size, *steps)
        return f"shift2d_rows_{item}", grid, (x, y, 1), sizes
    chunk = next(size for size in (16, 8, 4, 2, 1) if row % size == 0 and alignment % size == 0)
    x = _power_of_two(row // chunk, THREADS)
    y = _power_of_two(-(-height // ROWS_PER_THREAD), THREADS // x)
    z = _power_of_two(channels, min(64, THREADS // (x * y)))  # 64: the hardware's limit of the third dimension
    grid = (-(-channels // z), min(MAX_GRID, -(-height // (y * ROWS_PER_THREAD))), min(MAX_GRID, batch))
    sizes = (batch, channels, height, row // chunk, item, kernel_size, *steps)
    return f"shift2d_planes_{chunk}", grid, (x, y, z), sizes


def _plan_runs(sizes, item, step_y, step_x):
    """As plan, for the kernel whose threads keep a run of channels."""
    batch, _, height, width, chunks = sizes
    threads = _block_size(width * chunks)
    rows_apart = -(-height // abs(step_y))
    rows = min(ROWS_PER_BLOCK, rows_apart)
    blocks = -(-width * chunks // threads), min(MAX_GRID, -(-rows_apart // rows) * abs(step_y))
    images = -(-batch // min(MAX_GRID, batch, -(-ENOUGH_BLOCKS // (blocks[0] * blocks[1]))))  # of one thread
    return f"shift2d_runs_{item}", (*blocks, -(-batch // images)), (threads, 1, 1), (*sizes, rows, step_y, step_x)


@functools.lru_cache(maxsize=1024)
def _ready(*call):
    """`plan`, as launch takes it: host time of an eager call counts."""
    chosen = plan(*call)
    return chosen and (*chosen[:3], tuple(map(np.int32, chosen[3])))


def load():
    """Raises ImportError, or what CuPy raises, where kernels cannot be compiled and launched here."""
    import torch

    launch.load("shift2d", "shift2d_planes_16", torch.cuda.current_device())


def shift2d_cuda(x, y, kernel_size, dilation, direction, channels_last):
    """Write the shifted x into y, both (N, C, H, W) on one CUDA device, dense in the same layout, not empty.

    Any dtype of 1, 2, 4 or 8 bytes. Returns False, and does nothing, for sizes beyond the kernels' 32-bit indices.
    """
    bits = x.data_ptr() | y.data_ptr() | 16
    chosen = _ready(x.shape, x.element_size(), bits & -bits, kernel_size, dilation, direction, channels_last)
    if chosen is None:
        return False
    name, grid, block, sizes = chosen
    launch.launch("shift2d", name, grid, block, x, y, *sizes)
    return True
