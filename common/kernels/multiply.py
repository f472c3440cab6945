"""Linear layers and convolutions without a library's help, one multiplication per term.

The baseline of DeepShift's latency comparison: the same loops as its shift kernels (`bitshift`), with ordinary weights.
Torch operators effnets::multiply_linear and effnets::multiply_conv2d: numba on the CPU, CuPy on CUDA devices, PyTorch's
own layers where these are missing. Forward only.
"""

import functools

import torch
import torch.nn.functional as F

from common.kernels.bitshift_pack import output_size
from common.kernels.eager import loaded


def multiply_linear(x, weight, bias=None):
    """F.linear by a naive kernel. x: (..., in), weight: (out, in), bias: (out,) or None, all float32 on one device.

    Returns (..., out). Raises TypeError and ValueError for other types and shapes. (DeepShift's unoptimized kernels)
    """
    return _linear_operator(x, weight, bias)


def multiply_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """F.conv2d by a naive kernel. x: (N, in, H, W), weight: (out, in / groups, kh, kw), bias: (out,) or None; float32.

    stride, padding, dilation: an int or a pair; zero padding. Returns (N, out, H', W'). Errors: as multiply_linear.
    """
    pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    return _conv2d_operator(x, weight, bias, *pairs, groups)


def _check(name, x, weight, bias, dimensions, inputs):
    given = [x, weight] if bias is None else [x, weight, bias]
    if any(t.dtype != torch.float32 for t in given) or len({t.device for t in given}) > 1:
        raise TypeError(f"{name}: x, weight and bias must be float32 on one device, not {[t.dtype for t in given]}")
    if weight.dim() != dimensions or weight.shape[1] != inputs or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [tuple(t.shape) for t in given]
        raise ValueError(f"{name}: shapes of x, weight and bias do not fit: {shapes}")


def _check_conv2d(x, weight, bias, stride, padding, dilation, groups):
    sizes = [*stride, *dilation, groups]
    if x.dim() != 4 or min(sizes) < 1 or min(padding) < 0 or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(
            f"multiply_conv2d: cannot convolve x {tuple(x.shape)} with stride {stride}, padding {padding}, dilation "
            f"{dilation} and {groups} groups"
        )
    _check("multiply_conv2d", x, weight, bias, 4, x.shape[1] // groups)
    return output_size(x.shape, weight.shape, stride, padding, dilation)


@functools.cache
def _kernels(device_type):
    module = {"cpu": "multiply_cpu", "cuda": "multiply_cuda"}.get(device_type)
    return module and loaded(module, f"multiply: PyTorch's own layers on {device_type}")


def _add(y, bias, shape):
    return y if bias is None else y + bias.view(shape)


def _linear(x, weight, bias):
    _check("multiply_linear", x, weight, bias, 2, x.shape[-1] if x.dim() else -1)
    kernels = _kernels(x.device.type)
    if kernels is None or x.numel() == 0 or weight.numel() == 0:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(len(rows), len(weight))
    kernels.linear(rows, weight.contiguous(), y)
    return _add(y, bias, (-1,)).view(*x.shape[:-1], len(weight))


def _conv2d(x, weight, bias, stride, padding, dilation, groups):
    shape = _check_conv2d(x, weight, bias, stride, padding, dilation, groups)
    kernels = _kernels(x.device.type)
    if kernels is None or x.numel() == 0 or weight.numel() == 0:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous()
    y = x.new_empty(shape)
    kernels.conv2d(x.contiguous(), weight.contiguous(), y, stride, padding, dilation, groups)
    return _add(y, bias, (-1, 1, 1))


def _linear_fake(x, weight, bias):
    _check("multiply_linear", x, weight, bias, 2, x.shape[-1] if x.dim() else -1)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _conv2d_fake(x, weight, bias, stride, padding, dilation, groups):
    return x.new_empty(_check_conv2d(x, weight, bias, stride, padding, dilation, groups))


def _register(name, schema, kernel, fake):
    _library.define(name + schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effnets::{name}", fake, lib=_library)
    return getattr(torch.ops.effnets, name).default


_library = torch.library.Library("effnets", "FRAGMENT")
_geometry = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_linear_operator = _register(
    "multiply_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _linear_fake
)
_conv2d_operator = _register(
    "multiply_conv2d", f"(Tensor x, Tensor weight, Tensor? bias, {_geometry}) -> Tensor", _conv2d, _conv2d_fake
)
