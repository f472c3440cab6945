"""This repository's own checkpoints: written so that no moment is without a good file, read after a full check."""

import collections
import contextlib
import fcntl
import io
import os
import re
import secrets
import shutil
from pathlib import Path

import torch

from common.checkpoints.archives import ZIP_START, zip_members
from common.checkpoints.errors import Damaged, Refused, failure, printable, read_file, reason
from common.checkpoints.plain import SCALARS, are_attributes, is_key, read_plain


def save_checkpoint(path, payload, *, keep_previous=False):
    """Write `payload` to `path` so that whatever happens, `path` is either the old file or the new one, whole.

    payload: tensors (torch.Tensor, Parameter; strided, any device), str, int, float, bool, None, and dict, OrderedDict,
    list, tuple of these; keys are str, int, float, bool or None. It loads with `load_checkpoint`, or with
    torch.load(weights_only=True). keep_previous: a sound file that is replaced stays beside it as
    `<stem>.previous<suffix>`. Temporary files that killed processes left for the same target are removed.
    Raises CheckpointError, before anything is touched, for other values in the payload; and with the system's reason
    when the file cannot be written (full disk, no permission), in which case the old file is as it was.
    """
    try:
        _check_plain(payload, "payload", [])
    except Refused as error:
        raise failure(path, f"not saved: {error}") from error
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    target = Path(os.path.realpath(path))  # a link stays a link to the new contents
    if os.path.exists(target) and not os.path.isfile(target):
        raise failure(path, "not saved: it is a folder or device; choose another name")
    try:
        with buffer.getbuffer() as content:
            _replace(target, content, keep_previous)
    except OSError as error:
        good = [str(kept) for kept in (path, previous_path(path)) if _is_sound(kept)]
        rest = f"still good: {', '.join(good)}" if good else "there is no earlier checkpoint"
        raise failure(path, f"not saved: {reason(error)}; {rest}; free space there or choose another folder") from error


def load_checkpoint(path, map_location="cpu"):
    """The payload of a file that `save_checkpoint` wrote. map_location: device of its tensors, str or torch.device.

    The checksum of every member of the archive is verified before anything is used, and only tensors and plain values
    are loaded: tensors that shared memory share it again. Raises CheckpointError, naming the file and the damage, for
    one that is missing, damaged or of another kind; when the file before it (`keep_previous`) is good, the message
    offers it. CheckpointError also for a device that is not there.
    """
    try:
        torch.empty(0, device=map_location)
    except Exception as error:  # the file is not to blame
        why = f"the device {map_location} cannot be used here ({reason(error)})"
        raise failure(path, f"not loaded: {why}; load to 'cpu', or check CUDA and its driver") from error
    try:
        return _load(path, map_location)
    except (Damaged, Refused) as error:
        raise failure(path, f"not loaded: {error}; {_alternative(path)}") from error


def previous_path(path):
    """Where `save_checkpoint(path, …, keep_previous=True)` keeps the file before: `<stem>.previous<suffix>`."""
    path = Path(os.path.realpath(path))
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def _check_plain(value, where, parents):
    """Raise Refused unless `value` and all below it load with weights_only=True."""
    kind = type(value)
    if kind in SCALARS and (kind is not int or value.bit_length() < 2000):
        return
    if kind in (torch.Tensor, torch.nn.Parameter):
        if not _is_plain(value):
            raise Refused(f"{where} is a tensor with attributes or a layout of its own; save a plain one")
        return
    if any(value is parent for parent in parents) or len(parents) > 100:
        raise Refused(f"{where} contains itself or nests too deep; save a flat copy")
    for key, item in _entries(value, where):
        if not is_key(key):
            raise Refused(f"{where} has a key of type {_type_name(key)}, or a huge one; use str or int")
        _check_plain(item, f"{where}[{printable(repr(key), 60)}]", [*parents, value])


def _is_plain(tensor):
    is_quantized = tensor.is_quantized or str(tensor.dtype).startswith("torch.q")
    is_lazy = tensor.is_meta or tensor.is_conj() or tensor.is_neg()
    return tensor.layout is torch.strided and not (is_quantized or is_lazy or vars(tensor))


def _entries(value, where):
    if type(value) is dict:
        return value.items()
    if type(value) is collections.OrderedDict and are_attributes(vars(value)):
        return [*value.items(), *vars(value).items()]  # a state dict keeps its version numbers as an attribute
    if type(value) in (list, tuple):
        return enumerate(value)
    advice = "save its state_dict()" if hasattr(value, "state_dict") else "convert it with float(), int(), dict() or so"
    raise Refused(f"{where} is a {_type_name(value)}, which checkpoints do not hold; {advice}")


def _type_name(value):
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _replace(target, content, keep_previous):
    _remove_stale(target)
    handle, temporary = _open_temporary(target)
    try:
        with handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
            if keep_previous and _is_sound(target):  # a damaged file must not displace a good one
                _keep(target, previous_path(target))
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _keep(target, previous):
    """Make `previous` a second name of `target`'s contents, in one step; a copy where hard links do not exist."""
    second = _temporary_name(target)
    try:
        try:
            os.link(target, second)
        except OSError:
            shutil.copyfile(target, second)
            with open(second, "rb") as handle:
                os.fsync(handle.fileno())
        os.replace(second, previous)
    finally:
        second.unlink(missing_ok=True)  # rename does nothing where both names are one file already


def _temporary_name(target):
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def _open_temporary(target):
    """(file, path) of a new locked file beside `target`; the lock ends with the process, whatever ends it."""
    while True:
        path = _temporary_name(target)
        handle = open(path, "xb")
        if _lock(handle) is not False and os.fstat(handle.fileno()).st_nlink:
            return handle, path
        handle.close()  # another process took it for a stale one in the moment before the lock


def _lock(handle):
    """True: locked. False: another process holds the lock. None: this file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_stale(target):
    """Remove the temporary files of earlier saves to `target` whose process is gone, so that nobody locks them."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{16}\.tmp")
    for entry in os.scandir(target.parent):
        if not pattern.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # its process has just finished, or it is not ours to remove
            with open(entry.path, "rb") as handle:
                if _lock(handle):
                    os.unlink(entry.path)


def _sync_folder(folder):
    """Make the rename itself durable, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_sound(path):
    """True if `path` is an archive whose checksums all hold."""
    try:
        zip_members(read_file(path))
    except (Damaged, Refused):
        return False
    return True


def _load(path, map_location):
    data = read_file(path)
    if not data.startswith(ZIP_START):
        raise Damaged("it does not begin like a checkpoint of this repository (of an older PyTorch, or damaged)")
    try:
        return read_plain(data, map_location)
    except (Damaged, Refused):
        raise
    except Exception as error:  # a malformed pickle can raise nearly anything
        raise Damaged(reason(error)) from error


def _alternative(path):
    previous = previous_path(path)
    try:
        payload = _load(previous, "cpu")
    except (Damaged, Refused):
        return f"get the file again, or see what is in it: python -m common.checkpoints {path}"
    epoch = payload.get("epoch") if isinstance(payload, dict) else None
    return f"{previous}{'' if epoch is None else f' (epoch {epoch})'} is good: use it instead"
