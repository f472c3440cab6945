"""The CPU's bitshift kernels, compiled by numba: one row or many of x, convolutions, unpacking, and integers."""

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.codes_cpu import SMALL_WEIGHTS, dot, unpack
from common.kernels.product_cpu import product, to_panel, wide_product
from common.kernels.vectors import (
    FLOAT,
    FLOATS,
    I32,
    I64,
    INTS,
    LONGS,
    add_floats,
    broadcast,
    clear_floats,
    fetch_add,
    load,
    number,
    repeated,
    same,
    store,
)


@intrinsic
def _shifts(typing, weights, count, y):
    """From `count` times 32 floats +-2**p and 0: 32 shifts to the right, max(0, -p), then 32 factors +-2**max(0, p)"""

    def codegen(context, builder, signature, arguments):
        weights, count, y = arguments
        with cgutils.for_range(builder, builder.mul(count, number(4))) as loop:
            bits = load(builder, INTS, builder.add(weights, builder.mul(loop.index, number(32))))
            field = builder.and_(builder.lshr(bits, same(INTS, 23)), same(INTS, 255))
            exponent = builder.sub(field, same(INTS, 127))
            is_left = builder.icmp_signed(">", exponent, same(INTS, 0))
            right = builder.select(is_left, same(INTS, 0), builder.sub(same(INTS, 0), exponent))
            right = builder.select(builder.icmp_signed(">", right, same(INTS, 31)), same(INTS, 31), right)
            factor = builder.shl(same(INTS, 1), builder.select(is_left, exponent, same(INTS, 0)))
            negative = builder.icmp_signed("<", bits, same(INTS, 0))
            factor = builder.select(negative, builder.sub(same(INTS, 0), factor), factor)
            factor = builder.select(builder.icmp_signed("==", field, same(INTS, 0)), same(INTS, 0), factor)
            part = builder.and_(loop.index, number(3))
            line = builder.mul(builder.lshr(loop.index, number(2)), number(256))
            target = builder.add(y, builder.add(line, builder.mul(part, number(32))))
            store(builder, right, target)
            store(builder, factor, target, 128)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def _add_shifted(typing, shifts, inputs, x, y):
    """int64 y[:32] += sum over the inputs of (x >> shift) * factor, int32. At most 2**15 inputs: sums of halves."""

    def codegen(context, builder, signature, arguments):
        shifts, inputs, x, y = arguments
        low, high = ([cgutils.alloca_once_value(builder, same(INTS, 0)) for _ in range(4)] for _ in range(2))
        with cgutils.for_range(builder, inputs) as loop:
            line = builder.add(shifts, builder.mul(loop.index, number(256)))
            value = broadcast(builder, INTS, builder.add(x, builder.mul(loop.index, number(4))))
            for i in range(4):
                term = builder.ashr(value, load(builder, INTS, line, 32 * i))
                term = builder.mul(term, load(builder, INTS, line, 128 + 32 * i))
                for total, half in (
                    (low[i], builder.and_(term, same(INTS, 0xFFFF))),
                    (high[i], builder.ashr(term, same(INTS, 16))),
                ):
                    builder.store(builder.add(builder.load(total), half), total)
        for i in range(4):
            total = builder.shl(builder.sext(builder.load(high[i]), LONGS), same(LONGS, 16))
            total = builder.add(total, builder.zext(builder.load(low[i]), LONGS))
            store(builder, builder.add(total, load(builder, LONGS, y, 64 * i)), y, 64 * i)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _largest_field(typing, x, count):
    """The largest exponent field, 0 to 255, of `count` times eight floats"""

    def codegen(context, builder, signature, arguments):
        x, count = arguments
        largest = cgutils.alloca_once_value(builder, same(INTS, 0))
        with cgutils.for_range(builder, count) as loop:
            bits = load(builder, INTS, builder.add(x, builder.mul(loop.index, number(32))))
            bits, old = builder.and_(bits, same(INTS, 0x7FFFFFFF)), builder.load(largest)
            builder.store(builder.select(builder.icmp_signed(">", bits, old), bits, old), largest)
        lanes = builder.load(largest)
        highest, *others = (builder.extract_element(lanes, ir.Constant(I32, i)) for i in range(8))
        for lane in others:
            highest = builder.select(builder.icmp_signed(">", lane, highest), lane, highest)
        return builder.zext(builder.lshr(highest, ir.Constant(I32, 23)), I64)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _scale(typing, x, y, count, first, second):
    """y = x * 2**first * 2**second, `count` times eight floats; first, second: -126 to 127"""

    def codegen(context, builder, signature, arguments):
        x, y, count, *exponents = arguments
        factors = []
        for exponent in exponents:
            field = builder.shl(builder.add(exponent, number(127)), number(23))
            factors.append(repeated(builder, FLOATS, builder.bitcast(builder.trunc(field, I32), FLOAT)))
        with cgutils.for_range(builder, count) as loop:
            offset = builder.mul(loop.index, number(32))
            value = load(builder, FLOATS, builder.add(x, offset))
            for factor in factors:
                value = builder.fmul(value, factor)
            store(builder, value, builder.add(y, offset))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@njit
def _one_row(counters, scratch, grain, panels, bits, codes, x, y, blocks, tables, zero, exponent):
    # One item is a panel: 32 outputs of the one row of x. scratch: x, scaled up for small weights.
    size, first, second = blocks * 32 * bits, 0, 0
    if bits in SMALL_WEIGHTS:
        field = _largest_field(x, blocks)
        up = min(max(0, 252 - field), 127) if field < 255 else 0  # to less than 2**126; not infinity nor NaN
        _scale(x, scratch, blocks, up, 0)
        x, exponent = scratch, exponent - up
        first = min(max(-126, exponent), 127)
        second = exponent - first
    while True:
        start = fetch_add(counters, grain)
        for panel in range(start, min(start + grain, panels)):
            target = y + panel * 128
            dot(bits, zero, codes + panel * size, x, target, blocks, tables)
            if first or second:
                _scale(target, target, 4, first, second)
        if start + grain >= panels:
            return


@njit
def _many_rows(counters, scratch, grain, panels, bits, codes, x, y, blocks, tables, rows, chunk, terms, places, lines):
    # One item is a panel: 32 outputs of every row of x. scratch: the weights of `chunk` blocks, then their sums, which
    # are added to y: the error of a float32 sum grows with its length.
    size, sums = blocks * 32 * bits, scratch + chunk * 1024
    while True:
        first = fetch_add(counters, grain)
        for panel in range(first, min(first + grain, panels)):
            for block in range(0, blocks, chunk):
                count = min(chunk, blocks - block)
                unpack(bits, codes + panel * size + block * 32 * bits, scratch, count, 128, tables)
                clear_floats(sums, rows * 128)
                wide_product(scratch, terms, count * 8, x + block * 32, places, rows, sums, lines, sums, lines, 64)
                for row in range(rows):
                    add_floats(y + (panel + row * panels) * 128, sums + row * 128, 128)
        if first + grain >= panels:
            return


@njit
def _convolution(
    counters, scratch, grain, panels, bits, codes, x, y, bias, tables, count, chunk, terms, places, rows, zeros, targets
):
    # One item is a panel: 16 outputs of every pixel. scratch: `chunk` rows of it, then all `count` weights of each.
    weights, blocks = scratch + chunk * 64, count // 16
    while True:
        first = fetch_add(counters, grain)
        for panel in range(first, min(first + grain, panels)):
            unpack(bits, codes + panel * blocks * 32 * bits, weights, blocks, 128, tables)
            target = y + panel * 64
            start, starts = bias + panel * 64, zeros
            for i in range(0, count, chunk):
                size = min(chunk, count - i)
                to_panel(weights + i * 4, count * 4, size, scratch)
                # Pairs number i and on say where row i of the weights is: here it is the scratch's first.
                product(scratch - i * 64, terms + i * 16, size, x, places, rows, start, starts, target, targets)
                start, starts = target, targets
        if first + grain >= panels:
            return


@njit
def _weights(counters, grain, items, bits, codes, y, blocks, across, stride, step, tables):
    # One item is `blocks` blocks of codes; item i goes to y + i // across * step + i % across * 128.
    while True:
        first = fetch_add(counters, grain)
        for item in range(first, min(first + grain, items)):
            target = y + item // across * step + item % across * 128
            unpack(bits, codes + item * blocks * 32 * bits, target, blocks, stride, tables)
        if first + grain >= items:
            return


@njit
def _fixed_rows(counters, scratch, grain, panels, bits, codes, x, y, blocks, tables, rows, chunk):
    # As _many_rows in integers, y int64. bits 0: codes are floats already, each panel (inputs, 32).
    size = blocks * 32 * bits if bits else blocks * 1024
    x_stride, y_stride = blocks * 32, panels * 256
    shifts = scratch + chunk * 1024
    while True:
        first = fetch_add(counters, grain)
        for panel in range(first, min(first + grain, panels)):
            for block in range(0, blocks, chunk):
                count = min(chunk, blocks - block)
                weights = codes + panel * size + block * 1024
                if bits:
                    unpack(bits, codes + panel * size + block * 32 * bits, scratch, count, 128, tables)
                    weights = scratch
                _shifts(weights, count * 8, shifts)
                for row in range(rows):
                    at = x + block * 32 + row * x_stride
                    _add_shifted(shifts, count * 8, at, y + panel * 256 + row * y_stride)
        if first + grain >= panels:
            return


def fixed_rows_entry(arguments):
    a = carray(arguments, 13)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _fixed_rows(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12])


def one_row_entry(arguments):
    a = carray(arguments, 13)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _one_row(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12])


def many_rows_entry(arguments):
    a = carray(arguments, 16)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _many_rows(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15])


def convolution_entry(arguments):
    a = carray(arguments, 18)
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    _convolution(
        a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17]
    )


def weights_entry(arguments):
    a = carray(arguments, 13)
    _weights(a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12])
