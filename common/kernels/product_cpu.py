"""Products of gathered inputs with panels of 16 outputs: what the CPU's linear layers and convolutions are made of.

Six rows of inputs times two vectors of outputs fill AVX2's 16 vector registers: twelve sums, two weights, an input. So
do three rows times four vectors, two panels, which read their inputs half as often. AVX-512's vectors are twice as
long, and eight rows times two of them keep a processor busy. Inputs are broadcast one by one, so each may come from
anywhere: an input's address is that of its row plus an offset of its own, which is all that a convolution, or a shift,
adds to a linear layer. With AVX-512 two bfloat16 inputs may be in a float's place, and two weights.
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
    WIDE_FLOATS,
    add_wide_products,
    broadcast,
    clear_floats,
    copy_floats,
    fetch_add,
    lanes,
    load,
    multiply_add,
    named,
    number,
    prefetch,
    shuffle,
    store,
)

WIDTH = 16  # outputs of a panel


def most_rows(panels):
    """Rows that are multiplied at a time by one panel, or by two together."""
    return (12 if panels == 1 else 8) if lanes() == 16 else 6 // panels


@functools.cache
def equals_library():
    """Whether PyTorch's own products are no faster than `product`: with longer vectors than ours they are."""
    capability = torch.backends.cpu.get_cpu_capability()
    return capability == "AVX2" or (capability == "AVX512" and lanes() == 16)


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


def _add_wide(builder, inputs, weights, sums, kind):
    """The same in vectors of 16, of what the kind says."""
    kept = [load(builder, WIDE_FLOATS, *weight) for weight in weights]
    for place, totals in zip(inputs, sums, strict=True):
        add_wide_products(builder, place, 0, kept, totals, kind)


def _make_tile(rows, panels, asks, add_products):
    kind = WIDE_FLOATS if lanes() == 16 else FLOATS
    size = 4 * kind.count

    @intrinsic
    def tile(typing, weights, terms, count, x, places, start, starts, y, targets, step, ahead, lines):
        """y[row, :16 * panels] = start[row] + sum over i < count of weights[i] * x[row, i]; floats

        All offsets are int64, in bytes. terms: `count` pairs, of weights[i, :16] to weights, the second panel `step`
        further on, and of x[row, i] to x + places[row]. Row `row` of start is at start + starts[row], that of y at
        y + targets[row]. With `asks`, the cache line at ahead + lines[i], int32, is asked for with term i.
        """

        def codegen(context, builder, signature, arguments):
            weights, terms, count, x, places, start, starts, y, targets, step, ahead, lines = arguments
            vectors = range(64 * panels // size)

            def row_of(base, table, row):
                return builder.add(base, load(builder, I64, table, 8 * row))

            inputs = [row_of(x, places, row) for row in range(rows)]
            sums = [[cgutils.alloca_once_value(builder, load(builder, kind, place, size * i)) for i in vectors]
                    for place in (row_of(start, starts, row) for row in range(rows))]  # fmt: skip
            with cgutils.for_range(builder, count) as loop:
                term = builder.add(terms, builder.mul(loop.index, number(16)))
                first = builder.add(weights, load(builder, I64, term))
                if asks:
                    line = load(builder, I32, builder.add(lines, builder.mul(loop.index, number(4))))
                    prefetch(builder, builder.add(ahead, builder.sext(line, I64)))
                offset = load(builder, I64, term, 8)
                values = [builder.add(place, offset) for place in inputs]
                starts_of_panels = [first, builder.add(first, step)][:panels]
                parts = [(place, offset) for place in starts_of_panels for offset in range(0, 64, size)]
                add_products(builder, values, parts, sums)
            for row, totals in enumerate(sums):
                for i, total in enumerate(totals):
                    store(builder, builder.load(total), row_of(y, targets, row), size * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 12), codegen

    return tile


def _one_of(tiles, *name):
    """Function of a number of rows, and of what the tiles take: it calls the tile for so many rows, the first for 1."""
    first = tiles[0]
    if len(tiles) == 1:

        @named(*name, 1)
        def last(rows, *arguments):
            first(*arguments)

        return last
    others = _one_of(tiles[1:], *name)

    @named(*name, len(tiles))
    def choose(rows, *arguments):
        if rows == 1:
            first(*arguments)
        else:
            others(rows - 1, *arguments)

    return choose


def _make_product(panels, asks=False, kind="float"):
    add_products = functools.partial(_add_wide, kind=kind) if lanes() == 16 else _add_products
    most, name = most_rows(panels), (panels, asks, kind)
    tile = _one_of([_make_tile(rows, panels, asks, add_products) for rows in range(1, most + 1)], *name)

    @named(*name)
    def product(weights, terms, count, x, places, rows, start, starts, y, targets, step=0, ahead=0, lines=0):
        """y[row, :16 * panels] = start[row] + gathered inputs times weights, for any number of rows: see `_make_tile`.

        `asking_product` and `asking_pair` ask for a cache line with every term of every tile of rows, from the list
        `lines` of what will be read next, and return where in the list to go on.
        """
        tiles = (rows + most - 1) // most
        first = 0
        for i in range(tiles):
            # As even as can be: a tile of one row takes as long as one of four.
            size = (rows - first + tiles - i - 1) // (tiles - i)
            at, begin, to = places + 8 * first, starts + 8 * first, targets + 8 * first
            tile(size, weights, terms, count, x, at, start, begin, y, to, step, ahead, lines)
            first += size
            lines += 4 * count
        return lines

    return product


product, asking_product, asking_pair = _make_product(1), _make_product(1, asks=True), _make_product(2, asks=True)


def _make_wide_product():
    if lanes() == 16:
        return _make_product(2)

    @njit
    def two_products(weights, terms, count, x, places, rows, start, starts, y, targets, step):
        for half in range(2):
            some, outputs, begin = weights + half * step, y + half * 64, start + half * 64
            product(some, terms, count, x, places, rows, begin, starts, outputs, targets)

    return two_products


# Of two panels, as `product` takes them, the second `step` bytes further on.
wide_product = _make_wide_product()
# The same for pairs of bfloat16, where the processor multiplies them.
pairs_product = _make_product(2, kind="half") if lanes() == 16 else wide_product


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
