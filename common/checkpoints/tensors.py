"""Tensors out of a checkpoint's storages, checked before anything is allocated."""

import math
from dataclasses import dataclass

import torch

from common.checkpoints.errors import Damaged, Refused, printable

_MAX_DIMS = 64
_EXPANSION, _ALLOWANCE = 16, 2**24  # shared and expanded tensors may together take this much more than the file

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


@dataclass(eq=False, slots=True)
class Storage:
    """One storage that a file names: `count` elements of `dtype`; `data` (bytes-like) follows when it is found."""

    dtype: torch.dtype
    count: int
    data: memoryview | None = None

    @property
    def nbytes(self):
        return self.count * self.dtype.itemsize

    def content(self):
        """Its bytes; raises Damaged where they are missing or too many."""
        if self.data is None or len(self.data) != self.nbytes:
            raise Damaged("a storage has another size than its tensors say")
        return self.data


class TensorBuilder:
    """Makes the tensors of one file. They are empty until `fill`, because a file may put the data after the objects."""

    def __init__(self, file_size):
        self.storages = {}
        self._file_size = file_size
        self._named_bytes = 0
        self._left = _EXPANSION * file_size + _ALLOWANCE
        self._pending = []

    def charge(self, nbytes):
        """Count memory that a few bytes of the file cause; raises Refused beyond 16 times the file plus 16 MiB."""
        self._left -= nbytes
        if self._left < 0:
            raise Refused(f"it would take more than {_EXPANSION} times its own size in memory")

    def storage(self, key, dtype, count):
        """The Storage called `key`, the same one each time. Raises Damaged if the file cannot hold all it names."""
        if type(count) is not int or count < 0:
            raise Refused("it holds a storage whose size is not a number of elements")
        known = self.storages.get(key)
        if known is None:
            known = self.storages[key] = Storage(dtype, count)
            self._named_bytes += known.nbytes
            if self._named_bytes > self._file_size:
                raise Damaged("its tensors claim more bytes than the file has, it may be truncated")
        elif (known.dtype, known.count) != (dtype, count):
            raise Refused(f"its storage {printable(key, 40)} is there with two types or sizes")
        return known

    def tensor(self, storage, offset, size, stride, dtype=None):
        """An empty tensor that `fill` will turn into this view's own copy. Raises Refused outside the storage."""
        dtype, size, stride, extent = checked_view(storage, offset, size, stride, dtype)
        self.charge(max(math.prod(size), extent) * dtype.itemsize)
        result = torch.empty(0, dtype=dtype, device="cpu")
        self._pending.append((result, storage, offset, extent, size, stride))
        return result

    def fill(self):
        """Give every tensor made so far its values; all storages must have their data by now."""
        for result, storage, offset, extent, size, stride in self._pending:
            if not extent:
                result.resize_(size)
                continue
            itemsize = result.dtype.itemsize
            raw = bytearray(storage.content()[offset * itemsize : (offset + extent) * itemsize])
            result.set_(from_bytes(raw, result.dtype).as_strided(size, stride).clone())
        self._pending.clear()


def checked_view(storage, offset, size, stride, dtype=None):
    """(dtype, size, stride, elements from the first to the last one) of a tensor; Refused for one outside the storage.

    dtype: where it is not the storage's.
    """
    if type(storage) is not Storage:
        raise Refused("it rebuilds a tensor from something that is no storage")
    dtype = dtype or storage.dtype
    if not _are_counts([offset]) or not is_shape(size) or not is_shape(stride) or len(size) != len(stride):
        raise Refused("it holds a tensor whose sizes, strides or offset are not numbers of elements")
    if not size and not storage.count:
        size, stride = (0,), (1,)  # before PyTorch 0.4 an empty tensor had no dimensions
    extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if math.prod(size) else 0
    if extent and offset + extent > storage.nbytes // dtype.itemsize:
        raise Refused("it holds a tensor that reaches outside its storage")
    return dtype, size, stride, extent


def fill_from_array(result, dtype, shape, fortran_order, raw):
    """Turn the empty tensor `result` into a NumPy array's values: raw bytes of `dtype` in C or Fortran order."""
    if not is_shape(shape) or math.prod(shape) * dtype.itemsize != len(raw):
        raise Damaged("a NumPy array has another size than its shape says")
    values = from_bytes(bytearray(raw), dtype) if raw else torch.empty(0, dtype=dtype, device="cpu")
    if fortran_order:
        values = values.reshape(shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
    result.data = values.reshape(shape).clone()  # unlike set_, this changes the dtype too


def from_bytes(raw, dtype):
    """The 1-d tensor over a bytearray that is not empty. Raises Damaged for booleans other than 0 and 1."""
    if dtype is torch.bool and raw.translate(None, b"\0\1"):
        raise Damaged("a tensor of booleans holds other values than 0 and 1")
    return torch.frombuffer(raw, dtype=dtype)


def _are_counts(values):
    return all(type(value) is int and value >= 0 for value in values)


def is_shape(values):
    """True for at most 64 non-negative ints in a tuple, list or torch.Size."""
    return type(values) in (tuple, list, torch.Size) and len(values) <= _MAX_DIMS and _are_counts(values)
