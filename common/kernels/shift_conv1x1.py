"""A shift and the 1x1 convolution that follows it in one pass (ShiftNet, arXiv 1711.08141, Sec. 3.2), for inference.

`shift_conv1x1` is the torch operator effnets::shift_conv1x1: numba on the CPU, CuPy on CUDA devices; elsewhere, and for
gradients, shift2d and F.conv2d, which are its definition. The fused kernels read each input where its shift puts it, so
the shifted tensor is never written.
"""

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels.eager import is_plain, loaded
from common.kernels.shift2d import memory_format_of, shift2d


def shift_conv1x1(x, weight, bias=None, stride=1, kernel_size=3, dilation=1, by_tap=False):
    """F.conv2d(shift2d(x, kernel_size, dilation), weight, bias, stride), fused where that is faster.

    x: (N, C, H, W), weight: (out, C, 1, 1), bias: (out,) or None, floating, one dtype and device. Returns
    (N, out, ceil(H / stride), ceil(W / stride)) in x's dtype and memory format. Differentiable, but then not fused.
    by_tap: the channels of x and weight are in the order `tap_order` instead; each moves as before. Faster, above all
    where stride is 2, if `gains_from_tap_order` says so.
    The sums' order differs from F.conv2d's, and does not depend on the number of threads.
    Raises TypeError and ValueError for arguments other than these.
    """
    calls_kernel = is_plain(x, weight, bias)
    if calls_kernel and x.is_cpu and not torch.is_autocast_enabled("cpu"):  # the shortest way: small layers take 0.2 ms
        find = _prepared(x, weight, bias, stride, kernel_size, dilation, by_tap)
        if find:
            write, size, strides = find
            y = x.new_empty_strided(size, strides)
            write(x, weight, bias, y)
            return y
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        return shift_conv1x1_reference(x, weight, bias, stride, kernel_size, dilation, by_tap)
    call = _shift_conv1x1 if calls_kernel else _operator
    return call(x, weight, bias, stride, kernel_size, dilation, by_tap)


def shift_conv1x1_reference(x, weight, bias=None, stride=1, kernel_size=3, dilation=1, by_tap=False):
    """The definition of shift_conv1x1: a shift, then a convolution."""
    memory_format = memory_format_of(x)
    if by_tap:
        x, weight = _in_order(x, weight, kernel_size)
    y = F.conv2d(shift2d(x, kernel_size, dilation), weight, bias, stride)
    return y.contiguous(memory_format=memory_format)


def taps(channels, kernel_size=3):
    """Which of the kernel's positions, row by row, each channel takes its pixels from: (channels,), int64.

    c modulo kernel_size**2; that in the middle for the last channels, which `shift2d` copies.
    """
    tap = torch.arange(channels) % kernel_size**2
    tap[channels // kernel_size**2 * kernel_size**2 :] = kernel_size // 2 * (kernel_size + 1)
    return tap


def tap_order(channels, kernel_size=3):
    """Order of channels in which those that `shift2d` moves alike are neighbours: (channels,), int64.

    shift_conv1x1(x[:, order], weight[:, order], by_tap=True) is shift_conv1x1(x, weight). A network is brought into
    this order once and for all through the weights of the layer before. Displacements that are odd and even alike are
    neighbours as well: with stride 2 no others meet in a pixel, so that of each pixel one piece is read.
    """
    tap, half = taps(channels, kernel_size), kernel_size // 2
    parity = (tap // kernel_size - half) % 2 * 2 + (tap % kernel_size - half) % 2
    return (parity * kernel_size**2 + tap).argsort(stable=True)


def gains_from_tap_order(weight, kernel_size=3, dilation=1):
    """Whether shift_conv1x1 of channels-last tensors with this weight, (out, C, 1, 1), is fused and faster `by_tap`.

    Elsewhere (GPUs, processors with AVX-512, without numba, other dtypes than float32) `by_tap` costs a copy of x.
    """
    find_kernel = _KERNELS.get(weight.device.type) if weight.device.type in _TAKES_TAP_ORDER else None
    kernel = find_kernel and find_kernel()
    kind = weight.dtype, weight.shape[1], weight.shape[0], kernel_size, dilation
    return bool(kernel and _module_of(kernel).takes(*kind))


def _in_order(x, weight, kernel_size):
    """Channels as shift2d wants them, from those in the order `tap_order`."""
    back = tap_order(x.shape[1], kernel_size).argsort().to(x.device)
    ordered = x[:, back].contiguous(memory_format=memory_format_of(x))
    return ordered, weight[:, back]


def _check(x, weight, bias, stride, kernel_size, dilation):
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"shift_conv1x1: x and weight must have shapes (N, C, H, W) and (out, C, 1, 1), not {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"shift_conv1x1: bias must have shape {tuple(weight.shape[:1])}, not {tuple(bias.shape)}")
    given = [x, weight] if bias is None else [x, weight, bias]
    if not x.is_floating_point() or any(each.dtype != x.dtype or each.device != x.device for each in given):
        kinds = ", ".join(f"{each.dtype} on {each.device}" for each in given)
        raise TypeError(f"shift_conv1x1: tensors must be floating, of one dtype, on one device, not {kinds}")
    for name, value in (("stride", stride), ("kernel_size", kernel_size), ("dilation", dilation)):
        if not 1 <= value < 2**31:
            raise ValueError(f"shift_conv1x1: {name} must be at least 1 and below 2**31, not {value}")


def _output(x, weight, stride):
    # Not a view of x's strides: sizes may differ in every dimension.
    size = x.shape[0], weight.shape[0], -(-x.shape[2] // stride), -(-x.shape[3] // stride)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


@functools.cache
def _cpu_kernel():
    kernels = loaded("shift_conv1x1_cpu", "shift_conv1x1: not fused on the CPU")
    return kernels and kernels.shift_conv1x1_cpu


@functools.cache
def _cuda_kernel():
    kernels = loaded("shift_conv1x1_cuda", "shift_conv1x1: not fused on CUDA")
    return kernels and kernels.shift_conv1x1_cuda


_KERNELS = {"cpu": _cpu_kernel, "cuda": _cuda_kernel}
_TAKES_TAP_ORDER = ("cpu",)  # whose kernels have `by_tap`


def _module_of(kernel):
    return importlib.import_module(kernel.__module__)


def _prepared(x, weight, bias, *sizes):
    """(the CPU's fused kernel, size and strides of y), found once for such tensors; None: another case, or wrong."""
    find_kernel = _KERNELS.get("cpu")
    added = None if bias is None else (bias.shape, bias.dtype, bias.is_cpu, bias.is_contiguous())
    weights = weight.shape, weight.dtype, weight.is_cpu, weight.is_contiguous()
    kinds = x.shape, x.stride(), x.dtype, weights, added
    return _find_prepared(find_kernel and find_kernel(), *kinds, *sizes)


@functools.lru_cache(maxsize=256, typed=True)
def _find_prepared(kernel, shape, strides, dtype, weights, added, stride, kernel_size, dilation, by_tap):
    if not kernel or len(shape) != 4 or len(weights[0]) != 4 or not (shape.numel() and weights[0][0]):
        return None
    outputs = weights[0][0]
    is_right = weights == ((outputs, shape[1], 1, 1), dtype, True, True)
    is_right = is_right and added in (None, ((outputs,), dtype, True, True))
    is_right = is_right and all(type(n) is int and 1 <= n < 2**31 for n in (stride, kernel_size, dilation))
    if not is_right or type(by_tap) is not bool:
        return None
    write = _module_of(kernel).prepared(shape, strides, dtype, outputs, stride, kernel_size, dilation, by_tap)
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    y = _output(x, torch.empty(weights[0], device="meta"), stride)
    return write and (write, y.shape, y.stride())


def _shift_conv1x1(x, weight, bias, stride, kernel_size, dilation, by_tap=False):
    """Any device: its fused kernel if that takes these sizes, or the definition."""
    _check(x, weight, bias, stride, kernel_size, dilation)
    if by_tap and x.device.type not in _TAKES_TAP_ORDER:
        return _shift_conv1x1(*_in_order(x, weight, kernel_size), bias, stride, kernel_size, dilation)
    find_kernel = _KERNELS.get(x.device.type)
    kernel = find_kernel() if find_kernel and x.numel() and weight.shape[0] else None
    if kernel:
        x, y = x.contiguous(memory_format=memory_format_of(x)), _output(x, weight, stride)
        order = (by_tap,) if by_tap else ()
        if kernel(x, weight, bias, y, stride, kernel_size, dilation, *order):
            return y
    return shift_conv1x1_reference(x, weight, bias, stride, kernel_size, dilation, by_tap)


def _shift_conv1x1_fake(x, weight, bias, stride, kernel_size, dilation, by_tap=False):
    _check(x, weight, bias, stride, kernel_size, dilation)
    return _output(x, weight, stride)


def _shift_conv1x1_autograd(x, weight, bias, *sizes):
    wanted = any(each is not None and each.requires_grad for each in (x, weight, bias))
    if torch.autograd.forward_ad._current_level >= 0 or (wanted and torch.is_grad_enabled()):
        return shift_conv1x1_reference(x, weight, bias, *sizes)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(x, weight, bias, *sizes)


_library = torch.library.Library("effnets", "FRAGMENT")
_sizes = "int stride, int kernel_size, int dilation, bool by_tap=False"
_library.define(f"shift_conv1x1(Tensor x, Tensor weight, Tensor? bias, {_sizes}) -> Tensor")
_library.impl("shift_conv1x1", _shift_conv1x1, "CompositeExplicitAutograd")
_library.impl("shift_conv1x1", _shift_conv1x1_autograd, "Autograd")
torch.library.register_fake("effnets::shift_conv1x1", _shift_conv1x1_fake, lib=_library)
_operator = torch.ops.effnets.shift_conv1x1.default
