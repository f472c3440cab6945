"""int8 arithmetic of bitshift_linear on CUDA: codes become int8 in memory, the library's int8 product does the rest."""

import numpy as np
import torch
import torch.nn.functional as F

from common.kernels import launch
from common.kernels.bitshift_pack import GROUP

THREADS = 256
MAX_GRID = 65535
LEAST_ROWS = 32  # torch._int_mm refuses up to 16


def plan(panels, blocks, bits):
    """(kernel name, grid, block): 8 threads per two blocks of codes."""
    grid = max(1, min(MAX_GRID, -(-panels * -(-blocks // 2) * 8 // THREADS)))
    return f"bitshift_int8_{bits}", (grid, 1, 1), (THREADS, 1, 1)


def load():
    """Raises ImportError, or what CuPy raises, where kernels cannot be compiled and launched here."""
    launch.load("bitshift", "bitshift_int8_4", torch.cuda.current_device())


def unpack(weights):
    """Integers of the weights, int8 (out filled up to a multiple of 32, in filled up to one of 16). Not empty."""
    panels, blocks = -(-weights.shape[0] // GROUP), -(-weights.shape[1] // 8)
    y = torch.empty(panels * GROUP, -(-blocks // 2) * 16, dtype=torch.int8, device=weights.codes.device)
    sizes = map(np.int32, (panels, blocks, weights.zero))
    launch.launch("bitshift", *plan(panels, blocks, weights.bits), weights.codes, y, *sizes)
    return y


def linear(x, weights):
    """int8 x (rows, in) -> exact int32 sums (rows, out). Not empty."""
    rows, (outputs, inputs) = len(x), weights.shape
    weight = unpack(weights)
    fill = weight.shape[1] - inputs, max(0, LEAST_ROWS - rows)
    x = F.pad(x, (0, fill[0], 0, fill[1])) if any(fill) else x
    y = torch._int_mm(x.contiguous(), weight.t())
    return y[:rows, :outputs].contiguous()
