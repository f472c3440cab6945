"""Machine code that takes packed power-of-two codes apart (bitshift_pack.py), written as LLVM instructions for numba.

A group of 32 codes becomes four vectors of eight floats: two 16-entry byte tables give the upper halves of the floats,
sign, exponent and the mantissa's first bit, all that a power of two needs; interleaving them makes 32 words, and
shifting the even ones up, masking the odd ones, 32 floats. With AVX2 a table is one byte shuffle for 32 codes;
elsewhere the bytes are computed. Linear layers have 32 outputs in the lanes and take one input at a time, so that an
input is loaded once and no lane is ever summed with another.

Codes of up to 5 bits go faster into a sum: a magnitude in the lowest bits of a float's exponent is a power of two near
the smallest float, or 0. With its sign eight places above it (`plane_order`), half an AND and one shift make it one.
Sums of such small weights are scaled once, and x before, so that its products stay away from the ends of float32.
Where the processor has AVX2 and FMA, codes_cpu_avx2.py writes these instructions out.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels import codes_cpu_avx2
from common.kernels.bitshift_pack import GROUP, low_bits, plane_order
from common.kernels.vectors import (
    BYTES,
    FLOATS,
    I8,
    I64,
    INTS,
    WORDS,
    at,
    broadcast,
    load,
    multiply_add,
    number,
    prefetch,
    processor_has,
    same,
    shuffle,
    store,
)

SMALL_WEIGHTS = (2, 3, 4, 5)  # bits of codes that `dot` takes for small weights
PART = 64  # blocks summed at a time
AHEAD = 2048  # bytes of codes that are asked for in advance: a tenth faster than what the processor foresees itself


def _shift_bytes(builder, vector, left):
    """Every byte `left` places to the left, or to the right; the bits that come in are any."""
    if left == 0:
        return vector
    words, shift = builder.bitcast(vector, WORDS), same(WORDS, abs(left))
    moved = builder.shl(words, shift) if left > 0 else builder.lshr(words, shift)
    return builder.bitcast(moved, BYTES)


class _Tables:
    """Upper two bytes of the float of a code, by `tables` in memory: see `_tables`."""

    def __init__(self, builder, bits, address, can_shuffle):
        self.builder, self.bits, self.can_shuffle = builder, bits, can_shuffle
        if can_shuffle:
            halves = [load(builder, ir.VectorType(I8, 16), address, 16 * i) for i in range(4 if bits == 6 else 2)]
            self.tables = [shuffle(builder, half, half, [*range(16)] * 2) for half in halves]
        else:
            self.offset, self.zero = (broadcast(builder, BYTES, address, 64 + i) for i in (0, 1))

    def look_up(self, low, sign, high):
        """(top byte, next byte) of 32 floats. low: bytes of the first plane; sign, high: bits in bit 7, or None."""
        find = self._shuffled if self.can_shuffle else self._computed
        top, rest = find(low, sign, high)
        if sign is not None:
            top = self.builder.or_(top, self.builder.and_(sign, same(BYTES, 0x80)))
        return top, rest

    def _shuffled(self, low, sign, high):
        kind = ir.FunctionType(BYTES, [BYTES, BYTES])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx2.pshuf.b")
        found = [self.builder.call(function, [table, low]) for table in self.tables]
        if high is None:
            return found
        upper = self.builder.icmp_signed("<", high, same(BYTES, 0))
        return [self.builder.select(upper, found[2 + i], found[i]) for i in (0, 1)]

    def _computed(self, low, sign, high):
        builder = self.builder
        magnitude = low
        if sign is None:  # it is the first plane's upper bit
            width = low_bits(self.bits)
            magnitude = builder.and_(low, same(BYTES, 2 ** (width - 1) - 1))
        if high is not None:
            upper = builder.and_(builder.lshr(high, same(BYTES, 3)), same(BYTES, 16))
            magnitude = builder.or_(magnitude, upper)
        exponent = builder.add(magnitude, self.offset)
        is_zero = builder.icmp_unsigned("==", magnitude, self.zero)
        exponent = builder.select(is_zero, same(BYTES, 0), exponent)
        top, rest = builder.lshr(exponent, same(BYTES, 1)), builder.shl(exponent, same(BYTES, 7))
        if sign is None:
            bit = builder.and_(builder.shl(low, same(BYTES, 8 - width)), same(BYTES, 0x80))
            top = builder.or_(top, bit)
        return top, rest


def _pairs(first):
    """Order of a shuffle that puts bytes of two vectors together, from byte `first` of each half on."""
    return [byte for half in (0, 16) for i in range(first, first + 8) for byte in (half + i, 32 + half + i)]


def _groups(builder, bits, codes, tables):
    """The eight groups of the block at `codes`, one after the other, each four vectors of eight floats."""
    width = low_bits(bits)
    low = [load(builder, BYTES, codes, 32 * i) for i in range(width)]
    planes = [load(builder, BYTES, codes, 32 * i) for i in range(width, bits)]
    per_byte = 8 // width
    for group in range(8):
        index = _shift_bytes(builder, low[group // per_byte], -width * (group % per_byte))
        index = builder.and_(index, same(BYTES, 2**width - 1))
        to_top = 7 - plane_order(bits)[group]
        sign, high = [*(_shift_bytes(builder, plane, to_top) for plane in planes), None, None][:2]
        top, rest = tables.look_up(index, sign, high)
        vectors = []
        for first in (0, 8):
            pairs = builder.bitcast(shuffle(builder, rest, top, _pairs(first)), INTS)
            vectors += [builder.shl(pairs, same(INTS, 16)), builder.and_(pairs, same(INTS, 0xFFFF0000))]
        yield [builder.bitcast(vector, FLOATS) for vector in vectors]


def _small_groups(builder, bits, zero, codes):
    """As `_groups`, each weight as +-2**(m - 127), or 0 for m = 0; without a zero as +-2**(m + 2**(bits - 1) - 127)."""
    width = low_bits(bits)
    low = [load(builder, BYTES, codes, 32 * i) for i in range(width)]
    magnitudes, offset = 2 ** (bits - 1) - 1, 0 if zero else 2 ** (bits - 1)
    for index, plane in enumerate(low):
        if bits == width:
            signs = _shift_bytes(builder, plane, 1 - width)
        else:
            signs = _shift_bytes(builder, load(builder, BYTES, codes, 32 * width), -index)
        if not zero and bits == width:  # the sign's bit is free here
            plane = builder.or_(plane, same(BYTES, 0x88 if width == 4 else 0xAA))
        halves = [builder.bitcast(shuffle(builder, plane, signs, _pairs(first)), INTS) for first in (0, 8)]
        for place in range(0, 8, width):
            # One AND for the codes of both halves of a word: the shift pushes the upper one out, the product with 0
            # clears the lower one. (A product to shift the upper: other ports of the processor than the shift's.)
            fields = 0x10001 * (1 << 8 | magnitudes | offset) << place
            factor = ir.Constant(WORDS, [0, 1 << (7 - place)] * 8)
            weights = []
            for half in halves:
                if not zero and bits != width:
                    half = builder.or_(half, same(INTS, 0x10001 * offset << place))
                both = builder.and_(half, same(INTS, fields))
                upper = builder.mul(builder.bitcast(both, WORDS), factor)
                weights += [builder.shl(both, same(INTS, 23 - place)), builder.bitcast(upper, INTS)]
            yield [builder.bitcast(weight, FLOATS) for weight in weights]


def small_exponent(bits, base, zero):
    """Exponent of the power of two by which `dot`'s small weights are to be multiplied, 0 where they are not small."""
    return base + 127 - (0 if zero else 2 ** (bits - 1)) if bits in SMALL_WEIGHTS else 0


def _sums(builder, bits, zero, codes, x, blocks, tables):
    """Four vectors: the sums of 32 outputs over `blocks` blocks, weights small where they can be."""
    is_small = bits in SMALL_WEIGHTS
    in_assembly = is_small and codes_cpu_avx2.available()
    # With 2-bit planes two of each sum: decoding is as fast as an addition. Otherwise registers would run out.
    count = codes_cpu_avx2.SUMS if in_assembly else 8 if low_bits(bits) == 2 else 4
    sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(count)]
    for total in sums:
        builder.store(same(FLOATS, 0.0), total)
    with cgutils.for_range(builder, blocks) as loop:
        block = builder.add(codes, builder.mul(loop.index, number(GROUP * bits)))
        inputs = builder.add(x, builder.mul(loop.index, number(8 * 4)))
        for line in range(0, GROUP * bits, 64):
            prefetch(builder, at(builder, block, AHEAD + line))
        if in_assembly:
            codes_cpu_avx2.add_products(builder, bits, zero, block, inputs, sums)
        elif is_small:
            _add_products(builder, _small_groups(builder, bits, zero, block), inputs, sums)
        else:
            _add_products(builder, _groups(builder, bits, block, tables), inputs, sums)
    first, *others = ([builder.load(total) for total in sums[i : i + 4]] for i in range(0, count, 4))
    for other in others:
        first = [builder.fadd(a, b) for a, b in zip(first, other, strict=True)]
    return first


def _add_products(builder, groups, x, sums):
    for group, weights in enumerate(groups):
        value = broadcast(builder, FLOATS, x, 4 * group)
        for i, weight in enumerate(weights):
            total = sums[(4 * group + i) % len(sums)]
            builder.store(multiply_add(builder, weight, value, builder.load(total)), total)


def _make_dot(bits, zero):
    @intrinsic
    def sums(typing, codes, x, y, blocks, tables):
        """y[:32] = sum of the weights times x, over `blocks` times 8 inputs"""

        def codegen(context, builder, signature, arguments):
            codes, x, y, blocks, tables = arguments
            if bits not in SMALL_WEIGHTS:
                tables = _Tables(builder, bits, tables, processor_has("avx2"))
            # Sums of sums: the error of a float32 sum grows with its length.
            for i in range(4):
                store(builder, same(FLOATS, 0.0), y, 32 * i)
            parts = builder.sdiv(builder.add(blocks, number(PART - 1)), number(PART))
            with cgutils.for_range(builder, parts) as loop:
                start = builder.mul(loop.index, number(PART))
                left = builder.sub(blocks, start)
                count = builder.select(builder.icmp_signed("<", left, number(PART)), left, number(PART))
                part_codes = builder.add(codes, builder.mul(start, number(GROUP * bits)))
                inputs = builder.add(x, builder.mul(start, number(8 * 4)))
                for i, total in enumerate(_sums(builder, bits, zero, part_codes, inputs, count, tables)):
                    store(builder, builder.fadd(load(builder, FLOATS, y, 32 * i), total), y, 32 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return sums


def _make_unpack(bits):
    @intrinsic
    def floats(typing, codes, y, blocks, stride, tables):
        """32 floats per group of the codes at y, y + stride, y + 2 * stride and so on"""

        def codegen(context, builder, signature, arguments):
            codes, y, blocks, stride, tables = arguments
            tables = _Tables(builder, bits, tables, processor_has("avx2"))
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.add(codes, builder.mul(loop.index, ir.Constant(I64, GROUP * bits)))
                first = builder.mul(loop.index, ir.Constant(I64, 8))
                for group, weights in enumerate(_groups(builder, bits, block, tables)):
                    row = builder.add(y, builder.mul(at(builder, first, group), stride))
                    for i, weight in enumerate(weights):
                        store(builder, weight, row, 32 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return floats


_zero2, _zero3, _zero4, _zero5 = (_make_dot(bits, True) for bits in SMALL_WEIGHTS)
_full2, _full3, _full4, _full5 = (_make_dot(bits, False) for bits in SMALL_WEIGHTS)
_dot6 = _make_dot(6, None)
_unpack2, _unpack3, _unpack4, _unpack5, _unpack6 = map(_make_unpack, range(2, 7))


@njit
def dot(bits, zero, codes, x, y, blocks, tables):
    """y[:32] = sum of the weights, or of small ones (`small_exponent`), times x, over `blocks` times 8 inputs"""
    if bits == 6:
        _dot6(codes, x, y, blocks, tables)
    elif zero:
        if bits == 2:
            _zero2(codes, x, y, blocks, tables)
        elif bits == 3:
            _zero3(codes, x, y, blocks, tables)
        elif bits == 4:
            _zero4(codes, x, y, blocks, tables)
        else:
            _zero5(codes, x, y, blocks, tables)
    elif bits == 2:
        _full2(codes, x, y, blocks, tables)
    elif bits == 3:
        _full3(codes, x, y, blocks, tables)
    elif bits == 4:
        _full4(codes, x, y, blocks, tables)
    else:
        _full5(codes, x, y, blocks, tables)


@njit
def unpack(bits, codes, y, blocks, stride, tables):
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
