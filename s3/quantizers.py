"""Weights of S3 and DenseShift from their latent tensors, with the papers' gradients (arXiv 2107.03453, Sec. 3).

Pure functions on tensors of one shape. h(x) = 1 where x > 0, else 0; s = +1 where the sign latent is >= 0, else -1.
With T shift latents, outermost first, the exponent e is the number of leading ones of h: the recursion
S_0 = 0, S_t = h_t (S_{t-1} + 1), e = S_T from the innermost on. The gradient of s and h is straight through, unclipped.
"""

import functools
import logging
import math

import numpy as np
import torch
from torch import Tensor

from common.data.threads import run_chunks

LN2 = math.log(2)
S3_BITS = (2, 3, 4)
ELEMENTS_PER_THREAD = 1 << 16
_log = logging.getLogger(__name__)


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
    """One pass over the latents per direction, on the CPU where numba is there; nothing is kept but the latents."""

    @staticmethod
    def forward(ctx, sign, val, *shifts):
        ctx.save_for_backward(sign, val, *shifts)
        if len(shifts) == 2 and (found := _on_cuda("s3_weight", sign, val, *shifts)) is not None:
            return found
        kernels = _kernels_for(sign, val, *shifts)
        if kernels is not None:
            return _run(kernels[0], (sign, val, *shifts), 1)[0]
        # A product, as in the original: zeros keep their sign.
        return _signs(sign) * (val > 0) * _powers(shifts, sign)

    @staticmethod
    def backward(ctx, grad):
        sign, val, *shifts = ctx.saved_tensors
        if len(shifts) == 2 and (found := _on_cuda("s3_gradients", grad, sign, val, *shifts)) is not None:
            return found
        kernels = _kernels_for(sign, val, *shifts)
        if kernels is not None and grad.dtype == torch.float32:
            return _run(kernels[1], (_laid_out_like(grad, sign), sign, val, *shifts), 4)
        scaled = grad * _powers(shifts, sign)
        grad_sign, grad_val = scaled * (val > 0), scaled * _signs(sign)
        base = grad_val * (val > 0) * LN2
        slopes = _slopes(shifts, _exponents(shifts, sign))
        return grad_sign, grad_val, *(base * slope for slope in slopes)


class _DenseShiftWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sign, *shifts):
        ctx.save_for_backward(sign, *shifts)
        return _signs(sign) * _powers(shifts, sign)

    @staticmethod
    def backward(ctx, grad):
        sign, *shifts = ctx.saved_tensors
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


def _kernels_for(*latents):
    """The compiled forward and backward pass of 3 bits for these tensors, None where PyTorch's operations do it."""
    first = latents[0]
    if len(latents) != 4 or first.device.type != "cpu" or torch.compiler.is_compiling() or not _is_dense(first):
        return None
    if any(x.dtype != torch.float32 or x.shape != first.shape or x.stride() != first.stride() for x in latents):
        return None
    return _compiled()


def _is_dense(x):
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _laid_out_like(x, like):
    return x if x.stride() == like.stride() else torch.empty_like(like).copy_(x)


def _run(kernel, inputs, count):
    """Run a pass over tensors of one layout in the order of storage; returns `count` new tensors."""
    results = tuple(torch.empty_like(inputs[-1]) for _ in range(count))  # keeps the memory layout
    flat = [torch.as_strided(x.detach(), (x.numel(),), (1,)).numpy() for x in (*inputs, *results)]
    run_chunks(lambda start, stop: kernel(*flat, start, stop), inputs[0].numel(), ELEMENTS_PER_THREAD)
    return results


def _forward_pass(sign, val, shift, shift2, weight, start, stop):
    for i in range(start, stop):
        u, v, a, b = sign[i], val[i], shift[i], shift2[i]
        inner = np.float32(4) if b > 0 else np.float32(2)
        power = inner if a > 0 else np.float32(1)
        size = power if v > 0 else np.float32(0)
        weight[i] = size if u >= 0 else -size


def _backward_pass(grad, sign, val, shift, shift2, grad_sign, grad_val, grad_shift, grad_shift2, start, stop):
    ln2 = np.float32(LN2)
    for i in range(start, stop):
        g, u, v, a, b = grad[i], sign[i], val[i], shift[i], shift2[i]
        inner = np.float32(4) if b > 0 else np.float32(2)
        power = inner if a > 0 else np.float32(1)
        scaled = g * power
        signed = scaled if u >= 0 else -scaled
        base = signed * ln2 if v > 0 else np.float32(0)
        grad_sign[i] = scaled if v > 0 else np.float32(0)
        grad_val[i] = signed
        grad_shift[i] = base * (np.float32(2) if b > 0 else np.float32(1))
        grad_shift2[i] = base if a > 0 else np.float32(0)


@functools.cache
def _compiled():
    """Both passes for 3 bits compiled by numba, or None, said once, where it is not installed or switched off."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
    except ImportError as error:
        _log.warning("without numba (%s) the weights are built by PyTorch, which is slower", error)
        return None
    try:
        return tuple(numba.njit(cache=True, nogil=True)(each) for each in (_forward_pass, _backward_pass))
    except RuntimeError:  # no folder that numba may write its cache to
        return tuple(numba.njit(nogil=True)(each) for each in (_forward_pass, _backward_pass))


# Three bits, per element: (source, inputs, outputs).
CUDA_KERNELS = {
    "s3_weight": (
        """
template <typename T> void s3_weight(T sign, T val, T shift, T shift2, T& weight) {
  T power = shift > T(0) ? shift2 > T(0) ? T(4) : T(2) : T(1);
  T size = val > T(0) ? power : T(0);
  weight = sign >= T(0) ? size : -size;
}
""",
        4,
        1,
    ),
    "s3_gradients": (
        """
template <typename T> void s3_gradients(
    T grad, T sign, T val, T shift, T shift2, T& grad_sign, T& grad_val, T& grad_shift, T& grad_shift2) {
  T power = shift > T(0) ? shift2 > T(0) ? T(4) : T(2) : T(1);
  T scaled = grad * power;
  grad_sign = val > T(0) ? scaled : T(0);
  grad_val = sign >= T(0) ? scaled : -scaled;
  T base = val > T(0) ? grad_val * T(0.6931471805599453) : T(0);
  grad_shift = shift2 > T(0) ? base * T(2) : base;
  grad_shift2 = shift > T(0) ? base : T(0);
}
""",
        5,
        4,
    ),
}


@functools.cache
def _cuda_kernel(name):
    from torch.cuda import jiterator

    source, _, outputs = CUDA_KERNELS[name]
    return jiterator._create_multi_output_jit_fn(source, outputs)


_refused = set()


def _on_cuda(name, *tensors):
    """Result, or results, of one pass of a CUDA kernel, which PyTorch compiles; None where plain operations do it."""
    if not all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors) or name in _refused:
        return None
    if torch.compiler.is_compiling():
        return None
    try:
        with torch.no_grad():
            return _cuda_kernel(name)(*(tensor.detach() for tensor in tensors))
    except Exception as error:  # not a stable interface: whatever is wrong, PyTorch's own operations do it too
        _refused.add(name)
        _log.warning("%s takes several passes on this GPU: %s", name, str(error).splitlines()[0])
        return None
