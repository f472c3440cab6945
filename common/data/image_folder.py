"""ImageNet-style folders, root/{train,val}/<class>/<image>: worker processes decode and crop, the device normalises."""

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.data.augment import augment_batch
from common.data.folders import list_images, read_rgb
from common.data.image_set import DataError
from common.data.sharding import ShardedLoader, seeded_generator


class ImageFolderLoader(ShardedLoader):
    """Iterates over (images, targets) of one epoch: `dtype` (B, 3, size, size) and int64 (B,), both on `device`.

    train: root/train, shuffled, RandomResizedCrop(size), flip with probability 1/2; else root/val in order,
    Resize(size * 256 / 224), CenterCrop(size). Then ToTensor and Normalize(mean, std): the pixels are torchvision's.
    classes: the folders of root/<split>, sorted. limit: only so many images, taken from all classes in turn.
    workers: decoding processes; 0: in this one. batch_size, rank, world_size, seed, set_epoch: as in TensorLoader; the
    crop and flip of an image depend on (seed, epoch, image) only.
    Which folders and files count, and what is refused: see list_images and read_rgb.
    Raises DataError for a folder without classes, a class without images, train/ and val/ of different classes and, by
    path, an image that cannot be decoded.
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
        self.classes, samples = list_images(Path(root).expanduser(), "train" if train else "val", limit)
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
        image = read_rgb(os.fsdecode(self._paths[key[-1]]))
        if isinstance(image, DataError):
            return image
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


def _stack_or_error(items):
    for item in items:
        if isinstance(item, DataError):
            return item
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(targets)
