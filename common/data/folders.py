"""What lies in an ImageNet-style folder, root/{train,val}/<class>/<image>: its classes, its images, their pixels."""

import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.data.image_set import DataError

SPLITS = ("train", "val")
_told: set[str] = set()


def list_images(root: Path, split: str, limit: int | None = None) -> tuple[list[str], list[tuple[str, int]]]:
    """Names of the classes of root/<split>, sorted, and (path, index of the class) of every image, in order of paths.

    Names that begin with a dot are neither classes nor images: notebooks and file managers leave such folders. A link
    inside a class to a folder outside of it is not followed: its images would be read again under this label. Both are
    said once on stderr. limit: that many images, the first of every class, then the second of every class, …
    Raises DataError if there are no classes, a class has no images, the other split (if it is there) has other classes,
    whose labels would be other numbers, or limit < 1.
    """
    folder = root / split
    try:
        classes = _classes(folder)
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {folder}.")
        samples = []
        for index, name in enumerate(classes):
            images = sorted(_images(folder / name))
            if not images:
                raise FileNotFoundError(f"Found no image in the class folder {name}")
            samples += [(path, index) for path in images]
    except OSError as error:
        reason = error.strerror or textwrap.shorten(str(error), 200)
        raise DataError(
            f"{folder}: {reason}; {root} must hold train/ and val/, each with one folder of images per class "
            "(or use --embedded-data)"
        ) from None
    _require_same_classes(root, split, classes)
    return classes, samples if limit is None else _from_all_classes(samples, limit)


def _classes(folder):
    found = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    hidden = sorted(name for name in found if name.startswith("."))
    if hidden:
        _tell(f"left out, no class: {folder / hidden[0]}" + (f" and {len(hidden) - 1} more" if hidden[1:] else ""))
    return sorted(name for name in found if not name.startswith("."))


def _images(folder: Path) -> Iterator[str]:
    """Paths of the images of a class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    top, seen = os.path.realpath(folder), set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(directory)
        if place in seen:  # by a link: its images are there already
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and _is_inside(directory, name, top))
        for name in files:
            if not name.lower().endswith(IMG_EXTENSIONS):
                continue
            if name.startswith("."):
                _tell(f"left out, no image: {os.path.join(directory, name)}, and others that begin with a dot")
            else:
                yield os.path.join(directory, name)


def _is_inside(directory, name, top):
    path = os.path.join(directory, name)
    inside = os.path.commonpath([os.path.realpath(path), top]) == top
    if not inside:
        _tell(f"not followed, a link out of its class: {path}")
    return inside


def _tell(text):
    if text not in _told:
        _told.add(text)
        print(f"note: {text}", file=sys.stderr, flush=True)


def _require_same_classes(root, split, classes):
    other = next(name for name in SPLITS if name != split)
    if not (root / other).is_dir():
        return  # a test needs no training images
    theirs = sorted(entry.name for entry in os.scandir(root / other) if entry.is_dir() and entry.name[0] != ".")
    if odd := sorted(set(classes) ^ set(theirs)):
        names = ", ".join(odd[:3]) + (", …" if odd[3:] else "")
        raise DataError(
            f"{root}: train/ and val/ have different classes ({names} in one of them only), so that the same label "
            "would mean two things; give both the same folders"
        )


def _from_all_classes(samples, limit):
    if limit < 1:
        raise DataError(f"cannot train on {limit} images; --train-size must be at least 1")
    seen, position = {}, []
    for _, target in samples:
        position.append((seen.setdefault(target, 0), target))
        seen[target] += 1
    order = sorted(range(len(samples)), key=position.__getitem__)
    return [samples[index] for index in order[:limit]]


def read_rgb(path: str):
    """An image file as a PIL image of mode RGB, or the DataError that names it: decoding processes hand errors on.

    16-bit grey becomes 8-bit grey by its scale, 65535 to 255: `convert` would cut everything above 255 off, to white.
    Pixels that are 32-bit integers or floats are refused, because nothing says what their white is.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16") or (file.mode == "I" and file.format == "PNG"):  # older Pillow: I
                grey = np.asarray(file).astype(np.float64) / 257
                return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
            if file.mode in ("I", "F"):
                kind = {"I": "32-bit integers", "F": "floats"}[file.mode]
                return DataError(f"{path}: its pixels are {kind}, whose scale is unknown; save it with 8 or 16 bits")
            return file.convert("RGB")
    except Exception as error:  # decoders meet damage in many ways: OSError, SyntaxError, ValueError, struct.error
        return DataError(f"{path} cannot be read as an image ({error}); restore it, or remove it and run again")
