"""CPU kernel of shift_conv1x1, channels-last: each input is gathered from where its channel's shift puts it.

Pixels near an edge lack the inputs that their shift would take from outside. All pixels of y whose kernel reaches
across the same edges form a class with its own list of the channels that are left: no zeros are added, nothing is
copied. Imported on first use, never by the package: numba loads slowly.
"""

import functools

import numpy as np
import torch
from numba import carray, config, njit

from common.kernels import threads
from common.kernels.product_cpu import ROWS, WIDTH, equals_library, product, to_panel
from common.kernels.vectors import fetch_add, word

BAND_BYTES = 128 * 1024  # of x: they are read once per 16 outputs, from the L2 cache
IN_A_ROW = 4  # bands, at most, that one thread takes at a time
MOST_REACH = 8  # pixels from the middle of the kernel to its edge


@njit
def _shift_product(
    counters, scratch, grain, items, x, y, weights, bias, zeros, plan, bands, x_size, y_size, panels, channels, jump
):
    # One item is a band of one image of y. plan: see `_plan`. jump: items that the other threads take meanwhile.
    for panel in range(panels):
        to_panel(weights + panel * 64 * channels, channels * 4, channels, scratch + panel * 64 * channels)
    while True:
        first = fetch_add(counters, grain)
        last = min(first + grain, items)
        for item in range(first, last):
            image, target, band = x + item // bands * x_size, y + item // bands * y_size, plan + item % bands * 32
            # What probably comes next is brought from memory while this is computed: scattered as the product reads its
            # inputs, the processor does not foresee them.
            after = item + 1 if item + 1 < last else item + 1 + jump
            ahead, pace = x + after // bands * x_size + word(plan + after % bands * 32), word(band + 8)
            if after >= items:
                ahead, pace = image, 0
            for panel in range(panels):
                for c in range(word(band + 16), word(band + 24), 40):
                    ahead = product(
                        scratch + panel * 64 * channels, word(c), word(c + 8), image, word(c + 16), word(c + 24),
                        bias + panel * 64, zeros, target + panel * 64, word(c + 32), ahead, pace,
                    )  # fmt: skip
        if last >= items:
            return


def _entry(arguments):
    a = carray(arguments, 17)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _shift_product(
        a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16]
    )


@functools.cache
def load():
    """The compiled kernel. Raises ImportError where numba is switched off."""
    if config.DISABLE_JIT:
        raise ImportError("numba is switched off (NUMBA_DISABLE_JIT)")
    return threads.compiled(_entry)


def _moves(channels, kernel_size, dilation):
    """(down, across): where from each channel takes its pixels, relative to their own place."""
    channel, taps, half = np.arange(channels), kernel_size**2, kernel_size // 2
    moving = channel < channels // taps * taps
    rows, columns = channel // kernel_size % kernel_size - half, channel % kernel_size - half
    return np.where(moving, dilation * rows, 0), np.where(moving, dilation * columns, 0)


def _classes(size, y_size, moves, stride):
    """[(positions in y, channels whose source is inside of x)] along one dimension; moves: of each channel."""
    source = np.arange(y_size)[:, None] * stride + moves
    patterns, index = np.unique((source >= 0) & (source < size), axis=0, return_inverse=True)
    return [(np.flatnonzero(index.ravel() == i), pattern) for i, pattern in enumerate(patterns)]


def _records(shape, outputs, stride, moves, bands, address):
    """Per band of rows of y the arguments of `product`: terms, their number, places, their number, targets."""
    channels, height, width = shape
    down, across = moves
    pixel, y_width, y_height = channels * 4, -(-width // stride), -(-height // stride)
    offsets = (down * width + across) * pixel + np.arange(channels) * 4
    columns, by_band = _classes(width, y_width, across, stride), [[] for _ in bands]
    for some_rows, vertical in _classes(height, y_height, down, stride):
        for some_columns, horizontal in columns:
            inside = np.flatnonzero(vertical & horizontal)
            terms = address(np.stack([inside * (4 * WIDTH), offsets[inside]], axis=1))
            for (start, end), records in zip(bands, by_band, strict=True):
                rows = some_rows[(some_rows >= start) & (some_rows < end), None]
                if rows.size:
                    places = address((rows * width + some_columns).ravel() * (stride * pixel))
                    targets = address((rows * y_width + some_columns).ravel() * (4 * outputs))
                    records.append((terms, inside.size, places, rows.size * some_columns.size, targets))
    return by_band


@functools.lru_cache(maxsize=32)
def _plan(shape, outputs, stride, kernel_size, dilation):
    """(plan, bands, zeros, arrays to keep) for x of shape (channels, height, width), int64, in bytes.

    plan: per band of rows of y the beginning of what it reads of x, the pace at which to ask for as much, and where its
    `_records` begin and end.
    """
    channels, height, width = shape
    row, y_height, arrays = width * channels * 4, -(-height // stride), []

    def address(values):
        arrays.append(np.ascontiguousarray(values, np.int64))
        return arrays[-1].ctypes.data

    count = min(y_height, -(-height * row // BAND_BYTES))
    edges = [y_height * i // count for i in range(count + 1)]
    bands = list(zip(edges[:-1], edges[1:], strict=True))
    by_band = _records(shape, outputs, stride, _moves(channels, kernel_size, dilation), bands, address)
    at = address([record for records in by_band for record in records])
    heads = []
    for (start, _), records in zip(bands, by_band, strict=True):
        steps = sum(-(-record[3] // ROWS) * record[1] for record in records) * (outputs // WIDTH)
        begin = max(0, start * stride - kernel_size // 2 * dilation) * row
        heads.append((begin, -(-height * row // (count * max(1, steps))), at, at := at + 40 * len(records)))
    return address(heads), count, address(np.zeros(y_height * -(-width // stride))), arrays


def shift_conv1x1_cpu(x, weight, bias, y, stride, kernel_size, dilation):
    """Write the 1x1 convolution of the shifted x into y, both channels-last or both contiguous.

    Returns False, and does nothing, where plain operations are as fast or this kernel cannot do it: see `prepared`.
    """
    if not y.is_contiguous(memory_format=torch.channels_last):
        return False
    write = prepared(x.shape, x.stride(), x.dtype, weight.shape[0], stride, kernel_size, dilation)
    if write:
        write(x, weight.contiguous(), None if bias is None else bias.contiguous(), y)
    return bool(write)


@functools.lru_cache(maxsize=256)
def prepared(shape, strides, dtype, outputs, stride, kernel_size, dilation):
    """Function of x of this shape, contiguous weight and bias or None, and channels-last y, to be written.

    None for other dtypes of x than float32, contiguous tensors, channels not a multiple of 8, outputs not of 16, longer
    vectors than AVX2's.
    """
    images, channels, height, width = shape
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    is_small = kernel_size // 2 * dilation <= MOST_REACH
    fits = dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last) and is_small
    if not fits or channels % 8 or outputs % WIDTH or not equals_library():
        return None
    (plan, bands, zeros, kept), kernel = _plan(shape[1:], outputs, stride, kernel_size, dilation), load()
    no_bias, x_size = torch.zeros(outputs), 4 * channels * height * width
    y_size, items = 4 * outputs * -(-height // stride) * -(-width // stride), images * bands
    item_bytes, scratch_bytes = y_size // 4 * channels // 4 // bands, outputs * channels * 4
    sizes = zeros, plan, bands, x_size, y_size, outputs // WIDTH, channels

    def write(x, weight, bias, y, kept=kept):
        threads.advise_large_pages(y)
        bias, count = no_bias if bias is None else bias, torch.get_num_threads()
        grain = max(1, min(IN_A_ROW, items // (16 * count)))
        addresses = x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr()
        arguments = *addresses, *sizes, grain * (count - 1)
        threads.run(kernel, arguments, items, item_bytes, scratch_bytes, grain=grain)

    return write
