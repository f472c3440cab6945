"""For operators written in Python: whether a call needs the dispatcher, 20 to 40 us each, and why a path is closed."""

import importlib
import logging

import torch
from torch import Tensor

_log = logging.getLogger("effnets")


def is_plain(*tensors):
    """Whether nothing watches or transforms a call with these tensors (or None), so that the operator would only call
    its kernel: ordinary tensors on a CPU or a GPU, no gradient, no torch.compile, no mode, no functorch."""
    if torch.compiler.is_compiling():
        return False
    tensors = [tensor for tensor in tensors if tensor is not None]
    gradients = torch.is_grad_enabled()
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not torch.nn.Parameter) or (gradients and tensor.requires_grad):
            return False
    return (tensors[0].is_cpu or tensors[0].is_cuda) and not _is_watched(tensors)


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


def _is_watched(tensors):
    c = torch._C
    try:
        if c._len_torch_dispatch_stack() or c._len_torch_function_stack() or c._get_tracing_state() is not None:
            return True
        for tensor in tensors:  # the dispatcher makes negatives and conjugates real
            if c._functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_neg() or tensor.is_conj():
                return True
        return torch.autograd.forward_ad._current_level >= 0 or torch.autograd._profiler_enabled()
    except AttributeError:  # another PyTorch
        return True
