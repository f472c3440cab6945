"""Vectors of eight floats, 32-bit integers or 32 bytes as LLVM instructions, for the CPU kernels that numba compiles.

numba leaves many loops scalar: it cannot know that arrays do not overlap, and it has no registers to name. Imported by
the kernels only: numba loads slowly.
"""

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

I8, I16, I32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES, WORDS = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
INTS, FLOATS = ir.VectorType(I32, 8), ir.VectorType(FLOAT, 8)
LONGS = ir.VectorType(I64, 8)


def processor_has(*features):
    """Whether numba compiles for an x86-64 processor with all these features (it can be told not to)."""
    triple, _, known = cpu_target.target_context.codegen().magic_tuple()
    return triple.startswith(("x86_64", "amd64")) and {f"+{name}" for name in features} <= set(known.split(","))


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
    kind = ir.FunctionType(FLOATS, [FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.v8f32")
    return builder.call(function, [a, b, c])


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
