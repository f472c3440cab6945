"""CUDA kernels of bitshift for x of 16 bits: what bitshift_half.cu is given, and for which weights it is right."""

import functools
import threading
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.kernels import launch
from common.kernels.bitshift_pack import BLOCK, GROUP, in_order

WARPS = 8  # per thread block, as the kernels' launch bounds and shared memory have it
THREADS = 256
MAX_GRID = 65535
MOST_ROWS = 64  # of x; beyond, unpacking for the library's product is estimated (not measured) to be faster
CAPABILITY = (8, 0)
COUNTERS, OF_STREAM = 2**18, 1024  # per device, 1 MiB, and at least per stream
ALIGNMENT = 16  # bytes of the widest access


class Format(NamedTuple):
    """name: in the kernels' names. offset: of exponents of codes without a zero, so that magnitude 0 is not a zero."""

    name: str
    mantissa: int
    bias: int
    lowest: int
    most_bits: int
    offset: int


FORMATS = {
    torch.bfloat16: Format("bf16", 7, 127, -126, 6, 32),
    torch.float16: Format("f16", 10, 15, -24, 5, 1),  # 6 bits have more exponents than float16
}


def constants(dtype, weights):
    """(offset, scale) of the kernels, uint32, by which codes decode exactly to `dtype`; None where they cannot.

    A magnitude m becomes the exponent field m (+ offset), that is 2**(m + offset - bias); scale makes it 2**(base + m).
    """
    return _constants(dtype, weights.bits, weights.base, bool(weights.zero))


@functools.lru_cache(maxsize=256)
def _constants(dtype, bits, base, zero):
    form = FORMATS.get(dtype)
    if form is None or bits > form.most_bits:
        return None
    offset = 0 if zero else form.offset
    scale = base - offset + 2 * form.bias  # exponent field of the power of two
    lowest, highest = base + zero, base + 2 ** (bits - 1) - 1
    if lowest < form.lowest or highest > form.bias or not 1 <= scale <= 2 * form.bias:
        return None
    return tuple(np.uint32((field << form.mantissa) * 0x10001) for field in (offset, scale))


class Plan(NamedTuple):
    """Kernel, grid, block, its integers; counters: how many are used, partials: floats between thread blocks."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    sizes: tuple[int, int, int]
    counters: int
    partials: int


@functools.lru_cache(maxsize=256)
def plan_linear(rows, blocks, outputs, bits, dtype, processors):
    """For x (rows, 8 * blocks), none of them 0, and a GPU of so many multiprocessors."""
    tiles, words = (1, 4) if rows <= 8 else (4, 2)  # 8 * tiles rows of x, 32 * words outputs per thread block
    groups, row_groups = -(-outputs // (GROUP * words)), -(-rows // (8 * tiles))
    steps = -(-blocks // 2)
    warps = min(WARPS, 1 << (steps.bit_length() - 1))
    parts = max(1, min(2 * processors // (groups * row_groups), steps // (2 * warps)))
    name = f"bitshift_linear_{FORMATS[dtype].name}_{bits}_{tiles}"
    counters = groups * row_groups
    partials = counters * parts * 8 * tiles * GROUP * words
    used = (counters, partials) if parts > 1 else (0, 0)
    return Plan(name, (groups, row_groups, parts), (32, warps, 1), (rows, blocks, outputs), *used)


def plan_rows(blocks_in_all, bits, dtype):
    """(kernel name, grid, block): 8 threads per block of codes."""
    grid = max(1, min(MAX_GRID, -(-blocks_in_all * 8 // THREADS)))
    return f"bitshift_rows_{FORMATS[dtype].name}_{bits}", (grid, 1, 1), (THREADS, 1, 1)


def plan_flat(blocks_in_all, bits, dtype):
    """(kernel name, grid, block): 8 threads per block of codes."""
    _, *sizes = plan_rows(blocks_in_all, bits, dtype)
    return f"bitshift_flat_{FORMATS[dtype].name}_{bits}", *sizes


@functools.cache
def _processors(device):
    """Number of multiprocessors, 0 where the kernels cannot run."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count if (properties.major, properties.minor) >= CAPABILITY else 0


class _Counters:
    """Zeros that the kernels leave as zeros. What may run at the same time must not share them: each stream has its
    own, and so has each layer in a CUDA graph, from a pool that the first call outside of graphs fills, until it is
    used up: then, or where there was no such call, they are cleared at every call or replay."""

    def __init__(self):
        self.lock, self.of_stream, self.pools = threading.Lock(), {}, {}

    def take(self, count, device):
        with torch.cuda.device(device), self.lock:
            stream, captures = torch.cuda.current_stream(), torch.cuda.is_current_stream_capturing()
            if device not in self.pools and not captures:
                self.pools[device] = self._zeros(COUNTERS, device), stream.record_event()
            if captures:
                return self._next(count, device)
            kept = self.of_stream.get((device, stream.cuda_stream))
            if kept is None or kept.numel() < count:
                stream.wait_event(self.pools[device][1])
                kept = self.of_stream[device, stream.cuda_stream] = self._next(max(count, OF_STREAM), device)
            return kept

    def _next(self, count, device):
        pool, filled = self.pools.get(device, (None, None))
        if pool is None or pool.numel() < count:
            return self._zeros(count, device)
        self.pools[device] = pool[count:], filled
        return pool[:count]

    @staticmethod
    def _zeros(count, device):
        return torch.zeros(count, dtype=torch.int32, device=device)


_counters = _Counters()


def _aligned(tensor):
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def usable(dtype, weights):
    """Whether these kernels compute with such weights and x of this dtype on the weights' device."""
    return constants(dtype, weights) is not None and _processors(weights.codes.device) > 0


def linear(x, weights, bias):
    """x (rows, in) @ weights.T + bias -> (rows, out), in x's dtype; sums are float32. For `usable` weights."""
    outputs, inputs = weights.shape
    if len(x) > MOST_ROWS or 0 in (*x.shape, outputs):
        return F.linear(x, unpack_rows(weights, x.dtype), None if bias is None else bias.to(x.dtype))
    x = _aligned((F.pad(x, (0, -inputs % 8)) if inputs % 8 else x).contiguous())
    y = x.new_empty(len(x), outputs)
    plan = plan_linear(len(x), x.shape[1] // 8, outputs, weights.bits, x.dtype, _processors(x.device))
    partial, arrived = y, y  # not touched
    if plan.counters:
        arrived = _counters.take(plan.counters, x.device)
        partial = x.new_empty(plan.partials, dtype=torch.float32)
    tensors = _aligned(weights.codes), x, y if bias is None else bias.to(x.dtype).contiguous(), y, partial, arrived
    integers = map(np.int32, (*plan.sizes, bias is not None))
    launch.launch("bitshift_half", *plan[:3], *tensors, *integers, *constants(x.dtype, weights))
    return y


def unpack_rows(weights, dtype):
    """The weights of a linear layer, (out, in), rows a multiple of 16 bytes apart. For `usable` weights."""
    outputs, inputs = weights.shape
    panels, blocks = -(-outputs // GROUP), -(-inputs // 8)
    y = torch.empty(panels * GROUP, blocks * 8, dtype=dtype, device=weights.codes.device)
    if y.numel():
        sizes = map(np.int32, (panels, blocks))
        plan = plan_rows(panels * blocks, weights.bits, dtype)
        launch.launch("bitshift_half", *plan, _aligned(weights.codes), y, *sizes, *constants(dtype, weights))
    return y[:outputs, :inputs]


def unpack_flat(weights, dtype):
    """The weights of a convolution, shape weights.shape, channels-last. For `usable` weights."""
    blocks = weights.codes.numel() // (GROUP * weights.bits)
    y = torch.empty(blocks * BLOCK, dtype=dtype, device=weights.codes.device)
    if blocks:
        plan = plan_flat(blocks, weights.bits, dtype)
        launch.launch("bitshift_half", *plan, _aligned(weights.codes), y, np.int64(blocks), *constants(dtype, weights))
    return in_order(y, weights.shape)
