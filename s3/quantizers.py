"""Weights of S3 and DenseShift from their latent tensors, with the papers' gradients (arXiv 2107.03453, Sec. 3).

Pure functions on tensors of one shape. h(x) = 1 where x > 0, else 0; s = +1 where the sign latent is >= 0, else -1.
With T shift latents, outermost first, the exponent e is the number of leading ones of h: the recursion
S_0 = 0, S_t = h_t (S_{t-1} + 1), e = S_T from the innermost on. The gradient of s and h is straight through, unclipped.
"""

import torch
from torch import Tensor

from s3 import passes_cpu, passes_cuda
from s3.passes_cpu import LN2

S3_BITS = (2, 3, 4)


def s3_shift_count(bits: int) -> int:
    """Shift latents of S3: 2**(bits - 1) - 2 = T, for values 0, +-1 ... +-2**T. ValueError unless bits is 2 to 4."""
    _check_bits(bits)
    return 2 ** (bits - 1) - 2


def denseshift_shift_count(bits: int) -> int:
    """Shift latents of DenseShift, which has no zero: 2**(bits - 1) - 1. ValueError unless bits is 2 to 4."""
    _check_bits(bits)
    return 2 ** (bits - 1) - 1


def _check_bits(bits):
    if isinstance(bits, bool) or bits not in S3_BITS:
        raise ValueError(f"weights must have 2, 3 or 4 bits, not {bits}")


def s3_weight(sign: Tensor, val: Tensor, *shifts: Tensor) -> Tensor:
    """S3 weights s * h(val) * 2**e, in {0, +-1, ..., +-2**T}, of the latents' shape, dtype and device  (Sec. 3).

    sign, val, shifts: floating, of one shape; shifts outermost first (2 bits: none, 3 bits: 2, 4 bits: 6).
    Gradients for upstream G: |w| G for sign, G s 2**e for val, G w ln2 de/dh_t for shift t.
    """
    return _S3Weight.apply(sign, val, *shifts)


def denseshift_weight(sign: Tensor, *shifts: Tensor) -> Tensor:
    """DenseShift weights s * 2**e, in {+-1, ..., +-2**T}, never zero  (ICCV 2023, the successor of S3).

    Arguments as s3_weight. The gradient is that of s * sqrt(e + 1), not of s * 2**e.
    """
    return _DenseShiftWeight.apply(sign, *shifts)


def dense_weight_penalty(vals) -> Tensor:
    """R, the sum of max(-val, 0) over all elements of all sparse latents: what pushes zeros to return  (Sec. 3).

    vals: floating tensors; returns a scalar. The gradient at 0 is -1/2. Without tensors: 0.
    """
    return _NegativeSum.apply(*vals) if vals else torch.zeros(())


def _powers(shifts, like):
    """2**e."""
    power = torch.ones_like(like)
    for shift in reversed(shifts):
        power = torch.where(shift > 0, 2 * power, 1)
    return power


def _exponents(shifts, like):
    """[S_0, ..., S_T], innermost first."""
    exponents = [torch.zeros_like(like)]
    for shift in reversed(shifts):
        exponents.append(torch.where(shift > 0, exponents[-1] + 1, 0))
    return exponents


def _slopes(shifts, exponents):
    """de/dh_t = (S_{t-1} + 1) * (product of the h outside of t), outermost first."""
    outer = torch.ones_like(exponents[0])
    for shift, inner in zip(shifts, reversed(exponents[:-1]), strict=True):
        yield (inner + 1) * outer
        outer = torch.where(shift > 0, outer, 0)


def _signs(sign):
    return torch.where(sign >= 0, 1.0, -1.0).to(sign.dtype)


class _S3Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *latents):
        return _weight(ctx, "s3", _s3_weight, latents)

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, "s3", _s3_gradients, grad)


class _DenseShiftWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *latents):
        return _weight(ctx, "denseshift", _denseshift_weight, latents)

    @staticmethod
    def backward(ctx, grad):
        return _gradients(ctx, "denseshift", _denseshift_gradients, grad)


def _weight(ctx, method, operations, latents):
    """One pass over the latents, where a kernel fits: on the CPU nothing is kept but them, on CUDA their code."""
    ctx.count = len(latents)
    found = passes_cuda.weight_and_code(method, *latents)
    if found is not None:
        ctx.save_for_backward(found[1])
        return found[0]
    ctx.save_for_backward(*latents)
    found = passes_cpu.weights(method, *latents)
    return operations(*latents) if found is None else found


def _gradients(ctx, method, operations, grad):
    if len(ctx.saved_tensors) == 1:  # no weight has fewer than two latents: this is their code
        found = passes_cuda.gradients(method, ctx.count, ctx.saved_tensors[0], grad)
        latents = passes_cuda.decoded(ctx.saved_tensors[0], ctx.count) if found is None else ()
    else:
        latents = ctx.saved_tensors
        found = passes_cpu.gradients(method, grad, *latents)
    return operations(grad, *latents) if found is None else found


def _s3_weight(sign, val, *shifts):
    # A product, as in the original: zeros keep their sign.
    return _signs(sign) * (val > 0) * _powers(shifts, sign)


def _s3_gradients(grad, sign, val, *shifts):
    scaled = grad * _powers(shifts, sign)
    grad_sign, grad_val = scaled * (val > 0), scaled * _signs(sign)
    base = grad_val * (val > 0) * LN2
    slopes = _slopes(shifts, _exponents(shifts, sign))
    return grad_sign, grad_val, *(base * slope for slope in slopes)


def _denseshift_weight(sign, *shifts):
    return _signs(sign) * _powers(shifts, sign)


def _denseshift_gradients(grad, sign, *shifts):
    exponents = _exponents(shifts, sign)
    root = (exponents[-1] + 1).sqrt()
    base = grad * _signs(sign) / (2 * root)
    return grad * root, *(base * slope for slope in _slopes(shifts, exponents))


class _NegativeSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *vals):
        ctx.save_for_backward(*vals)
        return -sum(val.clamp(max=0).sum() for val in vals)

    @staticmethod
    def backward(ctx, grad):
        # 0 above zero, -1 below, -1/2 at zero, where the original's elementwise maximum splits its gradient.
        return tuple((torch.sign(val) - 1).mul_(grad / 2) for val in ctx.saved_tensors)
