"""For operators written in Python: whether a call needs the dispatcher, 20 to 40 us each, and why a path is closed."""

import importlib
import logging

import torch
from torch import Tensor
from torch.autograd import forward_ad

_log = logging.getLogger("effnets")


def is_plain(x, *others):
    """Whether nothing watches or transforms a call with x and others (tensors or None), so that the operator would only
    call its kernel: ordinary tensors on a CPU or a GPU, no gradient, no torch.compile, no mode, no functorch."""
    if torch.compiler.is_compiling() or not _is_ordinary(x):
        return False
    for tensor in others:
        if tensor is not None and not _is_ordinary(tensor):
            return False
    return not _is_watched()


def _is_ordinary(tensor):
    kind = type(tensor)
    if (kind is not Tensor and kind is not torch.nn.Parameter) or (tensor.requires_grad and torch.is_grad_enabled()):
        return False
    # The dispatcher makes negatives and conjugates real.
    return (tensor.is_cpu or tensor.is_cuda) and not (_is_wrapped(tensor) or tensor.is_neg() or tensor.is_conj())


def loaded(module, instead):
    """common.kernels.<module> with its kernels loaded, or None: then `instead` and the reason go to the log, in a line.

    Whatever is wrong with an optional library must not stop the run.
    """
    try:
        kernels = importlib.import_module(f"common.kernels.{module}")
        kernels.load()
    except Exception as error:
        _log.warning("%s: %s: %s", instead, type(error).__name__, str(error).partition("\n")[0])
        return None
    return kernels


def _is_watched():
    is_traced = _dispatch_modes() or _function_modes() or _tracing_state() is not None
    return is_traced or forward_ad._current_level >= 0 or _is_profiled()


try:  # by their names here: looking them up in torch's modules is slow on cold caches
    _dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
    _tracing_state, _is_wrapped = torch._C._get_tracing_state, torch._C._functorch.is_functorch_wrapped_tensor
    _is_profiled, _ = torch.autograd._profiler_enabled, forward_ad._current_level
except AttributeError:  # another PyTorch: every call takes the dispatcher

    def _is_wrapped(tensor):
        return True
