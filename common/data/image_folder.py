"""ImageNet-style folders, root/{train,val}/<class>/<image>: worker processes decode and crop, the device normalises."""

import os
import textwrap
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.augment import augment_batch
from common.data.image_set import DataError
from common.data.sharding import ShardedLoader, seeded_generator


class ImageFolderLoader(ShardedLoader):
    """Iterates over (images, targets) of one epoch: `dtype` (B, 3, size, size) and int64 (B,), both on `device`.

    train: root/train, shuffled, RandomResizedCrop(size), flip with probability 1/2; else root/val in order,
    Resize(size * 256 / 224), CenterCrop(size). Then ToTensor and Normalize(mean, std): the pixels are torchvision's.
    classes: the folders of root/<split>, sorted. limit: only so many images, taken from all classes in turn.
    workers: decoding processes; 0: in this one. batch_size, rank, world_size, seed, set_epoch: as in TensorLoader; the
    crop and flip of an image depend on (seed, epoch, image) only.
    Raises DataError for a folder without classes, a class without images and, by path, an image that cannot be decoded.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        batch_size: int,
        *,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
        size: int = 224,
        workers: int = 4,
        limit: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ):
        self.classes, samples = list_images(Path(root).expanduser() / ("train" if train else "val"), limit)
        super().__init__(len(samples), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.train, self.device = train, torch.device(device)
        self._pixels = {"mean": tuple(mean), "std": tuple(std), "dtype": dtype, "channels_last": channels_last}
        self._loader = DataLoader(
            FolderImages(samples, train, size),
            # Weak: in a cycle of references PyTorch cannot stop its processes and waits five seconds for each.
            batch_sampler=_StepKeys(weakref.proxy(self)),
            num_workers=workers,
            collate_fn=_stack_or_error,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # DataLoader draws a number per epoch: not one of the model's
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._decoded():
            if isinstance(batch, DataError):
                raise batch
            images, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            everything = torch.arange(len(images), device=self.device)
            yield augment_batch(images, everything, **self._pixels), targets

    def _decoded(self):
        try:
            yield from self._loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):  # PyTorch's words for a process that was killed
                raise
            raise DataError(f"{error} Too little memory, or room in /dev/shm? Use fewer --workers") from None


class _StepKeys:
    """For each step of this process, in the epoch set when an iteration starts: (seed, epoch, index) of its images."""

    def __init__(self, loader):
        self._loader = loader

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        loader, epoch = self._loader, self._loader.epoch
        order = torch.arange(loader.num_images)
        if loader.train:
            order = torch.randperm(loader.num_images, generator=seeded_generator(loader.seed, epoch))
        for start, stop in loader.shards:
            yield [(loader.seed, epoch, index) for index in order[start:stop].tolist()]


class FolderImages(Dataset):
    """Decoded images by key (seed, epoch, index): (uint8 (3, size, size), target), or the DataError with the path.

    The error is returned, not raised: from another process PyTorch would bring it as a traceback in a message.
    """

    def __init__(self, samples: list[tuple[str, int]], train: bool, size: int):
        # Arrays, not a million Python strings: counting references to those would copy them into every worker.
        self._paths = np.array([os.fsencode(path) for path, _ in samples])
        self._targets = np.array([target for _, target in samples])
        self._train, self._size = train, size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int] | DataError:
        from PIL import Image

        path = os.fsdecode(self._paths[key[-1]])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except Exception as error:  # decoders meet damage in many ways: OSError, SyntaxError, ValueError, struct.error
            return DataError(f"{path} cannot be read as an image ({error}); restore it, or remove it and run again")
        return self._transform(image, key), int(self._targets[key[-1]])

    def _transform(self, image, key):
        from torchvision import transforms

        if not self._train:
            resized = transforms.Resize(self._size * 256 // 224)(image)
            return transforms.PILToTensor()(transforms.CenterCrop(self._size)(resized))
        # torchvision draws from the global generator: lend it this image's numbers, then put the old ones back.
        state = torch.get_rng_state()
        torch.set_rng_state(seeded_generator(*key).get_state())
        try:
            cropped = transforms.RandomHorizontalFlip()(transforms.RandomResizedCrop(self._size)(image))
        finally:
            torch.set_rng_state(state)
        return transforms.PILToTensor()(cropped)


def list_images(folder: Path, limit: int | None = None) -> tuple[list[str], list[tuple[str, int]]]:
    """Names of the classes of `folder`, and (path, index of the class) of every image, in torchvision's order.

    limit: that many images, the first of every class, then the second of every class, …
    Raises DataError if there are no classes, a class has no images, or limit < 1.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, class_to_index = find_classes(str(folder))
        samples = make_dataset(str(folder), class_to_index, IMG_EXTENSIONS)
    except OSError as error:
        reason = error.strerror or textwrap.shorten(str(error), 200)  # the latter may list a thousand classes
        raise DataError(
            f"{folder}: {reason}; {folder.parent} must hold train/ and val/, each with one folder of images per class "
            "(or use --embedded-data)"
        ) from None
    return classes, samples if limit is None else _from_all_classes(samples, limit)


def _from_all_classes(samples, limit):
    if limit < 1:
        raise DataError(f"cannot train on {limit} images; --train-size must be at least 1")
    seen, position = {}, []
    for _, target in samples:
        position.append((seen.setdefault(target, 0), target))
        seen[target] += 1
    order = sorted(range(len(samples)), key=position.__getitem__)
    return [samples[index] for index in order[:limit]]


def _stack_or_error(items):
    for item in items:
        if isinstance(item, DataError):
            return item
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(targets)
