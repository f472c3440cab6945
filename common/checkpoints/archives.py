"""Zip and tar archives as PyTorch writes them, read from memory; nothing is ever extracted.

Both readers return views into the given bytes, so what they hand out is never larger than the file.
"""

import io
import re
import struct
import zipfile
import zlib

from common.checkpoints.errors import Damaged, Refused, printable, reason

ZIP_START = b"PK\x03\x04"
TAR_MEMBERS = frozenset({"sys_info", "pickle", "storages", "tensors"})
_FOLDER = 0x10  # in a member's attributes; torch.load then returns uninitialised memory for it, without an error
_TAR_BLOCK = 512


def zip_members(data):
    """Members of a zip archive that torch.save wrote: {name below the top folder: memoryview}.

    data: bytes. Every member's CRC-32 is verified (torch does not do so). Members must be stored, not compressed, lie
    side by side inside the file and share one top folder, as torch writes them.
    Raises Damaged (no zip, truncated, checksum), Refused (compressed, encrypted, overlapping, names with path tricks).
    """
    try:
        infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except Exception as error:  # zipfile lets struct.error, UnicodeDecodeError and others through
        raise Damaged(f"its zip directory cannot be read, it may be truncated ({reason(error)})") from error
    view, members, folders, total = memoryview(data), {}, set(), 0
    for info in infos:
        folder, name = _split_name(info.orig_filename)
        folders.add(folder)
        total += info.file_size
        if total > len(data):
            raise Refused("its members claim more bytes than the file has")
        if name in members or len(folders) > 1:
            raise Refused(f"its member {printable(info.orig_filename)} is there twice or in a second top folder")
        members[name] = _stored_bytes(view, info)
    return members


def _split_name(name):
    folder, *rest = name.split("/")
    if not rest or "\\" in name or any(part in ("", ".", "..") for part in (folder, *rest)) or not name.isprintable():
        raise Refused(f"its member name {printable(name)!r} is not one that torch writes")
    return folder, "/".join(rest)


def _stored_bytes(view, info):
    label = printable(info.orig_filename)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise Refused(f"its member {label} is compressed, which torch never does")
    if info.flag_bits & 1 or info.external_attr & _FOLDER:
        raise Refused(f"its member {label} is marked as encrypted or as a folder")
    start = info.header_offset
    header = bytes(view[start : start + 30]) if start >= 0 else b""
    if len(header) < 30 or not header.startswith(ZIP_START):
        raise Damaged(f"its member {label} has no header where the zip directory says")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    begin = start + 30 + name_length + extra_length
    if bytes(view[start + 30 : start + 30 + name_length]) != info.orig_filename.encode(encoding):
        raise Damaged(f"its member {label} has another name in its own header")
    content = view[begin : begin + info.file_size]
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        raise Damaged(f"its member {label} fails its checksum: the file is damaged")
    return content


def looks_like_tar(data):
    """True if the bytes begin with a tar header of the POSIX kind."""
    return data[257:262] == b"ustar"


def tar_members(data):
    """The four members of a checkpoint of PyTorch 0.1: {name: memoryview}.

    data: bytes. Not read with `tarfile`: sparse members, extended headers that rename or resize, and negative offsets
    (an endless loop in Python before 3.13.6) are things that this format never has.
    Raises Damaged (truncated, header checksum), Refused (links, any other kind or name of member).
    """
    view, members, offset = memoryview(data), {}, 0
    while offset + _TAR_BLOCK <= len(data):
        header = bytes(view[offset : offset + _TAR_BLOCK])
        if not any(header):
            break  # the end of an archive is marked by blocks of zeros
        name, kind, size = _tar_header(header)
        begin = offset + _TAR_BLOCK
        content = view[begin : begin + size]
        if len(content) != size:
            raise Damaged(f"it ends in the middle of its tar member {printable(name)}")
        offset = begin + -(-size // _TAR_BLOCK) * _TAR_BLOCK
        if kind == b"x":  # Python 2 wrote one before each member, for the fraction of the modification time
            _check_pax(bytes(content))
            continue
        if kind not in (b"0", b"\0") or name not in TAR_MEMBERS or name in members:
            raise Refused(f"its tar member {printable(name)!r} is a link, a folder, there twice or of no known name")
        members[name] = content
    if set(members) != TAR_MEMBERS:
        raise Damaged(f"its tar archive lacks {', '.join(sorted(TAR_MEMBERS - set(members)))}")
    return members


def _tar_header(header):
    """(name, kind, size) of one 512-byte header."""
    size_field, sum_field = header[124:136], header[148:156]
    octal = [field.strip(b" \0") for field in (size_field, sum_field)]
    if not all(re.fullmatch(rb"[0-7]{1,12}", field) for field in octal):
        raise Damaged("its tar header holds something that is not a number")
    size, checksum = (int(field, 8) for field in octal)
    if sum(header) - sum(sum_field) + 8 * ord(" ") != checksum:
        raise Damaged("its tar header fails its checksum")
    if header[345:500].strip(b"\0"):
        raise Refused("its tar member lies in a folder")
    return header[:100].split(b"\0")[0].decode("latin-1"), header[156:157], size


def _check_pax(content):
    if re.search(rb"\d+ (path|linkpath|size|GNU[^=]*)=", content):
        raise Refused("its tar archive renames or resizes a member through an extended header")
