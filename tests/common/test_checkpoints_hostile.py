"""Hostile pickles, in each place of each format: refused with one line, and nothing in them runs."""

import copyreg
import encodings.cp437  # noqa: F401  zip names use it: no new module for the tests below
import io
import os
import pickle
import struct
import sys

import pytest
import torch

from common.checkpoints import CheckpointError, read_foreign
from tests.common.test_checkpoints_writers import (
    legacy_parts,
    pack_tar,
    pack_zip,
    plain_pickle,
    sample_tensors,
    tar_parts,
)

EXTENSION = 0x7C  # registered for os.system by a fixture
CONV = "torch.nn.modules.conv Conv2d"
V2 = "torch._utils _rebuild_tensor_v2"
NONE, DICT, LIST, NO_ARGS, POP, TRUE = b"N", b"}", b"]", b")", b"0", b"\x88"
REDUCE, NEWOBJ, BUILD, TUPLE1, SETITEM, APPEND, PERSISTENT, PROTO2 = (
    b"R",
    b"\x81",
    b"b",
    b"\x85",
    b"s",
    b"a",
    b"Q",
    b"\x80\x02",
)


def text(value):
    raw = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def data(value):
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def number(value):
    return pickle.BININT + struct.pack("<i", value) if abs(value) < 2**31 else pickle.LONG1 + b"\x09" + long(value)


def long(value):
    return value.to_bytes(9, "little", signed=True)


def name(module_and_attribute):
    module, attribute = module_and_attribute.split(" ")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def stack_name(module_and_attribute):
    module, attribute = module_and_attribute.split(" ")
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *args):
    return function + tuple_of(*args) + REDUCE


def new(class_name):
    return name(class_name) + NO_ARGS + NEWOBJ


def system(command):
    return call(name("os system"), text(command))


def whole(program):
    return b"\x80\x04" + program + b"."


# Each of these runs the shell command `c` when pickle reads it carelessly; a test below makes sure of that.
LIVE = {
    "GLOBAL os.system": system,
    "GLOBAL posix.system": lambda c: call(name("posix system"), text(c)),
    "STACK_GLOBAL": lambda c: call(stack_name("os system"), text(c)),
    "STACK_GLOBAL from the memo": lambda c: (
        text("os") + b"q\x00" + POP + text("system") + b"q\x01" + POP + call(b"h\x00h\x01\x93", text(c))
    ),
    "MEMOIZE and a later call": lambda c: name("os system") + b"\x94" + POP + LIST + call(b"h\x00", text(c)) + APPEND,
    "LONG_BINPUT 2**31-1": lambda c: (
        name("os system") + b"r\xff\xff\xff\x7f" + POP + call(b"j\xff\xff\xff\x7f", text(c))
    ),
    "INST": lambda c: b"(" + text(c) + b"ios\nsystem\n",
    "OBJ": lambda c: b"(" + name("os system") + text(c) + b"o",
    "builtins.eval": lambda c: call(name("builtins eval"), text(f"__import__('os').system({c!r})")),
    "__builtin__.eval": lambda c: PROTO2 + call(name("__builtin__ eval"), text(f"__import__('os').system({c!r})")),
    "builtins.exec": lambda c: call(name("builtins exec"), text(f"import os; os.system({c!r})")),
    "nested REDUCE": lambda c: call(
        call(name("builtins getattr"), call(name("builtins __import__"), text("os")), text("system")), text(c)
    ),
    "subprocess": lambda c: call(name("subprocess getoutput"), text(c)),
    "NEWOBJ_EX": lambda c: call(name("functools partial") + tuple_of(name("os system"), text(c)) + DICT + b"\x92"),
    "NEWOBJ": lambda c: call(name("functools partial") + tuple_of(name("os system"), text(c)) + NEWOBJ),
    "operator.methodcaller": lambda c: call(
        call(name("operator methodcaller"), text("system"), text(c)), call(name("builtins __import__"), text("os"))
    ),
    "pickle.loads": lambda c: call(name("pickle loads"), data(whole(system(c)))),
    "in a frame": lambda c: b"\x95" + struct.pack("<Q", len(system(c)) + 1) + system(c),
    "as a dict value": lambda c: DICT + text("epoch") + number(3) + SETITEM + text("a") + system(c) + SETITEM,
    "popped again": lambda c: system(c) + POP + DICT,
    "in a BUILD state": lambda c: (
        call(name("collections OrderedDict")) + DICT + text("a") + system(c) + SETITEM + BUILD
    ),
    "as an argument of a known class": lambda c: call(name("collections OrderedDict"), LIST + system(c) + POP),
    "extension code of 1 byte": lambda c: call(pickle.EXT1 + bytes([EXTENSION]), text(c)),
    "extension code of 2 bytes": lambda c: call(pickle.EXT2 + struct.pack("<H", EXTENSION), text(c)),
    "extension code of 4 bytes": lambda c: call(pickle.EXT4 + struct.pack("<i", EXTENSION), text(c)),
    "dotted name": lambda c: call(stack_name("subprocess os.system"), text(c)),
    "after a second PROTO": lambda c: PROTO2 + system(c),
}

# These run nothing with plain pickle, or do harm in another way; the message that refuses them.
CONFUSED = {
    "name with Storage in it": (name("posix systemStorage"), "names posix.systemStorage"),
    "storage of another module": (name("os FloatStorage"), "names os.FloatStorage"),
    "getattr on a known class": (
        call(name("__builtin__ getattr"), name(CONV), text("__init__")),
        "__builtin__.getattr",
    ),
    "dotted name below a known class": (stack_name("torch.nn.modules.conv Conv2d.__init__.__globals__"), "__globals__"),
    "dotted name below a prefix": (stack_name("models.resnet ResNet.__init__.__globals__"), "__globals__"),
    "a name of a million characters": (stack_name("torch.nn.modules " + "a" * 10**6), "longer than any class"),
    "a path as a module": (name("models./tmp/evil Net"), "names models./tmp/evil.Net"),
    "an empty attribute": (stack_name("torch.nn.modules "), "names torch.nn.modules."),
    "torch.load": (name("torch.serialization load"), "names torch.serialization.load"),
    "torch.hub": (name("torch.hub load"), "names torch.hub.load"),
    "_load_from_bytes": (name("torch.storage _load_from_bytes"), "_load_from_bytes"),
    "typing a class": (name("builtins type"), "names builtins.type"),
    "copyreg": (name("copyreg _reconstructor"), "names copyreg._reconstructor"),
    "numpy from buffer": (name("numpy fromstring"), "names numpy.fromstring"),
    "numpy objects": (call(name("numpy dtype"), text("O8")), "type 'O8'"),
    "numpy scalar of a non-type": (
        call(name("numpy.core.multiarray scalar"), text("f8"), data(b"8bytes..")),
        "refused",
    ),
    "a record class called": (call(name(CONV), number(3)), "calls torch.nn.modules.conv.Conv2d"),
    "a record called": (call(new(CONV)), "calls a Record"),
    "text called": (call(text("eval"), text("1")), "calls a str"),
    "a tensor type called": (call(name("torch FloatTensor"), number(9)), "calls torch.FloatTensor"),
    "arguments that are no tuple": (name("collections OrderedDict") + LIST + REDUCE, "no tuple"),
    "BUILD on a record class": (name(CONV) + DICT + text("dump_patches") + TRUE + b"sb", "attributes of a RecordClass"),
    "BUILD on a function": (
        name(V2) + b"(" + NONE + DICT + text("__defaults__") + tuple_of(number(1)) + b"st" + BUILD,
        "attributes of a Function",
    ),
    "BUILD on a container class": (
        name("collections OrderedDict") + b"(" + NONE + DICT + text("update") + NONE + b"st" + BUILD,
        "attributes of a Function",
    ),
    "BUILD on a list": (LIST + DICT + BUILD, "attributes of a list"),
    "BUILD on a storage type": (name("torch FloatStorage") + DICT + BUILD, "attributes of a StorageType"),
    "BUILD on a dtype": (name("torch float32") + DICT + BUILD, "attributes of a dtype"),
    "BUILD of slots": (
        new(CONV) + b"(" + NONE + DICT + text("attributes") + NONE + b"st" + BUILD,
        "attributes of a Record",
    ),
    "BUILD with keys that are no names": (new(CONV) + DICT + number(1) + NONE + b"sb", "attributes of a Record"),
    "SETITEM on a record": (new(CONV) + text("a") + NONE + SETITEM, "no dict"),
    "SETITEM on a list": (LIST + number(0) + NONE + SETITEM, "no dict"),
    "APPEND on a dict": (DICT + NONE + APPEND, "no list"),
    "APPENDS on a record": (new(CONV) + b"(" + NONE + b"e", "no list"),
    "ADDITEMS on a list": (LIST + b"(" + NONE + b"\x90", "no set"),
    "INST of a known class": (b"(itorch.nn.modules.conv\nConv2d\n", "opcode INST"),
    "OBJ of a known class": (b"(" + name(CONV) + b"o", "opcode OBJ"),
    "NEWOBJ_EX of a known class": (name(CONV) + NO_ARGS + DICT + b"\x92", "opcode NEWOBJ_EX"),
    "EXT1": (pickle.EXT1 + bytes([EXTENSION]), "opcode EXT1"),
    "EXT2": (pickle.EXT2 + struct.pack("<H", EXTENSION), "opcode EXT2"),
    "EXT4": (pickle.EXT4 + struct.pack("<i", EXTENSION), "opcode EXT4"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 2**40), "opcode BYTEARRAY8"),
    "NEXT_BUFFER": (b"\x97", "opcode NEXT_BUFFER"),
    "text persistent id": (b"P0\n", "opcode PERSID"),
    "unknown opcode": (b"\xfe", "opcode 0xfe"),
    "a parameter of a class": (call(name("torch.nn.parameter Parameter"), name(CONV)), "no tensor"),
    "a tensor of a class": (call(name(V2), name(CONV), number(0), NO_ARGS, NO_ARGS), "no storage"),
    "a tensor of text": (call(name(V2), text("cpu"), number(0), NO_ARGS, NO_ARGS), "no storage"),
    "a set of text": (call(name("builtins set"), text("abc")), "from something else"),
    "an unhashable key": (DICT + LIST + NONE + SETITEM, "a list as a key"),
    "a tuple as a key": (DICT + tuple_of(number(1)) + NONE + SETITEM, "a tuple as a key"),
    "a huge key": (DICT + number(2**61 - 1) + NONE + SETITEM, "a huge number as a key"),
    "a size of text": (call(name("torch Size"), tuple_of(text("a"))), "no shape"),
    "an encoder": (call(name("_codecs encode"), text("abc"), text("rot13")), "encodes"),
    "a device of ours": (call(name("torch device"), text("evil")), "unknown device"),
    "a stack that runs out": (REDUCE, "damaged"),
    "a mark that is missing": (b"t", "damaged"),
    "a memo that is empty": (b"h\x09", "damaged"),
}


def legacy_with(program, place):
    parts = legacy_parts(sample_tensors(), era="0.4")
    parts[place] = whole(program)
    return b"".join(parts)


def tar_with(program, member):
    parts = tar_parts(sample_tensors())
    rest = parts[member] if member in ("storages", "tensors") else b""  # their first pickle is a count
    return pack_tar({**parts, member: whole(program) + rest})


def zip_with(program):
    return pack_zip({"data.pkl": whole(program), "version": b"3\n"})


PLACES = {
    "magic number": lambda program: legacy_with(program, 0),
    "protocol version": lambda program: legacy_with(program, 1),
    "type sizes": lambda program: legacy_with(program, 2),
    "object": lambda program: legacy_with(program, 3),
    "key list": lambda program: legacy_with(program, 4),
    "zip": zip_with,
    "tar sys_info": lambda program: tar_with(program, "sys_info"),
    "tar storages": lambda program: tar_with(program, "storages"),
    "tar tensors": lambda program: tar_with(program, "tensors"),
    "tar pickle": lambda program: tar_with(program, "pickle"),
}


@pytest.fixture(scope="module", autouse=True)
def extension_code():
    """An extension code that any library might have registered, already used once, so that it is in the cache."""
    copyreg.add_extension("os", "system", EXTENSION)
    pickle._extension_cache[EXTENSION] = os.system
    yield
    copyreg.remove_extension("os", "system", EXTENSION)  # clears the cache too


@pytest.fixture
def nothing_ran(tmp_path):
    """A shell command that leaves a trace; afterwards there must be none, nor any other change of the process."""
    sentinel, modules = tmp_path / "executed", set(sys.modules)
    rebuild = torch._utils._rebuild_tensor_v2
    before = (rebuild.__defaults__, dict(vars(rebuild)), dict(vars(torch.nn.Conv2d)))
    yield f"touch {sentinel}"
    assert not sentinel.exists()
    assert set(sys.modules) == modules
    assert (rebuild.__defaults__, dict(vars(rebuild)), dict(vars(torch.nn.Conv2d))) == before


def refuse(tmp_path, content, message):
    path = tmp_path / "hostile.t7"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_foreign(path, ["models."])
    line = str(error.value)
    assert line.startswith(f"{path}: ") and message in line and "\n" not in line and len(line) < len(str(path)) + 300


@pytest.mark.parametrize("attack", LIVE)
def test_the_attacks_are_live(tmp_path, attack):
    """What is refused below does run a command when it is loaded carelessly."""
    sentinel = tmp_path / "executed"
    pickle._Unpickler(io.BytesIO(whole(LIVE[attack](f"touch {sentinel}")))).load()
    assert sentinel.exists()


@pytest.mark.parametrize("attack", LIVE)
def test_no_command_runs(tmp_path, nothing_ran, attack):
    for put in PLACES.values():
        refuse(tmp_path, put(LIVE[attack](nothing_ran)), "refused: ")


@pytest.mark.parametrize("attack", CONFUSED)
def test_no_confused_type_passes(tmp_path, nothing_ran, attack):
    program, message = CONFUSED[attack]
    for put in PLACES.values():
        refuse(tmp_path, put(program), message)


def test_the_message_names_what_the_file_wants(tmp_path):
    refuse(tmp_path, zip_with(system("true")), "refused: it names os.system, which is not among")
    refuse(tmp_path, zip_with(LIVE["INST"]("true")), "refused: it names os.system, which is not among")
    evil = "models\x1b[2J\u202e" + "x" * 500
    refuse(tmp_path, zip_with(stack_name(f"{evil} Net")), "names models?[2J?xxx")


def persistent(*items):
    return tuple_of(*items) + PERSISTENT


def storage_id(kind=None, key=None, count=None, view=NONE):
    kind = name("torch FloatStorage") if kind is None else kind
    key = text("0") if key is None else key
    count = number(4) if count is None else count
    return persistent(text("storage"), kind, key, text("cpu"), count, view)


# Programs, and why the legacy format refuses them (in the others these persistent ids have no meaning at all).
PERSISTENT_IDS = {
    "module of a function": (persistent(text("module"), name(V2), text("f"), text("s")), "a module's class"),
    "module of a type": (
        persistent(text("module"), name("torch FloatStorage"), text("f"), text("s")),
        "a module's class",
    ),
    "module of an object": (persistent(text("module"), new(CONV), text("f"), text("s")), "a module's class"),
    "module of text": (persistent(text("module"), text("models.Net"), text("f"), text("s")), "a module's class"),
    "module without source": (persistent(text("module"), name(CONV)), "unknown kind"),
    "unknown kind": (persistent(text("file"), text("/etc/passwd"), NONE, NONE, NONE, NONE), "unknown kind"),
    "no tuple": (text("0") + PERSISTENT, "unknown kind"),
    "empty tuple": (NO_ARGS + PERSISTENT, "unknown kind"),
    "list": (LIST + PERSISTENT, "unknown kind"),
    "storage of a class": (storage_id(kind=name(CONV)), "storage of unknown kind"),
    "storage of text": (storage_id(kind=text("FloatStorage")), "storage of unknown kind"),
    "storage without a key": (storage_id(key=NONE), "storage of unknown kind"),
    "storage with a long key": (storage_id(key=text("0" * 65)), "storage of unknown kind"),
    "storage with a tuple as key": (storage_id(key=tuple_of(text("0"))), "storage of unknown kind"),
    "storage of a negative size": (storage_id(count=number(-1)), "not a number of elements"),
    "storage of a size in text": (storage_id(count=text("4")), "not a number of elements"),
    "storage of a size of True": (storage_id(count=TRUE), "not a number of elements"),
    "storage of a size in floats": (storage_id(count=b"G" + struct.pack(">d", 4.0)), "not a number of elements"),
    "view of a storage": (storage_id(view=tuple_of(text("1"), number(0), number(2))), "view of a storage"),
    "storage as a value": (storage_id(), "a Storage as a value"),
    "one storage of two types": (storage_id() + POP + storage_id(kind=name("torch IntStorage")), "two types or sizes"),
    "one storage of two sizes": (storage_id() + POP + storage_id(count=number(3)), "two types or sizes"),
}


@pytest.mark.parametrize("pid", PERSISTENT_IDS)
def test_persistent_ids_are_checked(tmp_path, nothing_ran, pid):
    program, message = PERSISTENT_IDS[pid]
    keys, one = plain_pickle(["0"]), struct.pack("<q4f", 4, *range(4))
    parts = legacy_parts({}, era="0.4")
    refuse(tmp_path, b"".join([*parts[:3], whole(program), keys, one]), message)
    refuse(tmp_path, pack_zip({"data.pkl": whole(program), "data/0": one[8:]}), "refused: ")
    refuse(tmp_path, tar_with(program, "pickle"), "refused: ")


def rebuilt(offset=0, size=(2, 2), stride=(2, 1), count=4, kind="torch FloatStorage", function=V2, more=None):
    """A program that rebuilds a tensor from storage "0" of the zip style."""

    def numbers(values):
        return tuple_of(*map(number, values)) if isinstance(values, tuple) else values

    pid = persistent(text("storage"), name(kind), text("0"), text("cpu"), number(count))
    more = [TRUE, call(name("collections OrderedDict"))] if more is None else more
    offset = number(offset) if isinstance(offset, int) else offset
    return call(name(function), pid, offset, numbers(size), numbers(stride), *more)


VIEWS = {
    "reaches beyond": ({"size": (2, 3)}, "outside"),
    "starts beyond": ({"offset": 1}, "outside"),
    "starts before": ({"offset": -1}, "not numbers"),
    "negative size": ({"size": (-2, -2)}, "not numbers"),
    "negative stride": ({"stride": (-1, 1)}, "not numbers"),
    "huge stride": ({"stride": (2**62, 1)}, "outside"),
    "huge size": ({"size": (2**62, 2**62), "stride": (0, 0)}, "memory"),
    "huge empty size": ({"size": (2**62, 2**62, 0), "stride": (1, 1, 1)}, "damaged"),
    "expanded": ({"size": (2**40,), "stride": (0,)}, "memory"),
    "fewer strides": ({"stride": (1,)}, "not numbers"),
    "65 dimensions": ({"size": (1,) * 65, "stride": (1,) * 65}, "not numbers"),
    "size of text": ({"size": tuple_of(text("2"), text("2"))}, "not numbers"),
    "size of a dict": ({"size": DICT}, "not numbers"),
    "offset of True": ({"offset": TRUE}, "not numbers"),
    "offset of text": ({"offset": text("0")}, "not numbers"),
    "fewer bytes than named": ({"count": 3, "size": (3,), "stride": (1,)}, "another size"),
    "more bytes than named": ({"count": 5}, "another size"),
    "another type": ({"kind": "torch DoubleStorage"}, "another size"),
    "a billion elements": ({"count": 2**30}, "more bytes than the file"),
    "a trillion elements": ({"count": 2**40}, "more bytes than the file"),
    "2**61 elements": ({"count": 2**61}, "more bytes than the file"),
    "wrong number of arguments": ({"more": []}, None),
    "too many arguments": ({"more": [NONE] * 5}, "damaged"),
    "lazy conjugate": ({"more": [TRUE, NONE, DICT + text("conj") + TRUE + SETITEM]}, "lazy"),
    "a dtype of text": (
        {"function": "torch._utils _rebuild_tensor_v3", "more": [TRUE, NONE, text("float32")]},
        "unknown type",
    ),
    "a wider dtype": (
        {"function": "torch._utils _rebuild_tensor_v3", "more": [TRUE, NONE, name("torch float64")]},
        "outside",
    ),
}


@pytest.mark.parametrize("view", VIEWS)
def test_tensors_stay_inside_their_storage(tmp_path, view):
    options, message = VIEWS[view]
    content = pack_zip({"data.pkl": whole(rebuilt(**options)), "data/0": struct.pack("<4f", *range(4))})
    if message is None:
        path = tmp_path / "fine.pt"
        path.write_bytes(content)
        assert read_foreign(path).tolist() == [[0, 1], [2, 3]]  # what the others differ from
    else:
        refuse(tmp_path, content, message)


def test_booleans_are_0_or_1(tmp_path):
    program = whole(rebuilt(kind="torch BoolStorage"))
    refuse(tmp_path, pack_zip({"data.pkl": program, "data/0": b"\0\1\2\1"}), "booleans")


def one_tensor_parts():
    return legacy_parts({"a": torch.arange(4.0), "b": torch.arange(3.0)}, era="0.4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys[:1], "list of storages"),
        (lambda keys: [*keys, "7"], "list of storages"),
        (lambda keys: [keys[0], keys[0]], "list of storages"),
        (lambda keys: [*keys, keys[0]], "list of storages"),
        (lambda keys: keys[::-1], "another size"),
        (lambda keys: dict.fromkeys(keys), "no list of names"),
        (lambda keys: [0, 1], "no list of names"),
        (lambda keys: [[keys], [keys]], "no list of names"),
        (lambda keys: None, "no list of names"),
    ],
)
def test_the_key_list_is_that_of_the_tensors(tmp_path, change, message):
    parts = one_tensor_parts()
    parts[4] = plain_pickle(change(pickle.loads(parts[4])))
    refuse(tmp_path, b"".join(parts), message)


def test_storages_have_the_sizes_that_were_named(tmp_path):
    parts = one_tensor_parts()
    for size in (-1, 5, 2**40, 2**63 - 1):
        refuse(tmp_path, b"".join([*parts[:5], struct.pack("<q", size), parts[5][8:]]), "another size")
    refuse(tmp_path, b"".join([*parts, b"\0"]), "1 bytes follow")
    refuse(tmp_path, b"".join(parts[:5]), "truncated")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 7, "not one that torch.save wrote"),
        (0, [], "not one that torch.save wrote"),
        (1, 1002, "protocol version"),
        (2, {"little_endian": False}, "little-endian"),
        (2, {"little_endian": 1}, "little-endian"),
        (2, {}, "little-endian"),
        (2, None, "little-endian"),
    ],
)
def test_the_first_pickles_are_those_of_torch(tmp_path, place, value, message):
    parts = one_tensor_parts()
    parts[place] = plain_pickle(value)
    refuse(tmp_path, b"".join(parts), message)


def tar_storage(key=None, kind="torch FloatStorage", count=4, content=4):
    entry = whole(tuple_of(number(1) if key is None else key, text("cpu"), name(kind)))
    return entry + struct.pack(f"<q{content}f", count, *range(content))


def tar_tensor(key=9, storage=1, dims=1, numbers=(4, 1, 0)):
    storage = number(storage) if isinstance(storage, int) else storage
    entry = whole(tuple_of(number(key), storage, name("torch.cuda FloatTensor")))
    return entry + struct.pack(f"<ii{len(numbers)}q", dims, 0, *numbers)


def tar_file(storages=None, tensors=None, views=(), counts=None, key="9"):
    """A tar checkpoint that is one tensor of four floats, unless a part of it is replaced."""
    storages, tensors = storages or [tar_storage()], tensors or [tar_tensor()]
    counts = counts or (len(storages), len(tensors))
    parts = {
        "sys_info": plain_pickle({"little_endian": True}),
        "storages": plain_pickle(counts[0]) + b"".join(storages) + plain_pickle(list(views)),
        "tensors": plain_pickle(counts[1]) + b"".join(tensors),
        "pickle": whole(text(key) + PERSISTENT),
    }
    return pack_tar(parts)


def test_views_of_storages_in_a_tar(tmp_path):
    path = tmp_path / "views.tar"
    path.write_bytes(tar_file(views=[(2, 1, 1, 3)], tensors=[tar_tensor(storage=2, numbers=(2, 1, 1))]))
    assert read_foreign(path).tolist() == [2, 3]
    path.write_bytes(tar_file())
    assert read_foreign(path).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storages": [tar_storage(count=2**40)]}, "more bytes than the file"),
        ({"storages": [tar_storage(count=-1)]}, "not a number"),
        ({"storages": [tar_storage(count=400)]}, "truncated"),
        ({"storages": [tar_storage(count=3)]}, "opcode 0x00"),  # of what is left of the data
        ({"storages": [tar_storage(), tar_storage()]}, "unknown kind"),
        ({"storages": [tar_storage(key=text("1"))]}, "unknown kind"),
        ({"storages": [tar_storage(kind=CONV)]}, "unknown kind"),
        ({"counts": (2**40, 1)}, "damaged"),
        ({"counts": (1, 2**40)}, "truncated"),
        ({"counts": ("1", 1)}, "damaged"),
        ({"views": [(2, 1, 2, 3)]}, "outside its storage"),
        ({"views": [(2, 1, -1, 2)]}, "outside its storage"),
        ({"views": [(2, 1, 3, -1)]}, "outside its storage"),
        ({"views": [(2, 7, 0, 2)]}, "outside its storage"),
        ({"views": [(1, 1, 0, 2)]}, "name of its own"),
        ({"views": [(2, 1, 0.0, 2)]}, "name of its own"),
        ({"views": [(2, (1,), 0, 2)]}, "name of its own"),
        ({"views": [2]}, "damaged"),
        ({"tensors": [tar_tensor(storage=7)]}, "no storage"),
        ({"tensors": [tar_tensor(numbers=(5, 1, 0))]}, "outside its storage"),
        ({"tensors": [tar_tensor(numbers=(4, 1, -1))]}, "not numbers"),
        ({"tensors": [tar_tensor(dims=-1)]}, "damaged"),
        ({"tensors": [tar_tensor(dims=2**31 - 1)]}, "truncated"),
        ({"tensors": [tar_tensor(), tar_tensor()]}, "name of its own"),
        ({"key": "8"}, "unknown kind"),
        ({"key": "-9"}, "unknown kind"),
        ({"key": "9" * 5000}, "unknown kind"),
    ],
)
def test_the_tables_of_a_tar_are_checked(tmp_path, changes, message):
    refuse(tmp_path, tar_file(**changes), message)
