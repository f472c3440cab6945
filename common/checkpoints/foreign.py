"""Checkpoints of third parties, read without executing anything in them.

The three formats that torch.save has had: zip (since PyTorch 1.6), five pickles in a row followed by raw data (before,
Python 2 and 3), and tar (0.1). The file is read into memory once; what it may build is in `stand_ins.py`.
"""

import collections
import re
import struct

import torch

from common.checkpoints.archives import ZIP_START, looks_like_tar, tar_members, zip_members
from common.checkpoints.errors import Damaged, Refused, failure, read_file, reason
from common.checkpoints.records import Record, RecordClass
from common.checkpoints.stand_ins import StandIns, StorageType
from common.checkpoints.tensors import Storage, TensorBuilder
from common.checkpoints.unpickler import PickleSource, RestrictedUnpickler

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_MAX_DEPTH = 256  # of containers and records; a whole pickled network nests about 20
_MAX_KEY = 64  # characters; the keys of storages are numbers
_LEAVES = (str, int, float, bool, type(None), bytes, torch.Tensor, torch.Size, torch.dtype, RecordClass)


def read_foreign(path, extra_records=()):
    """The object in a checkpoint that any version of PyTorch wrote, without executing anything in it.

    path: file; read whole. extra_records: names of classes that may occur besides those of torch.nn and torch.optim,
    dotted ("models.resnet.ResNet") or as a prefix that ends in a dot ("models."). Objects of all these classes become
    inert `Record`s, classes as values `RecordClass`es.
    Returns the tree of dict, OrderedDict, list, tuple, set, str, int, float, bool, None, bytes, torch.Size,
    torch.dtype, Record, RecordClass and tensors. Tensors are on the CPU, bit for bit the file's, each with a storage of
    its own; parameters are tensors, NumPy scalars numbers, NumPy arrays tensors, devices str, Counter and defaultdict
    dict. The tree has no cycles and at most 256 levels.
    Raises CheckpointError, naming the file, for one that is damaged, of another kind, or holds or asks for anything
    else; time and memory are bounded by the file's size in every case. ValueError for a malformed extra_records.
    """
    extra_records = (extra_records,) if isinstance(extra_records, str) else tuple(extra_records)
    StandIns(None, extra_records)  # the caller's mistake, before the file's
    try:
        return read_bytes(read_file(path), extra_records)
    except Refused as error:
        advice = "nothing in the file was executed, do not load it in other ways"
        raise failure(path, f"refused: {error}; {advice}") from error
    except Exception as error:  # a malformed pickle can raise nearly anything
        raise failure(path, f"damaged or not a checkpoint: {reason(error)}; get the file again") from error


def read_bytes(data, extra_records=()):
    """As `read_foreign`, on a file's contents; raises Refused, Damaged or nearly any other exception."""
    builder = TensorBuilder(len(data))
    stand_ins = StandIns(builder, extra_records)
    if data.startswith(ZIP_START):
        result = read_zip(data, builder, stand_ins)
    elif data.startswith(b"\x80"):  # PROTO, the first opcode of a pickle
        result = _read_legacy(data, builder, stand_ins)
    elif looks_like_tar(data):
        result = _read_tar(data, builder, stand_ins)
    else:
        raise Damaged("it begins like no format of PyTorch")
    builder.fill()
    check_tree(result)
    return result


def read_zip(data, builder, stand_ins, max_reads=None):
    """The object in the bytes of a zip archive: what builder and stand_ins make of it."""
    members = zip_members(data)
    if "constants.pkl" in members or any(name.startswith("code/") for name in members):
        raise Refused("it is a TorchScript archive, which is a program")
    if "data.pkl" not in members:
        raise Damaged("it is a zip archive, but not one of PyTorch: it has no data.pkl")
    if bytes(members.get("byteorder", b"little")) != b"little":
        raise Refused("it was written on a big-endian machine")

    def persistent_load(pid):
        key, dtype, count = _storage_id(pid, 5)
        storage = builder.storage(key, dtype, count)
        storage.data = members.get(f"data/{key}")
        return storage

    source = PickleSource(bytes(members["data.pkl"]), max_reads)
    return RestrictedUnpickler(source, stand_ins, persistent_load).load()


def _read_legacy(data, builder, stand_ins):
    source = PickleSource(data)

    def persistent_load(pid):
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return _module_class(pid[1])
        if type(pid) is tuple and pid[5:] != (None,):
            raise Refused("it holds a view of a storage, or a persistent id of unknown kind")
        return builder.storage(*_storage_id(pid, 6))

    if _plain(source, stand_ins) != _MAGIC_NUMBER:
        raise Damaged("it is a pickle, but not one that torch.save wrote")
    if _plain(source, stand_ins) != _PROTOCOL_VERSION:
        raise Damaged("its protocol version is unknown")
    _check_system(_plain(source, stand_ins))
    result = RestrictedUnpickler(source, stand_ins, persistent_load).load()
    keys = _plain(source, stand_ins)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise Damaged("its list of storages is no list of names")
    if len(keys) != len(builder.storages) or set(keys) != set(builder.storages):
        raise Refused("its list of storages is not that of its tensors")
    for key in keys:
        _take_storage(source, builder.storages[key])
    if source.remaining:
        raise Damaged(f"{source.remaining} bytes follow its last storage")
    return result


def _read_tar(data, builder, stand_ins):
    members = {name: PickleSource(bytes(content)) for name, content in tar_members(data).items()}
    _check_system(_plain(members["sys_info"], stand_ins))
    storages = _tar_storages(members["storages"], builder, stand_ins)
    tensors = _tar_tensors(members["tensors"], builder, stand_ins, storages)

    def persistent_load(pid):
        if type(pid) is tuple and len(pid) == 3:
            return _module_class(pid[0])
        if type(pid) is not str or not re.fullmatch("[0-9]{1,20}", pid) or int(pid) not in tensors:
            raise Refused("it holds a persistent id of unknown kind")
        return tensors[int(pid)]

    return RestrictedUnpickler(members["pickle"], stand_ins, persistent_load).load()


def _tar_storages(source, builder, stand_ins):
    """{key: Storage}: pickled (key, location, type), int64 count, data, for each; then a pickled list of views."""
    storages = {}
    for _ in range(_plain(source, stand_ins)):
        key, _location, kind = _plain(source, stand_ins)
        if type(key) is not int or key in storages or type(kind) is not StorageType:
            raise Refused("it holds a storage of unknown kind")
        count = struct.unpack("<q", source.read(8))[0]
        storages[key] = builder.storage(key, kind.dtype, count)
        storages[key].data = source.take(storages[key].nbytes)
    for key, root_key, offset, count in _plain(source, stand_ins):
        if {type(value) for value in (key, root_key, offset, count)} != {int} or key in storages:
            raise Refused("it holds a view of a storage without a name of its own")
        root = storages.get(root_key, Storage(torch.uint8, -1))
        if not 0 <= offset <= offset + count <= root.count:
            raise Refused("it holds a view outside its storage")
        itemsize = root.dtype.itemsize
        storages[key] = Storage(root.dtype, count, root.data[offset * itemsize : (offset + count) * itemsize])
    return storages


def _tar_tensors(source, builder, stand_ins, storages):
    """{key: tensor}: pickled (key, storage key, type), then ndim, sizes, strides, offset in binary, for each."""
    tensors = {}
    for _ in range(_plain(source, stand_ins)):
        key, storage_key, _kind = _plain(source, stand_ins)
        dims, _padding = struct.unpack("<iI", source.read(8))
        size, stride = (struct.unpack(f"<{dims}q", source.read(8 * dims)) for _ in range(2))
        (offset,) = struct.unpack("<q", source.read(8))
        if type(key) is not int or type(storage_key) is not int or key in tensors:
            raise Refused("it holds a tensor without a name of its own")
        tensors[key] = builder.tensor(storages.get(storage_key), offset, size, stride)
    return tensors


def _plain(source, stand_ins):
    def persistent_load(pid):
        raise Refused("it holds a persistent id where none belongs")

    return RestrictedUnpickler(source, stand_ins, persistent_load).load()


def _check_system(info):
    if type(info) is not dict or info.get("little_endian") is not True:
        raise Damaged("it does not say that it was written on a little-endian machine")


def _module_class(kind):
    """The class of a 'module' persistent id; the file name and source text beside it are not looked at."""
    if type(kind) is not RecordClass:
        raise Refused("it passes something as a module's class that is none")
    return kind


def _storage_id(pid, length):
    """(key, dtype, count) of the persistent id of a storage, a tuple of `length`."""
    if type(pid) is not tuple or len(pid) != length or pid[0] != "storage":
        raise Refused("it holds a persistent id of unknown kind")
    kind, key, count = pid[1], pid[2], pid[4]
    if type(kind) is not StorageType or type(key) is not str or len(key) > _MAX_KEY:
        raise Refused("it holds a storage of unknown kind")
    return key, kind.dtype, count


def _take_storage(source, storage):
    (count,) = struct.unpack("<q", source.read(8))
    if count != storage.count:
        raise Damaged("a storage has another size than its tensors say")
    storage.data = source.take(storage.nbytes)


def _children(node):
    if type(node) is Record:
        return list(node.attributes.values())
    if type(node) in (dict, collections.OrderedDict):
        return [*node.values()]
    if type(node) in (list, tuple, set):
        return list(node)
    if type(node) in _LEAVES:
        return None
    raise Refused(f"it holds a {type(node).__name__} as a value")


def check_tree(root, children_of=_children):
    """Raise Refused for a cycle, more than _MAX_DEPTH levels, or a value that should not be in the result.

    children_of: function of a node that returns the list of those below it, None for a leaf, or raises Refused.
    """
    heights, on_path, stack = {}, set(), [(root, None)]
    while stack:
        node, children = stack.pop()
        if children is None:  # first meeting
            children = children_of(node)
            if children is None or id(node) in heights:
                continue
            if id(node) in on_path:
                raise Refused("it holds something that contains itself")
            on_path.add(id(node))
            stack.append((node, children))
            stack.extend((child, None) for child in children)
        else:  # all children are done
            on_path.discard(id(node))
            heights[id(node)] = 1 + max((heights.get(id(child), 0) for child in children), default=0)
            if heights[id(node)] > _MAX_DEPTH:
                raise Refused(f"it nests more than {_MAX_DEPTH} levels")
