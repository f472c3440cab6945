"""Products of gathered inputs with panels of 16 outputs: what the CPU's linear layers and convolutions are made of.

Six rows of inputs times two vectors of outputs fill AVX2's 16 vector registers: twelve sums, two weights, an input. So
do three rows times four vectors, two panels, which read their inputs half as often. Inputs are broadcast one by one, so
each may come from anywhere: an input's address is that of its row plus an offset of its own, which is all that a
convolution, or a shift, adds to a linear layer.
"""

import functools

import torch
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.vectors import (
    FLOATS,
    I32,
    I64,
    broadcast,
    clear_floats,
    copy_floats,
    fetch_add,
    load,
    multiply_add,
    number,
    prefetch,
    shuffle,
    store,
)

WIDTH = 16  # outputs of a panel
ROWS = 6  # at a time, of one panel


@functools.cache
def equals_library():
    """Whether PyTorch's own products are no faster than `product`: with longer vectors than AVX2's they are."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _add_products(builder, inputs, weights, sums):
    """sums[row][i] += weights[i] * inputs[row]; inputs: addresses, weights: addresses and offsets, sums: variables."""

    def add(value, weight, total):
        builder.store(multiply_add(builder, weight, value, builder.load(total)), total)

    if len(weights) < len(inputs):  # the fewer factors are kept: there are no registers for both
        kept = [load(builder, FLOATS, *weight) for weight in weights]
        for place, totals in zip(inputs, sums, strict=True):
            value = broadcast(builder, FLOATS, place)
            for weight, total in zip(kept, totals, strict=True):
                add(value, weight, total)
    else:
        kept = [broadcast(builder, FLOATS, place) for place in inputs]
        for i, place in enumerate(weights):
            weight = load(builder, FLOATS, *place)
            for value, totals in zip(kept, sums, strict=True):
                add(value, weight, totals[i])


def _make_tile(rows, panels, asks):
    @intrinsic
    def tile(typing, weights, terms, count, x, places, start, starts, y, targets, step, ahead, lines):
        """y[row, :16 * panels] = start[row] + sum over i < count of weights[i] * x[row, i]; floats

        All offsets are int64, in bytes. terms: `count` pairs, of weights[i, :16] to weights, the second panel `step`
        further on, and of x[row, i] to x + places[row]. Row `row` of start is at start + starts[row], that of y at
        y + targets[row]. With `asks`, the cache line at ahead + lines[i], int32, is asked for with term i.
        """

        def codegen(context, builder, signature, arguments):
            weights, terms, count, x, places, start, starts, y, targets, step, ahead, lines = arguments
            vectors = range(2 * panels)

            def row_of(base, table, row):
                return builder.add(base, load(builder, I64, table, 8 * row))

            inputs = [row_of(x, places, row) for row in range(rows)]
            sums = [[cgutils.alloca_once_value(builder, load(builder, FLOATS, place, 32 * i)) for i in vectors]
                    for place in (row_of(start, starts, row) for row in range(rows))]  # fmt: skip
            with cgutils.for_range(builder, count) as loop:
                term = builder.add(terms, builder.mul(loop.index, number(16)))
                first = builder.add(weights, load(builder, I64, term))
                if asks:
                    line = load(builder, I32, builder.add(lines, builder.mul(loop.index, number(4))))
                    prefetch(builder, builder.add(ahead, builder.sext(line, I64)))
                offset = load(builder, I64, term, 8)
                values = [builder.add(place, offset) for place in inputs]
                halves = [(first, 0), (first, 32), (builder.add(first, step), 0), (builder.add(first, step), 32)]
                _add_products(builder, values, halves[: 2 * panels], sums)
            for row, totals in enumerate(sums):
                for i, total in enumerate(totals):
                    store(builder, builder.load(total), row_of(y, targets, row), 32 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return tile


def _make_product(panels, asks):
    most = ROWS // panels
    tile1, tile2, tile3, tile4, tile5, tile6 = (_make_tile(min(i, most), panels, asks) for i in range(1, ROWS + 1))

    @njit
    def product(weights, terms, count, x, places, rows, start, starts, y, targets, step=0, ahead=0, lines=0):
        """y[row, :16 * panels] = start[row] + gathered inputs times weights, for any number of rows: see `_make_tile`.

        `asking_product` and `asking_pair` ask for a cache line with every term of every tile of rows, from the list
        `lines` of what will be read next, and return where in the list to go on.
        """
        tiles = (rows + most - 1) // most
        first = 0
        for tile in range(tiles):
            # As even as can be: a tile of one row takes as long as one of four.
            size = (rows - first + tiles - tile - 1) // (tiles - tile)
            at, begin, to = places + 8 * first, starts + 8 * first, targets + 8 * first
            if most > 3 and size == 6:
                tile6(weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            elif most > 3 and size == 5:
                tile5(weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            elif most > 3 and size == 4:
                tile4(weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            elif size == 3:
                tile3(weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            elif size == 2:
                tile2(weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            else:
                tile1(weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            first += size
            lines += 4 * count
        return lines

    return product


product, asking_product, asking_pair = _make_product(1, False), _make_product(1, True), _make_product(2, True)


def _transposed(builder, rows):
    """Columns of eight vectors of eight, as vectors."""
    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [shuffle(builder, rows[i], rows[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    quads = [shuffle(builder, pairs[i], pairs[i + 2], order) for i in (0, 1, 4, 5) for order in (low, high)]
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [shuffle(builder, quads[i], quads[i + 4], order) for order in (low, high) for i in range(4)]


@intrinsic
def to_panel(typing, source, stride, count, panel):
    """panel[i, :16] = source[:16, i] for i < count, a multiple of 8; stride: bytes from row to row of the source"""

    def codegen(context, builder, signature, arguments):
        source, stride, count, panel = arguments
        for half in (0, 1):
            starts = [builder.add(source, builder.mul(stride, number(8 * half + row))) for row in range(8)]
            with cgutils.for_range(builder, builder.lshr(count, number(3))) as loop:
                offset = builder.mul(loop.index, number(32))
                rows = [load(builder, FLOATS, builder.add(place, offset)) for place in starts]
                target = builder.add(panel, builder.mul(loop.index, number(8 * 64)))
                for i, column in enumerate(_transposed(builder, rows)):
                    store(builder, column, target, 64 * i + 32 * half)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit
def _pad(counters, grain, rows, x, y, height, width, top, left, pixel):
    # One item is a row of y, width + 2 * left pixels of `pixel` bytes, a multiple of 32; an image has height + 2 * top.
    size, margin = width * pixel, left * pixel
    while True:
        first = fetch_add(counters, grain)
        for item in range(first, min(first + grain, rows)):
            image, row, target = item // (height + 2 * top), item % (height + 2 * top), y + item * (size + 2 * margin)
            if top <= row < height + top:
                clear_floats(target, margin)
                copy_floats(target + margin, x + (image * height + row - top) * size, size)
                clear_floats(target + margin + size, margin)
            else:
                clear_floats(target, size + 2 * margin)
        if first + grain >= rows:
            return


def pad_entry(arguments):
    a = carray(arguments, 12)
    _pad(a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11])
