"""Zip and tar archives that torch would not write: refused, named, and nothing is ever extracted."""

import io
import os
import struct
import tarfile
import zipfile

import pytest

from common.checkpoints import CheckpointError, read_foreign
from tests.common.test_checkpoints_writers import (
    assert_same_bits,
    legacy_parts,
    pack_tar,
    pack_zip,
    sample_tensors,
    tar_bytes,
    tar_parts,
    torch_bytes,
)


def torch_members():
    """{name: bytes} of a zip archive that torch wrote."""
    with zipfile.ZipFile(io.BytesIO(torch_bytes({"a": sample_tensors()["plain"]}))) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def refuse(folder, content, message):
    """The file is refused, and nothing appears in or vanishes from its folder, which is the working directory."""
    path = folder / "file.pt"
    path.write_bytes(content)
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError) as error:
        read_foreign(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_untouched_archives_are_read(tmp_path):
    tensors = sample_tensors()
    for content in (pack_zip(torch_members()), tar_bytes(tensors)):
        path = tmp_path / "good"
        path.write_bytes(content)
        assert read_foreign(path)
    assert_same_bits(read_foreign(path), tensors)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"constants.pkl": b"\x80\x02)."}, "TorchScript"),
        ({"code/__torch__.py": b"def forward(self): pass"}, "TorchScript"),
        ({"../evil.py": b"x"}, "evil.py' is not one that torch writes"),
        ({"data/../../../evil.py": b"x"}, "is not one that torch writes"),
        ({"data/./1": b"x"}, "is not one that torch writes"),
        ({"data//1": b"x"}, "is not one that torch writes"),
        ({"..\\evil.py": b"x"}, "is not one that torch writes"),
        ({"data/\x1b[2J": b"x"}, "is not one that torch writes"),
        ({"data/": b""}, "is not one that torch writes"),
        ({"byteorder": b"big"}, "big-endian"),
    ],
)
def test_members_that_torch_does_not_write(tmp_path, extra, message):
    refuse(tmp_path, pack_zip(torch_members() | extra), message)


@pytest.mark.parametrize("folder", ["", "/", "/tmp/", "../"])
def test_archives_without_a_folder_of_their_own(tmp_path, folder):
    refuse(tmp_path, pack_zip(torch_members(), folder=folder), "is not one that torch writes")


def test_members_are_there_once_and_all(tmp_path):
    members = torch_members()
    for missing, message in (("data.pkl", "no data.pkl"), ("data/0", "another size")):
        refuse(tmp_path, pack_zip({k: v for k, v in members.items() if k != missing}), message)
    file = io.BytesIO(pack_zip(members))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/data.pkl", members["data.pkl"])
    refuse(tmp_path, file.getvalue(), "second top folder")
    file = io.BytesIO(pack_zip(members))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", members["data.pkl"])
    refuse(tmp_path, file.getvalue(), "is there twice")


def test_compressed_members(tmp_path):
    refuse(tmp_path, pack_zip(torch_members() | {"x": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED), "compressed")
    refuse(tmp_path, pack_zip(torch_members(), compression=zipfile.ZIP_BZIP2), "compressed")


def central(content, name):
    """Position of the entry `name` in the zip directory."""
    return content.rindex(b"archive/" + name) - 46


def changed(content, position, layout, *values):
    return content[:position] + struct.pack(layout, *values) + content[position + struct.calcsize(layout) :]


@pytest.mark.parametrize(
    ("offset", "layout", "values", "message"),
    [
        (8, "<H", (1,), "encrypted"),
        (10, "<H", (8,), "compressed"),
        (16, "<I", (12345,), "archive/data/0 fails its checksum"),
        (20, "<II", (2**31, 2**31), "more bytes than the file"),
        (20, "<II", (600, 600), "fails its checksum"),
        (20, "<I", (8,), "compressed"),
        (38, "<I", (0x10,), "as a folder"),
        (42, "<I", (2**31,), "no header"),
        (42, "<I", (1,), "no header"),
        (46, "<7s", (b"Archive",), "second top folder"),
        (46, "<14s", (b"archive/data/1",), "another name in its own header"),
        (0, "<4s", (b"PK\0\0",), "zip directory cannot be read"),
    ],
)
def test_zip_directories_that_lie(tmp_path, offset, layout, values, message):
    content = pack_zip(torch_members())
    refuse(tmp_path, changed(content, central(content, b"data/0") + offset, layout, *values), message)


def test_members_that_overlap(tmp_path):
    """Many directory entries for the same bytes: the classic way to make a small archive large."""
    body = b"PK\x03\x04" + struct.pack("<5H3I2H", 20, 0, 0, 0, 0, 0, 1000, 1000, 9, 0) + b"archive/0" + bytes(1000)
    crc = __import__("zlib").crc32(bytes(1000))
    entries = [
        b"PK\x01\x02"
        + struct.pack("<6H3I5H2I", 20, 20, 0, 0, 0, 0, crc, 1000, 1000, 9, 0, 0, 0, 0, 0, 0)
        + f"archive/{index}".encode()
        for index in range(10)
    ]
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 10, 10, sum(map(len, entries)), len(body), 0)
    refuse(tmp_path, b"".join([body, *entries, end]), "its")  # newer versions of zipfile find it themselves


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"L", b"V"]
)
def test_tar_members_are_plain_files(tmp_path, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("pickle")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    refuse(tmp_path, file.getvalue() + tar_bytes({}), "is a link")


@pytest.mark.parametrize("name", ["../evil", "/etc/cron.d/evil", "evil", "pickle2", "PICKLE", "./pickle"])
def test_tar_members_have_known_names(tmp_path, name):
    refuse(tmp_path, pack_tar(tar_parts({}) | {name: b"x"}), "no known name")


@pytest.mark.parametrize("header", ["path", "size", "linkpath", "GNU.sparse.size", "GNU.sparse.major"])
def test_tar_headers_rename_nothing(tmp_path, header):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("pickle")
        info.pax_headers = {header: "1099511627776"}
        tar.addfile(info)
    refuse(tmp_path, file.getvalue() + tar_bytes({}), "extended header")


def tar_header(size=b"00000000000\0", checksum=None, prefix=b"", name=b"pickle"):
    fields = struct.pack("<100s8s8s8s12s12s", name, b"0000644", b"0", b"0", size, b"0")
    rest = struct.pack("<1s100s6s2s32s32s8s8s155s12x", b"0", b"", b"ustar\0", b"00", b"", b"", b"", b"", prefix)
    total = sum(fields) + sum(rest) + 8 * 32 if checksum is None else checksum
    return fields + b"%06o\0 " % total + rest


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (tar_header(), "tar archive lacks storages"),
        (tar_header(size=b"77777777777\0"), "ends in the middle of its tar member pickle"),
        (tar_header(size=b"\xff" * 12), "not a number"),
        (tar_header(size=b"\x80" + bytes(10) + b"\1"), "not a number"),
        (tar_header(size=b"-0000000001\0"), "not a number"),
        (tar_header(size=b"0000_000001\0"), "not a number"),
        (tar_header(size=b"\0" * 12), "not a number"),
        (tar_header(checksum=7), "fails its checksum"),
        (tar_header(prefix=b"/etc"), "in a folder"),
    ],
)
def test_tar_headers_that_lie(tmp_path, header, message):
    refuse(tmp_path, header + bytes(1024), message)


@pytest.mark.parametrize("missing", ["sys_info", "pickle", "storages", "tensors"])
def test_tar_members_are_all_there(tmp_path, missing):
    parts = tar_parts(sample_tensors())
    refuse(tmp_path, pack_tar({k: v for k, v in parts.items() if k != missing}), f"lacks {missing}")
    twice = pack_tar(parts).rstrip(b"\0")
    twice += bytes(-len(twice) % 512)
    refuse(tmp_path, twice + pack_tar({missing: parts[missing]}), "twice")


def test_a_tar_that_begins_like_a_pickle(tmp_path):
    """A tar starts with the name of its first member, so the magic number does not tell the formats apart."""
    magic = b"".join(legacy_parts({}, era="0.4")[:2])
    refuse(tmp_path, tar_header(name=magic) + bytes(1024), "opcode 0x00")


def test_nothing_is_read_through_a_link_or_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(CheckpointError, match="not a file"):
            read_foreign(path)
