"""MNIST, CIFAR-10, CIFAR-100 and SVHN as uint8 tensors, from files in torchvision's layout that were verified first.

Nothing here trusts a file: CIFAR's are pickles, so none is interpreted before its md5 matched, and then only arrays are
built from it.
"""

import gzip
import hashlib
import http.client
import io
import os
import pickle
import shutil
import socket
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.data.image_set import DataError, ImageSet
from common.data.locking import locked

# md5 of the unpacked files, computed from the .gz whose md5 torchvision lists.
MNIST_UNPACKED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
DOWNLOAD_TIMEOUT_S = 60  # without an answer; torchvision itself would wait for ever


class DataFile(NamedTuple):
    """A file of a data set: where it is below the data folder, and its checksum."""

    path: str
    md5: str


def load_dataset(name: str, data_dir: str | os.PathLike, *, split: str, download: bool = True) -> ImageSet:
    """A data set of `data_dir`, downloaded there first if it is absent and `download` is true.

    data_dir: torchvision's root; the folder that holds the files themselves (cifar-10-batches-py) is taken, too.

    name: mnist (1x28x28), cifar10, cifar100 (fine labels), svhn (3x32x32; label 10 is the digit 0, as in torchvision).
    split: train or test; svhn also extra and train+extra. Several processes may call this at once: one downloads.
    Raises DataError if a file is damaged, absent and cannot be had, or unreadable; ValueError for unknown names.
    """
    if name not in _READERS:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(_READERS)}")
    splits = ("train", "test", "extra", "train+extra") if name == "svhn" else ("train", "test")
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; choose from {', '.join(splits)}")
    files = _needed_files(name, split)
    root = _folder_of(Path(data_dir).expanduser(), files)
    if _missing(root, files):
        _provide(name, split, root, files, download)
    images, targets, classes = _READERS[name](root, files)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(targets.astype(np.int64)), classes, name)


def _torchvision_class(name):
    from torchvision import datasets

    return getattr(datasets, name.upper())  # MNIST, CIFAR10, CIFAR100, SVHN


def _needed_files(name, split):
    """One tuple of alternatives per file of the split; every md5 but MNIST's unpacked ones is torchvision's."""
    source = _torchvision_class(name)
    if name == "svhn":
        parts = [source.split_list[part] for part in split.split("+")]
        return [(DataFile(filename, md5),) for _, filename, md5 in parts]
    if name == "mnist":
        packed = [entry for entry in source.resources if entry[0].startswith("train" if split == "train" else "t10k")]
        plain = [filename.removesuffix(".gz") for filename, _ in packed]
        return [
            (DataFile(f"MNIST/raw/{p}", MNIST_UNPACKED_MD5[p]), DataFile(f"MNIST/raw/{filename}", md5))
            for p, (filename, md5) in zip(plain, packed, strict=True)
        ]
    batches = source.train_list if split == "train" else source.test_list
    listed = [*batches, (source.meta["filename"], source.meta["md5"])]
    return [(DataFile(f"{source.base_folder}/{filename}", md5),) for filename, md5 in listed]


def _present(root, alternatives):
    return next((file for file in alternatives if os.path.exists(root / file.path)), None)


def _missing(root, files):
    return [alternatives[0] for alternatives in files if _present(root, alternatives) is None]


def _folder_of(root, files):
    """root; or, if that is the set's own folder (…/cifar-10-batches-py, …/MNIST/raw), the one that it lies in."""
    folder, inner = root.resolve(), Path(files[0][0].path).parent.parts
    for count in range(1, len(inner) + 1):
        if folder.parts[-count:] == inner[:count] and not _missing(folder.parents[count - 1], files):
            return folder.parents[count - 1]
    return root


def _verified(root, file):
    """The content of a file whose md5 is the expected one."""
    path = root / file.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); make it readable, or delete it") from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != file.md5:
        raise DataError(
            f"{path} is damaged: expected md5 {file.md5}, found {found} ({len(content):,} bytes); "
            "delete it and run again to download it, or restore it"
        )
    return content


def _provide(name, split, root, files, download):
    """Unpack or download what is missing. Everything is staged beside its place and moved there when it is complete."""
    archive = _archive(name)
    if not (download or (archive and _present(root, [archive]))):
        raise DataError(
            f"{name}: {root / _missing(root, files)[0].path} not found; "
            "say with --data-dir where the data set is, or use --embedded-data"
        )
    for alternatives in files:  # a damaged file is reported before an hour of downloading, not after
        if present := _present(root, alternatives):
            _verified(root, present)
    with locked(root, name):
        missing = _missing(root, files)
        if not missing:  # another process was faster
            return
        stage = root / f".{name}.download"
        shutil.rmtree(stage, ignore_errors=True)  # left by a run that was killed
        try:
            _fill_stage(name, split, root, stage, missing)
            _move_new(stage, root)
        # OSError: the network (URLError), the disk; RuntimeError: torchvision's checks; the rest: a broken answer.
        except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException) as error:
            reason = textwrap.shorten(str(error) or type(error).__name__, 160)
            raise DataError(
                f"cannot download or unpack {name} in {root} ({reason}); "
                "say with --data-dir where the data set is, or use --embedded-data, which needs no download"
            ) from None
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _archive(name):
    if name not in ("cifar10", "cifar100"):
        return None
    source = _torchvision_class(name)
    return DataFile(source.filename, source.tgz_md5)


def _fill_stage(name, split, root, stage, missing):
    from torchvision.datasets.utils import extract_archive

    source, archive = _torchvision_class(name), _archive(name)
    if archive and _present(root, [archive]):
        _verified(root, archive)
        extract_archive(root / archive.path, stage)
        return
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        if name == "svhn":
            for part in split.split("+"):
                if any(file.path == source.split_list[part][1] for file in missing):
                    source(stage, split=part, download=True)
        else:
            source(stage, download=True)
    finally:
        socket.setdefaulttimeout(before)


def _move_new(stage, root):
    """Move the files that are not there yet; those that are there are the user's own. Archives are not kept."""
    for path in sorted(stage.rglob("*")):
        target = root / path.relative_to(stage)
        if path.is_file() and not path.name.endswith(".tar.gz") and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


def _read_mnist(root, files):
    arrays = []
    for alternatives in files:
        file = _present(root, alternatives)
        content = _verified(root, file)
        arrays.append(_parse_idx(gzip.decompress(content) if file.path.endswith(".gz") else content))
    images, targets = arrays
    return images[:, None], targets, list(_torchvision_class("mnist").classes)


def _parse_idx(content):
    """LeCun's idx format, unsigned bytes: two zeros, type 8, number of axes, big-endian uint32 sizes, data."""
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain values and NumPy arrays only."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise DataError(
                f"a CIFAR file asks for {module}.{name}: refused, nothing in it was executed; delete the file"
            )
        return super().find_class(module, name)


def _read_cifar(root, files):
    contents = (_ArrayUnpickler(io.BytesIO(_verified(root, file)), encoding="latin1").load() for (file,) in files)
    *batches, meta = contents
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    targets = np.concatenate([batch.get("labels", batch.get("fine_labels")) for batch in batches])
    return images, targets, list(meta.get("label_names", meta.get("fine_label_names")))


def _read_svhn(root, files):
    from scipy.io import loadmat

    images, targets = [], []
    for (file,) in files:
        content = loadmat(io.BytesIO(_verified(root, file)))
        images.append(np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1)))  # (H, W, C, N) -> (N, C, H, W)
        targets.append(content["y"].reshape(-1) % 10)
    return np.concatenate(images), np.concatenate(targets), [str(digit) for digit in range(10)]


_READERS = {"mnist": _read_mnist, "cifar10": _read_cifar, "cifar100": _read_cifar, "svhn": _read_svhn}
