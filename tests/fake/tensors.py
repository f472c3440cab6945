"""Where PyTorch's Python code does not take fake tensors as it takes those of a GPU: patches of a process, for good."""

import copy
import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _foreach_utils

from tests.fake import backward

optimizer = sys.modules["torch.optim.optimizer"]  # torch.optim hides its name
ALIGNMENT = 512  # bytes, of what CUDA's allocator gives out


def install(mode):
    """mode: a FakeCuda, whose log takes the steps of optimizers, and what changes between training and testing."""
    backward.install()
    _patch_tensors()
    _patch_modules(mode.log)
    _patch_optimizers(mode)
    _patch_checkpoints()


def _patch_tensors():
    deep_copy = Tensor.__deepcopy__

    def copy_deep(self, memo):
        if type(self) is not FakeTensor:
            return deep_copy(self, memo)
        if id(self) not in memo:
            memo[id(self)] = _parameter_like(self, self.detach().clone()) if _is_parameter(self) else self.clone()
        return memo[id(self)]

    def pin(self, device=None):
        copied = self.clone()
        copied._is_pinned_here = True
        return copied

    Tensor.__deepcopy__, Tensor.pin_memory = copy_deep, pin
    FakeTensor.tolist = lambda self: self.cpu().tolist()
    FakeTensor.data_ptr = _address
    FakeTensor.numpy = _no_numpy
    FakeTensor.__repr__ = lambda self, **kwargs: repr(self.detach().cpu())  # as PyTorch: a printed tensor is read


def _no_numpy(self, *args, **kwargs):
    words = "device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
    raise TypeError(f"can't convert {self.device} {words}")


_addresses = {"next": ALIGNMENT}


def _address(self):
    """An address as CUDA would give it: the storage's, aligned, and the offset."""
    storage = self.untyped_storage()
    if storage._cdata not in _addresses:
        _addresses[storage._cdata] = _addresses["next"]
        _addresses["next"] += -(-max(1, storage.nbytes()) // ALIGNMENT) * ALIGNMENT
    return _addresses[storage._cdata] + self.storage_offset() * self.element_size()


def _is_parameter(tensor):
    return isinstance(tensor, nn.Parameter)


def _parameter_like(parameter, data):
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _patch_modules(log):
    """Parameters stay the same objects when a network moves; PyTorch would put others in their place."""
    train = nn.Module.train
    torch.utils.weakref = SimpleNamespace(getweakrefs=lambda tensor: [])  # only swap_tensors asks: fakes have some

    def apply(self, fn, recurse=True):
        for child in self.children() if recurse else ():
            child._apply(fn)
        for name, parameter in self._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    moved = fn(parameter)
                self._parameters[name] = _moved(parameter, moved)
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer if buffer is None else fn(buffer)
        return self

    def switch(self, mode=True):
        if log.depth == 0:
            log.new_pass(bool(mode))
        log.depth += 1
        try:
            return train(self, mode)
        finally:
            log.depth -= 1

    nn.Module._apply, nn.Module.train = apply, switch


def _moved(parameter, moved):
    """The parameter of a module for a `moved` tensor."""
    if moved is parameter:
        return parameter
    if type(moved) is FakeTensor or type(parameter) is FakeTensor:
        parameter.grad = None
        torch.utils.swap_tensors(parameter, _parameter_like(parameter, moved))
    elif torch._has_compatible_shallow_copy_type(parameter, moved):
        parameter.data = moved
    else:
        return _parameter_like(parameter, moved)
    return parameter


def _patch_optimizers(mode):
    """Fake tensors take the way of CUDA's (many at once), and every update ends a step."""
    for kinds in (optimizer._foreach_supported_types, _foreach_utils._foreach_supported_types):
        kinds.append(FakeTensor)

    def updated(of, args, kwargs):
        for group in of.param_groups:
            mode.log.parameters.update(str(parameter.device) for parameter in group["params"])
        if mode.recording is None:  # else each replay is a step
            mode.log.step(training=True)

    optimizer.register_optimizer_step_post_hook(updated)


def _patch_checkpoints():
    """Checkpoints hold what a copy to the host gives: fake tensors cannot be written."""
    import common.checkpoints as package
    from common.checkpoints import own

    write = own.save_checkpoint

    def save_checkpoint(path, payload, **options):
        write(path, on_host(payload), **options)

    package.save_checkpoint = own.save_checkpoint = save_checkpoint


def on_host(value):
    """The same containers, fake tensors replaced by host tensors."""
    if type(value) is FakeTensor:
        return value.detach().cpu()
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update((key, on_host(item)) for key, item in value.items())
        return copied
    return type(value)(on_host(item) for item in value) if type(value) in (list, tuple) else value
