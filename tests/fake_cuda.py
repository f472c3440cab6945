"""GPUs that are not there, for tests on a machine without one: fake tensors on `cuda`, and who waits for them.

What a script computes on the host is computed. What it computes on `cuda` has a shape, a type and a device, but no
values: a mixture of devices raises, and each value that the host asks for is an event of the log; the host gets ones.
Operators of this repository run twice, as their fake implementation and as on a GPU, down to the launch, and what they
return must look alike.
"""

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from tests.fake import kernels, machine, tensors
from tests.fake.log import Log, place

aten, HOST, META = torch.ops.aten, torch.device("cpu"), torch.device("meta")
PRODUCTS = {aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default,
            aten.bmm.default, aten._int_mm.default}  # fmt: skip
TAKES_HOST_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Of these the host gets 0: (x is wrong).any(), and whether gradients are not finite.
ASKS_FOR_FAULTS = {aten.any.default, aten.any.dim, aten.any.dims}
LOOKS_FOR_INFINITIES = aten._amp_foreach_non_finite_check_and_unscale_.default


class FakeCuda(FakeTensorMode):
    """Runs operations on fake `cuda` tensors as fakes, all others as they are. log: takes what happens."""

    avoid_device_init = True

    def __init__(self, log: Log):
        super().__init__(allow_non_fake_inputs=True)
        self.log, self.recording = log, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = _leaves(args) + _leaves(kwargs.values())
        fakes = [leaf for leaf in leaves if type(leaf) is FakeTensor]
        goes_to = self._device_type_wanted(func, leaves, kwargs)
        if not fakes and goes_to != "cuda":
            self._count_product(func, leaves)
            return func(*args, **kwargs)
        hosts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and type(leaf) is not FakeTensor]
        if func is aten._local_scalar_dense.default:
            self.wait("read", func)
            return _stand_in(args[0]).item()
        if func in (aten._to_copy.default, aten.copy_.default) and (hosts or goes_to == "cpu"):
            return self._across(func, args, kwargs, hosts)
        self._check_devices(func, leaves[0], fakes, hosts)
        if hosts:
            args, kwargs = pytree.tree_map_only(Tensor, self._faked, (args, kwargs))
        result = self._on_device(func, types, args, kwargs)
        outputs = [output for output in _leaves([result]) if type(output) is FakeTensor]
        if func in ASKS_FOR_FAULTS:
            outputs[0].stands_for = 0
        if func is LOOKS_FOR_INFINITIES:
            args[1].stands_for = 0
        if self.recording is not None:
            self.recording.note(fakes, outputs, place())
        if any(output.device.type == "cpu" for output in outputs):
            return pytree.tree_map_only(FakeTensor, _stand_in, result)
        return result

    @staticmethod
    def _device_type_wanted(func, leaves, kwargs):
        """Type of the device that an operation is told to put its result on, None if it is not told."""
        device = kwargs.get("device")
        if device is None and func.namespace == "prims":
            device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if device is None:
            return None
        device = torch.device(device)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device}, {place()})")
        return device.type

    def wait(self, kind: str, operation):
        """The host waits for the device. While a graph is recorded, CUDA refuses it."""
        self.log.add(kind, str(operation))
        if self.recording is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation}, {place()})")

    def as_fake(self, tensor: Tensor, device=HOST) -> FakeTensor:
        """A fake tensor that looks like a real one. (The mode's own conversion would keep a reference to that.)"""
        return self.fake_tensor_converter.from_meta_and_device(self, _on_meta(tensor), device)

    def _faked(self, tensor):
        return tensor if type(tensor) is FakeTensor else self.as_fake(tensor)

    def _across(self, func, args, kwargs, hosts):
        """A copy between host and device. Towards the host it always waits, towards the device unless it is pinned."""
        if func is aten._to_copy.default:
            if not hosts:
                self.wait("read", func)
                return func(_stand_in(args[0]), **kwargs)
            self._upload(func, args[0], kwargs.get("non_blocking", False))
            return self.as_fake(func(_on_meta(args[0]), **kwargs | {"device": META}), kwargs["device"])
        target, source, *rest = args
        if type(target) is FakeTensor:
            self._upload(func, source, (*rest, kwargs.get("non_blocking", False))[0])
            return super().__torch_dispatch__(func, (), (target, self.as_fake(source), *rest), kwargs)
        self.wait("read", func)
        return target.fill_(1)

    def _upload(self, func, source, non_blocking):
        if not (non_blocking and getattr(source, "_is_pinned_here", False)):
            self.wait("upload", func)

    def _check_devices(self, func, first, fakes, hosts):
        """Raises RuntimeError where PyTorch would, for tensors on several devices. first: what is written, if any."""
        hosts = [host for host in hosts if host.dim() or (host is first and func._schema.is_mutable)]
        if hosts and func in TAKES_HOST_INDICES and all(host is not first for host in hosts):
            return self.wait("upload", func)
        devices = sorted({str(tensor.device) for tensor in (*fakes, *hosts)})
        if len(devices) > 1:
            words = f"Expected all tensors to be on the same device, but found {' and '.join(devices)}"
            raise RuntimeError(f"{words} ({func}, {place()})")

    def _on_device(self, func, types, args, kwargs):
        self._count_product(func, args)
        if func is aten.nll_loss_forward.default:
            self.log.step(training=False)
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return self._as_ones(func, args, kwargs)
        if func.namespace == "effnets":
            self._compare_with_kernel(func, args, kwargs, result)
        return result

    def _as_ones(self, func, args, kwargs):
        """An operation whose output's shape depends on values, which the host must read: as if all were one."""
        self.wait("read", func)
        device = next(leaf.device for leaf in pytree.arg_tree_leaves(*args, **kwargs) if type(leaf) is FakeTensor)
        real = pytree.tree_map_only(FakeTensor, _stand_in, (args, kwargs))
        result = func(*real[0], **real[1])
        return pytree.tree_map_only(Tensor, lambda tensor: self.as_fake(tensor, device), result)

    def _count_product(self, func, leaves):
        if func in PRODUCTS or func.namespace == "effnets":
            device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
            self.log.products[str(device), place()] += 1

    def _compare_with_kernel(self, func, args, kwargs, fake):
        """Run what a GPU would run, and raise unless its outputs look like those of the fake implementation."""
        with self:
            real = func._op_dk(torch.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        found, expected = ([_looks(t) for t in pytree.tree_leaves(result)] for result in (fake, real))
        if found != expected:
            raise AssertionError(f"{func}: its fake implementation gives {found}, its kernel {expected} ({place()})")


@contextlib.contextmanager
def fake_cuda(log: Log, gpus: int = 1):
    """Turn this process, for good, into one on a machine with so many GPUs; within it tensors on them are fake."""
    mode = FakeCuda(log)
    machine.install(machine.Machine(mode, gpus))
    tensors.install(mode)
    kernels.install(log)
    with mode:
        yield mode


def _leaves(values):
    """What containers of an operation's arguments hold. (PyTorch's own, for any container, takes most of the time.)"""
    found = []
    for value in values:
        if type(value) in (list, tuple):
            found += _leaves(value)
        else:
            found.append(value)
    return found


def _on_meta(tensor):
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=META)


def _stand_in(fake: FakeTensor) -> Tensor:
    """A host tensor that looks like the fake one, of ones, or of what that `stands_for`."""
    value = getattr(fake, "stands_for", 1)
    return torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype).fill_(value)


def _looks(value):
    """Of a tensor: shape, strides, type and device. A stride of a dimension of size 1 means nothing."""
    if not isinstance(value, Tensor):
        return value
    strides = [stride for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1]
    return tuple(value.shape), strides, str(value.dtype), str(value.device)
