"""CPU kernels of shift2d, compiled by numba. Imported on first use, never by the package: numba takes a second to load.

Addresses, offsets and sizes are integers in bytes, so the same compiled kernels serve every dtype. The inner loops
move 32 bytes at a time through small LLVM intrinsics, because numba cannot know that arrays do not overlap and leaves
loops over them scalar. Channels-last rows, where neighbouring channels move differently, are put together with byte
masks: first vertically, choosing among k rows, then horizontally, choosing among k columns. That is 2k loads, not k*k;
for k = 3, where what was chosen vertically stays in registers and serves neighbouring pixels, it is fewer.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels import threads
from common.kernels.vectors import fetch_add, number

VECTOR = 32
PIXELS = 2  # channels-last, at a time
MASK_BLOCK = 2048  # bytes after which channels-last masks repeat: a long inner loop whose masks still fit the L1 cache


def _lanes(width):
    return ir.IntType(8) if width == 1 else ir.VectorType(ir.IntType(8), width)


def _store(builder, lanes, address, value):
    builder.store(value, builder.inttoptr(address, lanes.as_pointer()), align=1)


def _load(builder, lanes, *addresses):
    return [builder.load(builder.inttoptr(address, lanes.as_pointer()), align=1) for address in addresses]


def _is_set(builder, mask):
    zero = ir.Constant(mask.type, 0 if isinstance(mask.type, ir.IntType) else None)
    return builder.icmp_signed("<", mask, zero)


def _make_zero(width):
    @intrinsic
    def zero(typing, destination):
        def codegen(context, builder, signature, arguments):
            lanes = _lanes(width)
            _store(builder, lanes, arguments[0], ir.Constant(lanes, 0 if width == 1 else None))
            return context.get_dummy_value()

        return types.void(types.intp), codegen

    return zero


def _make_masked(width):
    @intrinsic
    def masked(typing, destination, source, mask):
        """destination = source & mask"""

        def codegen(context, builder, signature, arguments):
            lanes = _lanes(width)
            _store(builder, lanes, arguments[0], builder.and_(*_load(builder, lanes, *arguments[1:])))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return masked


def _make_merge(width):
    @intrinsic
    def merge(typing, destination, source, mask):
        """destination = source where the mask is set"""

        def codegen(context, builder, signature, arguments):
            lanes = _lanes(width)
            old, new, mask = _load(builder, lanes, *arguments)
            _store(builder, lanes, arguments[0], builder.select(_is_set(builder, mask), new, old))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return merge


_zero1, _zero32 = _make_zero(1), _make_zero(VECTOR)
_masked1, _masked32 = _make_masked(1), _make_masked(VECTOR)
_merge1, _merge32 = _make_merge(1), _make_merge(VECTOR)


@njit
def _zero_run(y, size):
    if size < VECTOR:
        for t in range(size):
            _zero1(y + t)
    else:
        for t in range(0, size - VECTOR, VECTOR):
            _zero32(y + t)
        _zero32(y + size - VECTOR)  # may overlap the one before: no remainder loop


@njit
def _masked_run(y, x, mask, period, start, end):
    # y[t] = x[t] & mask[t % period] for start <= t < end; the mask is VECTOR bytes longer than its period.
    if end - start < VECTOR:
        for t in range(start, end):
            _masked1(y + t, x + t, mask + t % period)
        return
    _masked32(y + start, x + start, mask + start % period)
    t = (start // VECTOR + 1) * VECTOR  # from here on aligned as the plane is
    phase, step = t % period, VECTOR % period
    while t + VECTOR <= end:
        _masked32(y + t, x + t, mask + phase)
        phase += step
        if phase >= period:
            phase -= period
        t += VECTOR
    _masked32(y + end - VECTOR, x + end - VECTOR, mask + (end - VECTOR) % period)


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
                _zero_run(target, size)
                continue
            offset = dy * row + dx
            start, end = max(0, -offset), min(size, size - offset)
            _zero_run(target, start)
            _masked_run(target, source + offset, masks + column * (row + VECTOR), row, start, end)
            _zero_run(target + end, size - end)
        if first + grain >= planes:
            return


@njit
def _merge_run(y, x, mask, block, size):
    # y[t] = x[t] where mask[t % block] is set, 0 <= t < size. block: multiple of VECTOR; the mask: VECTOR bytes longer.
    if size < VECTOR:
        for t in range(size):
            _merge1(y + t, x + t, mask + t % block)
        return
    last = size - VECTOR
    for base in range(0, last, block):
        for t in range(0, min(block, last - base), VECTOR):
            _merge32(y + base + t, x + base + t, mask + t)
    _merge32(y + last, x + last, mask + last % block)


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
                _merge_run(staged, origin, masks + tap * stride, block, row)
            for tap in range(k):
                _merge_run(target, staged + step * (tap - half), across + tap * stride, block, row)
        if first + grain >= rows:
            return


@intrinsic
def _shift_pixels(typing, y, above, here, below, pixel, left, right, masks, stride, step_y, step_x):
    """PIXELS neighbouring pixels of a row of y, of `pixel` bytes, at least VECTOR, for k = 3 and steps of one.

    above, here, below: the first of them in three rows of x. left, right: bytes to the pixels beside, or 0 where there
    are none. masks, stride: by vertical, then by horizontal tap. Each vector of masks serves all pixels.
    """

    def codegen(context, builder, signature, arguments):
        y, above, here, below, pixel, left, right, masks, stride, step_y, step_x = arguments
        lanes, zero = _lanes(VECTOR), number(0)
        none = ir.Constant(lanes, None)
        is_left, is_right = (builder.icmp_signed("!=", side, zero) for side in (left, right))
        places = [left, *(builder.mul(pixel, number(i)) for i in range(PIXELS))]
        places.append(builder.add(places[-1], right))
        forward_y, forward_x = (builder.icmp_signed(">", step, zero) for step in (step_y, step_x))
        taps = (builder.select(forward_y, zero, number(2)), number(1),
                builder.select(forward_x, number(3), number(5)), number(4))  # fmt: skip
        chosen = [builder.add(masks, builder.mul(stride, tap)) for tap in taps]
        last = builder.sub(pixel, number(VECTOR))
        count = builder.add(builder.udiv(builder.sub(pixel, number(1)), number(VECTOR)), number(1))
        with cgutils.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, number(VECTOR))
            offset = builder.select(builder.icmp_signed(">", offset, last), last, offset)  # may overlap the one before
            up, middle, before, center = (
                _is_set(builder, mask) for mask in _load(builder, lanes, *(builder.add(m, offset) for m in chosen))
            )
            rows = [builder.add(row, offset) for row in (above, here, below)]
            columns = []
            for place in places:
                a, b, c = _load(builder, lanes, *(builder.add(row, place) for row in rows))
                columns.append(builder.select(up, a, builder.select(middle, b, c)))
            columns[0] = builder.select(is_left, columns[0], none)
            columns[-1] = builder.select(is_right, columns[-1], none)
            for i in range(PIXELS):
                value = builder.select(before, columns[i], builder.select(center, columns[i + 1], columns[i + 2]))
                _store(builder, lanes, builder.add(builder.add(y, offset), places[i + 1]), value)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 11), codegen


@njit
def _shift_neighbours(counters, scratch, grain, rows, x, y, masks, block, pixel, height, width, step_y, step_x):
    # Channels-last, the networks' case, twice as fast: k = 3, steps of one, at least PIXELS columns of VECTOR bytes.
    row, stride = width * pixel, block + VECTOR
    while True:
        first = fetch_add(counters, grain)
        for item in range(first, min(first + grain, rows)):
            i, source, target = item % height, x + item * row, y + item * row
            above = source - row if i else scratch
            below = source + row if i + 1 < height else scratch
            for j in range(0, width, PIXELS):
                at = min(j, width - PIXELS) * pixel  # the last ones may overlap
                left, right = -pixel if at else 0, pixel if at + PIXELS * pixel < row else 0
                _shift_pixels(
                    target + at, above + at, source + at, below + at, pixel, left, right, masks, stride, step_y, step_x
                )
        if first + grain >= rows:
            return


def _planes_entry(arguments):
    a = carray(arguments, 14)
    _shift_planes(a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13])


def _rows_entry(arguments):
    a = carray(arguments, 15)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _shift_rows(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14])


def _neighbours_entry(arguments):
    a = carray(arguments, 14)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _shift_neighbours(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13])


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


@functools.lru_cache(maxsize=64)
def _edge_masks(width, item, k, step):
    """Masks of k rows of width * item bytes: set where column j has its source j + step * (tap - k // 2) in the row."""
    source = np.arange(width) + step * (np.arange(k)[:, None] - k // 2)
    return _masks(np.repeat((source >= 0) & (source < width), item, axis=1))


@functools.lru_cache(maxsize=64)
def _tap_masks(channels, item, k):
    """Masks of 2k rows of whole pixels: set where a channel moves by vertical, then by horizontal tap 0 to k-1."""
    channel = np.arange(channels)
    moves = channel < channels // (k * k) * (k * k)
    taps = np.arange(k)[:, None]
    down, across = (np.where(moves, tap, k // 2) == taps for tap in (channel // k % k, channel % k))
    pixel = np.repeat(np.concatenate([down, across]), item, axis=1)
    unit = np.lcm(pixel.shape[1], VECTOR)  # whole pixels and whole vectors
    return _masks(np.tile(pixel, (1, unit // pixel.shape[1] * max(1, MASK_BLOCK // unit))))


def shift2d_cpu(x, y, kernel_size, dilation, direction, channels_last):
    """Write the shifted x into y: both (N, C, H, W), dense in the same layout, not empty; C >= kernel_size**2.

    Returns True: there is no size that it cannot do.
    """
    planes, rows, neighbours = load()
    threads.advise_large_pages(y)
    n, channels, height, width = x.shape
    item = x.element_size()
    # Beyond the image a longer step changes nothing; a shorter one cannot overflow.
    step_y, step_x = direction * min(dilation, height), direction * min(dilation, width)
    addresses = x.data_ptr(), y.data_ptr()
    if channels_last:
        pixel = channels * item
        masks, block, _ = _tap_masks(channels, item, kernel_size)
        sizes, row = (*addresses, masks, block, pixel, height, width), width * pixel
        if kernel_size == 3 and dilation == 1 and pixel >= VECTOR and width >= PIXELS:
            threads.run(neighbours, (*sizes, step_y, step_x), n * height, row, row, zeroed=True)
        else:
            scratch = 2 * (row + kernel_size // 2 * abs(step_x) * pixel)
            threads.run(rows, (*sizes, kernel_size, step_y, step_x), n * height, row, scratch, zeroed=True)
    else:
        masks, row, _ = _edge_masks(width, item, kernel_size, step_x)
        arguments = (*addresses, masks, channels, height, row, kernel_size, step_y, step_x * item)
        threads.run(planes, arguments, n * channels, height * row)
    return True
