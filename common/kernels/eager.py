"""For operators written in Python: whether a call needs the dispatcher, 20 to 40 us each, and why a path is closed."""

import importlib
import logging

import torch
from torch import Tensor

_log = logging.getLogger("effnets")


def is_plain(*tensors):
    """Whether nothing watches or transforms a call with these tensors (or None), so that the operator would only call
    its kernel: ordinary tensors on a CPU or a GPU, no gradient, no torch.compile, no mode, no functorch."""
    tensors = [tensor for tensor in tensors if tensor is not None]
    if any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors) or torch.compiler.is_compiling():
        return False
    wants_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wants_gradient and (tensors[0].is_cpu or tensors[0].is_cuda) and not _is_watched(tensors)


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
        return bool(
            c._len_torch_dispatch_stack()
            or c._len_torch_function_stack()
            or torch.autograd.forward_ad._current_level >= 0
            or any(c._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
            or any(tensor.is_neg() or tensor.is_conj() for tensor in tensors)  # the dispatcher makes these real
            or torch.jit.is_tracing()
            or torch.autograd._profiler_enabled()
        )
    except AttributeError:  # another PyTorch
        return True
