"""Runs of bytes that are zeroed, masked or merged, 32 at a time, for shift2d's CPU kernels.

Addresses and sizes are integers in bytes. The inner loops are small LLVM intrinsics, because numba cannot know that
arrays do not overlap and leaves loops over them scalar.
"""

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from common.kernels.vectors import BYTES, I8, ask_for, load, store

VECTOR = 32
AHEAD = 2048  # bytes of a long run that are asked for in advance


def is_set(builder, mask):
    """Of a mask's bytes, as a vector of bits; also of one byte."""
    return builder.icmp_signed("<", mask, ir.Constant(mask.type, 0 if mask.type == I8 else None))


def _make_zero(kind):
    @intrinsic
    def zero(typing, destination):
        def codegen(context, builder, signature, arguments):
            store(builder, ir.Constant(kind, 0 if kind == I8 else None), arguments[0])
            return context.get_dummy_value()

        return types.void(types.intp), codegen

    return zero


def _make_masked(kind):
    @intrinsic
    def masked(typing, destination, source, mask):
        """destination = source & mask"""

        def codegen(context, builder, signature, arguments):
            destination, *sources = arguments
            value, mask = (load(builder, kind, address) for address in sources)
            store(builder, builder.and_(value, mask), destination)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return masked


def _make_merge(kind):
    @intrinsic
    def merge(typing, destination, source, mask):
        """destination = source where the mask is set"""

        def codegen(context, builder, signature, arguments):
            old, new, mask = (load(builder, kind, address) for address in arguments)
            store(builder, builder.select(is_set(builder, mask), new, old), arguments[0])
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), codegen

    return merge


_zero1, _zero32 = _make_zero(I8), _make_zero(BYTES)
_masked1, _masked32 = _make_masked(I8), _make_masked(BYTES)
_merge1, _merge32 = _make_merge(I8), _make_merge(BYTES)


@njit
def zero_run(y, size):
    if size < VECTOR:
        for t in range(size):
            _zero1(y + t)
    else:
        for t in range(0, size - VECTOR, VECTOR):
            _zero32(y + t)
        _zero32(y + size - VECTOR)  # may overlap the one before: no remainder loop


@njit
def masked_run(y, x, mask, period, start, end):
    # y[t] = x[t] & mask[t % period] for start <= t < end; the mask is VECTOR bytes longer than its period.
    if end - start < VECTOR:
        for t in range(start, end):
            _masked1(y + t, x + t, mask + t % period)
        return
    _masked32(y + start, x + start, mask + start % period)
    t = (start // VECTOR + 1) * VECTOR  # from here on aligned as the plane is
    phase, step = t % period, VECTOR % period
    while t + VECTOR <= end:
        ask_for(x + t + AHEAD)
        _masked32(y + t, x + t, mask + phase)
        phase += step
        if phase >= period:
            phase -= period
        t += VECTOR
    _masked32(y + end - VECTOR, x + end - VECTOR, mask + (end - VECTOR) % period)


@njit
def merge_run(y, x, mask, block, size):
    # y[t] = x[t] where mask[t % block] is set, 0 <= t < size. block: multiple of VECTOR; the mask: VECTOR bytes longer.
    if size < VECTOR:
        for t in range(size):
            _merge1(y + t, x + t, mask + t % block)
        return
    last = size - VECTOR
    for base in range(0, last, block):
        for t in range(0, min(block, last - base), VECTOR):
            _merge32(y + base + t, x + base + t, mask + t)
    _merge32(y + last, x + last, mask + last % block)
