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
from common.kernels.product_cpu import WIDTH, asking_pair, asking_product, equals_library, most_rows, to_panel
from common.kernels.shift_conv1x1 import tap_order, taps
from common.kernels.vectors import fetch_add, word

BAND_BYTES = 96 * 1024  # of x: they are read once per 16 outputs, from the L2 cache
LINE = 64  # bytes of a cache line
MOST_ASKED = 2**14  # entries in the list of cache lines to ask for
IN_A_ROW = 4  # bands, at most, that one thread takes at a time
MOST_REACH = 8  # pixels from the middle of the kernel to its edge


@njit
def _shift_product(
    counters, scratch, grain, items, x, y, weights, bias, zeros, plan, bands, lines, asking, x_size, y_size, panels,
    together, channels, jump,
):  # fmt: skip
    # One item is a band of one image of y. plan: see `_plan`. jump: items that the other threads take meanwhile.
    for panel in range(panels):
        to_panel(weights + panel * 64 * channels, channels * 4, channels, scratch + panel * 64 * channels)
    while True:
        first = fetch_add(counters, grain)
        last = min(first + grain, items)
        for item in range(first, last):
            image, target, band = x + item // bands * x_size, y + item // bands * y_size, plan + item % bands * 24
            # What probably comes next is brought from memory while this is computed: scattered as the product reads its
            # inputs, the processor does not foresee them.
            after = item + 1 if item + 1 < last else item + 1 + jump
            after = after if after < items else item
            ahead = x + after // bands * x_size + word(plan + after % bands * 24)
            for panel in range(0, panels, together):
                if panel % asking == 0:
                    asked = lines
                step = 64 * channels
                some, start, to = scratch + panel * step, bias + panel * 64, target + panel * 64
                for c in range(word(band + 8), word(band + 16), 40):
                    terms, count, places, rows, targets = word(c), word(c + 8), word(c + 16), word(c + 24), word(c + 32)
                    if together == 2:
                        asked = asking_pair(
                            some, terms, count, image, places, rows, start, zeros, to, targets, step, ahead, asked
                        )
                    else:
                        asked = asking_product(
                            some, terms, count, image, places, rows, start, zeros, to, targets, step, ahead, asked
                        )
        if last >= items:
            return


def _entry(arguments):
    a = carray(arguments, 20)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _shift_product(
        a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
        a[17], a[18], a[19],
    )  # fmt: skip


@functools.cache
def load():
    """The compiled kernel. Raises ImportError where numba is switched off."""
    if config.DISABLE_JIT:
        raise ImportError("numba is switched off (NUMBA_DISABLE_JIT)")
    return threads.compiled(_entry)


def _moves(channels, kernel_size, dilation, by_tap):
    """(down, across): where from each channel takes its pixels, relative to their own place."""
    tap = taps(channels, kernel_size)
    tap = (tap[tap_order(channels, kernel_size)] if by_tap else tap).numpy()
    half = kernel_size // 2
    return dilation * (tap // kernel_size - half), dilation * (tap % kernel_size - half)


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


def _lines(shape, stride, moves):
    """{i: offsets of the cache lines that are read in the rows of x whose number modulo stride is i}"""
    channels, _, width = shape
    down, across = moves
    columns = np.arange(0, width, stride)[:, None] + across
    inside = (columns >= 0) & (columns < width)
    lines = (columns * channels + np.arange(channels)) // (LINE // 4) * LINE
    return {i: np.unique(lines[inside & (down % stride == i)]) for i in np.unique(down % stride)}


@functools.lru_cache(maxsize=32)
def _plan(shape, outputs, together, stride, kernel_size, dilation, by_tap):
    """(plan, bands, lines, asking, zeros, arrays to keep) for x of shape (channels, height, width), int64, in bytes.

    plan: per band of rows of y where its first row begins in x, and where its `_records` begin and end. lines: what
    cache lines a band reads, from there on, spread over the terms of its products with `asking` panels of weights,
    `together` at a time; int32.
    """
    channels, height, width = shape
    row, y_height, arrays = width * channels * 4, -(-height // stride), []
    moves = _moves(channels, kernel_size, dilation, by_tap)

    def address(values):
        arrays.append(np.ascontiguousarray(values, np.int64))
        return arrays[-1].ctypes.data

    lines, reach = _lines(shape, stride, moves), np.abs(moves[0]).max()
    count = min(y_height, -(-y_height * LINE * sum(map(len, lines.values())) // BAND_BYTES))
    rows = range(-reach, (-(-y_height // count) - 1) * stride + reach + 1)
    asked = np.concatenate([lines[i % stride] + i * row for i in rows if i % stride in lines])
    edges = [y_height * i // count for i in range(count + 1)]
    bands = list(zip(edges[:-1], edges[1:], strict=True))
    by_band = _records(shape, outputs, stride, moves, bands, address)
    at = address([record for records in by_band for record in records])
    most = most_rows(together)
    steps = max(sum(-(-rows // most) * terms for _, terms, _, rows, _ in records) for records in by_band)
    passes = min(outputs // WIDTH // together, max(1, MOST_ASKED // steps))
    asked = asked[np.arange(steps * passes) * len(asked) // (steps * passes)].astype(np.int32)
    arrays.append(asked)
    heads = []
    for (start, _), records in zip(bands, by_band, strict=True):
        heads.append((start * stride * row, at, at := at + 40 * len(records)))
    zeros = address(np.zeros(y_height * -(-width // stride)))
    return address(heads), count, asked.ctypes.data, passes * together, zeros, arrays


def shift_conv1x1_cpu(x, weight, bias, y, stride, kernel_size, dilation, by_tap=False):
    """Write the 1x1 convolution of the shifted x into y, both channels-last or both contiguous.

    Returns False, and does nothing, where plain operations are as fast or this kernel cannot do it: see `prepared`.
    """
    if not y.is_contiguous(memory_format=torch.channels_last):
        return False
    write = prepared(x.shape, x.stride(), x.dtype, weight.shape[0], stride, kernel_size, dilation, by_tap)
    if write:
        write(x, weight.contiguous(), None if bias is None else bias.contiguous(), y)
    return bool(write)


def takes(dtype, channels, outputs, kernel_size, dilation):
    """Whether the kernel takes channels-last tensors of this kind, and pays.

    Not other dtypes than float32, channels that are not a multiple of 8, outputs not of 16, shifts beyond MOST_REACH;
    nor where the library has longer vectors than AVX2's.
    """
    is_small = kernel_size // 2 * dilation <= MOST_REACH
    return dtype == torch.float32 and is_small and not (channels % 8 or outputs % WIDTH) and equals_library()


@functools.lru_cache(maxsize=256)
def prepared(shape, strides, dtype, outputs, stride, kernel_size, dilation, by_tap):
    """Function of x of this shape, contiguous weight and bias or None, and channels-last y, to be written.

    None where x is not channels-last, or not of a kind that the kernel `takes`.
    """
    images, channels, height, width = shape
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    if not is_last or not takes(dtype, channels, outputs, kernel_size, dilation):
        return None
    together = 1 if outputs % (2 * WIDTH) else 2
    plan, bands, lines, asking, zeros, kept = _plan(shape[1:], outputs, together, stride, kernel_size, dilation, by_tap)
    kernel = load()
    no_bias, x_size = torch.zeros(outputs), 4 * channels * height * width
    y_size, items = 4 * outputs * -(-height // stride) * -(-width // stride), images * bands
    item_bytes, scratch_bytes = y_size // 4 * channels // 4 // bands, outputs * channels * 4
    sizes = zeros, plan, bands, lines, asking, x_size, y_size, outputs // WIDTH, together, channels

    @functools.cache
    def call_of(count):
        grain = max(1, min(IN_A_ROW, items // (16 * count)))
        return threads.prepared(kernel, items, item_bytes, scratch_bytes, grain=grain), grain * (count - 1)

    def write(x, weight, bias, y, kept=kept):
        threads.advise_large_pages(y)
        call, jump = call_of(torch.get_num_threads())
        bias = no_bias if bias is None else bias
        call(x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), *sizes, jump)

    return write
