"""Our own checkpoints: exact, whole whatever happens to the process or disk, and damage is always found."""

import collections
import errno
import io
import itertools
import multiprocessing
import os
import random
import resource
import signal
import struct
import time
import zipfile

import numpy as np
import pytest
import torch

from common.checkpoints import CheckpointError, load_checkpoint, own, previous_path, save_checkpoint
from tests.common.test_checkpoints_writers import assert_same_bits, pack_zip, sample_tensors, tar_bytes, torch_bytes


def payload(epoch=3, size=1000):
    """Made of `epoch` alone, so that a file can be recognised."""
    generator = torch.Generator().manual_seed(epoch)
    return {
        "epoch": epoch,
        "model": {"weight": torch.randn(size, generator=generator)},
        "note": ("best", 91.25, None, True),
    }


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_is_exact(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    tree = {
        **sample_tensors(),
        "model": model.state_dict(),
        "parameters": list(model.parameters()),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "numbers": [0, -1, 2**100, -(2**70), 1e-320, float("inf"), True, None],
        "text": "caf\xe9 \u4e2d \ud800",
        "tuple": (1, ("a", [])),
        7: {None: 1, 2.5: 2, True: 3},
        "bfloat16": torch.randn(3).bfloat16(),
    }
    save_checkpoint(tmp_path / "model.pt", tree)
    loaded = load_checkpoint(tmp_path / "model.pt")
    assert_same_bits(loaded, tree)
    assert loaded["model"]._metadata == tree["model"]._metadata
    assert_same_bits(torch.load(tmp_path / "model.pt", weights_only=True), tree)
    assert files(tmp_path) == ["model.pt"]


def test_nan_bits_survive(tmp_path):
    bits = torch.tensor([0x7FC00001, -0x3FFFFE, 0x7F800001], dtype=torch.int32)
    save_checkpoint(tmp_path / "nan.pt", bits.view(torch.float32))
    assert load_checkpoint(tmp_path / "nan.pt").view(torch.int32).tolist() == bits.tolist()


def itself():
    loop = []
    loop.append(loop)
    return loop


def tagged():
    tensor = torch.ones(1)
    tensor.tag = object()
    return tensor


def metadata():
    state = collections.OrderedDict()
    state.note = object()
    return state


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.float64(1.5), r"numpy.float64.*float\(\)"),
        (np.zeros(2), "numpy.ndarray"),
        (torch.nn.Linear(1, 1), r"Linear.*state_dict\(\)"),
        (torch.float32, "torch.dtype"),
        (torch.Size([1]), "torch.Size"),
        (torch.device("cpu"), "torch.device"),
        (torch.empty(2, device="meta"), "layout"),
        (torch.ones(2, 2).to_sparse(), "layout"),
        (tagged(), "attributes"),
        (metadata(), r"\['note'\] is a object"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (collections.Counter("a"), "Counter"),
        (collections.defaultdict(list), "defaultdict"),
        (collections.namedtuple("Pair", "a")(1), "Pair"),
        (lambda: 0, "function"),
        (print, "builtin_function"),
        (1 << 3000, "int"),
        (1j, "complex"),
        (itself(), "contains itself"),
        ({(1, 2): 3}, "key of type tuple"),
        ({np.int64(1): 3}, "key of type numpy.int64"),
    ],
)
def test_other_values_are_refused_before_anything_is_touched(tmp_path, value, message):
    target = tmp_path / "model.pt"
    save_checkpoint(target, payload())
    before = (files(tmp_path), target.read_bytes(), target.stat().st_mtime_ns)
    with pytest.raises(CheckpointError, match=message) as error:
        save_checkpoint(target, {"epoch": 1, "extra": [value]}, keep_previous=True)
    assert str(error.value).startswith(f"{target}: not saved: payload['extra'][0]") and "\n" not in str(error.value)
    assert (files(tmp_path), target.read_bytes(), target.stat().st_mtime_ns) == before


def test_keep_previous(tmp_path):
    target = tmp_path / "run.best.pt"
    for epoch in range(3):
        save_checkpoint(target, payload(epoch), keep_previous=True)
    assert files(tmp_path) == ["run.best.previous.pt", "run.best.pt"]
    assert_same_bits(load_checkpoint(target), payload(2))
    assert_same_bits(load_checkpoint(previous_path(target)), payload(1))
    save_checkpoint(target, payload(9))  # without the flag the one before stays as it is
    assert_same_bits(load_checkpoint(previous_path(target)), payload(1))


def test_keep_previous_after_a_kill_between_its_two_steps(tmp_path):
    """Both names are one file then; renaming one onto the other does nothing, and must not leave a third name."""
    target = tmp_path / "run.pt"
    save_checkpoint(target, payload(0))
    os.link(target, previous_path(target))
    save_checkpoint(target, payload(1), keep_previous=True)
    assert files(tmp_path) == ["run.previous.pt", "run.pt"]
    assert_same_bits(load_checkpoint(previous_path(target)), payload(0))
    assert_same_bits(load_checkpoint(target), payload(1))


def test_keep_previous_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    test_keep_previous(tmp_path)


def test_a_damaged_file_does_not_displace_a_good_one(tmp_path):
    target = tmp_path / "run.pt"
    save_checkpoint(target, payload(0))
    save_checkpoint(target, payload(1), keep_previous=True)
    target.write_bytes(target.read_bytes()[:-100])
    save_checkpoint(target, payload(2), keep_previous=True)
    assert_same_bits(load_checkpoint(previous_path(target)), payload(0))
    assert_same_bits(load_checkpoint(target), payload(2))


def test_a_link_stays_a_link_and_permissions_follow_the_umask(tmp_path):
    (tmp_path / "latest.pt").symlink_to("epoch3.pt")
    old = os.umask(0o027)
    try:
        for _ in range(2):
            save_checkpoint(tmp_path / "latest.pt", payload(), keep_previous=True)
    finally:
        os.umask(old)
    assert (tmp_path / "latest.pt").is_symlink() and files(tmp_path)[:2] == ["epoch3.previous.pt", "epoch3.pt"]
    assert (tmp_path / "epoch3.pt").stat().st_mode & 0o777 == 0o640
    (tmp_path / "epoch3.pt").unlink()
    with pytest.raises(CheckpointError, match=r"epoch3.previous.pt \(epoch 3\) is good"):
        load_checkpoint(tmp_path / "latest.pt")


def assert_nothing_lost(target, error, before):
    assert str(error.value).startswith(f"{target}: not saved: ") and "\n" not in str(error.value)
    assert (files(target.parent), target.read_bytes()) == before
    assert f"still good: {target}" in str(error.value)


@pytest.mark.parametrize("keep_previous", [False, True])
def test_a_full_disk_leaves_the_old_file(tmp_path, keep_previous):
    """The limit on a file's size stops the write in the middle, as a full disk does."""
    target = tmp_path / "run.pt"
    save_checkpoint(target, payload(0))
    before = (files(tmp_path), target.read_bytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large") as error:
            save_checkpoint(target, payload(1, size=100_000), keep_previous=keep_previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_lost(target, error, before)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_errors_at_every_step_leave_the_old_file(tmp_path, monkeypatch, call):
    target = tmp_path / "run.pt"
    save_checkpoint(target, payload(0))
    before = (files(tmp_path), target.read_bytes())

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        save_checkpoint(target, payload(1))
    assert_nothing_lost(target, error, before)


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "run.pt", payload())
    assert files(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for target, message in (
        (tmp_path / "absent" / "run.pt", "No such file or directory; there is no earlier checkpoint"),
        (tmp_path / "file" / "run.pt", "Not a directory"),
        (tmp_path / "folder", "folder or device"),
        ("/dev/null", "folder or device"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            save_checkpoint(target, payload())
        assert str(error.value).startswith(f"{target}: not saved")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            save_checkpoint(tmp_path / "run.pt", payload())
    finally:
        tmp_path.chmod(0o700)


def test_stale_temporaries_go_and_others_stay(tmp_path):
    target = tmp_path / "run[1].pt"
    stale, busy = own._temporary_name(target), own._temporary_name(target)
    other = [own._temporary_name(tmp_path / "run1.pt"), tmp_path / ".run[1].pt.tmp", tmp_path / ".run[1].pt.notes.tmp"]
    for path in (stale, *other):
        path.write_bytes(b"half a file")
    with open(busy, "wb") as handle:
        assert own._lock(handle) is True  # another process is writing it
        save_checkpoint(target, payload())
        assert set(files(tmp_path)) == {target.name, busy.name, *(path.name for path in other)}
    save_checkpoint(target, payload())
    assert set(files(tmp_path)) == {target.name, *(path.name for path in other)}


def member_ranges(data):
    """{member name: (begin, end)} of the contents in the file."""
    ranges = {}
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        lengths = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        begin = info.header_offset + 30 + sum(lengths)
        ranges[info.filename] = (begin, begin + info.file_size)
    return ranges


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    """In the contents of a member it is found and the member is named; elsewhere nothing may change unnoticed.

    Every bit of a tensor's entry in the zip directory is tried: torch's reader and Python's see these differently (a
    member marked as a folder loads as uninitialised memory, without an error).
    """
    target, rng = tmp_path / "run.pt", random.Random(0)
    save_checkpoint(target, payload(size=40))
    good = target.read_bytes()
    ranges = member_ranges(good)
    inside = {position: name for name, (begin, end) in ranges.items() for position in range(begin, end)}
    outside = sorted(set(range(len(good))) - set(inside))
    entry = good.rindex(b"archive/data/0") - 46
    assert good[entry : entry + 4] == b"PK\x01\x02" and len(inside) > 300 and len(outside) > 600
    flips = [(position, rng.randrange(8)) for position in (*inside, *rng.sample(outside, 600))]
    for position, bit in [*flips, *itertools.product(range(entry, entry + 60), range(8))]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << bit
        target.write_bytes(damaged)
        try:
            result = load_checkpoint(target)
        except CheckpointError as error:
            assert "\n" not in str(error)
            assert position not in inside or f"its member {inside[position]} fails its checksum" in str(error)
        else:
            assert position not in inside
            assert_same_bits(result, payload(size=40))


def test_truncated_files_are_named_and_the_previous_one_offered(tmp_path):
    target = tmp_path / "run.pt"
    save_checkpoint(target, payload(4))
    save_checkpoint(target, payload(5), keep_previous=True)
    good = target.read_bytes()
    for length in [0, 1, 3, 4, 100, *range(200, len(good), 997), len(good) - 1]:
        target.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"run.previous.pt \(epoch 4\) is good: use it instead") as error:
            load_checkpoint(target)
        assert str(error.value).startswith(f"{target}: not loaded: ") and "\n" not in str(error.value)
    target.unlink()
    with pytest.raises(CheckpointError, match=r"No such file.*run.previous.pt \(epoch 4\)"):
        load_checkpoint(target)
    previous_path(target).write_bytes(good[:-1])
    with pytest.raises(CheckpointError, match="get the file again"):
        load_checkpoint(target)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch_bytes({"model": torch.nn.ReLU()}), "besides tensors and plain values"),
        (torch_bytes({"scheduler": np.float64(1.5)}), "besides tensors and plain values"),
        (
            pack_zip({"data.pkl": b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00truetR.", "version": b"3\n"}),
            "names os.system",
        ),
        (pack_zip({"data.pkl": b"\x80\x02}.", "constants.pkl": b"\x80\x02)."}), "not loaded"),
        (pack_zip({"hello.txt": b"hello"}), "not loaded"),
        (torch_bytes({}, _use_new_zipfile_serialization=False), "older PyTorch"),
        (tar_bytes({}), "older PyTorch"),
        (b"text", "does not begin"),
    ],
)
def test_other_kinds_of_files(tmp_path, content, message):
    target = tmp_path / "run.pt"
    target.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(target)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(target)) * 2 + 300


def test_a_device_that_is_absent(tmp_path):
    save_checkpoint(tmp_path / "run.pt", payload())
    assert load_checkpoint(tmp_path / "run.pt", map_location="meta")["model"]["weight"].is_meta
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match="the device cuda cannot be used here.*CUDA") as error:
            load_checkpoint(tmp_path / "run.pt", map_location="cuda")
        assert "\n" not in str(error.value)


def save_forever(target, first):
    epoch = first
    while True:
        save_checkpoint(target, payload(epoch, size=20_000), keep_previous=True)
        epoch += 1


def test_a_killed_process_leaves_a_whole_file(tmp_path):
    """SIGKILL at 25 or more random moments, some of them within a save, of processes that save in a loop."""
    target, rng = tmp_path / "run.pt", random.Random(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", __name__])  # each process then starts in milliseconds
    save_checkpoint(target, payload(0, size=20_000))
    reached, kills, in_a_save = 0, 0, 0
    while kills < 25 or (not in_a_save and kills < 250):
        process = context.Process(target=save_forever, args=(target, reached + 1))
        process.start()
        deadline = time.monotonic() + 60
        while load_checkpoint(target)["epoch"] == reached and time.monotonic() < deadline:
            pass  # until it saves for the first time
        time.sleep(rng.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        result = load_checkpoint(target)
        assert result["epoch"] > reached
        reached = result["epoch"]
        assert_same_bits(result, payload(reached, size=20_000))
        kept = load_checkpoint(previous_path(target))
        assert kept["epoch"] in (reached - 1, reached)
        assert_same_bits(kept, payload(kept["epoch"], size=20_000))
        kills += 1
        in_a_save += len(files(tmp_path)) > 2
        assert len(files(tmp_path)) <= 4  # a temporary and a name for the one before, cleaned by the next process
    assert in_a_save, "no process was killed in the middle of a save: the test proves nothing"
    save_checkpoint(target, payload(1))
    assert files(tmp_path) == ["run.previous.pt", "run.pt"]
