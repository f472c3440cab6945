"""Compile a .cu file of this folder once, and launch its kernels on torch's current stream, through CuPy.

CuPy checks neither the types nor the number of a kernel's arguments, so `launch` admits tensors and NumPy scalars only.
Nothing here synchronises; after the first call of a kernel, which loads it, calls can be captured in a CUDA graph.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OPTIONS = ("-std=c++17",)  # of NVRTC; the tests compile with the same


def source(stem):
    """Text of common/kernels/<stem>.cu."""
    return Path(__file__).with_name(f"{stem}.cu").read_text(encoding="utf-8")


@functools.cache
def load(stem, name, device):
    """The kernel `name` of <stem>.cu on CUDA device number `device`; compiled on first use, cached on disk by CuPy.

    Raises ImportError without CuPy, and CuPy's own errors where it cannot compile or find the device.
    """
    import cupy

    with cupy.cuda.Device(device):
        kernel = _module(stem).get_function(name)
        kernel.compile()
        return kernel


@functools.cache
def _module(stem):
    import cupy

    return cupy.RawModule(code=source(stem), options=OPTIONS, backend="nvrtc")


def launch(stem, name, grid, block, *arguments):
    """Run a kernel over `grid` blocks of `block` threads (three ints each) on torch's current stream.

    arguments: in order, contiguous CUDA tensors on one device (channels-last counts as contiguous; at least one) and
    NumPy scalars of exactly the C parameters' types. Returns at once. Raises TypeError for anything else,
    ValueError for a tensor with gaps or on another device.
    """
    import cupy

    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    values = tuple(_checked(argument, device) for argument in arguments)
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), _as_cupy(stream):
        load(stem, name, device.index)(grid, block, values)


def _checked(argument, device):
    if isinstance(argument, np.generic):
        return argument
    if not isinstance(argument, Tensor):
        raise TypeError(f"launch: arguments are CUDA tensors or NumPy scalars, not {type(argument).__name__}")
    if argument.device != device or device.type != "cuda":
        raise ValueError(f"launch: all tensors must be on one CUDA device, not {argument.device} and {device}")
    channels_last = argument.dim() == 4 and argument.is_contiguous(memory_format=torch.channels_last)
    if not (argument.is_contiguous() or channels_last):
        shape, strides = tuple(argument.shape), argument.stride()
        raise ValueError(f"launch: a tensor of shape {shape} with strides {strides} is not contiguous")
    return np.uintp(argument.data_ptr())


def _as_cupy(stream):
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)  # CuPy before 14, or torch before 2.9
