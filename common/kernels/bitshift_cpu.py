"""CPU kernels of bitshift: which kernel of bitshift_cpu_kernels.py, on how much work at a time.

Imported on first use, never by the package: numba loads slowly.
"""

import functools
import math
import threading

import numpy as np
import torch
import torch.nn.functional as F
from numba import config

from common.kernels import bitshift_cpu_kernels as kernels
from common.kernels import codes_cpu_avx512, rows_cpu_avx512, threads
from common.kernels.bitshift_pack import BLOCK, GROUP, code_values, in_order, low_bits, output_size
from common.kernels.codes_cpu import small_exponent
from common.kernels.product_cpu import WIDTH, equals_library, pad_entry
from common.kernels.shift2d import memory_format_of
from common.kernels.vectors import has_avx512, lanes

CHUNK = 256  # inputs whose weights are multiplied at a time: 16 KiB for 16 outputs, half of an L1 cache
MANY_ROWS = 128  # of x; beyond, unpacking columns for the library's product is faster
COLUMNS = 512  # unpacked at a time for the library's product
SMALL = 2**16  # weights of a convolution that may be brought into any order in no time
# Pixels of y times taps of a small convolution, with vectors of 8 floats and of 16; beyond, the library's is faster.
MOST_PATCHES = {8: 8000, 16: 4000}
MOST_TERMS = 8192  # of a sum: 16 outputs' weights of so many are 512 KiB
LEAST_SPREAD = 4  # rows of x; fewer fit into the cache wherever they are
SAME_PLACE, APART = 1024, 320  # bytes: rows a multiple of the first apart are put so much further apart
WORKSPACE = 2**24  # floats, at most, kept for unpacked weights


def load():
    """Raises ImportError where numba is switched off."""
    if config.DISABLE_JIT:
        raise ImportError("numba is switched off (NUMBA_DISABLE_JIT)")


@functools.lru_cache(maxsize=64)
def _tables(bits, base, zero):
    """(address, array): by the first plane's bits, the float's top byte and its next byte, 16 bytes each, and again for
    magnitudes of 16 and more; then the exponent to add to a magnitude, and the magnitude that means 0 (255: none)."""
    width = 2 ** low_bits(bits)
    words = np.array(code_values(bits, base, zero), np.float32).view(np.uint32)
    table = np.zeros(66, np.uint8)
    for half in range(2 if bits == 6 else 1):
        values = words[16 * half : 16 * half + width]
        table[32 * half : 32 * half + width] = values >> 24
        table[32 * half + 16 : 32 * half + 16 + width] = values >> 16 & 255
    table[64:] = (base + 127) % 256, 0 if zero else 255
    return table.ctypes.data, table


@functools.lru_cache(maxsize=64)
def _table(bits, base, zero):
    """(address, array): the 32 bfloat16 of `codes_cpu_avx512.table_of`."""
    values = codes_cpu_avx512.table_of(code_values(bits, base, zero), bits)
    table = (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return table.ctypes.data, table


def _run_panels(entry, bits, codes, tables, x, y, *more, scratch=0):
    rows, panels, blocks = x.shape[0], y.shape[1] // GROUP, x.shape[1] // 8
    arguments = bits, codes.data_ptr(), x.data_ptr(), y.data_ptr(), blocks, tables, *more
    # What an item costs is counted in bytes of codes; further rows of x make it dearer.
    item_bytes = blocks * GROUP * (bits or 32) * max(1, rows // 4)
    threads.run(threads.compiled(entry), arguments, panels, item_bytes, scratch)


def input_types():
    """Types of x that a linear layer multiplies as they are; bfloat16 where the processor does."""
    return (torch.float32, torch.bfloat16) if has_avx512() else (torch.float32,)


def linear(x, weights):
    """x (rows, in) @ weights.T -> (rows, out), float32. x: of `input_types`, or becomes float32. weights: of shape
    (out, in), on the CPU."""
    x = x if x.dtype in input_types() else x.float()
    rows, outputs = x.shape[0], weights.shape[0]
    if rows == 0 or 0 in weights.shape:
        return x.new_zeros(rows, outputs, dtype=torch.float32)
    x = (F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x).contiguous()
    if rows > MANY_ROWS:
        return _by_columns(x.float(), weights)
    filled, bits, base, zero = -(-outputs // GROUP) * GROUP, weights.bits, weights.base, weights.zero
    x = _spread(x)
    if rows == 1 or has_avx512() and (rows <= rows_cpu_avx512.MOST_ROWS or x.dtype == torch.bfloat16):
        y = few_rows((rows, filled), x.shape[1], bits, base, zero, x.dtype, x.stride(0))(x, weights.codes)
    else:
        y, tables = x.new_zeros(rows, filled), _tables(bits, base, zero)[0]
        more = _terms(CHUNK, GROUP * 4)[0], _steps(rows, x.stride(0) * 4)[0], _steps(rows, GROUP * 4)[0]
        more, scratch = (rows, CHUNK // 8, *more), (CHUNK + rows) * GROUP * 4
        _run_panels(kernels.many_rows_entry, bits, weights.codes, tables, x, y, *more, scratch=scratch)
    return y[:, :outputs] if outputs % GROUP else y


def _spread(x):
    """x (rows, in), with its rows apart so that they do not compete for the same places of the cache."""
    row = x.stride(0) * x.element_size()
    if len(x) < LEAST_SPREAD or row % SAME_PLACE:
        return x
    spread = x.new_empty(len(x), x.shape[1] + APART // x.element_size())
    return spread[:, : x.shape[1]].copy_(x)


@functools.lru_cache(maxsize=256)
def few_rows(y_shape, inputs, bits, base, zero, dtype=torch.float32, x_row=0):
    """Function of x of this type, `inputs` elements a row, a multiple of 8, rows `x_row` apart, and codes: y, float32,
    shape y_shape, the last a multiple of 32. For one row of float32, with AVX-512 also for what `linear` says. What
    does not depend on the tensors is found out once: on cold caches it takes long."""
    make = _few_rows_avx512 if has_avx512() else _one_row
    (first, others), run_kernel, kept = make(y_shape, inputs, bits, base, zero, dtype, x_row)
    y_strides = torch.empty(y_shape, device="meta").stride()
    is_added_to = math.prod(y_shape[:-1]) > rows_cpu_avx512.MOST_ROWS

    def run(x, codes, kept=kept):
        y = x.new_empty_strided(y_shape, y_strides, dtype=torch.float32)  # new_empty takes longer
        if is_added_to:
            y.zero_()
        run_kernel(*first, codes.data_ptr(), x.data_ptr(), y.data_ptr(), *others)
        return y

    return run


def _one_row(y_shape, inputs, bits, base, zero, dtype, x_row):
    panels, blocks, tables = y_shape[-1] // GROUP, inputs // 8, _tables(bits, base, zero)
    run_kernel = threads.prepared(threads.compiled(kernels.one_row_entry), panels, blocks * GROUP * bits, inputs * 4)
    return ((bits,), (blocks, tables[0], int(zero), small_exponent(bits, base, zero))), run_kernel, tables


def _few_rows_avx512(y_shape, inputs, bits, base, zero, dtype, x_row):
    panels, blocks, rows = y_shape[-1] // GROUP, inputs // 8, math.prod(y_shape[:-1])
    kernel = threads.compiled(rows_cpu_avx512.ROWS_ENTRIES[bits])
    scratch = (CHUNK // 2 + rows) * GROUP * 4 if rows > rows_cpu_avx512.MOST_ROWS else 0
    run_kernel = threads.prepared(kernel, panels, blocks * GROUP * bits * max(1, rows // 4), scratch)
    x_row, table, terms = x_row * dtype.itemsize, _table(bits, base, zero), _terms(CHUNK, GROUP * 4)
    places, sums = _steps(rows, x_row), _steps(rows, GROUP * 4)
    more = rows, x_row, int(dtype == torch.bfloat16), CHUNK // 8, terms[0], places[0], sums[0]
    return ((), (blocks, table[0], *more)), run_kernel, (table, terms, places, sums)


@functools.lru_cache(maxsize=64)
def _byte_table(bits, zero):
    """(address, array): the 64 weights of `codes_cpu_avx512.byte_table_of`, int8, in units of the smallest magnitude,
    then eight times 128."""
    values = [int(value) for value in code_values(bits, -int(zero), zero)]
    table = np.array(codes_cpu_avx512.byte_table_of(values, bits) + [-128] * 8, np.int8)
    return table.ctypes.data, table


def takes_int8():
    """Whether `linear_int8` is for this processor."""
    return has_avx512()


def linear_int8(x, weights):
    """int8 x (rows, in) -> int32 (rows, out), not empty: exact sums of x * w / (smallest magnitude of w)."""
    (rows, inputs), outputs, bits = x.shape, weights.shape[0], weights.bits
    x = F.pad(x.contiguous(), (0, -inputs % 8)).bitwise_xor(-128)  # bytes without a sign, 128 more
    y, table = torch.empty(rows, -(-outputs // GROUP) * GROUP, dtype=torch.int32), _byte_table(bits, weights.zero)
    blocks, panels = x.shape[1] // 8, y.shape[1] // GROUP
    arguments = weights.codes.data_ptr(), x.data_ptr(), y.data_ptr(), blocks, table[0], rows, x.stride(0)
    kernel = threads.compiled(rows_cpu_avx512.INTEGERS_ENTRIES[bits])
    threads.run(kernel, arguments, panels, blocks * GROUP * bits * -(-rows // rows_cpu_avx512.MOST_ROWS))
    return y[:, :outputs].contiguous()


@functools.lru_cache(maxsize=64)
def _steps(count, step):
    """(address, array) of 0, step, 2 * step and so on, int64."""
    steps = np.arange(count, dtype=np.int64) * step
    return steps.ctypes.data, steps


@functools.lru_cache(maxsize=64)
def _terms(count, step):
    """(address, array) of a product's terms: weights every `step` bytes, inputs one after the other."""
    terms = np.arange(count, dtype=np.int64)[:, None] * (step, 4)
    return terms.ctypes.data, terms


def _by_columns(x, weights):
    """x (rows, in up to a multiple of 8) times weights.T, `COLUMNS` outputs at a time through the library's product."""
    outputs, inputs = weights.shape[0], x.shape[1]
    y = x.new_empty(len(x), outputs)
    buffer = x.new_empty(inputs, min(-(-outputs // GROUP) * GROUP, COLUMNS))
    for first in range(0, outputs, COLUMNS):
        columns = min(outputs - first, COLUMNS)
        _unpack_columns(weights, first // GROUP, -(-columns // GROUP), buffer)
        torch.mm(x, buffer[:, :columns], out=y[:, first : first + columns])
    return y


def _unpack_columns(weights, first, count, y):
    """Write `count` panels of a linear layer, transposed, into y[:, : 32 * count]; y: (in, at least that), float32."""
    blocks = len(y) // 8
    _unpack_into(weights, first * blocks * GROUP * weights.bits, count, blocks, y, count, y.stride(0) * 4, 0)


def _unpack_into(weights, offset, items, blocks, y, across, stride, step):
    tables, _ = _tables(weights.bits, weights.base, weights.zero)
    codes = weights.codes.data_ptr() + offset
    arguments = weights.bits, codes, y.data_ptr(), blocks, across, stride, step, tables
    threads.run(threads.compiled(kernels.weights_entry), arguments, items, blocks * BLOCK * 4)


def unpack(weights, buffer=None):
    """Weights of a convolution, float32, shape weights.shape, channels-last. buffer: written to if large enough."""
    blocks = weights.codes.numel() // (GROUP * weights.bits)
    if buffer is None or buffer.numel() < blocks * BLOCK:
        buffer = torch.empty(blocks * BLOCK)
    _unpack_into(weights, 0, blocks, 1, buffer, 1, 128, BLOCK * 4)
    return in_order(buffer, weights.shape)


def unpack_half(weights):
    """As `unpack`, in bfloat16, in this thread's workspace."""
    blocks, table = weights.codes.numel() // (GROUP * weights.bits), _table(weights.bits, weights.base, weights.zero)
    buffer = _workspace.floats(blocks * BLOCK // 2)
    arguments = weights.bits, weights.codes.data_ptr(), buffer.data_ptr(), table[0]
    threads.run(threads.compiled(rows_cpu_avx512.halves_entry), arguments, blocks, BLOCK * 2)
    return in_order(buffer.view(torch.bfloat16), weights.shape)


class _Workspace(threading.local):
    """Of each thread, for the weights or inputs of one convolution: fresh memory would cost more than unpacking."""

    buffer = torch.empty(0)

    def floats(self, count):
        """At least so many."""
        if count > WORKSPACE:
            return torch.empty(count)
        if self.buffer.numel() < count:
            self.buffer = torch.empty(count)
        return self.buffer


_workspace = _Workspace()


def conv2d(x, weights, bias, stride, padding, dilation, groups):
    """x (N, in, H, W) -> (N, out, H', W'), in x's memory format and type, of `input_types`. bias: like x, or None.

    Few pixels: weights are unpacked into the cache and multiplied there. Many, or bfloat16: the library's convolution
    on unpacked weights, which costs a few percent of it.
    """
    if x.dtype == torch.bfloat16:
        y = F.conv2d(x, unpack_half(weights), bias, stride, padding, dilation, groups)
        return y.contiguous(memory_format=memory_format_of(x))
    shape = output_size(x.shape, weights.shape, stride, padding, dilation)
    if _is_small(shape, weights.shape, groups):
        return _by_pixels(x, weights, bias, shape, stride, padding, dilation)
    size = weights.codes.numel() // weights.bits * 8
    weight = unpack(weights, _workspace.floats(size))
    if size <= SMALL and x.is_contiguous():
        return F.conv2d(x, weight.contiguous(), bias, stride, padding, dilation, groups)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)  # one channels-last argument makes it so
    return y.contiguous(memory_format=memory_format_of(x))


def _is_small(shape, weight_shape, groups):
    images, outputs, height, width = shape
    terms = math.prod(weight_shape[1:])
    fits = groups == 1 and outputs % WIDTH == 0 and weight_shape[1] % 16 == 0 and 0 < terms <= MOST_TERMS
    work = images * height * width * math.prod(weight_shape[2:])
    return fits and 0 < work <= MOST_PATCHES[lanes()] and equals_library()


def _by_pixels(x, weights, bias, shape, stride, padding, dilation):
    """The convolution as one product: a row for each pixel of y, its inputs gathered from the padded x."""
    memory_format, x = memory_format_of(x), x.contiguous(memory_format=torch.channels_last)
    padded, padded_shape = _padded(x, padding)
    y = torch.empty(shape, memory_format=torch.channels_last)
    bias = torch.zeros(shape[1]) if bias is None else bias.contiguous()
    gathered, _ = _gather(padded_shape, weights.shape[2:], shape, stride, dilation)
    tables, _ = _tables(weights.bits, weights.base, weights.zero)
    terms, pixels = math.prod(weights.shape[1:]), shape[0] * shape[2] * shape[3]
    addresses = weights.codes.data_ptr(), padded.data_ptr(), y.data_ptr(), bias.data_ptr()
    arguments = weights.bits, *addresses, tables, terms, CHUNK, *gathered
    scratch = (CHUNK + terms) * WIDTH * 4
    threads.run(threads.compiled(kernels.convolution_entry), arguments, shape[1] // WIDTH, terms * pixels * 2, scratch)
    return y.contiguous(memory_format=memory_format)


def _padded(x, padding):
    """(tensor, shape) of channels-last x with zeros around it: x itself, or this thread's workspace. C % 8 == 0."""
    (images, channels, height, width), (top, left) = x.shape, padding
    if not (top or left):
        return x, x.shape
    shape = images, channels, height + 2 * top, width + 2 * left
    y = _workspace.floats(math.prod(shape))
    arguments = x.data_ptr(), y.data_ptr(), height, width, top, left, channels * 4
    threads.run(threads.compiled(pad_entry), arguments, images * shape[2], shape[3] * channels * 4)
    return y, shape


@functools.lru_cache(maxsize=256)
def _gather(padded, kernel, shape, stride, dilation):
    """(values, arrays): the kernel's terms, places, number of rows, zeros and targets for a channels-last image."""
    images, channels, height, width = padded
    rows, columns = (np.arange(n)[:, None] * step for n, step in zip(kernel, dilation, strict=True))
    taps = (rows * width + columns.T).reshape(-1, 1) * channels
    inputs = (taps + np.arange(channels)).ravel()
    terms = np.stack([np.arange(inputs.size) * (4 * WIDTH), inputs * 4], axis=1)
    rows, columns = (np.arange(n) * step for n, step in zip(shape[2:], stride, strict=True))
    pixels = np.arange(images)[:, None, None] * height * width + rows[:, None] * width + columns
    places = pixels.ravel() * (4 * channels)
    arrays = terms, places, np.zeros_like(places), np.arange(places.size) * (4 * shape[1])
    terms, places, zeros, targets = arrays = [np.ascontiguousarray(array, np.int64) for array in arrays]
    return (terms.ctypes.data, places.ctypes.data, places.size, zeros.ctypes.data, targets.ctypes.data), arrays


def _fits(x, weights):
    """Whether every product of the integers x fits into int32. (-2**31 negated does not.)"""
    if x.numel() == 0:
        return True
    highest = weights.base + 2 ** (weights.bits - 1) - 1
    return max(int(x.max()), -int(x.min())) << max(0, highest) < 2**31


def linear_fixed(x, weights):
    """int32 x (rows, in) -> exact int64 sums of shifted inputs, (rows, out); None where a product exceeds int32."""
    rows, outputs = len(x), weights.shape[0]
    if not _fits(x, weights):
        return None
    x = F.pad(x, (0, -x.shape[1] % 8)).contiguous()
    y = torch.zeros(rows, -(-outputs // GROUP) * GROUP, dtype=torch.int64)
    if y.numel() and x.numel():
        tables, _ = _tables(weights.bits, weights.base, weights.zero)
        _run_fixed(weights.bits, weights.codes, tables, x, y)
    return y[:, :outputs]


def _run_fixed(bits, codes, tables, x, y):
    scratch = CHUNK * GROUP * (4 + 8)
    _run_panels(kernels.fixed_rows_entry, bits, codes, tables, x, y, len(x), CHUNK // 8, scratch=scratch)


def conv2d_fixed(x, weights, stride, padding, dilation, groups):
    """int32 x (N, in, H, W) -> exact int64 sums (N, out, H', W'); None where a product exceeds int32."""
    if not _fits(x, weights):
        return None
    outputs, inputs, *kernel = weights.shape
    weight = unpack(weights).permute(0, 2, 3, 1).view(groups, outputs // groups, inputs * math.prod(kernel))
    y = torch.empty(output_size(x.shape, weights.shape, stride, padding, dilation), dtype=torch.int64)
    for image in range(len(x)):  # one after the other: patches take kh * kw times an image's memory
        patches = _patches(x[image], kernel, stride, padding, dilation)  # (H', W', kh, kw, in)
        for group in range(groups):
            rows = patches[..., group * inputs : (group + 1) * inputs].reshape(-1, weight.shape[2])
            part = _fixed_product(rows, weight[group]).T
            first = group * (outputs // groups)
            y[image, first : first + outputs // groups] = part.reshape(-1, *y.shape[2:])
    return y


def _fixed_product(x, weight):
    """int32 x (rows, in) -> int64 (rows, out) with float weights 0 and +-2**p of shape (out, in)."""
    outputs, inputs = weight.shape
    panels = F.pad(weight, (0, -inputs % 8, 0, -outputs % GROUP)).view(-1, GROUP, inputs + -inputs % 8)
    x = F.pad(x, (0, -inputs % 8)).contiguous()
    y = torch.zeros(len(x), len(panels) * GROUP, dtype=torch.int64)
    if y.numel() and x.numel():
        _run_fixed(0, panels.transpose(1, 2).contiguous(), 0, x, y)
    return y[:, :outputs]


def _patches(image, kernel, stride, padding, dilation):
    """View (H', W', kh, kw, C) of the zero-padded image (C, H, W): what each output of a convolution sees."""
    image = F.pad(image, (padding[1], padding[1], padding[0], padding[0])).contiguous()
    c, h, w = image.stride()
    _, _, rows, columns = output_size((1, *image.shape), (1, 1, *kernel), stride, (0, 0), dilation)
    strides = h * stride[0], w * stride[1], h * dilation[0], w * dilation[1], c
    return image.as_strided((rows, columns, *kernel, image.shape[0]), strides)
