"""What stands for an object of a third party's class: its name and its attributes, without its code."""

import torch

from common.checkpoints.errors import failure, printable

_MAX_NAME = 512  # characters of a dotted name; also bounds how deep modules nest
_WRAPPERS = frozenset(
    {
        "torch.nn.parallel.data_parallel.DataParallel",
        "torch.nn.parallel.distributed.DistributedDataParallel",
    }
)


class Record:
    """An object that a file holds, inert: `class_name` (dotted, str) and `attributes` (dict with str keys)."""

    __slots__ = ("class_name", "attributes")

    def __init__(self, class_name, attributes=None):
        self.class_name = class_name
        self.attributes = {} if attributes is None else attributes

    def __repr__(self):
        return f"Record({self.class_name!r}, {len(self.attributes)} attributes)"


class RecordClass:
    """A class (or function) that a file names without making an object of it, inert: `class_name` (dotted, str)."""

    __slots__ = ("class_name",)

    def __init__(self, class_name):
        self.class_name = class_name

    def __repr__(self):
        return f"RecordClass({self.class_name!r})"


def record_state_dict(record, path="checkpoint"):
    """State dict of a module that `read_foreign` returned as a Record: {dotted name: tensor}, in PyTorch's order.

    Per module its parameters, then its buffers, then its submodules; DataParallel around it is taken off and
    non-persistent buffers are left out, as `Module.state_dict` does. Tensors are clones; one that the file holds under
    several names is one clone under these names. path: the file, for the messages.
    Raises CheckpointError if the record is no module, or its tables hold anything but modules, tensors and None, the
    same module twice (a cycle, or a chain that doubles), or a name of more than 512 characters.
    """
    collected = _StateDict(path)
    if type(record) is Record and record.class_name in _WRAPPERS:
        record = collected.table(record, "_modules").get("module")
    collected.add_module(record, prefix="")
    return collected.state


class _StateDict:
    def __init__(self, path):
        self.path = path
        self.state = {}
        self._met = set()
        self._clones = {}

    def fail(self, message):
        raise failure(self.path, f"not a usable model: {message}; get the file again")

    def table(self, record, name):
        table = record.attributes.get(name)
        if not isinstance(table, dict):
            self.fail(f"{printable(record.class_name)} has no {name}, so it is no module")
        return table

    def add_module(self, record, prefix):
        if type(record) is not Record:
            self.fail(f"{printable(prefix or 'the model', 80)} is a {type(record).__name__}, not a module")
        if id(record) in self._met:  # a chain whose links hold the next one twice would take 2**length steps
            self.fail(f"the module {printable(prefix, 80)} is there twice or in itself")
        self._met.add(id(record))
        hidden = record.attributes.get("_non_persistent_buffers_set", set())  # since PyTorch 1.6
        if type(hidden) is not set:
            self.fail(f"the non-persistent buffers of {printable(record.class_name)} are no set")
        for name, value in self.table(record, "_parameters").items():
            self.add_tensor(prefix, name, value)
        for name, value in self.table(record, "_buffers").items():
            if name not in hidden:
                self.add_tensor(prefix, name, value)
        for name, value in self.table(record, "_modules").items():
            if value is not None:
                self.add_module(value, f"{self.joined(prefix, name)}.")

    def add_tensor(self, prefix, name, value):
        if value is None:
            return
        full = self.joined(prefix, name)
        if not isinstance(value, torch.Tensor):
            self.fail(f"{printable(full, 80)} is a {type(value).__name__}, not a tensor")
        if full in self.state:
            self.fail(f"{printable(full, 80)} is there twice")
        if id(value) not in self._clones:
            self._clones[id(value)] = value.detach().clone()
        self.state[full] = self._clones[id(value)]

    def joined(self, prefix, name):
        if type(name) is not str or not name or "." in name:
            self.fail(f"a parameter or module is called {printable(name, 80)!r}, which PyTorch does not allow")
        if len(prefix) + len(name) > _MAX_NAME:
            self.fail(f"the dotted name of a parameter or module is longer than {_MAX_NAME} characters")
        return prefix + name
