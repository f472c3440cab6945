"""Neighbouring pixels of shift2d on channels-last images, as LLVM instructions for numba: k = 3 and steps of one.

For each vector of channels, the vertical choice among three rows is made once per column and kept for the three pixels
that it serves. Few pixels at a time: what is read stays in order, which the processor foresees.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.shift2d_runs_cpu import VECTOR, is_set
from common.kernels.vectors import BYTES, at, load, number, prefetch, store, stream

PIXELS = 2  # at a time
AHEAD = 2048  # bytes that are asked for in advance: what the processor foresees itself takes a fifth longer


def _column(builder, rows, offset, up, middle):
    """The vector at `offset` of whichever of three rows each byte comes from."""
    above, here, below = (load(builder, BYTES, builder.add(row, offset)) for row in rows)
    return builder.select(up, above, builder.select(middle, here, below))


def _each_vector(builder, pixel):
    """for_range over the vectors of a pixel, at least one: (index, offset). The last may overlap the one before."""
    last = builder.sub(pixel, number(VECTOR))
    count = builder.add(builder.udiv(builder.sub(pixel, number(1)), number(VECTOR)), number(1))
    with cgutils.for_range(builder, count) as loop:
        offset = builder.mul(loop.index, number(VECTOR))
        yield loop.index, builder.select(builder.icmp_signed(">", offset, last), last, offset)


@intrinsic
def start_row(typing, above, here, below, pixel, masks, kept):
    """kept: for each vector of a pixel what is chosen of the column left of a row, nothing, and of its first column."""

    def codegen(context, builder, signature, arguments):
        *rows, pixel, masks, kept = arguments
        for index, offset in _each_vector(builder, pixel):
            up, middle = _masks(builder, masks, index)[:2]
            target = builder.add(kept, builder.mul(index, number(2 * VECTOR)))
            store(builder, ir.Constant(BYTES, None), target)
            store(builder, _column(builder, rows, offset, up, middle), target, VECTOR)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), codegen


def _masks(builder, masks, index):
    line = builder.add(masks, builder.mul(index, number(4 * VECTOR)))
    return [is_set(builder, load(builder, BYTES, line, i * VECTOR)) for i in range(4)]


def _ask_ahead(builder, address, done, size, **options):
    """Ask for `size` bytes AHEAD of what is `done`."""
    ahead = builder.add(address, builder.add(done, number(AHEAD)))
    for line in range(0, size, 64):
        prefetch(builder, at(builder, ahead, line), **options)


def _make_shift_pixels(pixels, is_streamed):
    @intrinsic
    def shift_pixels(typing, y, above, here, below, next_row, pixel, masks, is_last, kept):
        """`pixels` neighbouring pixels of a row of y, of `pixel` bytes, at least VECTOR. is_streamed: y and `pixel` are
        multiples of VECTOR, and y is written past the cache.

        above, here, below: the first of them in three rows of x. is_last: they end the row. masks: for each vector, set
        where a byte comes from above, from here, from the left, from the middle. kept: for each vector, what was chosen
        vertically in the two columns before the next to be read. next_row: of x; it and y, unless streamed, are asked
        for AHEAD bytes in advance.
        """

        def codegen(context, builder, signature, arguments):
            y, *rows, next_row, pixel, masks, is_last, kept = arguments
            places = [builder.mul(pixel, number(i)) for i in range(pixels + 1)]
            ends = builder.icmp_signed("!=", is_last, number(0))
            beyond = builder.select(ends, places[-2], places[-1])  # a place to read in any case
            for index, offset in _each_vector(builder, pixel):
                done = builder.mul(index, number(pixels * VECTOR))
                _ask_ahead(builder, next_row, done, pixels * VECTOR)
                if not is_streamed:
                    _ask_ahead(builder, y, done, pixels * VECTOR, locality=3, write=True)
                up, middle, before, center = _masks(builder, masks, index)
                state = builder.add(kept, builder.mul(index, number(2 * VECTOR)))
                columns = [load(builder, BYTES, state, i * VECTOR) for i in range(2)]
                for place in (*places[1:-1], beyond):
                    columns.append(_column(builder, rows, builder.add(place, offset), up, middle))
                columns[-1] = builder.select(ends, ir.Constant(BYTES, None), columns[-1])
                for i in range(pixels):
                    value = builder.select(before, columns[i], builder.select(center, columns[i + 1], columns[i + 2]))
                    target = builder.add(builder.add(y, offset), places[i])
                    (stream if is_streamed else store)(builder, value, target)
                for i, column in enumerate(columns[-2:]):
                    store(builder, column, state, i * VECTOR)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), codegen

    return shift_pixels


shift_pixel, stream_pixel = (_make_shift_pixels(1, is_streamed) for is_streamed in (False, True))
shift_pixels, stream_pixels = (_make_shift_pixels(PIXELS, is_streamed) for is_streamed in (False, True))
