"""Products of a few rows of inputs with packed codes, by AVX-512: straight from the codes, 32 outputs a tile.

Rows are floats, bfloat16, or bytes; many rows of bfloat16 are multiplied by panels that are unpacked once for all of
them (product_cpu.py), and so are many rows of floats (bitshift_cpu_kernels.py).
"""

from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.bitshift_pack import GROUP
from common.kernels.codes_cpu_avx512 import HALVES, groups, terms
from common.kernels.product_cpu import pairs_product
from common.kernels.vectors import (
    WIDE_BYTES,
    WIDE_FLOATS,
    WIDE_INTS,
    WIDE_WORDS,
    add_floats,
    add_wide_products,
    at,
    clear_floats,
    fetch_add,
    load,
    named,
    number,
    prefetch,
    same,
    store,
)

PART = 64  # blocks summed at a time: the error of a float32 sum grows with its length
AHEAD = 2048  # bytes of codes that are asked for in advance
MOST_ROWS = 8  # of x that are multiplied straight from the codes; beyond, weights are unpacked once for all rows
SIZES = (1, 2, 4, 8)  # rows of a tile
BLOCK_BYTES = {"float": 32, "half": 16, "int8": 8}  # of the inputs of a block


def _make_tile(bits, rows, kind):
    several = max(1, 4 // rows)  # sums for each output: the next addition to one has to wait for the last
    is_int, size = kind == "int8", BLOCK_BYTES[kind]

    @intrinsic
    def tile(typing, codes, x, x_row, last, y, y_row, blocks, table):
        """y[row, :32] = weights times x[row], `blocks` times 8 inputs. x_row, y_row: bytes from row to row.

        Rows after row number `last` are row `last` again.
        """

        def codegen(context, builder, signature, arguments):
            codes, x, x_row, last, y, y_row, blocks, table = arguments
            weights = load(builder, WIDE_BYTES if is_int else WIDE_WORDS, table)
            numbers = [_least(builder, last, number(row)) for row in range(rows)]
            inputs, targets = ([builder.add(start, builder.mul(row, step)) for row in numbers]
                               for start, step in ((x, x_row), (y, y_row)))  # fmt: skip
            # Bytes without a sign are 128 too much; 128 times the weights are summed like one more row.
            more = [at(builder, table, 64)] if is_int else []
            sums = [[[cgutils.alloca_once(builder, WIDE_FLOATS) for _ in HALVES] for _ in (*inputs, *more)]
                    for _ in range(several)]  # fmt: skip
            _clear(builder, targets)
            parts = builder.sdiv(builder.add(blocks, number(PART - 1)), number(PART))
            with cgutils.for_range(builder, parts) as part:
                start = builder.mul(part.index, number(PART))
                count = _least(builder, builder.sub(blocks, start), number(PART))
                for total in (total for some in sums for totals in some for total in totals):
                    builder.store(same(WIDE_FLOATS, 0.0), total)
                with cgutils.for_range(builder, count) as loop:
                    index = builder.add(start, loop.index)
                    block = builder.add(codes, builder.mul(index, number(GROUP * bits)))
                    _ask(builder, bits, block)
                    offset = builder.mul(index, number(size))
                    places = [builder.add(place, offset) for place in inputs] + more
                    for i, term in enumerate(terms(builder, bits, kind, block, weights)):
                        for place, totals in zip(
                            places, sums[(i // 2 if kind == "float" else i) % several], strict=True
                        ):
                            add_wide_products(builder, place, 4 * i, term, totals, kind)
                _add_to(builder, sums, targets, is_int)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return tile


def _ask(builder, bits, block):
    for line in range(0, GROUP * bits, 64):
        prefetch(builder, at(builder, block, AHEAD + line), locality=3)


def _least(builder, a, b):
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _clear(builder, targets):
    for target in targets:
        for offset in (0, 64):
            store(builder, same(WIDE_FLOATS, 0.0), target, offset)


def _add_to(builder, sums, targets, is_int):
    """Add the sums of each row, all of them, to the 32 numbers at its target; rows may share one, and then agree."""
    kind, add = (WIDE_INTS, builder.add) if is_int else (WIDE_FLOATS, builder.fadd)
    totals = []
    for several in zip(*sums, strict=True):
        first, *others = ([builder.bitcast(builder.load(total), kind) for total in halves] for halves in several)
        for other in others:
            first = [add(a, b) for a, b in zip(first, other, strict=True)]
        totals.append(first)
    if is_int:
        *totals, too_much = totals
        totals = [[builder.sub(a, b) for a, b in zip(total, too_much, strict=True)] for total in totals]
    places = [(target, 64 * i) for target in targets for i in (0, 1)]
    vectors = [vector for total in totals for vector in total]
    results = [add(load(builder, kind, *place), vector) for place, vector in zip(places, vectors, strict=True)]
    for place, result in zip(places, results, strict=True):
        store(builder, result, *place)


def _make_unpack(bits):
    @intrinsic
    def unpack(typing, codes, y, blocks, table):
        """Pairs of weights of the codes at y, 32 outputs a pair, bfloat16: `pairs_product` takes them."""

        def codegen(context, builder, signature, arguments):
            codes, y, blocks, table = arguments
            table = load(builder, WIDE_WORDS, table)
            with cgutils.for_range(builder, blocks) as loop:
                block = builder.add(codes, builder.mul(loop.index, number(GROUP * bits)))
                _ask(builder, bits, block)
                target = builder.add(y, builder.mul(loop.index, number(4 * 128)))
                for i, vectors in enumerate(terms(builder, bits, "half", block, table)):
                    for j, vector in enumerate(vectors):
                        store(builder, vector, target, 128 * i + 64 * j)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), codegen

    return unpack


def _make_few(bits, kind):
    tile1, tile2, tile4, tile8 = (_make_tile(bits, rows, kind) for rows in SIZES)

    @named(bits, kind)
    def few(codes, x, x_row, last, y, y_row, blocks, table):
        if last == 0:
            tile1(codes, x, x_row, last, y, y_row, blocks, table)
        elif last < 2:
            tile2(codes, x, x_row, last, y, y_row, blocks, table)
        elif last < 4:
            tile4(codes, x, x_row, last, y, y_row, blocks, table)
        else:
            tile8(codes, x, x_row, last, y, y_row, blocks, table)

    return few


def _make_rows(bits):
    few, few_halves, unpack = _make_few(bits, "float"), _make_few(bits, "half"), _make_unpack(bits)

    @named(bits)
    def rows_of(counters, scratch, grain, panels, codes, x, y, blocks, table, rows, x_row, is_half, chunk, more):
        # One item is a panel: 32 outputs of every row of x, floats, or bfloat16 if is_half; only these may be more than
        # `MOST_ROWS`, y is then zeros. scratch: weights of `chunk` blocks and their sums. more: a product's terms, its
        # rows' places, and those of the sums.
        size, y_row = blocks * 32 * bits, panels * 128
        while True:
            first = fetch_add(counters, grain)
            for panel in range(first, min(first + grain, panels)):
                some, target = codes + panel * size, y + panel * 128
                if rows <= MOST_ROWS:
                    if is_half:
                        few_halves(some, x, x_row, rows - 1, target, y_row, blocks, table)
                    else:
                        few(some, x, x_row, rows - 1, target, y_row, blocks, table)
                    continue
                (terms, places, lines), sums = more, scratch + chunk * 512
                for block in range(0, blocks, chunk):
                    count, inputs = min(chunk, blocks - block), x + block * 16
                    unpack(some + block * 32 * bits, scratch, count, table)
                    clear_floats(sums, rows * 128)
                    pairs_product(scratch, terms, count * 4, inputs, places, rows, sums, lines, sums, lines, 64)
                    for row in range(rows):
                        add_floats(target + row * y_row, sums + row * 128, 128)
            if first + grain >= panels:
                return

    return rows_of


def _make_integers(bits):
    few = _make_few(bits, "int8")

    @named(bits)
    def integers_of(counters, grain, panels, codes, x, y, blocks, table, rows, x_row):
        # One item is a panel: 32 outputs, int32, of every row of x, bytes that are 128 too much.
        size, y_row = blocks * 32 * bits, panels * 128
        while True:
            first = fetch_add(counters, grain)
            for panel in range(first, min(first + grain, panels)):
                for row in range(0, rows, MOST_ROWS):
                    last, target = min(MOST_ROWS, rows - row) - 1, y + panel * 128 + row * y_row
                    few(codes + panel * size, x + row * x_row, x_row, last, target, y_row, blocks, table)
            if first + grain >= panels:
                return

    return integers_of


_rows2, _rows3, _rows4, _rows5, _rows6 = map(_make_rows, range(2, 7))
_integers2, _integers3, _integers4 = map(_make_integers, range(2, 5))


@njit
def _row_arguments(a):
    scratch = a[1] + a[2] * fetch_add(a[0] + 8, 1)
    return a[0], scratch, a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], (a[14], a[15], a[16])


@njit
def _integer_arguments(a):
    return a[0], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]


def _rows2_entry(arguments):
    _rows2(*_row_arguments(carray(arguments, 17)))


def _rows3_entry(arguments):
    _rows3(*_row_arguments(carray(arguments, 17)))


def _rows4_entry(arguments):
    _rows4(*_row_arguments(carray(arguments, 17)))


def _rows5_entry(arguments):
    _rows5(*_row_arguments(carray(arguments, 17)))


def _rows6_entry(arguments):
    _rows6(*_row_arguments(carray(arguments, 17)))


def _integers2_entry(arguments):
    _integers2(*_integer_arguments(carray(arguments, 12)))


def _integers3_entry(arguments):
    _integers3(*_integer_arguments(carray(arguments, 12)))


def _integers4_entry(arguments):
    _integers4(*_integer_arguments(carray(arguments, 12)))


def _make_groups(bits):
    @intrinsic
    def halves(typing, codes, y, table):
        """The 256 weights of the block at `codes`, in the order in which they were packed, bfloat16."""

        def codegen(context, builder, signature, arguments):
            codes, y, table = arguments
            for i, vector in enumerate(groups(builder, bits, codes, load(builder, WIDE_WORDS, table))):
                store(builder, vector, y, 64 * i)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), codegen

    return halves


_halves2, _halves3, _halves4, _halves5, _halves6 = map(_make_groups, range(2, 7))


@njit
def _halves(counters, grain, blocks, bits, codes, y, table):
    while True:
        first = fetch_add(counters, grain)
        for block in range(first, min(first + grain, blocks)):
            some, target = codes + block * 32 * bits, y + block * 512
            if bits == 2:
                _halves2(some, target, table)
            elif bits == 3:
                _halves3(some, target, table)
            elif bits == 4:
                _halves4(some, target, table)
            elif bits == 5:
                _halves5(some, target, table)
            else:
                _halves6(some, target, table)
        if first + grain >= blocks:
            return


def halves_entry(arguments):
    a = carray(arguments, 9)
    _halves(a[0], a[3], a[4], a[5], a[6], a[7], a[8])


ROWS_ENTRIES = {2: _rows2_entry, 3: _rows3_entry, 4: _rows4_entry, 5: _rows5_entry, 6: _rows6_entry}
INTEGERS_ENTRIES = {2: _integers2_entry, 3: _integers3_entry, 4: _integers4_entry}
