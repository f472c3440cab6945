"""Writers of old checkpoint formats, for the tests of `common.checkpoints`, and checks of them against torch's readers.

PyTorch before 0.4 and its Python 2 cannot be installed beside today's, so their files are made here: the formats byte
by byte, objects pickled as Python 2's cPickle did (8-bit strings, text for long integers, no checks of names).
"""

import collections
import io
import pickle
import struct
import tarfile
import zipfile

import torch

MAGIC_NUMBER, PROTOCOL_VERSION = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
SOURCE = "# caf\xe9, not UTF-8\nclass ResNet(nn.Module):\n    pass\n" + "    # padding\n" * 30  # longer than 255 bytes


def fake_class(dotted):
    """A class that pickles under a name of our choice."""
    module, _, name = dotted.rpartition(".")
    return type(name, (), {"__module__": module})


OBJECT_CLASSES = {}


def fake_object(dotted, **attributes):
    """An object that pickles as one of the class `dotted` with these attributes."""
    if dotted not in OBJECT_CLASSES:
        OBJECT_CLASSES[dotted] = fake_class(dotted)
    result = OBJECT_CLASSES[dotted]()
    vars(result).update(attributes)
    return result


class Variable:
    """A tensor that pickles as a Variable of PyTorch 0.2."""

    def __init__(self, tensor):
        self.tensor = tensor


class Backend:
    """Pickles as the function backend of PyTorch before 1.5."""


class StorageReference:
    """Pickles as the persistent id of a storage."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.key = str(tensor.untyped_storage().data_ptr())
        self.count = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        names = {"float32": "Float", "float64": "Double", "int64": "Long", "uint8": "Byte", "float16": "Half"}
        self.type_name = names[str(tensor.dtype).removeprefix("torch.")] + "Storage"

    def data(self):
        return bytes(self.tensor.untyped_storage())


class OldPickler(pickle._Pickler):
    """Pickles as PyTorch `era` ("0.2", "0.4", "tar") under Python 2 (`python2`) or 3 did; collects the storages."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, file, era, python2=True, source=SOURCE):
        super().__init__(file, protocol=2)
        self.era, self.python2, self.source = era, python2, source
        self.storages, self.tensors, self.met = {}, {}, set()

    def persistent_id(self, obj):
        if isinstance(obj, type) and obj in OBJECT_CLASSES.values() and obj not in self.met:
            self.met.add(obj)
            return ((obj,) if self.era == "tar" else ("module", obj)) + ("models/resnet.py", self.source)
        if isinstance(obj, StorageReference):
            self.storages[obj.key] = obj
            return ("storage", fake_class(f"torch.{obj.type_name}"), obj.key, "cuda:0", obj.count, None)
        if self.era == "tar" and type(obj) is torch.Tensor:
            self.tensors[id(obj)] = obj
            return str(id(obj))
        return None

    def call(self, dotted, *args, obj=None, state=None):
        self.save_reduce(fake_class(dotted), args, state, obj=obj)

    def save_global(self, obj, name=None):
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    def save_type(self, obj):
        self.save_global(obj)

    def save_text(self, text):
        if not self.python2:
            return pickle._Pickler.save_str(self, text)
        raw = text.encode("latin1")
        short = len(raw) < 256
        self.write(
            pickle.SHORT_BINSTRING + bytes([len(raw)]) if short else pickle.BINSTRING + struct.pack("<i", len(raw))
        )
        self.write(raw)
        self.memoize(text)

    def save_integer(self, value):
        if self.python2 and not -(2**31) <= value < 2**31:
            self.write(pickle.INT + b"%d\n" % value)  # cPickle, where the value does not fit BININT
        else:
            pickle._Pickler.save_long(self, value)

    def save_ordered_dict(self, value):
        if self.python2:
            self.call("collections.OrderedDict", [[k, v] for k, v in value.items()], obj=value)
        else:
            self.save_reduce(fake_class("collections.OrderedDict"), (), None, None, iter(value.items()), obj=value)

    def save_tensor(self, tensor):
        view = (StorageReference(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        if self.era == "0.2":
            self.call("torch._utils._rebuild_tensor", *view, obj=tensor)
        else:
            self.call("torch._utils._rebuild_tensor_v2", *view, False, collections.OrderedDict(), obj=tensor)

    def save_parameter(self, parameter):
        if self.era == "0.4":
            self.call("torch._utils._rebuild_parameter", parameter.data, True, collections.OrderedDict(), obj=parameter)
        else:
            flags = (True, False, collections.OrderedDict())
            self.call("torch.nn.parameter.Parameter", parameter.data, obj=parameter, state=flags)

    def save_variable(self, variable):
        self.call("torch.autograd.variable.Variable", variable.tensor, obj=variable, state=(False, False, None))

    def save_backend(self, backend):
        self.call("torch.nn.backends.thnn._get_thnn_function_backend", obj=backend)

    def save_size(self, size):
        self.call("torch.Size", tuple(size), obj=size)

    def save_set(self, value):
        self.call("__builtin__.set" if self.python2 else "builtins.set", sorted(value), obj=value)

    dispatch.update(
        {
            type: save_type,
            str: save_text,
            int: save_integer,
            collections.OrderedDict: save_ordered_dict,
            torch.Tensor: save_tensor,
            torch.nn.Parameter: save_parameter,
            Variable: save_variable,
            Backend: save_backend,
            torch.Size: save_size,
            set: save_set,
        }
    )


def plain_pickle(value):
    return pickle.dumps(value, protocol=2)


def old_pickle(value, **options):
    """(bytes, {key: StorageReference}, [tensors]) of one object."""
    file = io.BytesIO()
    pickler = OldPickler(file, **options)
    pickler.dump(value)
    return file.getvalue(), pickler.storages, list(pickler.tensors.values())


def legacy_parts(value, **options):
    """The five pickles of the legacy format and the raw data of the storages: six byte strings."""
    body, storages, _ = old_pickle(value, **options)
    keys = sorted(storages)
    data = b"".join(struct.pack("<q", storages[key].count) + storages[key].data() for key in keys)
    return [*map(plain_pickle, (MAGIC_NUMBER, PROTOCOL_VERSION, SYSTEM)), body, plain_pickle(keys), data]


def legacy_bytes(value, era="0.2", **options):
    return b"".join(legacy_parts(value, era=era, **options))


def tar_parts(value, **options):
    """{member name: bytes} of the tar format of PyTorch 0.1."""
    body, _, tensors = old_pickle(value, era="tar", **options)
    references = {id(tensor): StorageReference(tensor) for tensor in tensors}
    storages = {reference.key: reference for reference in references.values()}
    storage_part = [plain_pickle(len(storages))]
    for key, storage in storages.items():
        entry, _, _ = old_pickle((int(key), "cpu", fake_class(f"torch.{storage.type_name}")), era="tar")
        storage_part += [entry, struct.pack("<q", storage.count), storage.data()]
    tensor_part = [plain_pickle(len(tensors))]
    for tensor in tensors:
        kind = fake_class(f"torch.{references[id(tensor)].type_name.replace('Storage', 'Tensor')}")
        entry, _, _ = old_pickle((id(tensor), int(references[id(tensor)].key), kind), era="tar")
        numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        tensor_part += [entry, struct.pack(f"<ii{len(numbers)}q", tensor.dim(), 0, *numbers)]
    return {
        "sys_info": plain_pickle({**SYSTEM, "protocol_version": 1000}),
        "pickle": body,
        "tensors": b"".join(tensor_part),
        "storages": b"".join([*storage_part, plain_pickle([])]),
    }


def pack_tar(parts):
    """A tar archive with an extended header per member, as Python 2's tarfile wrote for fractional times."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1500000000.25
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def tar_bytes(value, **options):
    return pack_tar(tar_parts(value, **options))


def pack_zip(members, folder="archive/", **options):
    """A zip archive, stored unless options say otherwise."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(folder + name, content)
    return file.getvalue()


def torch_bytes(value, **options):
    """What today's torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def assert_same_bits(left, right):
    """Equal trees: same types, keys, order, values, and the same bits in tensors."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert _bits(left) == _bits(right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same_bits(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_bits(one, other)
    else:
        assert left == right


def _bits(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample_tensors():
    """Tensors of several types, layouts and sizes, two of them on one storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 3, 2, 5, generator=generator)
    return {
        "plain": base,
        "view": base[1:3, :, :, ::2],
        "transposed": torch.randn(3, 7, generator=generator).t(),
        "number": torch.tensor(93),
        "double": torch.tensor([float("nan"), -0.0, 1e-310], dtype=torch.float64),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.arange(5).half(),
    }


def test_torch_reads_the_legacy_writer():
    tensors = sample_tensors()
    read = torch.load(io.BytesIO(legacy_bytes(tensors, era="0.4", python2=False)), "cpu", weights_only=True)
    assert_same_bits(dict(read), tensors)


def test_torch_reads_the_python2_writer():
    tensors = sample_tensors()
    read = torch.load(io.BytesIO(legacy_bytes(tensors, era="0.2")), "cpu", weights_only=False, encoding="latin1")
    assert_same_bits(dict(read), tensors)


def test_torch_reads_the_tar_writer(tmp_path):
    tensors = sample_tensors()
    path = tmp_path / "old.tar"
    path.write_bytes(tar_bytes(tensors))
    assert_same_bits(dict(torch.load(path, weights_only=False, encoding="latin1")), tensors)
