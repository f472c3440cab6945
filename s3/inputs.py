"""Loaders of both scripts: ImageNet-style folders, and data sets in memory for the CIFAR networks (3x32x32)."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.data import DataError, ImageFolderLoader, ImageSet, TensorLoader, load_dataset, load_digits_set
from common.data import write_digits_folder as write_digits
from s3.runs import RunError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
PIXELS = {
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
    "mnist": {"mean": (0.1307,) * 3, "std": (0.3081,) * 3},
    "digits": {"mean": (0.1307,) * 3, "std": (0.3081,) * 3},
}
# The original has no CIFAR script; this is the usual augmentation. A mirrored digit is another one, or none.
AUGMENT = {"cifar10": {"pad": 4, "flip": True}, "cifar100": {"pad": 4, "flip": True}, "mnist": {"pad": 2},
           "digits": {"pad": 2}}  # fmt: skip
SIZE = 32


class Loaders(NamedTuple):
    """train: None where only a test is wanted. classes: how many there are."""

    train: object
    test: object
    classes: int


class FolderLoader(ImageFolderLoader):
    """ImageFolderLoader for which an image that cannot be decoded is an error, or with `skip` is left out.

    With skip each one is named once on stderr and kept in `damaged`; a batch is smaller by its damaged images.
    Raises DataError for damaged images, with skip only if a process's part of a batch has none left.
    """

    def __init__(self, *args, skip: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self._loader.collate_fn = _separate
        self.skip, self.damaged = skip, set()

    def _decoded(self):
        for images, targets, errors in super()._decoded():
            names = [str(error).rpartition(";")[0] for error in errors]
            if names and not (self.skip and len(targets)):
                many = f" and {len(names) - 1} more of its batch" if len(names) > 1 else ""
                advice = "no image of the batch is left" if self.skip else "or leave them out with --skip-damaged"
                raise DataError(f"{names[0]}{many}; restore or remove damaged images, {advice}")
            for name in names:
                if name not in self.damaged:
                    print(f"left out: {name}", file=sys.stderr, flush=True)
                    self.damaged.add(name)
            yield images, targets


def _separate(items):
    good = [item for item in items if not isinstance(item, DataError)]
    errors = [item for item in items if isinstance(item, DataError)]
    if not good:
        return torch.empty(0), torch.empty(0), errors
    images, targets = zip(*good, strict=True)
    return torch.stack(images), torch.tensor(targets), errors


def make_loaders(args, seed: int, device, world) -> Loaders:
    """Training and test loader that the flags ask for; with --evaluate the training images are not looked at.

    Raises DataError if the data cannot be used, RunError if there are too few images for the processes.
    """
    make = _folder_loaders if args.dataset == "imagenet" else _memory_loaders
    common = {"device": device, "rank": world.rank, "world_size": world.size, "channels_last": args.channels_last}
    try:
        return make(args, seed, common)
    except ValueError as error:
        raise RunError(f"{error}; use fewer processes or a larger --batch-size") from None


def _folder_loaders(args, seed, common):
    root = write_digits(Path(args.data_dir) / "digits") if args.embedded_data else Path(args.data)
    options = {**IMAGENET, **common, "size": args.image_size, "workers": args.workers, "skip": args.skip_damaged}
    test, train = FolderLoader(root, args.batch_size, train=False, **options), None
    if not args.evaluate:
        train = FolderLoader(root, args.batch_size, train=True, seed=seed, limit=args.train_size, **options)
    return Loaders(train, test, len(test.classes))


def _memory_loaders(args, seed, common):
    pixels = PIXELS[args.dataset]
    test_set = _images(args, "test")
    test, train = TensorLoader(test_set, args.batch_size, train=False, **pixels, **common), None
    if not args.evaluate:
        train_set = _images(args, "train")
        train_set = train_set if args.train_size is None else train_set.subset(args.train_size)
        augment = AUGMENT[args.dataset]
        train = TensorLoader(train_set, args.batch_size, train=True, seed=seed, **pixels, **augment, **common)
    return Loaders(train, test, len(test_set.classes))


def _images(args, split) -> ImageSet:
    """Images of 3x32x32."""
    if args.embedded_data:
        return load_digits_set(split, channels=3, size=SIZE)
    found = load_dataset(args.dataset, args.data_dir, split=split)
    if args.dataset != "mnist":
        return found
    images = F.pad(found.images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    return ImageSet(images, found.targets, found.classes, found.name)
