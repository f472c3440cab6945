"""The embedded data: scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), which need no download.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the copy inside scikit-learn).
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from common.data.image_set import DataError, ImageSet
from common.data.locking import locked

FOLDER_SIZE = 64  # pixels of a side in the image folder: quick to decode, larger than the digits' own 8
TEST_EVERY = 5  # of each class, every fifth image is for testing


def load_digits_set(split: str, *, channels: int = 1, size: int = 28) -> ImageSet:
    """The digits enlarged to (channels, size, size), bilinearly; grey levels 0..16 become 0..255.

    split: "train" (1,442 images) or "test" (355), the same classes in the same proportions; same bits on every machine.
    Raises ValueError for another split or a size below 8, DataError if scikit-learn is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"the digits have no split {split!r}; choose train or test")
    images, targets = _read_digits()
    chosen = _is_test(targets) == (split == "test")
    enlarged = torch.from_numpy(_enlarge(images[chosen], size))[:, None].repeat(1, channels, 1, 1)
    return ImageSet(enlarged, torch.from_numpy(targets[chosen]), [str(digit) for digit in range(10)], "digits")


def write_digits_folder(root: str | os.PathLike) -> Path:
    """Write the digits as an ImageNet-style folder, root/{train,val}/<class>/*.png (64x64 grey), once; returns root.

    A folder that is there is used when it has every image. Several processes may call this at once.
    Raises DataError if the folder has another number of images, or cannot be written.
    """
    root = Path(root).expanduser()
    if _is_absent(root):
        with locked(root.parent, root.name):
            if _is_absent(root):  # another process may have written it while this one waited
                _write_folder(root)
    for folder, image_set in _folder_sets().items():
        found = sum(1 for _ in (root / folder).glob("*/*.png"))
        if found != len(image_set):
            raise DataError(f"{root / folder} has {found} of {len(image_set)} digits; delete {root} and run again")
    return root


def _read_digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the embedded data needs scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    return digits.images.astype(np.int64), digits.target.astype(np.int64)


def _is_test(targets):
    chosen = np.zeros(len(targets), dtype=bool)
    for digit in range(10):
        chosen[np.flatnonzero(targets == digit)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    return chosen


def _enlarge(images, size):
    """(N, 8, 8) levels 0..16 -> (N, size, size) uint8. Integers throughout: no rounding that depends on the machine."""
    old = images.shape[-1]
    if size < old:
        raise ValueError(f"digits are {old}x{old}; {size}x{size} is smaller")
    # Output pixel i has its centre at ((2i + 1) * old - size) / (2 * size) of the source; weights in 1 / (2 * size).
    position = np.clip((2 * np.arange(size) + 1) * old - size, 0, 2 * size * (old - 1))
    left, right_weight = position // (2 * size), position % (2 * size)
    weights = np.zeros((size, old), dtype=np.int64)
    weights[np.arange(size), left] = 2 * size - right_weight
    weights[np.arange(size), np.minimum(left + 1, old - 1)] += right_weight
    unit = 16 * (2 * size) ** 2
    levels = weights @ images @ weights.T
    return ((levels * 255 * 2 + unit) // (2 * unit)).astype(np.uint8)


def _folder_sets():
    return {folder: load_digits_set(split, size=FOLDER_SIZE) for folder, split in (("train", "train"), ("val", "test"))}


def _is_absent(root):
    return not any(root.glob("*"))


def _write_folder(root):
    """All images under a temporary name first: a run that is killed here leaves no folder that looks complete."""
    from PIL import Image

    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    except OSError as error:
        raise DataError(f"cannot write in {root.parent} ({error.strerror}); choose another folder") from None
    try:
        for folder, image_set in _folder_sets().items():
            for name in image_set.classes:
                (temporary / folder / name).mkdir(parents=True)
            for index, (image, target) in enumerate(zip(image_set.images, image_set.targets, strict=True)):
                Image.fromarray(image[0].numpy()).save(temporary / folder / str(int(target)) / f"{index:04d}.png")
        temporary.chmod(0o755)  # mkdtemp made it private
        os.replace(temporary, root)
    except OSError as error:
        raise DataError(f"cannot write {root} ({error.strerror}); choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
