"""The functions that a checkpoint may call, in our own words.

Each takes the file's StandIns first. They are reached through `stand_ins.Function` only, never put on a pickle's stack.
"""

import collections
import struct

import torch

from common.checkpoints.errors import Damaged, Refused, printable
from common.checkpoints.tensors import is_shape

_ENTRY_BYTES = 100  # about what one entry of a Python container takes

# NumPy's plain numbers: struct format and torch dtype.
NUMPY_TYPES = {
    "b1": ("?", torch.bool),
    "i1": ("b", torch.int8),
    "u1": ("B", torch.uint8),
    "i2": ("h", torch.int16),
    "u2": ("H", torch.uint16),
    "i4": ("i", torch.int32),
    "u4": ("I", torch.uint32),
    "i8": ("q", torch.int64),
    "u8": ("Q", torch.uint64),
    "f2": ("e", torch.float16),
    "f4": ("f", torch.float32),
    "f8": ("d", torch.float64),
}


class NumpyType:
    """`numpy.dtype` of a plain number; `code` such as "f8"."""

    __slots__ = ("code",)

    def __init__(self, code):
        self.code = code


def raw_bytes(value):
    """Bytes as Python 3 (bytes) or Python 2 (str of latin1) pickled them."""
    if type(value) is str:
        return value.encode("latin1")
    if type(value) is not bytes:
        raise Refused("it holds NumPy values that are not plain numbers")
    return value


def _rebuild_tensor(stand_ins, storage, offset, size, stride, requires_grad=None, hooks=None, metadata=None):
    if metadata:  # a lazy conjugate or negation: ignoring it would change the values
        raise Refused("it holds a tensor with lazy operations")
    return stand_ins.builder.tensor(storage, offset, size, stride)


def _rebuild_tensor_v3(stand_ins, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    if metadata or type(dtype) is not torch.dtype:
        raise Refused("it holds a tensor of unknown type or with lazy operations")
    return stand_ins.builder.tensor(storage, offset, size, stride, dtype)


def _tensor_itself(stand_ins, tensor, *_):
    if type(tensor) is not torch.Tensor:
        raise Refused("it makes a parameter from something that is no tensor")
    return tensor


def _nothing(stand_ins):
    return None


def _size(stand_ins, sizes=()):
    if not is_shape(sizes):
        raise Refused("it holds a torch.Size that is no shape")
    return torch.Size(sizes)


def _device(stand_ins, kind, index=None):
    if (
        type(kind) is not str
        or kind not in ("cpu", "cuda", "mps", "xpu", "meta")
        or not (index is None or type(index) is int)
    ):
        raise Refused("it names an unknown device")
    return kind if index is None else f"{kind}:{index}"


def _items(stand_ins, collection):
    if type(collection) not in (list, tuple, dict, set):
        raise Refused("it fills a container from something else than a container")
    stand_ins.builder.charge(_ENTRY_BYTES * len(collection))
    return collection


def _ordered_dict(stand_ins, pairs=()):
    return collections.OrderedDict((stand_ins.key(key), value) for key, value in _items(stand_ins, pairs))


def _default_dict(stand_ins, factory=None, pairs=()):
    return dict(_ordered_dict(stand_ins, pairs))


def _counter(stand_ins, counts=()):
    return {stand_ins.key(key): counts[key] for key in _items(stand_ins, counts)}


def _set(stand_ins, elements=()):
    return {stand_ins.key(element) for element in _items(stand_ins, elements)}


def _empty_bytes(stand_ins):
    return b""


def _encode(stand_ins, text, encoding):  # how Python 3 writes bytes in protocol 2
    if type(text) is not str or encoding != "latin1":
        raise Refused("it encodes text other than as bytes")
    stand_ins.builder.charge(len(text))
    return text.encode("latin1")


def _numpy_type(stand_ins, code, *_):
    if type(code) is not str:  # hashing a deeply nested tuple would crash Python
        raise Refused("it holds NumPy values of a type that is not named")
    if code not in NUMPY_TYPES:
        raise Refused(f"it holds NumPy values of the type {printable(code, 40)!r}, not plain numbers")
    return NumpyType(code)


def _numpy_scalar(stand_ins, dtype, raw):
    if type(dtype) is not NumpyType:
        raise Refused("it holds a NumPy value of unknown type")
    raw, layout = raw_bytes(raw), "<" + NUMPY_TYPES[dtype.code][0]
    if len(raw) != struct.calcsize(layout):
        raise Damaged("a NumPy value has another size than its type")
    return struct.unpack(layout, raw)[0]


def _numpy_array(stand_ins, *_):
    return stand_ins.new_array()


FUNCTIONS = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _tensor_itself,
    "torch._utils._rebuild_parameter_with_state": _tensor_itself,
    "torch.nn.parameter.Parameter": _tensor_itself,
    "torch.autograd.variable.Variable": _tensor_itself,
    "torch.nn.backends.thnn._get_thnn_function_backend": _nothing,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.bytes": _empty_bytes,
    "__builtin__.bytes": _empty_bytes,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _numpy_array,
    "numpy._core.multiarray._reconstruct": _numpy_array,
}
