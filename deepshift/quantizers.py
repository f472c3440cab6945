"""Rounding to fixed point and to powers of two, with the straight-through gradients of DeepShift (arXiv 1905.13298).

Pure functions on tensors; only the two named `..._`, and the clamping of trained weights, write into an argument.
Fixed-point rounding, which runs over every activation, is one pass on the CPU, compiled by numba, or plain PyTorch
without it. On a GPU that, and the rounding of weights, are one kernel each, compiled by PyTorch's jiterator.
"""

import functools
import logging
import math

import numpy as np
import torch
from torch import Tensor

from common.data.threads import run_chunks

LN2 = math.log(2)
ROUNDINGS = ("deterministic", "stochastic")
ELEMENTS_PER_THREAD = 1 << 17
_log = logging.getLogger(__name__)


def ps_shift_range(weight_bits: int) -> tuple[int, int]:
    """Exponents of DeepShift-PS weights, whose sign may be 0: (-(2**(bits-1) - 2), 0). ValueError below 2 bits."""
    if weight_bits < 2:
        raise ValueError(f"DeepShift-PS needs at least 2 weight bits, not {weight_bits}")
    return -(2 ** (weight_bits - 1) - 2), 0


def q_shift_range(weight_bits: int) -> tuple[int, int]:
    """Exponents of DeepShift-Q weights, which are never 0: (-(2**(bits-1) - 1), 0). ValueError below 1 bit."""
    if weight_bits < 1:
        raise ValueError(f"DeepShift-Q needs at least 1 weight bit, not {weight_bits}")
    return -(2 ** (weight_bits - 1) - 1), 0


def round_to_fixed(x: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
    """x rounded down to multiples of 2**-fraction_bits and cut off at -2**(integer_bits-1) and 2**(integer_bits-1) - 1.

    x: floating, any shape; returns the same shape and dtype. The upper end is an integer, as in the original.
    Raises ValueError for fewer than 1 integer bit; 1 gives sign(x) - 1, as in the original. No gradient.
    """
    if integer_bits < 1:
        raise ValueError(f"activations need at least 1 integer bit, not {integer_bits}")
    if integer_bits == 1:
        return torch.sign(x) - 1
    scale, low, high = 2.0**fraction_bits, -(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 1) - 1
    if (found := _on_cuda("round_to_fixed", x, scale=scale, inverse=1 / scale, low=low, high=high)) is not None:
        return found
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        if (kernel := _numba_round()) is not None and _is_dense(x):
            return _round_on_cpu(kernel, x, scale, 1 / scale, low, high)
    return torch.floor(x * scale).mul_(1 / scale).clamp_(low, high)


def round_values(x: Tensor, rounding: str = "deterministic") -> Tensor:
    """Nearest integers, ties to even; or, stochastic, floor(x) plus 1 with probability x - floor(x). No gradient."""
    if rounding == "deterministic":
        return torch.round(x)
    if rounding != "stochastic":
        raise ValueError(f"unknown rounding {rounding!r}; choose from {', '.join(ROUNDINGS)}")
    low = torch.floor(x)
    return low + torch.bernoulli((x - low).nan_to_num(0.0, 0.0, 0.0))  # -inf, the exponent of zero, has no fraction


def shift_and_sign(weight: Tensor, rounding: str = "deterministic") -> tuple[Tensor, Tensor]:
    """(shift, sign) with 2**shift * sign the power of two nearest to each weight on the logarithmic scale.

    Same shape and dtype as weight. Zero gives shift -inf and sign 0. No gradient.
    """
    # The natural logarithm, as in the original: log2 rounds differently next to a threshold.
    return round_values(weight.abs().log_().div_(LN2), rounding), torch.sign(weight)


def round_power_of_2(weight: Tensor, rounding: str = "deterministic") -> Tensor:
    """Signed powers of two, nearest on the logarithmic scale (threshold 2**(k + 0.5)); zero stays zero. No gradient."""
    return round_values(weight.abs().log_().div_(LN2), rounding).exp2_().copysign_(weight)


def clamp_magnitude_(weight: Tensor, low: float, high: float) -> Tensor:
    """In place: magnitudes above `high` become `high`, those below `low` become `low`; zero stays zero."""
    magnitude = weight.abs().clamp_(low, high).copysign_(weight)
    return weight.copy_(magnitude.masked_fill_(weight == 0, 0.0))


class _FixedPoint(torch.autograd.Function):
    """round_to_fixed; the gradient passes unchanged, also where the value was cut off."""

    @staticmethod
    def forward(ctx, x, integer_bits, fraction_bits):
        return round_to_fixed(x, integer_bits, fraction_bits)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


class _PSWeight(torch.autograd.Function):
    """2**round(shift) * sign(round(sign)) with the gradients of the original."""

    @staticmethod
    def forward(ctx, shift, sign, rounding, weight):
        if weight is None:
            power = round_values(shift, rounding).exp2_()
            weight = round_values(sign, rounding).sign_().mul_(power)
        ctx.save_for_backward(weight)
        return weight

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        # As in the original: the gradient of sign is not multiplied by 2**shift.
        grad_shift = None
        if ctx.needs_input_grad[0] and (grad_shift := _on_cuda("ps_gradient", weight, grad)) is None:
            grad_shift = (weight * LN2).mul_(grad)
        return grad_shift, grad, None, None


class _QWeight(torch.autograd.Function):
    """round_power_of_2; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, weight, rounding, rounded):
        return round_power_of_2(weight, rounding) if rounded is None else rounded

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def fixed_point(x: Tensor, bits: tuple[int, int]) -> Tensor:
    """round_to_fixed(x, *bits) with a straight-through gradient (Sec. 2); half precision is rounded in float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    return _FixedPoint.apply(x, *bits)


def ps_weight(shift: Tensor, sign: Tensor, shift_range: tuple[int, int], rounding: str = "deterministic") -> Tensor:
    """DeepShift-PS weights 2**round(shift) * sign(round(sign)), in {0, +-2**p}.

    shift, sign: float32 of one shape. `shift` is first clamped to shift_range in place, as in the original; `sign`
    is 0 up to a magnitude of 0.5. Gradients for upstream G: G * weight * ln 2 for shift, G for sign.
    """
    low, high = map(float, shift_range)
    found = _on_cuda("ps_weight", shift, sign, low=low, high=high) if rounding == "deterministic" else None
    if found is None:
        with torch.no_grad():
            shift.data.clamp_(low, high)
        return _PSWeight.apply(shift, sign, rounding, None)
    clamped, weight = found
    shift.data.copy_(clamped)  # in place: other addresses would not be those that a recorded step reads
    return _PSWeight.apply(shift, sign, rounding, weight)


def q_weight(weight: Tensor, shift_range: tuple[int, int], rounding: str = "deterministic") -> Tensor:
    """DeepShift-Q weights: the nearest power of two with an exponent in shift_range; zero stays zero.

    weight: float32; its magnitudes are first clamped to the range in place, as in the original. The gradient passes.
    """
    low, high = (2.0**end for end in shift_range)
    found = _on_cuda("q_weight", weight, low=low, high=high) if rounding == "deterministic" else None
    if found is None:
        with torch.no_grad():
            clamp_magnitude_(weight.data, low, high)
        return _QWeight.apply(weight, rounding, None)
    clamped, rounded = found
    weight.data.copy_(clamped)
    return _QWeight.apply(weight, rounding, rounded)


class _SquaredPowers(torch.autograd.Function):
    """sum((2**shift)**2) in one pass per direction."""

    @staticmethod
    def forward(ctx, shift):
        squares = (shift * 2).exp2_()
        ctx.save_for_backward(squares)
        return squares.sum()

    @staticmethod
    def backward(ctx, grad):
        (squares,) = ctx.saved_tensors
        return squares * (grad * 2 * LN2)


def shift_l2_norm(shifts, weight_decay: float) -> Tensor:
    """The regulariser of DeepShift-PS: 0.5 * weight_decay * sum((2**shift)**2) over all tensors, before rounding."""
    return 0.5 * weight_decay * sum(_SquaredPowers.apply(shift) for shift in shifts)


def _is_dense(x):
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _round_on_cpu(kernel, x, *numbers):
    result = torch.empty_like(x)  # keeps the memory layout, so both can be walked in the order of storage
    flat = [torch.as_strided(tensor.detach(), (x.numel(),), (1,)).numpy() for tensor in (x, result)]
    numbers = [np.float32(number) for number in numbers]
    run_chunks(lambda start, stop: kernel(*flat, *numbers, start, stop), x.numel(), ELEMENTS_PER_THREAD)
    return result


def _round_pass(x, result, scale, inverse, low, high, start, stop):
    """Elements [start, stop), compiled by numba. NaN fails both comparisons and stays NaN."""
    for i in range(start, stop):
        value = np.floor(x[i] * scale) * inverse
        value = low if value < low else value
        result[i] = high if value > high else value


@functools.cache
def _numba_round():
    """The compiled pass, or None, said once, where numba is not installed or switched off."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
    except ImportError as error:
        _log.warning("without numba (%s) activations are rounded by PyTorch, which is slower", error)
        return None
    try:
        return numba.njit(cache=True, nogil=True)(_round_pass)
    except RuntimeError:  # no folder that numba may write its cache to
        return numba.njit(nogil=True)(_round_pass)


# Per element: (source, names of its numbers, outputs). The first output of a weight is the clamped parameter.
CUDA_KERNELS = {
    "round_to_fixed": (
        """
template <typename T> void round_to_fixed(T x, T scale, T inverse, T low, T high, T& y) {
  T value = floor(x * scale) * inverse;
  value = value < low ? low : value;
  y = value > high ? high : value;
}
""",
        ("scale", "inverse", "low", "high"),
        1,
    ),
    "ps_weight": (
        """
template <typename T> void ps_weight(T shift, T sign, T low, T high, T& clamped, T& weight) {
  T value = shift < low ? low : shift;
  clamped = value > high ? high : value;
  T direction = rint(sign);
  T unit = direction > T(0) ? T(1) : direction < T(0) ? T(-1) : direction;
  weight = unit * exp2(rint(clamped));
}
""",
        ("low", "high"),
        2,
    ),
    "ps_gradient": (
        """
template <typename T> void ps_gradient(T weight, T grad, T& y) { y = weight * T(0.6931471805599453) * grad; }
""",
        (),
        1,
    ),
    "q_weight": (
        """
template <typename T> void q_weight(T weight, T low, T high, T& clamped, T& rounded) {
  T size = fabs(weight);
  size = size < low ? low : size > high ? high : size;
  clamped = weight == T(0) ? T(0) : copysign(size, weight);
  rounded = copysign(exp2(rint(log(fabs(clamped)) / T(0.6931471805599453))), clamped);
}
""",
        ("low", "high"),
        2,
    ),
}


@functools.cache
def _cuda_kernel(name):
    from torch.cuda import jiterator

    source, numbers, outputs = CUDA_KERNELS[name]
    return jiterator._create_multi_output_jit_fn(source, outputs, **dict.fromkeys(numbers, 1.0))


_refused = set()


def _on_cuda(name, *tensors, **numbers):
    """Result, or results, of one pass of a CUDA kernel, which PyTorch compiles; None where plain operations do it."""
    if not all(tensor.is_cuda and tensor.dtype == torch.float32 for tensor in tensors) or name in _refused:
        return None
    if torch.compiler.is_compiling():
        return None
    try:
        with torch.no_grad():
            return _cuda_kernel(name)(*(tensor.detach() for tensor in tensors), **numbers)
    except Exception as error:  # not a stable interface: whatever is wrong, PyTorch's own operations do it too
        _refused.add(name)
        _log.warning("%s takes several passes on this GPU: %s", name, str(error).splitlines()[0])
        return None
