"""CPU kernels of shift2d, compiled by numba. Imported on first use, never by the package: numba takes a second to load.

Addresses, offsets and sizes are integers in bytes, so the same compiled kernels serve every dtype. Channels-last rows,
where neighbouring channels move differently, are put together with byte masks: first vertically, choosing among k
rows, then horizontally, choosing among k columns. That is 2k loads, not k*k; for k = 3, where each vector chosen
vertically serves three pixels, it is fewer. There a large y is written past the cache.
"""

import functools

import numpy as np
from numba import carray, config, njit

from common.kernels import threads
from common.kernels.shift2d_pixels_cpu import (
    PIXELS,
    shift_pixel,
    shift_pixels,
    start_row,
    stream_pixel,
    stream_pixels,
)
from common.kernels.shift2d_runs_cpu import VECTOR, masked_run, merge_run, zero_run
from common.kernels.vectors import fence, fetch_add

MASK_BLOCK = 2048  # bytes after which channels-last masks repeat: a long inner loop whose masks still fit the L1 cache


@njit
def _shift_planes(counters, grain, planes, x, y, masks, channels, height, row, k, step_y, step_x):
    """NCHW. One item is a plane of `height` rows of `row` bytes; step_y in rows, step_x in bytes, both signed.

    A plane moves as one run of bytes, by dy * row + dx; the columns that would wrap into the next row are masked.
    """
    half, shifted, size = k // 2, channels // (k * k) * (k * k), height * row
    while True:
        first = fetch_add(counters, grain)
        for plane in range(first, min(first + grain, planes)):
            channel = plane % channels
            column, dy = half, 0
            if channel < shifted:
                column, dy = channel % k, step_y * (channel // k % k - half)
            dx = step_x * (column - half)
            source, target = x + plane * size, y + plane * size
            if abs(dx) >= row or abs(dy) >= height:
                zero_run(target, size)
                continue
            offset = dy * row + dx
            start, end = max(0, -offset), min(size, size - offset)
            zero_run(target, start)
            masked_run(target, source + offset, masks + column * (row + VECTOR), row, start, end)
            zero_run(target + end, size - end)
        if first + grain >= planes:
            return


@njit
def _shift_rows(counters, scratch, grain, rows, x, y, masks, block, pixel, height, width, k, step_y, step_x):
    """Channels-last. One item is a row of `width` pixels of `pixel` bytes; step_y in rows, step_x in pixels, signed.

    masks: 2k of `block` + VECTOR bytes, by vertical and by horizontal tap. scratch, zeroed: a row of zeros, then a row
    with k // 2 * |step_x| pixels of zeros on either side.
    """
    half, row, stride = k // 2, width * pixel, block + VECTOR
    across = masks + k * stride
    margin = half * abs(step_x) * pixel
    staged, step = scratch + row + margin, step_x * pixel
    while True:
        first = fetch_add(counters, grain)
        for item in range(first, min(first + grain, rows)):
            i, source, target = item % height, x + item * row, y + item * row
            for tap in range(k):
                dy = step_y * (tap - half)
                origin = source + dy * row if 0 <= i + dy < height else scratch
                merge_run(staged, origin, masks + tap * stride, block, row)
            for tap in range(k):
                merge_run(target, staged + step * (tap - half), across + tap * stride, block, row)
        if first + grain >= rows:
            return


@njit
def _shift_neighbours(counters, scratch, grain, rows, x, y, masks, pixel, height, width, streams):
    # Channels-last, the networks' case, for k = 3 and steps of one: what was chosen vertically serves three pixels.
    # scratch, zeroed: a row of zeros, then 2 vectors for each of a pixel.
    row = width * pixel
    kept = scratch + row
    streams = streams and (y | pixel) % VECTOR == 0
    while True:
        first = fetch_add(counters, grain)
        for item in range(first, min(first + grain, rows)):
            i, source, target = item % height, x + item * row, y + item * row
            above = source - row if i else scratch
            below = source + row if i + 1 < height else scratch
            start_row(above, source, below, pixel, masks, kept)
            j = 0
            while j < width:
                at, rest = j * pixel, width - j
                a, h, b, n, t = above + at, source + at, below + at, source + row + at, target + at
                if rest >= PIXELS:
                    if streams:
                        stream_pixels(t, a, h, b, n, pixel, masks, rest == PIXELS, kept)
                    else:
                        shift_pixels(t, a, h, b, n, pixel, masks, rest == PIXELS, kept)
                    j += PIXELS
                else:
                    if streams:
                        stream_pixel(t, a, h, b, n, pixel, masks, rest == 1, kept)
                    else:
                        shift_pixel(t, a, h, b, n, pixel, masks, rest == 1, kept)
                    j += 1
        if first + grain >= rows:
            if streams:
                fence()
            return


def _planes_entry(arguments):
    a = carray(arguments, 14)
    _shift_planes(a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13])


def _rows_entry(arguments):
    a = carray(arguments, 15)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _shift_rows(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14])


def _neighbours_entry(arguments):
    a = carray(arguments, 12)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _shift_neighbours(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11])


@functools.cache
def load():
    """(planes, rows, neighbours), compiled or from numba's cache. Raises ImportError where numba is switched off."""
    if config.DISABLE_JIT:
        raise ImportError("numba is switched off (NUMBA_DISABLE_JIT)")
    return tuple(map(threads.compiled, (_planes_entry, _rows_entry, _neighbours_entry)))


def _masks(periods):
    # (address, period in bytes, array to keep). Rows repeat; VECTOR bytes more let a vector start anywhere in a period.
    period = periods.shape[1]
    masks = np.ascontiguousarray(periods[:, np.arange(period + VECTOR) % period] * np.uint8(255))
    return masks.ctypes.data, period, masks


def _edge_masks(width, item, k, step):
    """Masks of k rows of width * item bytes: set where column j has its source j + step * (tap - k // 2) in the row."""
    source = np.arange(width) + step * (np.arange(k)[:, None] - k // 2)
    return _masks(np.repeat((source >= 0) & (source < width), item, axis=1))


def _taps(channels, item, k):
    """(2k, bytes of a pixel) bool: set where a channel moves by vertical, then by horizontal tap 0 to k-1."""
    channel = np.arange(channels)
    moves = channel < channels // (k * k) * (k * k)
    taps = np.arange(k)[:, None]
    down, across = (np.where(moves, tap, k // 2) == taps for tap in (channel // k % k, channel % k))
    return np.repeat(np.concatenate([down, across]), item, axis=1)


def _tap_masks(channels, item, k):
    """Masks of 2k rows of whole pixels, as `_taps`."""
    pixel = _taps(channels, item, k)
    unit = np.lcm(pixel.shape[1], VECTOR)  # whole pixels and whole vectors
    return _masks(np.tile(pixel, (1, unit // pixel.shape[1] * max(1, MASK_BLOCK // unit))))


def _pixel_masks(channels, item, direction):
    """(address, array) of the masks that shift2d_pixels_cpu.py takes, for each vector of a pixel four. k = 3."""
    taps = _taps(channels, item, 3)
    pixel, first = taps.shape[1], 1 - direction
    chosen = taps[[first, 1, 3 + first, 4]]
    starts = np.minimum(np.arange(0, pixel, VECTOR), pixel - VECTOR)[:, None]
    vectors = chosen[:, starts + np.arange(VECTOR)].transpose(1, 0, 2)
    masks = np.ascontiguousarray(vectors * np.uint8(255))
    return masks.ctypes.data, masks


@functools.lru_cache(maxsize=64)
def _plan(shape, item, kernel_size, dilation, direction, channels_last):
    """(kernel, as function of its arguments, those after x and y, bytes of y, masks to keep)."""
    planes, rows, neighbours = load()
    n, channels, height, width = shape
    # Beyond the image a longer step changes nothing; a shorter one cannot overflow.
    step_y, step_x = direction * min(dilation, height), direction * min(dilation, width)
    pixel, row = channels * item, width * channels * item
    size = n * height * row
    if not channels_last:
        address, row, masks = _edge_masks(width, item, kernel_size, step_x)
        arguments = address, channels, height, row, kernel_size, step_y, step_x * item
        return threads.prepared(planes, n * channels, height * row), arguments, size, masks
    if kernel_size == 3 and dilation == 1 and pixel >= VECTOR:
        address, masks = _pixel_masks(channels, item, direction)
        streams = int(size > threads.cache_bytes() // 2)  # else y may still be there when it is read
        kernel, arguments = neighbours, (address, pixel, height, width, streams)
        scratch = row + 2 * VECTOR * -(-pixel // VECTOR)
    else:
        address, block, masks = _tap_masks(channels, item, kernel_size)
        kernel, arguments = rows, (address, block, pixel, height, width, kernel_size, step_y, step_x)
        scratch = 2 * (row + kernel_size // 2 * abs(step_x) * pixel)
    return threads.prepared(kernel, n * height, row, scratch, zeroed=True), arguments, size, masks


def shift2d_cpu(x, y, kernel_size, dilation, direction, channels_last):
    """Write the shifted x into y: both (N, C, H, W), dense in the same layout, not empty; C >= kernel_size**2.

    Returns True: there is no size that it cannot do.
    """
    run, arguments, size, _ = _plan(x.shape, x.element_size(), kernel_size, dilation, direction, channels_last)
    if size > threads.LARGE:
        threads.advise_large_pages(y)
    run(x.data_ptr(), y.data_ptr(), *arguments)
    return True
