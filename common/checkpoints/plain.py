"""The restricted reader for files that `save_checkpoint` wrote, which hold tensors and plain values and nothing else.

It gives back what was saved: tensors that shared memory share it, parameters are parameters, state dicts keep their
versions. PyTorch's own reader is not used: before version 2.10 a crafted file could corrupt memory through it
(CVE-2026-24747), and it knows more classes than these files need.
"""

import collections
import functools
import math

import torch

from common.checkpoints.errors import Refused, printable
from common.checkpoints.foreign import check_tree, read_zip
from common.checkpoints.stand_ins import Function, StandIns, StorageType
from common.checkpoints.tensors import STORAGE_DTYPES, TensorBuilder, checked_view, from_bytes

DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
MAX_KEY = 2**61 - 1  # below, an int is its own hash: a file cannot have keys that collide
SCALARS = (str, int, float, bool, type(None))


def read_plain(data, device):
    """The payload in a file's bytes, its tensors on `device`; raises Refused, Damaged or nearly any other exception."""
    builder = _SharedTensors(len(data), torch.device(device))
    result = read_zip(data, builder, _PlainStandIns(builder), max_reads=math.inf)  # lists of numbers may be long
    check_tree(result, _children)
    return result


class _SharedTensors(TensorBuilder):
    """Makes each tensor as a view of its storage, so that no file can take more memory than its own size."""

    def __init__(self, file_size, device):
        super().__init__(file_size)
        self._device = device
        self._memory = {}

    def tensor(self, storage, offset, size, stride, dtype=None):
        dtype, size, stride, _ = checked_view(storage, offset, size, stride, dtype)
        memory = self._memory.get(storage)
        if memory is None:
            memory = self._memory[storage] = self._to_device(storage)
        memory = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        result = torch.empty(0, dtype=dtype, device=self._device)
        result.set_(memory.as_strided(size, stride, offset))  # unlike the view itself, a tensor of its own
        return result

    def _to_device(self, storage):
        content = bytearray(storage.content())
        if not content:
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        return from_bytes(content, storage.dtype).view(torch.uint8).to(self._device)


def _tensor(stand_ins, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    return _tensor_of_type(stand_ins, storage, offset, size, stride, requires_grad, hooks, None, metadata)


def _tensor_of_type(stand_ins, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    if metadata or not isinstance(dtype, torch.dtype | None):
        raise Refused("it holds a tensor of unknown type or with lazy operations")
    return stand_ins.builder.tensor(storage, offset, size, stride, dtype).requires_grad_(requires_grad)


def _parameter(stand_ins, tensor, requires_grad=True, hooks=None):
    if type(tensor) is not torch.Tensor:
        raise Refused("it makes a parameter from something that is no tensor")
    return torch.nn.Parameter(tensor, requires_grad)


def _ordered_dict(stand_ins):
    return collections.OrderedDict()


_FUNCTIONS = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
}


class _PlainStandIns(StandIns):
    """The names and opcodes of these files."""

    def _make(self, module, name, full):
        if full in _FUNCTIONS:
            return Function(functools.partial(_FUNCTIONS[full], self))
        if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
            return StorageType(STORAGE_DTYPES[name])
        if full in DTYPES:
            return DTYPES[full]
        super()._make(module, name, full)  # which refuses what no checkpoint needs, by its name
        raise Refused(f"it holds pickled objects besides tensors and plain values: {printable(full)}")

    def key(self, key):
        if not is_key(key):
            raise Refused(f"it uses a {type(key).__name__}, or a huge number, as a key")
        return key

    def set_state(self, target, state):
        """A state dict's version numbers are the one thing that BUILD sets."""
        if type(target) is not collections.OrderedDict or type(state) is not dict or not are_attributes(state):
            raise Refused(f"it sets attributes of a {type(target).__name__}")
        vars(target).update(state)


def is_key(key):
    """Whether a dict of a checkpoint may have this key."""
    return type(key) in SCALARS and (type(key) is not int or abs(key) < MAX_KEY)


def are_attributes(names):
    """Whether an OrderedDict of a checkpoint may have attributes of these names: none that hides one of its own."""
    return all(type(name) is str and not hasattr(collections.OrderedDict, name) for name in names)


def _children(node):
    if type(node) is dict:
        return [*node.values()]
    if type(node) is collections.OrderedDict:
        return [*node.values(), *vars(node).values()]
    if type(node) in (list, tuple):
        return list(node)
    if type(node) in (*SCALARS, torch.Tensor, torch.nn.Parameter):
        return None
    raise Refused(f"it holds a {type(node).__name__}, and so pickled objects besides tensors and plain values")
