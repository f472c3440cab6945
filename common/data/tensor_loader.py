"""Batches of a data set that lies on the training device: an index and vectorised augmentation, no worker processes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.data.augment import augment_batch
from common.data.image_set import ImageSet
from common.data.sharding import ShardedLoader, seeded_generator


class TensorLoader(ShardedLoader):
    """Iterates over (images, targets) of one epoch: `dtype` (B, C, H, W) and int64 (B,), both on `device`.

    train: shuffled and augmented, else in order and as they are. Every image comes once per epoch, none is dropped.
    batch_size: images per step over all processes; `rank` of `world_size` gets a contiguous part of each batch, so that
    steps and pixels are the same for every world_size. mean, std, pixel_mean, pad, channels_last, backend: see
    augment_batch.
    crop_offsets: how many offsets per axis can be drawn, from 0; default all, 2 * pad + 1. flip: with probability 1/2.
    Order and augmentation of an epoch depend on (seed, epoch) only. Call set_epoch before each epoch.
    Raises ValueError if an argument is out of range or a process would be left without images.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        *,
        train: bool,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pad: int = 0,
        crop_offsets: int | None = None,
        flip: bool = False,
        pixel_mean: Tensor | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        backend: str | None = None,
    ):
        super().__init__(len(image_set), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.crop_offsets = 2 * pad + 1 if crop_offsets is None else crop_offsets
        if pad < 0 or not 1 <= self.crop_offsets <= 2 * pad + 1:
            raise ValueError(f"padding {pad} leaves offsets 0..{2 * pad}, not {self.crop_offsets} of them")
        self.device = torch.device(device)
        self.images, self.targets = image_set.images.to(self.device), image_set.targets.to(self.device)
        self.train, self.pad, self.flip = train, pad, flip
        self._pixels = {
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
            "pixel_mean": None if pixel_mean is None else pixel_mean.to(self.device, torch.float32),
            "dtype": dtype,
            "channels_last": channels_last,
            "backend": backend,
        }

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, *crop_and_flip = (None if draw is None else draw.to(self.device) for draw in self._draw())
        for start, stop in self.shards:
            indices = order[start:stop]
            draws = (None if draw is None else draw[start:stop] for draw in crop_and_flip)
            images = augment_batch(self.images, indices, *draws, pad=self.pad, **self._pixels)
            yield images, self.targets.index_select(0, indices)

    def _draw(self):
        """Order, top, left and flip of the epoch, drawn at once on the CPU: the same for every device and rank."""
        if not self.train:
            return torch.arange(self.num_images), None, None, None
        generator = seeded_generator(self.seed, self.epoch)
        order = torch.randperm(self.num_images, generator=generator)
        top = left = flip = None
        if self.pad:
            top, left = torch.randint(self.crop_offsets, (2, self.num_images), generator=generator)
        if self.flip:
            flip = torch.randint(2, (self.num_images,), generator=generator).bool()
        return order, top, left, flip
