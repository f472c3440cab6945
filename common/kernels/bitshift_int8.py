"""arithmetic="int8" of bitshift_linear: weights as integers times int8 activations, exact.

On a GPU by tensor cores, on a CPU by AVX-512's products of bytes where it has them.

A weight +-2**p over the smallest magnitude of its code is an integer, 0 or +-1 to +-64 where the code has at most seven
magnitudes: S3 and DeepShift-PS of 4 bits or less, DeepShift-Q of 3 (with 4 bits it needs +128). Unlike "fixed", nothing
is rounded: the sums are int32 and exact. (DeepShift, Sec. 3, and S3, Sec. 3, for the weights; the route is not theirs)
"""

import functools

import torch
from torch import Tensor

from common.kernels.bitshift_pack import code_bytes
from common.kernels.bitshift_reference import Weights, linear_int8_reference, wide
from common.kernels.eager import loaded

MOST_LEVELS = 7  # magnitudes 1 to 64
MOST_TERMS = 2**17  # of a sum: 128 * 64 * MOST_TERMS is 2**30


def linear_int8(x, weights, bias, activation_bits):
    """x @ W.T + bias, (..., out), for Weights of shape (out, in).

    x floating: becomes int8 by truncation of x * 2**fraction, cut off at the ends (NaN becomes 0, nothing is counted),
    for activation_bits = (integer, fraction) of at most 8 bits in all. The exact sums become float32, are scaled, and
    bias, floating, is added; returns x's dtype. x int8: returns int32, exact, in units of the smallest magnitude of the
    weights; bias is int32 in these units. Forward only. Raises TypeError and ValueError for arguments other than these.
    """
    _check(x, weights, bias)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    shape = (*x.shape[:-1], weights.shape[0])
    if x.dtype == torch.int8:
        sums = _operator(rows, weights.codes, *weights[1:])
        return (sums if bias is None else sums + bias).reshape(shape)
    fraction = _fraction(activation_bits)
    sums = _operator(to_int8(rows.detach(), fraction), weights.codes, *weights[1:])
    y = sums.to(wide(x.dtype)) * 2.0 ** (weights.base + weights.zero - fraction)
    return (y if bias is None else y + bias.detach()).to(x.dtype).reshape(shape)


def to_int8(x, fraction):
    """int8 integers of x * 2**fraction, truncated toward zero, cut off at -128 and 127; NaN becomes 0."""
    return (x * 2.0**fraction).clamp(-128, 127).nan_to_num(0.0).to(torch.int8)  # scaled exactly, or out of range


def _fraction(activation_bits):
    try:
        integer, fraction = map(int, activation_bits)
    except (TypeError, ValueError):
        raise ValueError(f"bitshift_linear: activation_bits must be two integers, not {activation_bits!r}") from None
    if integer < 0 or integer + fraction > 8 or integer + fraction < 1:
        raise ValueError(
            "bitshift_linear: int8 arithmetic is for activation_bits of 1 to 8 in all, for example (4, 4), not "
            f"{integer} and {fraction}"
        )
    return fraction


def _check(x, weights, bias):
    levels = 2 ** (weights.bits - 1) - weights.zero
    if levels > MOST_LEVELS:
        kind = f"{weights.bits}-bit codes {'with' if weights.zero else 'without'} a zero"
        largest = 2 ** (levels - 1)
        raise ValueError(f"bitshift_linear: {kind} have integers up to +{largest}, and int8 ends at +127")
    if x.dtype != torch.int8 and not (x.is_floating_point() and x.element_size() >= 2):
        raise TypeError(f"bitshift_linear: x must be floating or int8 with int8 arithmetic, not {x.dtype}")
    given = [x, weights.codes] if bias is None else [x, weights.codes, bias]
    if len({tensor.device for tensor in given}) > 1:
        raise ValueError(f"bitshift_linear: x, weights and bias must be on one device, not {[t.device for t in given]}")
    if x.dim() < 1 or x.shape[-1] != weights.shape[1]:
        raise ValueError(f"bitshift_linear: x must have shape (..., {weights.shape[1]}), not {tuple(x.shape)}")
    if weights.shape[1] > MOST_TERMS:
        raise ValueError(f"bitshift_linear: int8 arithmetic is for at most {MOST_TERMS} inputs, not {weights.shape[1]}")
    _check_bias(x, weights, bias)


def _check_bias(x, weights, bias):
    if bias is None:
        return
    fits = bias.dtype == torch.int32 if x.dtype == torch.int8 else bias.is_floating_point()
    if bias.shape != weights.shape[:1] or not fits:
        wanted = "int32" if x.dtype == torch.int8 else "floating"
        kind = f"{tuple(bias.shape)}, {bias.dtype}"
        raise ValueError(f"bitshift_linear: bias must have shape {weights.shape[:1]} and be {wanted}, not {kind}")


@functools.cache
def _cuda_kernels():
    return loaded("bitshift_int8_cuda", "bitshift: plain PyTorch for int8 on CUDA: CuPy")


@functools.cache
def _cpu_kernels():
    kernels = loaded("bitshift_cpu", "bitshift: plain PyTorch for int8 on the CPU: numba")
    return kernels if kernels and kernels.takes_int8() else None


def _kernels(x):
    return _cuda_kernels() if x.is_cuda else _cpu_kernels() if x.is_cpu else None


@torch.library.custom_op("effnets::bitshift_linear_int8", mutates_args=())
def _operator(x: Tensor, codes: Tensor, shape: list[int], bits: int, base: int, zero: bool) -> Tensor:
    weights = Weights(codes, tuple(shape), bits, base, zero)
    kernels = _kernels(x)
    if codes.shape != (code_bytes(weights.shape, bits),):
        raise ValueError(f"bitshift_linear: {tuple(codes.shape)} codes do not fit weights of shape {weights.shape}")
    if kernels is None or 0 in (*x.shape, shape[0]):
        return linear_int8_reference(x, weights)
    return kernels.linear(x, weights) if x.is_cuda else kernels.linear_int8(x, weights)


@_operator.register_fake
def _fake(x, codes, shape, bits, base, zero):
    return x.new_empty((x.shape[0], shape[0]), dtype=torch.int32)
