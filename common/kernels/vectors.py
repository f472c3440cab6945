"""Vectors of floats, integers and bytes as LLVM instructions, for the CPU kernels that numba compiles.

numba leaves many loops scalar: it cannot know that arrays do not overlap, and it has no registers to name. Imported by
the kernels only: numba loads slowly.
"""

import functools

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

I8, I16, I32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
INTS, FLOATS = ir.VectorType(I32, 8), ir.VectorType(FLOAT, 8)
LONGS = ir.VectorType(I64, 8)
WIDE_BYTES, WIDE_WORDS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)
WIDE_INTS, WIDE_FLOATS = ir.VectorType(I32, 16), ir.VectorType(FLOAT, 16)
# All that the kernels with vectors of 64 bytes need: tables of bfloat16 (bw) and of bytes and fields at any bit (vbmi),
# products of bfloat16 and of bytes. AMD's Zen 4 and 5 have it, Intel's servers from Sapphire Rapids on.
AVX512 = ("avx512f", "avx512bw", "avx512vbmi", "avx512bf16", "avx512vnni")

llvmlite.binding.initialize_native_asmparser()  # also for code from numba's cache that is compiled into other code


def processor_has(*features):
    """Whether numba compiles for an x86-64 processor with all these features (it can be told not to)."""
    triple, _, known = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith(("x86_64", "amd64")) and {f"+{name}" for name in features} <= set(known.split(","))


def named(*of):
    """njit for a function in a function, which is named by what it is made of, strings and numbers.

    numba tells functions apart by name and by a number that it gives in the order of compilation: in code from its
    cache on disk, compiled in several processes, both may be the same for two functions made by one.
    """

    def decorate(function):
        function.__qualname__ = "_".join([function.__qualname__, *map(str, of)])
        return njit(function)

    return decorate


@functools.cache
def has_avx512():
    """Whether the processor has all of `AVX512`."""
    return processor_has(*AVX512)


def lanes():
    """Floats of the vectors that products are made of: 16 with AVX-512, else 8."""
    return WIDE_FLOATS.count if has_avx512() else FLOATS.count


def same(vector, value):
    """A constant with `value` in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def number(value):
    return ir.Constant(I64, value)


def at(builder, address, offset):
    return builder.add(address, number(offset)) if offset else address


def load(builder, kind, address, offset=0):
    pointer = builder.inttoptr(at(builder, address, offset), kind.as_pointer())
    return builder.load(pointer, align=1)


def store(builder, value, address, offset=0):
    pointer = builder.inttoptr(at(builder, address, offset), value.type.as_pointer())
    builder.store(value, pointer, align=1)


def stream(builder, value, address):
    """`store` past the cache, for what is not read soon; the address must be a multiple of the vector's size.

    The memory's lines are not read first. Other threads see it after a `fence`.
    """
    pointer = builder.inttoptr(address, value.type.as_pointer())
    store = builder.store(value, pointer, align=32)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


def shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def broadcast(builder, kind, address, offset=0):
    """The scalar at an address in every lane."""
    return repeated(builder, kind, load(builder, kind.element, address, offset))


def repeated(builder, kind, value):
    """A scalar in every lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return shuffle(builder, first, undefined, [0] * kind.count)


def multiply_add(builder, a, b, c):
    """a * b + c in floats: one instruction where the processor has it."""
    return call(builder, f"llvm.fmuladd.v{c.type.count}f32", c.type, a, b, c)


# What multiplies a 32-bit lane of inputs by one of weights and adds: a float, two bfloat16, or four bytes, the inputs'
# without a sign, the weights' with one.
WIDE_PRODUCTS = {"float": "vfmadd231ps", "half": "vdpbf16ps", "int8": "vpdpbusd"}


def add_wide_products(builder, place, offset, weights, totals, kind="float"):
    """totals[i] += weights[i] times the inputs at an address, 32 bits, in vectors of 16; totals: addresses of these.

    kind: of `WIDE_PRODUCTS`; vectors are passed as floats whatever it is. Sums of "half" are float32, rounded after
    each of the two products, and what is smaller than its normal numbers counts as 0; those of "int8" are int32.

    In assembly: LLVM loads inputs long before they are used, until it runs out of registers, and by an instruction for
    floats that shares a port with shuffles on some processors.
    """
    count, instruction = len(totals), WIDE_PRODUCTS[kind]
    lines = [f"vpbroadcastd {offset}(${2 * count + 1}), ${count}"]
    lines += [f"{instruction} ${count + 1 + i}, ${count}, ${i}" for i in range(count)]
    operands = ["=&v"] * (count + 1) + ["v"] * count + ["r"] + [str(i) for i in range(count)]
    result = ir.LiteralStructType([WIDE_FLOATS] * (count + 1))
    function = ir.FunctionType(result, [WIDE_FLOATS] * count + [I64] + [WIDE_FLOATS] * count)
    values = [*weights, place, *map(builder.load, totals)]
    sums = builder.asm(function, "\\0A".join(lines), ",".join(operands), values, False)
    for i, total in enumerate(totals):
        builder.store(builder.extract_value(sums, i), total)


def call(builder, name, result, *arguments):
    """Call LLVM's function `name`, which returns `result`."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def fetch_add(typing, address, amount):
    """The int64 at an address, which is then increased by `amount`, atomically."""

    def codegen(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def word(typing, address):
    """The int64 at an address."""

    def codegen(context, builder, signature, arguments):
        return load(builder, I64, arguments[0])

    return types.int64(types.int64), codegen


def prefetch(builder, address, locality=2, write=False):
    """Ask for the cache line of an address. locality: 3 for the L1 cache, 2 for the L2 cache."""
    bytes_pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [bytes_pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    options = (ir.Constant(I32, value) for value in (int(write), locality, 1))  # 1: data
    builder.call(function, [builder.inttoptr(address, bytes_pointer), *options])


@intrinsic
def ask_for(typing, address):
    """`prefetch` for code that numba compiles."""

    def codegen(context, builder, signature, arguments):
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def fence(typing):
    """What was streamed is written when this returns."""

    def codegen(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _make_copy(kind):
    @intrinsic
    def copy(typing, target, source):
        def codegen(context, builder, signature, arguments):
            store(builder, load(builder, kind, arguments[1]), arguments[0])
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


def _make_clear(kind):
    @intrinsic
    def clear(typing, target):
        def codegen(context, builder, signature, arguments):
            store(builder, same(kind, 0.0), arguments[0])
            return context.get_dummy_value()

        return types.void(types.int64), codegen

    return clear


@intrinsic
def _add_vector(typing, target, source):
    def codegen(context, builder, signature, arguments):
        target, source = arguments
        store(builder, builder.fadd(load(builder, FLOATS, target), load(builder, FLOATS, source)), target)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


_copy_vector, _clear_vector = _make_copy(FLOATS), _make_clear(FLOATS)


@njit
def copy_floats(target, source, size):
    """Copy `size` bytes, a multiple of 32."""
    for i in range(0, size, 32):
        _copy_vector(target + i, source + i)


@njit
def clear_floats(target, size):
    """Zero `size` bytes, a multiple of 32."""
    for i in range(0, size, 32):
        _clear_vector(target + i)


@njit
def add_floats(target, source, size):
    """Add `size` bytes of floats, a multiple of 32, to those at target."""
    for i in range(0, size, 32):
        _add_vector(target + i, source + i)
