"""Checkpoints that ask for too much: memory and time stay in proportion to the file; random damage never escapes."""

import json
import pickle
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from common.checkpoints import CheckpointError, read_foreign, record_state_dict, unpickler
from common.checkpoints.__main__ import describe
from tests.common.test_checkpoints_hostile import (
    APPEND,
    BUILD,
    CONV,
    DICT,
    LIST,
    NO_ARGS,
    NONE,
    PERSISTENT,
    POP,
    REDUCE,
    SETITEM,
    TUPLE1,
    V2,
    call,
    legacy_with,
    name,
    new,
    number,
    persistent,
    rebuilt,
    storage_id,
    tar_file,
    tar_tensor,
    tar_with,
    text,
    tuple_of,
    whole,
    zip_with,
)
from tests.common.test_checkpoints_writers import legacy_bytes, pack_zip, sample_tensors, tar_bytes, torch_bytes

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20


def put(index):
    return pickle.LONG_BINPUT + struct.pack("<I", index)


def get(index):
    return pickle.LONG_BINGET + struct.pack("<I", index)


def float_storage(count):
    return persistent(text("storage"), name("torch FloatStorage"), text("0"), text("cpu"), number(count))


def many_views(size, stride, repeat):
    """A zip file of one megabyte whose storage is viewed `repeat` times."""
    view = tuple_of(float_storage(2**18), number(0), tuple_of(number(size)), tuple_of(number(stride)), NONE, NONE)
    program = name(V2) + put(0) + POP + view + put(1) + POP + LIST + (get(0) + get(1) + REDUCE + APPEND) * repeat
    return pack_zip({"data.pkl": whole(program), "data/0": bytes(MEGABYTE)})


def repeated(function, argument, repeat):
    """Call a known function again and again on one large argument."""
    program = function + put(0) + POP + argument + put(1) + POP + LIST
    return zip_with(program + (get(0) + get(1) + REDUCE + APPEND) * repeat)


def big_list(count):
    return LIST + b"(" + (LIST + NONE + APPEND + NONE + APPEND) * count + b"e"


DEEP = NO_ARGS + TUPLE1 * 200_000  # to hash it, or to compare it with its like, takes that many C calls
OPEN_PAIR = name("collections OrderedDict") + LIST + LIST + text("a") + APPEND  # OrderedDict([["a",

# File contents, and the message that refuses them (None: they are harmless and are read).
BOMBS = {
    "memo index 2**27": (zip_with(DICT + put(2**27)), None),
    "memo index 2**32-1": (legacy_with(DICT + put(2**32 - 1) + POP + get(2**32 - 1), 3), "list of storages"),
    "BINUNICODE of 4 GiB": (zip_with(b"X" + struct.pack("<I", 2**32 - 1)), "truncated"),
    "BINUNICODE8 of 1 TiB": (zip_with(b"\x8d" + struct.pack("<Q", 2**40)), "truncated"),
    "BINUNICODE8 of 2**63": (zip_with(b"\x8d" + struct.pack("<Q", 2**63)), "damaged"),
    "BINBYTES8 of 1 TiB": (zip_with(b"\x8e" + struct.pack("<Q", 2**40)), "truncated"),
    "BINSTRING of 2 GiB": (zip_with(b"T" + struct.pack("<i", 2**31 - 1)), "truncated"),
    "BINSTRING of -1": (zip_with(b"T" + struct.pack("<i", -1)), "negative"),
    "BYTEARRAY8 of 1 TiB": (zip_with(b"\x96" + struct.pack("<Q", 2**40)), "opcode BYTEARRAY8"),
    "LONG4 of 2 GiB": (zip_with(b"\x8b" + struct.pack("<i", 2**31 - 1)), "opcode LONG4"),
    "FRAME of 2**60": (zip_with(b"\x95" + struct.pack("<Q", 2**60)), "truncated"),
    "INT of 5000 digits": (zip_with(b"I" + b"9" * 5000 + b"\n"), "does not end"),
    "GLOBAL without end": (zip_with(b"c" + b"a" * MEGABYTE), "does not end"),
    "storage of 4 TiB": (legacy_with(storage_id(count=number(2**40)), 3), "more bytes than the file"),
    "tensor of 4 TiB": (pack_zip({"data.pkl": whole(rebuilt(count=2**40, size=(2**40,), stride=(1,)))}), "more bytes"),
    "half a million steps": (zip_with((NONE + POP) * 250_000 + DICT), None),
    "three million steps": (zip_with((NONE + POP) * 1_500_000 + DICT), "steps"),
    "three million sets": (zip_with(b"\x8f" * 3_000_000 + b"."), "steps"),
    "a million memo entries": (zip_with(LIST + b"\x94" * 1_000_000), None),
    "deep lists": (zip_with(LIST * 100_000 + APPEND * 99_999), "levels"),
    "deep tuples": (legacy_with(NO_ARGS + TUPLE1 * 100_000, 3), "list of storages"),
    "deep tuples in a tar": (tar_with(NO_ARGS + TUPLE1 * 100_000, "pickle"), "levels"),
    "deep tuple as a key": (zip_with(DICT + DEEP + NONE + SETITEM), "a tuple as a key"),
    "deep tuple as an argument": (zip_with(call(name("torch Size"), DEEP)), "no shape"),
    "deep tuple as a NumPy type": (zip_with(call(name("numpy dtype"), DEEP)), "not named"),
    "deep tuple as a device": (zip_with(call(name("torch device"), DEEP)), "unknown device"),
    "deep tuple as a storage's key": (
        zip_with(persistent(text("storage"), name("torch FloatStorage"), DEEP, NONE, NONE)),
        "unknown kind",
    ),
    "deep tuple as a tensor's storage": (tar_file(tensors=[tar_tensor(storage=DEEP)]), "name of its own"),
    "deep tuple as a magic number": (legacy_with(DEEP, 0), "not one that torch.save"),
    "deep tuple as the list of storages": (legacy_with(LIST + DEEP + APPEND, 4), "no list of names"),
    "deep tuple as a persistent id": (legacy_with(DEEP + PERSISTENT, 3), "unknown kind"),
    "deep records": (zip_with((new(CONV) + DICT + text("a")) * 30_000 + NONE + (SETITEM + BUILD) * 30_000), "levels"),
    "deep calls": (zip_with(OPEN_PAIR * 30_000 + NONE + (APPEND + APPEND + TUPLE1 + REDUCE) * 30_000), "levels"),
    "a list in itself": (zip_with(LIST + b"q\x00h\x00a"), "contains itself"),
    "a record in itself": (zip_with(new(CONV) + b"q\x00" + DICT + text("a") + b"h\x00sb"), "contains itself"),
    "encoding again and again": (
        repeated(name("_codecs encode"), tuple_of(text("a" * MEGABYTE), text("latin1")), 300),
        "in memory",
    ),
    "OrderedDict again and again": (
        repeated(name("collections OrderedDict"), tuple_of(big_list(50_000)), 1000),
        "in memory",
    ),
    "attributes again and again": (
        zip_with(
            DICT
            + b"("
            + b"".join(text(str(i)) + NONE for i in range(50_000))
            + b"u"
            + put(1)
            + POP
            + LIST
            + (new(CONV) + get(1) + BUILD + APPEND) * 1000
        ),
        "in memory",
    ),
    "views again and again": (many_views(2**18, 1, 300), "in memory"),
    "sparse views again and again": (many_views(2, 2**18 - 1, 300), "in memory"),
    "colliding keys": (
        zip_with(DICT + b"(" + b"".join(number(k * (2**61 - 1)) + NONE for k in range(1, 60)) + b"u"),
        "huge number as a key",
    ),
    "colliding members of a set": (
        zip_with(b"\x8f(" + b"".join(number(k * (2**61 - 1)) for k in range(1, 60)) + b"\x90"),
        "huge number as a key",
    ),
}

READER = """
import json, pathlib, resource, sys, time
from common.checkpoints import CheckpointError, read_foreign
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before, start, message = peak(), time.process_time(), None
    try:
        read_foreign(path)
    except CheckpointError as error:
        message = str(error)
    print(json.dumps([path.name, message, time.process_time() - start, peak() - before]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, to limit and measure memory")
def test_bombs_take_no_memory_and_no_time(tmp_path):
    """In a process of its own: the limit must not hit other tests, and a crash must be seen as one."""
    for index, (content, _) in enumerate(BOMBS.values()):
        (tmp_path / f"{index:03}").write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(reports) == len(BOMBS)
    for (bomb, (content, expected)), (_, message, seconds, megabytes) in zip(BOMBS.items(), reports, strict=True):
        assert (message is None) if expected is None else (expected in (message or "")), (bomb, message)
        assert "\n" not in (message or "") and len(message or "") < 600, bomb
        assert megabytes < 100 + 250 * len(content) / MEGABYTE and seconds < 20, (bomb, seconds, megabytes)


def test_a_chain_that_doubles_is_walked_once(tmp_path):
    """60 records, each holding the next one twice: small in memory, 2**60 steps for a careless walk."""

    def tables(body):
        empty = text("_parameters") + DICT + SETITEM + text("_buffers") + DICT + SETITEM
        return DICT + empty + text("_modules") + DICT + body + SETITEM

    program = new(CONV) + tables(b"") + BUILD
    for _ in range(60):
        twice = put(0) + POP + new(CONV) + tables(text("a") + get(0) + SETITEM + text("b") + get(0) + SETITEM)
        program += twice + BUILD
    path = tmp_path / "chain.t7"
    path.write_bytes(zip_with(program))
    record = read_foreign(path)
    assert len(list(describe(record))) < 60 * 10
    with pytest.raises(CheckpointError, match="there twice or in itself"):
        record_state_dict(record, path)


def test_the_number_of_steps_is_bounded(tmp_path, monkeypatch):
    path = tmp_path / "file.pt"
    path.write_bytes(torch_bytes(sample_tensors()))
    read_foreign(path)
    monkeypatch.setattr(unpickler, "MAX_READS", 100)
    with pytest.raises(CheckpointError, match="more than 100 steps"):
        read_foreign(path)


def mutations(content, seed, count):
    """Copies of `content` with random damage: bytes changed, cut, repeated or inserted."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            position, length = rng.randrange(len(damaged)), rng.choice([1, 1, 1, 2, 8])
            replacement = rng.choice([rng.randbytes(length), b"", bytes(damaged[position : position + 40])])
            damaged[position : position + length] = replacement
        yield bytes(damaged)


@pytest.mark.parametrize("kind", ["legacy", "tar", "zip", "zip with sound checksums"])
def test_random_damage_gives_a_result_or_one_line(tmp_path, kind):
    tensors = sample_tensors()
    path = tmp_path / "file"
    if kind == "zip with sound checksums":  # else hardly any damage gets as far as the unpickler
        program = whole(rebuilt())
        files = [pack_zip({"data.pkl": bad, "data/0": bytes(16)}) for bad in mutations(program, 4, 400)]
    else:
        good = {"legacy": legacy_bytes, "tar": tar_bytes, "zip": torch_bytes}[kind](tensors)
        files = list(mutations(good, zlib.crc32(kind.encode()), 400))
    refused = 0
    for content in files:
        path.write_bytes(content)
        try:
            read_foreign(path)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(files) // 2
