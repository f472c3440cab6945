"""Machine code of the CPU's bitshift kernels, compiled by numba: one row or many of x, unpacking, and integers.

What numba cannot vectorise is written as LLVM instructions. A group of 32 codes becomes four vectors of eight floats:
two 16-entry byte tables give the upper halves of the floats, sign, exponent and the mantissa's first bit, all that a
power of two needs; interleaving them makes 32 words, and shifting the even ones up, masking the odd ones, 32 floats.
With AVX2 a table is one byte shuffle for 32 codes; elsewhere the bytes are computed. Linear layers have 32 outputs in
the lanes and take one input at a time, so that an input is loaded once and no lane is ever summed with another.

What is compiled together is in this one file (but for a counter): numba's cache heeds changes of the file of the entry
points only.
"""

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from common.kernels.bitshift_pack import GROUP, low_bits
from common.kernels.shift2d_cpu import _fetch_add

I8, I16, I32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
INTS, FLOATS = ir.VectorType(I32, 8), ir.VectorType(FLOAT, 8)
LONGS = ir.VectorType(I64, 8)


def _all(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def _at(builder, address, offset):
    return builder.add(address, ir.Constant(I64, offset)) if offset else address


def _load(builder, kind, address, offset=0):
    pointer = builder.inttoptr(_at(builder, address, offset), kind.as_pointer())
    return builder.load(pointer, align=1)


def _store(builder, value, address, offset=0):
    pointer = builder.inttoptr(_at(builder, address, offset), value.type.as_pointer())
    builder.store(value, pointer, align=1)


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def _broadcast(builder, kind, address, offset=0):
    undefined = ir.Constant(kind, ir.Undefined)
    value = _load(builder, kind.element, address, offset)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return _shuffle(builder, first, undefined, [0] * kind.count)


def _multiply_add(builder, a, b, c):
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32")
    return builder.call(function, [a, b, c])


def _shift_bytes(builder, vector, left):
    """Every byte `left` places to the left, or to the right; the bits that come in are any."""
    if left == 0:
        return vector
    words, shift = builder.bitcast(vector, WORDS), _all(WORDS, abs(left))
    moved = builder.shl(words, shift) if left > 0 else builder.lshr(words, shift)
    return builder.bitcast(moved, BYTES)


def _has_byte_shuffle():
    """Whether numba compiles for a processor with AVX2 (it can be told not to)."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith(("x86_64", "amd64")) and "+avx2" in features.split(",")


class _Tables:
    """Upper two bytes of the float of a code, by `tables` in memory: see `_tables`."""

    def __init__(self, builder, bits, address, shuffle):
        self.builder, self.bits, self.shuffle = builder, bits, shuffle
        if shuffle:
            halves = [_load(builder, ir.VectorType(I8, 16), address, 16 * i) for i in range(4 if bits == 6 else 2)]
            self.tables = [_shuffle(builder, half, half, [*range(16)] * 2) for half in halves]
        else:
            self.offset, self.zero = (_broadcast(builder, BYTES, address, 64 + i) for i in (0, 1))

    def look_up(self, low, sign, high):
        """(top byte, next byte) of 32 floats. low: bytes of the first plane; sign, high: bits in bit 7, or None."""
        find = self._shuffled if self.shuffle else self._computed
        top, rest = find(low, sign, high)
        if sign is not None:
            top = self.builder.or_(top, self.builder.and_(sign, _all(BYTES, 0x80)))
        return top, rest

    def _shuffled(self, low, sign, high):
        kind = ir.FunctionType(BYTES, [BYTES, BYTES])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx2.pshuf.b")
        found = [self.builder.call(function, [table, low]) for table in self.tables]
        if high is None:
            return found
        upper = self.builder.icmp_signed("<", high, _all(BYTES, 0))
        return [self.builder.select(upper, found[2 + i], found[i]) for i in (0, 1)]

    def _computed(self, low, sign, high):
        builder = self.builder
        magnitude = low
        if sign is None:  # it is the first plane's upper bit
            width = low_bits(self.bits)
            magnitude = builder.and_(low, _all(BYTES, 2 ** (width - 1) - 1))
        if high is not None:
            upper = builder.and_(builder.lshr(high, _all(BYTES, 3)), _all(BYTES, 16))
            magnitude = builder.or_(magnitude, upper)
        exponent = builder.add(magnitude, self.offset)
        is_zero = builder.icmp_unsigned("==", magnitude, self.zero)
        exponent = builder.select(is_zero, _all(BYTES, 0), exponent)
        top, rest = builder.lshr(exponent, _all(BYTES, 1)), builder.shl(exponent, _all(BYTES, 7))
        if sign is None:
            bit = builder.and_(builder.shl(low, _all(BYTES, 8 - width)), _all(BYTES, 0x80))
            top = builder.or_(top, bit)
        return top, rest


def _groups(builder, bits, codes, tables):
    """The eight groups of the block at `codes`, one after the other, each four vectors of eight floats."""
    width = low_bits(bits)
    low = [_load(builder, BYTES, codes, 32 * i) for i in range(width)]
    planes = [_load(builder, BYTES, codes, 32 * i) for i in range(width, bits)]
    per_byte = 8 // width
    for group in range(8):
        index = _shift_bytes(builder, low[group // per_byte], -width * (group % per_byte))
        index = builder.and_(index, _all(BYTES, 2**width - 1))
        sign, high = [*(_shift_bytes(builder, plane, group) for plane in planes), None, None][:2]
        top, rest = tables.look_up(index, sign, high)
        vectors = []
        for first in (0, 8):
            order = [byte for half in (0, 16) for i in range(first, first + 8) for byte in (half + i, 32 + half + i)]
            pairs = builder.bitcast(_shuffle(builder, rest, top, order), INTS)
            vectors += [builder.shl(pairs, _all(INTS, 16)), builder.and_(pairs, _all(INTS, 0xFFFF0000))]
        yield [builder.bitcast(vector, FLOATS) for vector in vectors]


def _make_dot(bits):
    @intrinsic
    def dot(typing, codes, x, y, blocks, tables):
        """y[:32] = sum of the weights times x, over `blocks` times 8 inputs"""

        def codegen(context, builder, signature, arguments):
            codes, x, y, blocks, tables = arguments
            tables = _Tables(builder, bits, tables, _has_byte_shuffle())
            sums = [cgutils.alloca_once_value(builder, _all(FLOATS, 0.0)) for _ in range(4)]
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.add(codes, builder.mul(loop.index, ir.Constant(I64, GROUP * bits)))
                inputs = builder.add(x, builder.mul(loop.index, ir.Constant(I64, 8 * 4)))
                for group, weights in enumerate(_groups(builder, bits, block, tables)):
                    value = _broadcast(builder, FLOATS, inputs, 4 * group)
                    for weight, total in zip(weights, sums, strict=True):
                        builder.store(_multiply_add(builder, weight, value, builder.load(total)), total)
            for i, total in enumerate(sums):
                _store(builder, builder.load(total), y, 32 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return dot


def _make_unpack(bits):
    @intrinsic
    def unpack(typing, codes, y, blocks, stride, tables):
        """32 floats per group of the codes at y, y + stride, y + 2 * stride and so on"""

        def codegen(context, builder, signature, arguments):
            codes, y, blocks, stride, tables = arguments
            tables = _Tables(builder, bits, tables, _has_byte_shuffle())
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.add(codes, builder.mul(loop.index, ir.Constant(I64, GROUP * bits)))
                first = builder.mul(loop.index, ir.Constant(I64, 8))
                for group, weights in enumerate(_groups(builder, bits, block, tables)):
                    row = builder.add(y, builder.mul(_at(builder, first, group), stride))
                    for i, weight in enumerate(weights):
                        _store(builder, weight, row, 32 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return unpack


def _make_multiply(rows):
    @intrinsic
    def multiply(typing, weights, inputs, x, x_stride, y, y_stride):
        """y[row, :32] += x[row, :inputs] @ weights (inputs, 32) for `rows` rows"""

        def codegen(context, builder, signature, arguments):
            weights, inputs, x, x_stride, y, y_stride = arguments
            xs = [builder.add(x, builder.mul(x_stride, ir.Constant(I64, row))) for row in range(rows)]
            ys = [builder.add(y, builder.mul(y_stride, ir.Constant(I64, row))) for row in range(rows)]
            start = [[_load(builder, FLOATS, at, 32 * i) for i in range(4)] for at in ys]
            sums = [[cgutils.alloca_once_value(builder, value) for value in row] for row in start]
            with cgutils.for_range(builder, inputs) as loop:
                line = builder.add(weights, builder.mul(loop.index, ir.Constant(I64, 4 * GROUP)))
                vectors = [_load(builder, FLOATS, line, 32 * i) for i in range(4)]
                offset = builder.mul(loop.index, ir.Constant(I64, 4))
                for row in range(rows):
                    value = _broadcast(builder, FLOATS, builder.add(xs[row], offset))
                    for weight, total in zip(vectors, sums[row], strict=True):
                        builder.store(_multiply_add(builder, weight, value, builder.load(total)), total)
            for at, row_sums in zip(ys, sums, strict=True):
                for i, total in enumerate(row_sums):
                    _store(builder, builder.load(total), at, 32 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return multiply


@intrinsic
def _shifts(typing, weights, count, y):
    """From `count` times 32 floats +-2**p and 0: 32 shifts to the right, max(0, -p), then 32 factors +-2**max(0, p)"""

    def codegen(context, builder, signature, arguments):
        weights, count, y = arguments
        with cgutils.for_range(builder, builder.mul(count, ir.Constant(I64, 4))) as loop:
            bits = _load(builder, INTS, builder.add(weights, builder.mul(loop.index, ir.Constant(I64, 32))))
            field = builder.and_(builder.lshr(bits, _all(INTS, 23)), _all(INTS, 255))
            exponent = builder.sub(field, _all(INTS, 127))
            is_left = builder.icmp_signed(">", exponent, _all(INTS, 0))
            right = builder.select(is_left, _all(INTS, 0), builder.sub(_all(INTS, 0), exponent))
            right = builder.select(builder.icmp_signed(">", right, _all(INTS, 31)), _all(INTS, 31), right)
            factor = builder.shl(_all(INTS, 1), builder.select(is_left, exponent, _all(INTS, 0)))
            negative = builder.icmp_signed("<", bits, _all(INTS, 0))
            factor = builder.select(negative, builder.sub(_all(INTS, 0), factor), factor)
            factor = builder.select(builder.icmp_signed("==", field, _all(INTS, 0)), _all(INTS, 0), factor)
            part = builder.and_(loop.index, ir.Constant(I64, 3))
            line = builder.mul(builder.lshr(loop.index, ir.Constant(I64, 2)), ir.Constant(I64, 256))
            target = builder.add(y, builder.add(line, builder.mul(part, ir.Constant(I64, 32))))
            _store(builder, right, target)
            _store(builder, factor, target, 128)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def _add_shifted(typing, shifts, inputs, x, y):
    """int64 y[:32] += sum over the inputs of (x >> shift) * factor, int32. At most 2**15 inputs: sums of halves."""

    def codegen(context, builder, signature, arguments):
        shifts, inputs, x, y = arguments
        low, high = ([cgutils.alloca_once_value(builder, _all(INTS, 0)) for _ in range(4)] for _ in range(2))
        with cgutils.for_range(builder, inputs) as loop:
            line = builder.add(shifts, builder.mul(loop.index, ir.Constant(I64, 256)))
            value = _broadcast(builder, INTS, builder.add(x, builder.mul(loop.index, ir.Constant(I64, 4))))
            for i in range(4):
                term = builder.ashr(value, _load(builder, INTS, line, 32 * i))
                term = builder.mul(term, _load(builder, INTS, line, 128 + 32 * i))
                for total, half in (
                    (low[i], builder.and_(term, _all(INTS, 0xFFFF))),
                    (high[i], builder.ashr(term, _all(INTS, 16))),
                ):
                    builder.store(builder.add(builder.load(total), half), total)
        for i in range(4):
            total = builder.shl(builder.sext(builder.load(high[i]), LONGS), _all(LONGS, 16))
            total = builder.add(total, builder.zext(builder.load(low[i]), LONGS))
            _store(builder, builder.add(total, _load(builder, LONGS, y, 64 * i)), y, 64 * i)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


_dot2, _dot3, _dot4, _dot5, _dot6 = map(_make_dot, range(2, 7))
_unpack2, _unpack3, _unpack4, _unpack5, _unpack6 = map(_make_unpack, range(2, 7))
_multiply1, _multiply2 = map(_make_multiply, (1, 2))


@njit
def _dot(bits, codes, x, y, blocks, tables):
    if bits == 2:
        _dot2(codes, x, y, blocks, tables)
    elif bits == 3:
        _dot3(codes, x, y, blocks, tables)
    elif bits == 4:
        _dot4(codes, x, y, blocks, tables)
    elif bits == 5:
        _dot5(codes, x, y, blocks, tables)
    else:
        _dot6(codes, x, y, blocks, tables)


@njit
def _unpack(bits, codes, y, blocks, stride, tables):
    if bits == 2:
        _unpack2(codes, y, blocks, stride, tables)
    elif bits == 3:
        _unpack3(codes, y, blocks, stride, tables)
    elif bits == 4:
        _unpack4(codes, y, blocks, stride, tables)
    elif bits == 5:
        _unpack5(codes, y, blocks, stride, tables)
    else:
        _unpack6(codes, y, blocks, stride, tables)


@njit
def _one_row(counters, grain, panels, bits, codes, x, y, blocks, tables):
    # One item is a panel: 32 outputs of the one row of x.
    size = blocks * 32 * bits
    while True:
        first = _fetch_add(counters, grain)
        for panel in range(first, min(first + grain, panels)):
            _dot(bits, codes + panel * size, x, y + panel * 128, blocks, tables)
        if first + grain >= panels:
            return


@njit
def _many_rows(counters, scratch, grain, panels, bits, codes, x, y, blocks, tables, rows, chunk):
    # One item is a panel: 32 outputs of every row of x. scratch: the weights of `chunk` blocks.
    size, x_stride, y_stride = blocks * 32 * bits, blocks * 32, panels * 128
    while True:
        first = _fetch_add(counters, grain)
        for panel in range(first, min(first + grain, panels)):
            outputs = y + panel * 128
            for block in range(0, blocks, chunk):
                count = min(chunk, blocks - block)
                _unpack(bits, codes + panel * size + block * 32 * bits, scratch, count, 128, tables)
                inputs = x + block * 32
                for row in range(0, rows - 1, 2):
                    at = inputs + row * x_stride
                    _multiply2(scratch, count * 8, at, x_stride, outputs + row * y_stride, y_stride)
                if rows % 2:
                    at = inputs + (rows - 1) * x_stride
                    _multiply1(scratch, count * 8, at, x_stride, outputs + (rows - 1) * y_stride, y_stride)
        if first + grain >= panels:
            return


@njit
def _weights(counters, grain, items, bits, codes, y, blocks, across, stride, step, tables):
    # One item is `blocks` blocks of codes; item i goes to y + i // across * step + i % across * 128.
    while True:
        first = _fetch_add(counters, grain)
        for item in range(first, min(first + grain, items)):
            target = y + item // across * step + item % across * 128
            _unpack(bits, codes + item * blocks * 32 * bits, target, blocks, stride, tables)
        if first + grain >= items:
            return


@njit
def _fixed_rows(counters, scratch, grain, panels, bits, codes, x, y, blocks, tables, rows, chunk):
    # As _many_rows in integers, y int64. bits 0: codes are floats already, each panel (inputs, 32).
    size = blocks * 32 * bits if bits else blocks * 1024
    x_stride, y_stride = blocks * 32, panels * 256
    shifts = scratch + chunk * 1024
    while True:
        first = _fetch_add(counters, grain)
        for panel in range(first, min(first + grain, panels)):
            for block in range(0, blocks, chunk):
                count = min(chunk, blocks - block)
                weights = codes + panel * size + block * 1024
                if bits:
                    _unpack(bits, codes + panel * size + block * 32 * bits, scratch, count, 128, tables)
                    weights = scratch
                _shifts(weights, count * 8, shifts)
                for row in range(rows):
                    at = x + block * 32 + row * x_stride
                    _add_shifted(shifts, count * 8, at, y + panel * 256 + row * y_stride)
        if first + grain >= panels:
            return


def fixed_rows_entry(arguments):
    a = carray(arguments, 13)
    scratch = a[1] + a[2] * _fetch_add(a[0] + 8, 1)
    _fixed_rows(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12])


def one_row_entry(arguments):
    a = carray(arguments, 11)
    _one_row(a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10])


def many_rows_entry(arguments):
    a = carray(arguments, 13)
    scratch = a[1] + a[2] * _fetch_add(a[0] + 8, 1)
    _many_rows(a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12])


def weights_entry(arguments):
    a = carray(arguments, 13)
    _weights(a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12])
