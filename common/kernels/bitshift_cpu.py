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
from common.kernels import threads
from common.kernels.bitshift_pack import BLOCK, GROUP, code_values, in_order, low_bits, output_size
from common.kernels.codes_cpu import small_exponent
from common.kernels.product_cpu import WIDTH, equals_library, pad_entry
from common.kernels.shift2d import memory_format_of

CHUNK = 256  # inputs whose weights are multiplied at a time: 16 KiB for 16 outputs, half of an L1 cache
MANY_ROWS = 128  # of x; beyond, unpacking columns for the library's product is faster
COLUMNS = 512  # unpacked at a time for the library's product
SMALL = 2**16  # weights of a convolution that may be brought into any order in no time
MOST_PATCHES = 8000  # pixels of y times taps of a small convolution; beyond, the library's is faster
MOST_TERMS = 8192  # of a sum: 16 outputs' weights of so many are 512 KiB
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


def _run_panels(entry, bits, codes, tables, x, y, *more, scratch=0):
    rows, panels, blocks = x.shape[0], y.shape[1] // GROUP, x.shape[1] // 8
    arguments = bits, codes.data_ptr(), x.data_ptr(), y.data_ptr(), blocks, tables, *more
    # What an item costs is counted in bytes of codes; further rows of x make it dearer.
    item_bytes = blocks * GROUP * (bits or 32) * max(1, rows // 4)
    threads.run(threads.compiled(entry), arguments, panels, item_bytes, scratch)


def linear(x, weights):
    """float32 x (rows, in) @ weights.T -> (rows, out), float32. weights: of shape (out, in), on the CPU."""
    rows, outputs = x.shape[0], weights.shape[0]
    if rows == 0 or 0 in weights.shape:
        return x.new_zeros(rows, outputs)
    x = (F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x).contiguous()
    if rows > MANY_ROWS:
        return _by_columns(x, weights)
    filled, bits, base, zero = -(-outputs // GROUP) * GROUP, weights.bits, weights.base, weights.zero
    if rows == 1:
        y = one_row((1, filled), x.shape[1], bits, base, zero)(x, weights.codes)
    else:
        y, tables = x.new_zeros(rows, filled), _tables(bits, base, zero)[0]
        more = _terms(CHUNK, GROUP * 4)[0], _steps(rows, x.stride(0) * 4)[0], _steps(rows, y.stride(0) * 4)[0]
        more = rows, CHUNK // 8, *more
        _run_panels(kernels.many_rows_entry, bits, weights.codes, tables, x, y, *more, scratch=CHUNK * GROUP * 4)
    return y[:, :outputs] if outputs % GROUP else y


@functools.lru_cache(maxsize=256)
def one_row(y_shape, inputs, bits, base, zero):
    """Function of contiguous float32 x, `inputs` elements, a multiple of 8, and codes: y, float32, shape y_shape, the
    last a multiple of 32. What does not depend on the tensors is found out once: on cold caches it takes long."""
    panels, blocks, tables = y_shape[-1] // GROUP, inputs // 8, _tables(bits, base, zero)
    kernel, more = threads.compiled(kernels.one_row_entry), (int(zero), small_exponent(bits, base, zero))
    run_kernel = threads.prepared(kernel, panels, blocks * GROUP * bits, inputs * 4)
    y_strides = torch.empty(y_shape, device="meta").stride()

    def run(x, codes):
        y = x.new_empty_strided(y_shape, y_strides)  # new_empty takes longer
        run_kernel(bits, codes.data_ptr(), x.data_ptr(), y.data_ptr(), blocks, tables[0], *more)
        return y

    return run


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
    """float32 x (N, in, H, W) -> (N, out, H', W'), in x's memory format. bias: float32 or None.

    Few pixels: weights are unpacked into the cache and multiplied there. Many: the library's convolution on unpacked
    weights, which costs a few percent of it.
    """
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
    return fits and 0 < work <= MOST_PATCHES and equals_library()


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
