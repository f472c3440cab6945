"""Linear layers and convolutions whose weights are powers of two, computed from packed codes (DeepShift, S3).

Two arithmetics. "float": each code becomes its exact power of two, products are accumulated in float32. "fixed": the
papers' integers, one bitwise shift and one addition or subtraction per weight (DeepShift, Sec. 3 and its kernels).
Both are torch operators, effnets::bitshift_linear and effnets::bitshift_conv2d: numba on the CPU, CuPy on CUDA devices,
plain PyTorch elsewhere, which is the definition: unpack, then the library's product. Forward only.
"""

import functools

import torch

from common.kernels.bitshift_fixed import fixed_layer, overflow_count
from common.kernels.bitshift_int8 import linear_int8
from common.kernels.bitshift_pack import (
    GROUP,
    PackedShiftWeights,
    code_bytes,
    output_size,
    pack_shift_weights,
)
from common.kernels.bitshift_reference import (
    MOST_TERMS,
    Weights,
    as_wide,
    conv2d_fixed_reference,
    conv2d_reference,
    linear_fixed_reference,
    linear_reference,
)
from common.kernels.eager import is_plain, loaded
from common.kernels.shift2d import memory_format_of

__all__ = ["PackedShiftWeights", "bitshift_conv2d", "bitshift_linear", "overflow_count", "pack_shift_weights"]

FLOAT = -1  # `fraction` of the operators that asks for float arithmetic
MOST_LEFT_SHIFT = 16  # of the fixed-point path: exact 64-bit sums up to here


def bitshift_linear(x, packed, bias=None, arithmetic="float", activation_bits=(16, 16)):
    """x @ W.T + bias with packed power-of-two weights W of shape (out, in).

    x: (..., in), floating, any device; bias: (out,) floating or None. Returns (..., out) in x's dtype.
    packed: PackedShiftWeights on x's device. arithmetic: "float", accumulated in at least float32; or "fixed", with
    activation_bits = (integer, fraction): x and bias become integers by truncation of x * 2**fraction, every product is
    rounded down to a multiple of 2**-fraction, sums are int32 and wrap. x and bias may also be these int32 integers
    themselves; then the result is int32 too. Integers that do not fit are counted: see `overflow_count`. Or "int8",
    exact sums of int8 activations and integer weights: see `linear_int8` of bitshift_int8.py.
    Raises TypeError and ValueError for arguments other than these; RuntimeError when a gradient is asked for.
    """
    name = "bitshift_linear"
    if arithmetic == "int8":
        return linear_int8(x, _weights(packed, name, 2), bias, activation_bits)
    calls_kernel = is_plain(x, bias)
    if calls_kernel and arithmetic == "float":  # the shortest way: of one row every microsecond shows
        run = _one_row(x, packed, bias)
        if run:
            y = run(x, packed.codes)
            y = y if bias is None else y.add_(bias)
            return y if y.dtype == x.dtype else y.to(x.dtype)
    weights, fraction = _weights(packed, name, 2), _fraction(arithmetic, activation_bits, name)
    if calls_kernel:
        return _linear(x, weights, bias, fraction)
    return _linear_operator(x, weights.codes, bias, *weights[1:], fraction)


def bitshift_conv2d(
    x,
    packed,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    arithmetic="float",
    activation_bits=(16, 16),
):
    """F.conv2d with packed power-of-two weights of shape (out, in / groups, kh, kw).

    x: (N, in, H, W), floating, any device; bias: (out,) or None; stride, padding, dilation: an int or a pair, zero
    padding. Returns (N, out, H', W') in x's dtype and memory format; channels-last is the faster one. packed,
    arithmetic, activation_bits, int32 input, errors: as `bitshift_linear`.
    """
    name = "bitshift_conv2d"
    weights, fraction = _weights(packed, name, 4), _fraction(arithmetic, activation_bits, name)
    stride, padding, dilation = _pair(stride, "stride", 1), _pair(padding, "padding", 0), _pair(dilation, "dilation", 1)
    geometry = stride, padding, dilation, groups
    if is_plain(x, bias):
        return _conv2d(x, weights, bias, *geometry, fraction)
    return _conv2d_operator(x, weights.codes, bias, *weights[1:], *geometry, fraction)


def _weights(packed, name, dimensions):
    if not isinstance(packed, PackedShiftWeights):
        kind = type(packed).__name__
        raise TypeError(f"{name}: weights must be PackedShiftWeights (of pack_shift_weights), not {kind}")
    if len(packed.shape) != dimensions:
        raise ValueError(f"{name}: weights must have {dimensions} dimensions, not shape {packed.shape}")
    return Weights(packed.codes, packed.shape, packed.bits, packed.base, packed.zero)


def _fraction(arithmetic, activation_bits, name):
    if arithmetic == "float":
        return FLOAT
    if arithmetic != "fixed":
        more = ' or "int8"' if name == "bitshift_linear" else ""
        raise ValueError(f'{name}: arithmetic must be "float" or "fixed"{more}, not {arithmetic!r}')
    try:
        integer, fraction = map(int, activation_bits)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: activation_bits must be two integers, not {activation_bits!r}") from None
    if integer < 1 or fraction < 0 or integer + fraction > 32:
        raise ValueError(
            f"{name}: activation_bits must be at least 1 integer bit, no negative number of fraction bits, and at most "
            f"32 in all, not {integer} and {fraction}"
        )
    return fraction


def _pair(value, what, least):
    if type(value) is int and value >= least:
        return value, value
    pair = (value, value) if isinstance(value, (int, torch.SymInt)) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) and n >= least for n in pair):
        raise ValueError(f"bitshift_conv2d: {what} must be one or two integers of at least {least}, not {value}")
    return pair


def _check(name, x, weights, bias, fraction):
    if x.device != weights.codes.device or (bias is not None and bias.device != x.device):
        devices = {x.device, weights.codes.device} | ({bias.device} if bias is not None else set())
        raise ValueError(f"{name}: x, weights and bias must be on one device, not {', '.join(map(str, devices))}")
    if not (x.is_floating_point() or (x.dtype == torch.int32 and fraction != FLOAT)) or x.element_size() < 2:
        raise TypeError(f"{name}: x must be floating (or int32 with fixed arithmetic), not {x.dtype}")
    if weights.codes.dtype != torch.uint8 or weights.codes.shape != (code_bytes(weights.shape, weights.bits),):
        raise ValueError(f"{name}: {tuple(weights.codes.shape)} codes do not fit weights of shape {weights.shape}")
    if bias is not None and (bias.shape != weights.shape[:1] or bias.is_floating_point() != x.is_floating_point()):
        kind = f"{tuple(bias.shape)}, {bias.dtype}"
        raise ValueError(f"{name}: bias must have shape {weights.shape[:1]} and be like x ({x.dtype}), not {kind}")
    terms = weights.shape[1] if len(weights.shape) == 2 else weights.shape[1] * weights.shape[2] * weights.shape[3]
    if fraction != FLOAT and (_highest(weights) > MOST_LEFT_SHIFT or terms > MOST_TERMS):
        limits = f"exponents up to {MOST_LEFT_SHIFT} and {MOST_TERMS} terms"
        raise ValueError(f"{name}: fixed arithmetic is for {limits}, not {_highest(weights)} and {terms}")


def _highest(weights):
    return weights.base + 2 ** (weights.bits - 1) - 1


def _check_linear(x, weights, bias, fraction):
    _check("bitshift_linear", x, weights, bias, fraction)
    if x.dim() < 1 or x.shape[-1] != weights.shape[1]:
        raise ValueError(f"bitshift_linear: x must have shape (..., {weights.shape[1]}), not {tuple(x.shape)}")


def _check_conv2d(x, weights, bias, groups, fraction):
    _check("bitshift_conv2d", x, weights, bias, fraction)
    if groups < 1 or weights.shape[0] % groups:
        raise ValueError(f"bitshift_conv2d: groups must divide the {weights.shape[0]} outputs, not be {groups}")
    if x.dim() != 4 or x.shape[1] != weights.shape[1] * groups:
        channels = weights.shape[1] * groups
        raise ValueError(f"bitshift_conv2d: x must have shape (N, {channels}, H, W), not {tuple(x.shape)}")


# The operators.


@functools.cache
def _cpu_kernels():
    return loaded("bitshift_cpu", "bitshift: plain PyTorch on the CPU, which is slower: numba")


@functools.cache
def _cuda_kernels():
    return loaded("bitshift_cuda", "bitshift: plain PyTorch on CUDA, which is slower: CuPy")


_KERNELS = {"cpu": _cpu_kernels, "cuda": _cuda_kernels}


def _kernels(x):
    """Module of the kernels of x's device, or None where only plain PyTorch is left (and for float64)."""
    find = _KERNELS.get(x.device.type)
    return find() if find and x.dtype != torch.float64 else None


def _linear(x, weights, bias, fraction):
    _check_linear(x, weights, bias, fraction)
    kernels = _kernels(x)
    if fraction != FLOAT:
        return fixed_layer(x, bias, fraction, lambda integers: _linear_sums(kernels, integers, weights), -1)
    if kernels is None:
        return linear_reference(x, weights, bias)
    rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if x.is_cuda:  # its kernels take x's dtype and the bias
        y = kernels.linear(rows, weights, bias)
    else:
        y = kernels.linear(rows, weights)
        y = y if bias is None else y + bias
        y = (y if y.dtype == x.dtype else y.to(x.dtype)).contiguous()
    return y if x.dim() == 2 else y.reshape((*x.shape[:-1], weights.shape[0]))


def _one_row(x, packed, bias):
    """The CPU kernel for one row of contiguous x, checked once; None: it is another case, or wrong."""
    if not isinstance(packed, PackedShiftWeights) or not (x.is_cpu and x.is_contiguous() and packed.codes.is_cpu):
        return None
    codes = packed.codes
    added = None if bias is None else (bias.shape, bias.dtype, bias.is_cpu)
    kinds = x.shape, x.dtype, codes.shape, codes.dtype, added
    return _find_one_row(_KERNELS["cpu"](), *kinds, packed.shape, packed.bits, packed.base, packed.zero)


@functools.lru_cache(maxsize=256)
def _find_one_row(kernels, x_shape, x_dtype, codes_shape, codes_dtype, added, shape, bits, base, zero):
    if not kernels or len(shape) != 2 or x_shape[-1:] != shape[1:] or x_shape.numel() != shape[1]:
        return None
    is_right = x_dtype in kernels.input_types() and codes_dtype == torch.uint8
    is_right = is_right and codes_shape == (code_bytes(shape, bits),) and added in (None, (shape[:1], x_dtype, True))
    if not (is_right and shape[0] and shape[1]) or shape[0] % GROUP or shape[1] % 8:
        return None
    return kernels.few_rows((*x_shape[:-1], shape[0]), shape[1], bits, base, zero, x_dtype)


def _linear_sums(kernels, integers, weights):
    rows = integers.reshape(integers.shape[:-1].numel(), integers.shape[-1])
    sums = kernels.linear_fixed(rows, weights) if kernels else None
    if sums is None:
        sums = linear_fixed_reference(rows, weights)
    return sums.reshape(*integers.shape[:-1], weights.shape[0])


def _conv2d_sums(kernels, integers, weights, geometry):
    sums = kernels.conv2d_fixed(integers, weights, *geometry) if kernels else None
    return conv2d_fixed_reference(integers, weights, *geometry) if sums is None else sums


def _conv2d(x, weights, bias, stride, padding, dilation, groups, fraction):
    _check_conv2d(x, weights, bias, groups, fraction)
    output_size(x.shape, weights.shape, stride, padding, dilation)
    geometry, kernels = (stride, padding, dilation, groups), _kernels(x)
    if fraction != FLOAT:
        y = fixed_layer(x, bias, fraction, lambda integers: _conv2d_sums(kernels, integers, weights, geometry), 1)
        return y.contiguous(memory_format=memory_format_of(x))
    if kernels is None:
        return conv2d_reference(x, weights, bias, *geometry)
    if x.is_cuda:
        return kernels.conv2d(x, weights, bias, *geometry)
    if x.dtype in kernels.input_types() and (bias is None or bias.dtype == x.dtype):
        return kernels.conv2d(x, weights, bias, *geometry)
    return kernels.conv2d(x.float(), weights, as_wide(bias, x), *geometry).to(x.dtype)


def _linear_kernel(x, codes, bias, shape, bits, base, zero, fraction):
    return _linear(x, Weights(codes, tuple(shape), bits, base, zero), bias, fraction)


def _conv2d_kernel(x, codes, bias, shape, bits, base, zero, stride, padding, dilation, groups, fraction):
    weights = Weights(codes, tuple(shape), bits, base, zero)
    return _conv2d(x, weights, bias, tuple(stride), tuple(padding), tuple(dilation), groups, fraction)


def _linear_fake(x, codes, bias, shape, bits, base, zero, fraction):
    _check_linear(x, Weights(codes, tuple(shape), bits, base, zero), bias, fraction)
    return x.new_empty((*x.shape[:-1], shape[0]))


def _conv2d_fake(x, codes, bias, shape, bits, base, zero, stride, padding, dilation, groups, fraction):
    weights = Weights(codes, tuple(shape), bits, base, zero)
    _check_conv2d(x, weights, bias, groups, fraction)
    shape = output_size(x.shape, weights.shape, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


class _ForwardOnly(torch.autograd.Function):
    """Marks an output as differentiable so that asking for the gradient says why there is none."""

    @staticmethod
    def forward(ctx, operator, x, codes, bias, *rest):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, codes, bias, *rest)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("bitshift: forward only, there is no gradient through packed weights: train unpacked ones")


def _register(name, schema, kernel, fake):
    def autograd(x, codes, bias, *rest):
        wanted = x.requires_grad or (bias is not None and bias.requires_grad)
        if wanted and torch.is_grad_enabled():
            return _ForwardOnly.apply(operator, x, codes, bias, *rest)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, codes, bias, *rest)

    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"effnets::{name}", fake, lib=_library)
    operator = getattr(torch.ops.effnets, name).default
    return operator


_library = torch.library.Library("effnets", "FRAGMENT")
_packed = "Tensor x, Tensor codes, Tensor? bias, int[] shape, int bits, int base, bool zero"
_geometry = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_linear_operator = _register("bitshift_linear", f"({_packed}, int fraction) -> Tensor", _linear_kernel, _linear_fake)
_conv2d_operator = _register(
    "bitshift_conv2d", f"({_packed}, {_geometry}, int fraction) -> Tensor", _conv2d_kernel, _conv2d_fake
)
