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

    All kernels of a file are compiled together. Raises ImportError without CuPy, or with one for another CUDA than
    PyTorch's, and CuPy's own errors where it cannot compile or launch, has no such kernel or no such device.
    """
    import cupy

    _try_out(device)
    with cupy.cuda.Device(device):
        return _module(stem).get_function(name)


@functools.cache
def _try_out(device):
    """Launch a kernel once: what does not work here shows now, where a slower path can still take over."""
    import cupy

    theirs, ours = cupy.cuda.runtime.runtimeGetVersion() // 1000, (torch.version.cuda or "").partition(".")[0]
    if ours and theirs != int(ours):
        raise ImportError(f"CuPy is built for CUDA {theirs}, PyTorch for CUDA {ours}: install cupy-cuda{ours}x instead")
    with cupy.cuda.Device(device):
        stream = _stream(torch._C._cuda_getCurrentRawStream(device), device)
        _module("nothing").get_function("nothing")((1, 1, 1), (1, 1, 1), (), stream=stream)


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
    device = _device_of(arguments)
    values = tuple([each if isinstance(each, np.generic) else _address(each, device) for each in arguments])
    kernel, stream = load(stem, name, device), _stream(torch._C._cuda_getCurrentRawStream(device), device)
    if device == torch.cuda.current_device():
        kernel(grid, block, values, stream=stream)
    else:
        with torch.cuda.device(device):
            kernel(grid, block, values, stream=stream)


def _device_of(arguments):
    """Number of the first tensor's CUDA device. Nothing is imported or asked of a device before it is known."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_cuda:
                raise ValueError(f"launch: all tensors must be on one CUDA device, not {argument.device}")
            return argument.get_device()
    raise TypeError("launch: at least one argument must be a CUDA tensor")


def _address(argument, device):
    if not isinstance(argument, Tensor):
        raise TypeError(f"launch: arguments are CUDA tensors or NumPy scalars, not {type(argument).__name__}")
    if not argument.is_cuda or argument.get_device() != device:
        raise ValueError(f"launch: all tensors must be on one CUDA device, not {argument.device} and cuda:{device}")
    if not (argument.is_contiguous() or _is_channels_last(argument)):
        shape, strides = tuple(argument.shape), argument.stride()
        raise ValueError(f"launch: a tensor of shape {shape} with strides {strides} is not contiguous")
    return np.uintp(argument.data_ptr())


def _is_channels_last(tensor):
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


class _AtAddress:
    """A stream by its address, in the protocol by which CuPy takes streams of others."""

    def __init__(self, address):
        self.address = address

    def __cuda_stream__(self):
        return 0, self.address


@functools.lru_cache(maxsize=256)
def _stream(address, device):
    """CuPy's object for the stream at this address; making one takes longer than a launch."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_AtAddress(address))
    return cupy.cuda.ExternalStream(address, device)  # CuPy before 14
