"""Batches of a data set that lies on the training device: an index and vectorised augmentation, no worker processes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.data.augment import augment_batch
from common.data.image_set import ImageSet
from common.data.sharding import ShardedLoader, StagedDraws, seeded_generator


class TensorLoader(ShardedLoader):
    """Iterates over (images, targets) of one epoch: `dtype` (B, C, H, W) and int64 (B,), both on `device`.

    train: shuffled and augmented, else in order and as they are. Every image comes once per epoch, none is dropped.
    batch_size: images per step over all processes; `rank` of `world_size` gets a contiguous part of each batch, so that
    steps and pixels are the same for every world_size. mean, std, pixel_mean, pad, channels_last, backend: see
    augment_batch.
    crop_offsets: how many offsets per axis can be drawn, from 0; default all, 2 * pad + 1. flip: with probability 1/2.
    Order and augmentation of an epoch depend on (seed, epoch) only. Call set_epoch before each epoch.
    `stage` and `take` give the same batches to a CUDA graph, which cannot be handed new tensors at every step.
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
        self._staged = None
        self._pixels = {
            "mean": None if mean is None else tuple(mean),
            "std": None if std is None else tuple(std),
            "pixel_mean": None if pixel_mean is None else pixel_mean.to(self.device, torch.float32),
            "dtype": dtype,
            "channels_last": channels_last,
            "backend": backend,
        }

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = [None if draw is None else draw.to(self.device) for draw in self._draw(self.epoch)]
        for start, stop in self.shards:
            yield self._batch([None if draw is None else draw[start:stop] for draw in draws])

    def _batch(self, draws):
        indices, *crop_and_flip = draws
        images = augment_batch(self.images, indices, *crop_and_flip, pad=self.pad, **self._pixels)
        return images, self.targets.index_select(0, indices)

    def stage(self, epochs: Sequence[int] | None = None, count: int | None = None) -> None:
        """Put the order and the augmentation of an epoch on the device, for `take`.

        epochs: which, one after the other (default: that of set_epoch). count: the first so many images of each
        (default: all). Raises ValueError with several processes: each would take its own part of a batch.
        """
        if len(self.shards) and self.shards[0][1] - self.shards[0][0] != self.batch_sizes[0]:
            raise ValueError("staged batches are for one process")
        parts = [self._draw(epoch) for epoch in ([self.epoch] if epochs is None else epochs)]
        draws = [None if draw[0] is None else torch.cat([part[:count] for part in draw])
                 for draw in zip(*parts, strict=True)]  # fmt: skip
        self._staged = self._staged or StagedDraws(self.device)
        self._staged.fill(draws)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` images that were staged: what iterating gives, bit for bit.

        Reads nothing on the host: may be captured in a CUDA graph, each replay of which takes the next ones.
        """
        return self._batch(self._staged.take(count))

    def _draw(self, epoch):
        """Order, top, left and flip of an epoch, drawn at once on the CPU: the same for every device and rank."""
        if not self.train:
            return torch.arange(self.num_images), None, None, None
        generator = seeded_generator(self.seed, epoch)
        order = torch.randperm(self.num_images, generator=generator)
        top = left = flip = None
        if self.pad:
            top, left = torch.randint(self.crop_offsets, (2, self.num_images), generator=generator)
        if self.flip:
            flip = torch.randint(2, (self.num_images,), generator=generator).bool()
        return order, top, left, flip
