"""What the names and opcodes of a checkpoint stand for: the only objects that the restricted unpickler can reach.

No plain function and no class of a library is among them, because a pickle could set attributes on those (with the
opcode BUILD a file changed the defaults of torch's own functions). A name is a `Function` (an instance with slots), a
`StorageType`, a dtype or a `RecordClass`; what may be called or given a state is checked by exact type.
"""

import collections
import functools
import re

import torch

from common.checkpoints.errors import Refused, printable
from common.checkpoints.functions import FUNCTIONS, NUMPY_TYPES, NumpyType, raw_bytes
from common.checkpoints.records import Record, RecordClass
from common.checkpoints.tensors import STORAGE_DTYPES, fill_from_array

# Classes that become inert records in every file; a name that ends in a dot stands for all that is below it.
DEFAULT_RECORDS = (
    "torch.nn.modules.",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "torch.optim.",  # optimizers and learning-rate schedulers, which some checkpoints hold as objects
    "numpy.ndarray",
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("dict", "list", "int", "float")),
    *(f"torch.{cuda}{name.replace('Storage', 'Tensor')}" for cuda in ("", "cuda.") for name in STORAGE_DTYPES),
)
_DTYPES = {str(dtype): dtype for dtype in STORAGE_DTYPES.values()} | {str(t): t for _, t in NUMPY_TYPES.values()}
_ENTRY_BYTES = 100  # about what one attribute of a record takes
_MAX_NAME = 1024


class Function:
    """A name that a pickle may call."""

    __slots__ = ("_body",)

    def __init__(self, body):
        self._body = body

    def __call__(self, *args):
        return self._body(*args)

    def __setstate__(self, state):
        raise Refused("it sets attributes of a function")


class StorageType:
    """`torch.FloatStorage` and its kind; `dtype` of the elements."""

    __slots__ = ("dtype",)

    def __init__(self, dtype):
        self.dtype = dtype


class StandIns:
    """The names that one file may use, and what its opcodes may do with them.

    builder: TensorBuilder of the file. extra_records: dotted class names, or prefixes that end in a dot, that become
    inert records besides DEFAULT_RECORDS. Raises ValueError for one that is neither.
    """

    def __init__(self, builder, extra_records=()):
        for name in extra_records:
            if not isinstance(name, str) or not re.fullmatch(r"(\w+\.)+\w*", name):
                raise ValueError(f"extra_records: {name!r} is neither a dotted class name nor a prefix like 'models.'")
        self.builder = builder
        self._records = (*DEFAULT_RECORDS, *extra_records)
        self._found = {}
        self._arrays = {}  # by id: the tensors that stand for NumPy arrays

    def find(self, module, name):
        """The stand-in for `module`.`name`; raises Refused, with the name, for one that is in no table."""
        if (
            len(module) + len(name) > _MAX_NAME
        ):  # names come from the memo too: joining long ones again and again is slow
            raise Refused(f"it names {printable(module, 80)}…, longer than any class of PyTorch")
        full = f"{module}.{name}"
        if full not in self._found:
            self._found[full] = self._make(module, name, full)
        return self._found[full]

    def _make(self, module, name, full):
        if full in FUNCTIONS:
            return Function(functools.partial(FUNCTIONS[full], self))
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return StorageType(STORAGE_DTYPES[name])
        if full in _DTYPES:
            return _DTYPES[full]
        listed = any(full == known or (known.endswith(".") and full.startswith(known)) for known in self._records)
        if listed and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
            return RecordClass(full)
        raise Refused(f"it names {printable(full)}, which is not among the classes that this reader knows")

    def key(self, key):
        """`key`, if it may be one of a dict or set. Tuples may not: hashing deeply nested ones crashes Python."""
        if type(key) not in (str, int, float, bool, type(None), bytes, torch.Tensor):
            raise Refused(f"it uses a {type(key).__name__} as a key")
        if type(key) is int and abs(key) >= 2**61 - 1:  # below, an int is its own hash: no crafted collisions
            raise Refused("it uses a huge number as a key")
        return key

    def call(self, target, args):
        """Result of the opcodes REDUCE and NEWOBJ."""
        if type(args) is not tuple:
            raise Refused("it calls something with arguments that are no tuple")
        if type(target) is Function:
            return target(*args)
        if type(target) is RecordClass and not args:
            return Record(target.class_name)
        what = target.class_name if type(target) is RecordClass else f"a {type(target).__name__}"
        raise Refused(f"it calls {printable(what)}")

    def set_state(self, target, state):
        """Effect of the opcode BUILD."""
        if type(target) is Record and type(state) is dict and all(type(name) is str for name in state):
            self.builder.charge(_ENTRY_BYTES * len(state))
            target.attributes.update(state)
        elif id(target) in self._arrays:
            self._set_array(target, state)
        elif type(target) is NumpyType:
            if type(state) is not tuple or len(state) != 8 or state[1] not in ("<", "|") or state[2:5] != (None,) * 3:
                raise Refused("it holds NumPy values that are not plain little-endian numbers")
        elif type(target) not in (torch.Tensor, collections.OrderedDict):
            raise Refused(f"it sets attributes of a {type(target).__name__}")
        # A tensor or OrderedDict stays as it is: the state is an old Parameter's flags, a state dict's versions.

    def new_array(self):
        """An empty tensor that stands for a NumPy array until its state comes."""
        array = torch.empty(0, device="cpu")
        self._arrays[id(array)] = array
        return array

    def _set_array(self, array, state):
        _, shape, dtype, fortran_order, raw = state
        if type(dtype) is not NumpyType:
            raise Refused("it holds a NumPy array of unknown type")
        raw = raw_bytes(raw)
        self.builder.charge(len(raw))
        fill_from_array(array, NUMPY_TYPES[dtype.code][1], shape, bool(fortran_order), raw)
