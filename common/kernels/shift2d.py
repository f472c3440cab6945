"""The shift operation ("Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", Wu et al., CVPR 2018).

`shift2d` is the torch operator effnets::shift2d: numba on the CPU, CuPy on CUDA devices, plain PyTorch elsewhere.
`shift2d_reference` is its definition.
"""

import functools

import torch
from torch import Tensor

from common.kernels.eager import is_plain, loaded


def shift2d(x: Tensor, kernel_size: int = 3, dilation: int = 1) -> Tensor:
    """Move each channel by its own displacement, without arithmetic (paper, Sec. 3.1, Eq. 2).

    x: (N, C, H, W), any dtype of 1, 2, 4 or 8 bytes, any device. Returns a new tensor of the same shape and dtype,
    channels-last if x is, else contiguous. With k = kernel_size,

        y[n, c, i, j] = x[n, c, i + dilation * (c // k % k - k // 2), j + dilation * (c % k - k // 2)], zero outside x;

    the last C mod k*k channels are copied. Differentiable any number of times; keeps its dtype under autocast.
    Raises TypeError for an argument of the wrong type, ValueError unless x is 4-D, kernel_size and dilation at least 1.
    """
    if isinstance(x, Tensor) and is_plain(x):
        return _shift2d(x, kernel_size, dilation, 1)
    _check(x, kernel_size, dilation)
    return _operator(x, kernel_size, dilation, 1)


def shift2d_reference(x: Tensor, kernel_size: int = 3, dilation: int = 1, direction: int = 1) -> Tensor:
    """The definition of shift2d, in plain PyTorch. direction -1 is its adjoint, which moves every channel back."""
    k, (_, channels, height, width) = kernel_size, x.shape
    y = torch.zeros_like(x, memory_format=memory_format_of(x))
    shifted = channels // (k * k) * (k * k)
    y[:, shifted:] = x[:, shifted:]
    for tap in range(min(k * k, shifted)):
        dy, dx = direction * dilation * (tap // k - k // 2), direction * dilation * (tap % k - k // 2)
        if abs(dy) < height and abs(dx) < width:
            moved = x[:, tap : shifted : k * k, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            y[:, tap : shifted : k * k, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)] = moved
    return y


def _check(x, kernel_size, dilation, direction=1):
    if not isinstance(x, Tensor):
        raise TypeError(f"shift2d: x must be a tensor, not {type(x).__name__}")
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"shift2d: {name} must be an int, not {type(value).__name__}")
        if not 1 <= value < 2**31:
            raise ValueError(f"shift2d: {name} must be at least 1 and below 2**31, not {value}")
    if x.dim() != 4:
        raise ValueError(f"shift2d: x must have 4 dimensions (N, C, H, W), not shape {tuple(x.shape)}")
    if x.layout != torch.strided or x.element_size() not in (1, 2, 4, 8) or x.is_quantized:
        raise TypeError(f"shift2d: x must be dense, with 1, 2, 4 or 8 bytes per element, not {x.dtype}, {x.layout}")
    if direction not in (1, -1):
        raise ValueError(f"shift2d: direction must be 1 or -1, not {direction}")


def memory_format_of(x):
    """Memory format of an output that goes with x, (N, C, H, W): channels-last if x is that only, else contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


@functools.cache
def _cpu_kernel():
    kernels = loaded("shift2d_cpu", "shift2d: plain PyTorch on the CPU, which is slower: numba")
    return kernels and kernels.shift2d_cpu


@functools.cache
def _cuda_kernel():
    kernels = loaded("shift2d_cuda", "shift2d: plain PyTorch on CUDA, which is slower: CuPy")
    return kernels and kernels.shift2d_cuda


def _shift2d(x, kernel_size, dilation, direction):
    """Any device: the cases without a move, the kernel of the device, or plain PyTorch where there is none."""
    try:
        layout, has_layout, moves = _plan(x.shape, x.stride(), x.dtype, x.layout, kernel_size, dilation, direction)
    except Exception:
        _check(x, kernel_size, dilation, direction)  # says what is wrong with x itself
        raise
    if not moves:
        return x.clone(memory_format=layout)
    find_kernel = _KERNELS.get("cpu" if x.is_cpu else x.device.type)
    kernel = find_kernel() if find_kernel else None
    if kernel:
        x = x if has_layout else x.contiguous(memory_format=layout)
        y = torch.empty_like(x, memory_format=layout)
        if kernel(x, y, kernel_size, dilation, direction, layout is torch.channels_last):
            return y
    return shift2d_reference(x, kernel_size, dilation, direction)


@functools.lru_cache(maxsize=1024, typed=True)
def _plan(shape, strides, dtype, tensor_layout, kernel_size, dilation, direction):
    """(memory format of y, whether x has it, whether anything moves), kept: finding out is slow on cold caches."""
    if tensor_layout != torch.strided:
        raise TypeError(tensor_layout)
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    _check(x, kernel_size, dilation, direction)
    layout = memory_format_of(x)
    moves = x.numel() > 0 and kernel_size > 1 and kernel_size * kernel_size <= shape[1]
    return layout, x.is_contiguous(memory_format=layout), moves


_KERNELS = {"cpu": _cpu_kernel, "cuda": _cuda_kernel}


def _shift2d_fake(x, kernel_size, dilation, direction):
    _check(x, kernel_size, dilation, direction)
    return torch.empty_like(x, memory_format=memory_format_of(x))


class _Shift2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel_size, dilation, direction):
        ctx.move = kernel_size, dilation, direction
        with torch._C._AutoDispatchBelowAutograd():
            return _operator(x, kernel_size, dilation, direction)

    @staticmethod
    def backward(ctx, grad):
        kernel_size, dilation, direction = ctx.move
        return _operator(grad, kernel_size, dilation, -direction), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return _operator(tangent, *ctx.move)


def _shift2d_autograd(x, kernel_size, dilation, direction):
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    if forward_mode or (x.requires_grad and torch.is_grad_enabled()):
        if torch._C._are_functorch_transforms_active():  # torch.func.grad: autograd.Function is refused in an operator
            return shift2d_reference(x, kernel_size, dilation, direction)
        return _Shift2d.apply(x, kernel_size, dilation, direction)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(x, kernel_size, dilation, direction)


def _shift2d_vmap(info, in_dims, x, kernel_size, dilation, direction):
    batched = x.movedim(in_dims[0], 0)
    return _operator(batched.flatten(0, 1), kernel_size, dilation, direction).unflatten(0, batched.shape[:2]), 0


# Registered piece by piece for the overhead of a call, without and with a gradient (microseconds of CPU time):
# torch.library.custom_op 16 and 41, torch.library.register_autograd 12 and 33, this 11 and 18 on torch 2.15;
# 46 and 99, 26 and 67, 13 and 31 on torch 2.6.
_library = torch.library.Library("effnets", "FRAGMENT")
_library.define("shift2d(Tensor x, int kernel_size, int dilation, int direction) -> Tensor")
_library.impl("shift2d", _shift2d, "CompositeExplicitAutograd")
_library.impl("shift2d", _shift2d_autograd, "Autograd")
torch.library.register_fake("effnets::shift2d", _shift2d_fake, lib=_library)
torch.library.register_vmap("effnets::shift2d", _shift2d_vmap, lib=_library)
_operator = torch.ops.effnets.shift2d.default
