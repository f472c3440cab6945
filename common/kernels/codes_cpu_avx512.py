"""Packed power-of-two codes (bitshift_pack.py) taken apart by AVX-512: bfloat16 pairs, floats, or bytes.

Powers of two are exact in bfloat16, and a table of 32 of them is one vector register. A byte of the first plane holds
the codes of two or four neighbouring inputs for one output, which is what products of pairs want: each 32-bit lane an
output, in it the weights of two inputs. So one shuffle brings 32 codes of 4 bits to their words, in order, out of two
planes and the same moved by 4 bits, and one more looks the weights up. For fp32 inputs two instructions more make
floats of the pairs, whose products are exact and cost two instructions a pair; inputs as sums of three bfloat16, no
less exact, would cost three. Integer weights are looked up 64 at a time, four inputs in a lane.
"""

from llvmlite import ir

from common.kernels.bitshift_pack import BYTE_OF, GROUP, low_bits, plane_order
from common.kernels.vectors import BYTES, WIDE_BYTES, WIDE_FLOATS, WIDE_INTS, WIDE_WORDS, call, load, same, shuffle

HALVES = range(16), range(16, 32)  # outputs in a vector


def _two_sources(builder, first, second, outputs, places):
    """In each 32-bit lane four bytes for one of 16 outputs; `places` counts from where its byte is in `first`.

    first: 64 bytes, behind which are those of `second`.
    """
    order = ir.Constant(WIDE_BYTES, [BYTE_OF[output] + place for output in outputs for place in places])
    found = call(builder, "llvm.x86.avx512.vpermi2var.qi.512", WIDE_BYTES, first, order, second)
    return builder.bitcast(found, WIDE_WORDS)


def _gathered(builder, plane, width, first=0):
    """For each output two words: twice its byte of a plane, and that twice, `width` bits lower. Two vectors of 16.

    plane: 64 bytes, from byte `first` on. Bits that come in are any.
    """
    shifted = builder.lshr(builder.bitcast(plane, WIDE_WORDS), same(WIDE_WORDS, width))
    shifted = builder.bitcast(shifted, WIDE_BYTES)
    places = [first, first, 64 + first, 64 + first]
    return [_two_sources(builder, plane, shifted, outputs, places) for outputs in HALVES]


def _bit_plane(builder, address, offset):
    """32 bytes and 32 zeros"""
    return shuffle(builder, load(builder, BYTES, address, offset), same(BYTES, 0), [*range(64)])


def _shifted(builder, source, places):
    """Bytes that begin at any bit: four `places` in each 32-bit lane of the source."""
    bits = [(32 * (lane % 2) + place) % 64 for lane in range(16) for place in places]  # each 64 bits are a ring
    order, source = ir.Constant(WIDE_BYTES, bits), builder.bitcast(source, WIDE_BYTES)
    found = call(builder, "llvm.x86.avx512.pmultishift.qb.512", WIDE_BYTES, order, source)
    return builder.bitcast(found, WIDE_WORDS)


def _side_by_side(builder, bits, codes):
    """Of a block's codes of 2 or 3 bits, for each output its bytes of the two planes, and twice its signs."""
    low = load(builder, WIDE_BYTES, codes)
    signs = _bit_plane(builder, codes, 64) if bits == 3 else low
    return [_two_sources(builder, low, signs, outputs, [0, 32, 64, 64]) for outputs in HALVES]


def _fields_of_three(builder, codes):
    """`_fields` of codes of 3 bits: one instruction takes a code's lower bits and its sign to the ends of a word."""
    order, halves = plane_order(3), _side_by_side(builder, 3, codes)
    for group in range(0, 8, 2):
        places = [place for i in (group, group + 1) for place in (2 * i, 16 + order[i] - 7)]
        for half in halves:
            fields = _shifted(builder, half, places)
            yield fields, fields


def _moved(builder, words, left):
    """16-bit words `left` bits to the left, or to the right."""
    if left < 0:
        return builder.lshr(words, same(WIDE_WORDS, -left))
    return builder.shl(words, same(WIDE_WORDS, left)) if left else words


def _selected(builder, bits, ones, zeros):
    """Bits of `ones` where the 16-bit constant `bits` has them, else of `zeros`."""
    others = builder.and_(zeros, same(WIDE_WORDS, ~bits & 0xFFFF))
    return builder.or_(builder.and_(ones, same(WIDE_WORDS, bits)), others)


def _fields(builder, bits, codes):
    """(index, signs) of each pair of inputs, for 16 outputs and for 16: words, whose five lowest bits choose from the
    table, and whose highest bit is the sign, or None."""
    width, order = low_bits(bits), plane_order(bits)
    planes = [load(builder, WIDE_BYTES, codes, plane // 2 * 64) for plane in range(width)]
    low = [_gathered(builder, plane, width, 32 * (i % 2)) for i, plane in enumerate(planes)]
    high = [_gathered(builder, _bit_plane(builder, codes, 32 * i), width) for i in range(width, bits)]
    for group in range(0, 8, 2):
        plane, place = divmod(width * group, 8)
        for half in (0, 1):
            index, signs = _moved(builder, low[plane][half], -place), None
            if bits == 6:  # the table's fifth bit
                index = _selected(builder, 1 << 4, _moved(builder, high[1][half], 4 - order[group]), index)
            if high:
                signs = _moved(builder, high[0][half], 7 - order[group])  # from the words' upper bytes
            yield index, signs


def _pairs(builder, bits, codes, table):
    """The four pairs of inputs of the block at `codes`: of each two vectors of 16 outputs, 32 bfloat16, as floats."""
    fields, vectors = (_fields_of_three(builder, codes) if bits == 3 else _fields(builder, bits, codes)), []
    for index, signs in fields:
        weights = _looked_up(builder, table, index)
        if signs is not None:
            weights = builder.xor(weights, builder.and_(signs, same(WIDE_WORDS, 1 << 15)))
        vectors.append(builder.bitcast(weights, WIDE_FLOATS))
        if len(vectors) == 2:
            yield vectors
            vectors = []


def groups(builder, bits, codes, table):
    """The eight groups of the block at `codes`, one after the other: 32 bfloat16 each, in order."""
    width, order = low_bits(bits), plane_order(bits)
    places = [BYTE_OF[i] for i in range(GROUP) for _ in (0, 1)]

    def words(source):
        """Each byte twice, in order."""
        found = call(builder, "llvm.x86.avx512.permvar.qi.512", WIDE_BYTES, source, ir.Constant(WIDE_BYTES, places))
        return builder.bitcast(found, WIDE_WORDS)

    planes = [words(_bit_plane(builder, codes, 32 * i)) for i in range(bits)]
    for group in range(8):
        plane, place = divmod(width * group, 8)
        index = _moved(builder, planes[plane], -place)
        if bits == 6:
            index = _selected(builder, 1 << 4, _moved(builder, planes[5], 4 - order[group]), index)
        weights = _looked_up(builder, table, index)
        if bits > width:
            signs = _moved(builder, planes[width], 7 - order[group])
            weights = builder.xor(weights, builder.and_(signs, same(WIDE_WORDS, 1 << 15)))
        yield weights


def _looked_up(builder, table, index):
    return call(builder, "llvm.x86.avx512.permvar.hi.512", WIDE_WORDS, table, index)


def _quads(builder, bits, codes, table):
    """The two times four inputs of the block at `codes`, of 2 to 4 bits: each two vectors of 16 outputs, 64 bytes."""
    if bits == 4:
        planes = [load(builder, WIDE_BYTES, codes, offset) for offset in (0, 64)]
        moved = [
            builder.bitcast(_moved(builder, builder.bitcast(plane, WIDE_WORDS), -4), WIDE_BYTES) for plane in planes
        ]
    else:
        order, halves = plane_order(bits), _side_by_side(builder, bits, codes)
    for quad in (0, 1):
        vectors = []
        for half in (0, 1):
            if bits == 4:
                index = _two_sources(builder, planes[quad], moved[quad], HALVES[half], [0, 64, 32, 96])
            else:
                index = _shifted(builder, halves[half], [8 * quad + 2 * i for i in range(4)])
            if bits == 3:  # the table's sixth bit
                signs = _shifted(builder, halves[half], [16 + order[4 * quad + i] - 5 for i in range(4)])
                index = _selected(builder, 1 << 13 | 1 << 5, signs, index)
            index = builder.bitcast(index, WIDE_BYTES)
            found = call(builder, "llvm.x86.avx512.permvar.qi.512", WIDE_BYTES, table, index)
            vectors.append(builder.bitcast(found, WIDE_FLOATS))
        yield vectors


def byte_table_of(values, bits):
    """The 64 weights among which six bits choose, in `_quads`, of those of all codes: see `table_of`."""
    return values * (64 // len(values)) if bits != 3 else values[:4] * 8 + values[4:] * 8


def table_of(values, bits):
    """The 32 weights among which five bits choose, of those of all codes: repeated where a code's first plane has fewer
    bits, because the next ones are any. Signs are in the table where the first plane has them."""
    count = 2 ** (bits if bits == low_bits(bits) else bits - 1)
    return values[:count] * (32 // count)


def _floats_of(builder, vector):
    """Two vectors of floats: the first and the second of each pair of bfloat16."""
    words = builder.bitcast(vector, WIDE_INTS)
    halves = builder.shl(words, same(WIDE_INTS, 16)), builder.and_(words, same(WIDE_INTS, 0xFFFF0000))
    return [builder.bitcast(half, WIDE_FLOATS) for half in halves]


def terms(builder, bits, kind, codes, table):
    """Pairs of vectors, each of 16 outputs, with the block's weights for 32 bits of inputs after the other."""
    if kind == "int8":
        yield from _quads(builder, bits, codes, table)
        return
    for vectors in _pairs(builder, bits, codes, table):
        if kind == "half":
            yield vectors
        else:
            yield from zip(*(_floats_of(builder, vector) for vector in vectors), strict=True)
