"""Batches as the original feeds them: per-pixel mean, divided by 128; CIFAR's crop and flip, SVHN's distortions.

Every training loader here gives `steps` full batches per epoch; an incomplete last batch is dropped.
"""

import functools
import itertools
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import DataError, ImageSet, TensorLoader, load_dataset, load_digits_set
from common.data.sharding import ShardedLoader, StagedDraws, seeded_generator

DIVISOR = 128.0
TEST_BATCH_SIZE = 128  # gates look at whole batches, so this belongs to the result
PAD = 4
SPLITS = {"cifar10": ("train", "test"), "cifar100": ("train", "test"), "svhn": ("train+extra", "test")}

BRIGHTNESS, CONTRAST = 10.0, (0.8, 1.2)
ANCHORS = ((0.2, 0.2), (0.2, 0.8), (0.8, 0.8), (0.8, 0.2))  # (y, x) of the deformation's centres
ANCHOR_VARIANCE, ANCHOR_RANGE = 0.2, 3.0


def data_folder(data_dir: str | None, dataset: str) -> str:
    """Where a data set is: --data-dir, else the original's $TENSORPACK_DATASET/<dataset>_data, else ./data."""
    if data_dir is not None:
        return data_dir
    root = os.environ.get("TENSORPACK_DATASET")
    return str(Path(root) / f"{dataset}_data") if root else "./data"


def load_sets(dataset: str, data_dir: str | None, embedded: bool) -> tuple[ImageSet, ImageSet]:
    """Training and test set, 32x32 RGB; SVHN's training set is train + extra. Raises DataError."""
    if embedded:
        return tuple(load_digits_set(split, channels=3, size=32) for split in ("train", "test"))
    folder = data_folder(data_dir, dataset)
    return tuple(load_dataset(dataset, folder, split=split) for split in SPLITS[dataset])


def pixel_mean(*sets: ImageSet) -> Tensor:
    """Mean image of several sets together, float32 (C, H, W). As in the original, the test images are among them."""
    total = sum(images.sum(0, dtype=torch.int64) for image_set in sets for images in image_set.images.split(50_000))
    return (total.double() / sum(map(len, sets))).float()


class EpochBatches:
    """`steps` full batches per epoch from as many passes over a loader as they take, values divided by `divisor`.

    One pass with one process. With k GPUs the original keeps the number of steps and so sees k times the images.
    Raises DataError if the training set is smaller than a batch.
    """

    def __init__(self, loader, batch_size: int, steps: int, divisor: float = 1.0):
        self.loader, self.steps, self.divisor = loader, steps, divisor
        self.full = sum(size == batch_size for size in loader.batch_sizes)
        if not self.full:
            raise DataError(
                f"{loader.num_images} training images are fewer than a batch of {batch_size}; "
                "use a smaller --batch_size or a larger --train-size"
            )
        self.passes, self.num_images = -(-steps // self.full), steps * batch_size
        self.device, self.epoch = loader.device, 0

    def __len__(self) -> int:
        return self.steps

    @property
    def batch_sizes(self) -> list[int]:
        """Images of each step, over all processes: always the same."""
        return [self.num_images // self.steps] * self.steps

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration gives; order and distortions depend on (seed, epoch) only."""
        self.epoch = epoch

    def __iter__(self):
        for index in range(self.passes):
            self.loader.set_epoch(self.epoch * self.passes + index)
            for images, targets in itertools.islice(self.loader, min(self.full, self.steps - index * self.full)):
                yield (images if self.divisor == 1 else images.div_(self.divisor)), targets


class MemoryBatches(EpochBatches):
    """EpochBatches of a loader in memory, whose batches a CUDA graph can take: see TensorLoader.stage and take."""

    def stage(self) -> None:
        """Put order and distortions of the epoch's passes on the device."""
        first = self.epoch * self.passes
        self.loader.stage(range(first, first + self.passes), self.full * self.batch_sizes[0])

    def take(self, count: int):
        """The next `count` images that were staged, and their targets."""
        images, targets = self.loader.take(count)
        return (images if self.divisor == 1 else images.div_(self.divisor)), targets


def epoch_batches(loader, batch_size: int, steps: int, divisor: float = 1.0) -> EpochBatches:
    """EpochBatches, or MemoryBatches where the images are in memory. Raises DataError as they do."""
    kind = MemoryBatches if hasattr(loader, "take") else EpochBatches
    return kind(loader, batch_size, steps, divisor)


class TestBatches:
    """Test batches in order; each process takes whole batches, so that every gate sees the batch it would see alone."""

    def __init__(self, loader, rank: int = 0, world_size: int = 1, divisor: float = 1.0):
        loader.shards = loader.shards[rank::world_size]
        self.loader, self.divisor, self.device = loader, divisor, loader.device

    def __len__(self) -> int:
        return len(self.loader.shards)

    def __iter__(self):
        for images, targets in self.loader:
            yield (images if self.divisor == 1 else images.div_(self.divisor)), targets


def test_batches(images: ImageSet, mean: Tensor, *, device, rank=0, world_size=1, channels_last=False) -> TestBatches:
    """Test batches of CIFAR or SVHN: the mean subtracted, divided by 128."""
    loader = TensorLoader(
        images, TEST_BATCH_SIZE, train=False, pixel_mean=mean, device=device, channels_last=channels_last
    )
    return TestBatches(loader, rank, world_size, DIVISOR)


def training_loader(dataset, images, batch_size, mean, *, seed, device, rank=0, world_size=1, channels_last=False):
    """Shuffled and distorted training images: CIFAR's offsets 0..7 of 0..8 (the original never draws 8) and flip."""
    options = {"pixel_mean": mean, "seed": seed, "device": device, "rank": rank, "world_size": world_size,
               "channels_last": channels_last}  # fmt: skip
    if dataset == "svhn":
        return SvhnLoader(images, batch_size, **options)
    return TensorLoader(images, batch_size, train=True, pad=PAD, crop_offsets=2 * PAD, flip=True, **options)


class SvhnLoader(ShardedLoader):
    """SVHN's training batches: brightness, contrast, deformation, crop, mean subtracted; float32 (B, 3, 32, 32).

    Arguments as TensorLoader's. The distortions of an image depend on (seed, epoch) and its place in the order only.
    """

    def __init__(self, images, batch_size, *, pixel_mean, seed, device, rank=0, world_size=1, channels_last=False):
        super().__init__(len(images), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.device = torch.device(device)
        self.images, self.targets = images.images.to(self.device), images.targets.to(self.device)
        self.mean = pixel_mean.to(self.device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self._staged = None

    def __iter__(self):
        draws = [draw.to(self.device) for draw in self._draw(self.epoch)]
        for start, stop in self.shards:
            yield self._batch([draw[start:stop] for draw in draws])

    def stage(self, epochs, count: int) -> None:
        """Put order and distortions of epochs, the first `count` images of each, on the device; one process only."""
        self._staged = self._staged or StagedDraws(self.device)
        parts = zip(*(self._draw(epoch) for epoch in epochs), strict=True)
        self._staged.fill([torch.cat([draw[:count] for draw in part]) for part in parts])

    def take(self, count: int):
        """The next `count` images that were staged, and their targets; may be captured in a CUDA graph."""
        return self._batch(self._staged.take(count))

    def _draw(self, epoch):
        """Order, and of each place in it ten uniform numbers and the crop's corner."""
        generator = seeded_generator(self.seed, epoch)
        order = torch.randperm(self.num_images, generator=generator)
        uniform = torch.rand(self.num_images, 2 + 2 * len(ANCHORS), generator=generator)
        return order, uniform, torch.randint(2 * PAD, (self.num_images, 2), generator=generator)

    def _batch(self, draws):
        indices, uniform, corner = draws
        batch = distort(self.images.index_select(0, indices), uniform, corner) - self.mean
        return batch.contiguous(memory_format=self.layout), self.targets.index_select(0, indices)


@functools.lru_cache(maxsize=8)
def _constants(canvas_size, device):
    """(anchors, size of the canvas) on the device: copying them at every batch would wait for it."""
    whole = torch.tensor(canvas_size, device=device, dtype=torch.float32)
    return torch.tensor(ANCHORS, device=device), whole


def distort(images: Tensor, draws: Tensor, corner: Tensor) -> Tensor:
    """SVHN's distortions of uint8 images (B, 3, H, W); returns float32 values 0..255 of the same shape.

    draws: (B, 10) in [0, 1): brightness, contrast, and (y, x) of the offset at each anchor. corner: int64 (B, 2), top
    left of the crop from the image in the middle of a black canvas, 8 wider and higher.
    """
    canvas = F.pad(images.float(), (PAD, PAD, PAD, PAD))
    canvas = (canvas + (2 * draws[:, 0] - 1)[:, None, None, None] * BRIGHTNESS).clamp_(0, 255)
    factor = (CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * draws[:, 1])[:, None, None, None]
    mean = canvas.mean((2, 3), keepdim=True)  # of each channel
    canvas = ((canvas - mean) * factor + mean).clamp_(0, 255)
    offsets = (2 * draws[:, 2:].view(-1, len(ANCHORS), 2) - 1) * ANCHOR_RANGE
    positions = _positions(canvas.shape[2:], offsets, corner, images.shape[2:])
    size = _constants(tuple(canvas.shape[2:]), canvas.device)[1]
    grid = (2 * positions / (size - 1) - 1).flip(3)  # grid_sample wants (x, y) in [-1, 1]
    return F.grid_sample(canvas, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _positions(canvas_size, offsets, corner, size):
    """Where each output pixel is read from the canvas: (B, H, W, 2) as (y, x), only for the pixels of the crop."""
    device = offsets.device
    anchors, whole = _constants(tuple(canvas_size), device)
    axes = [corner[:, axis, None] + torch.arange(size[axis], device=device) for axis in (0, 1)]
    # (B, anchors, H) and (B, anchors, W): the Gaussian is the product of one factor per axis
    rows, columns = (
        torch.exp(-((axes[axis][:, None] / whole[axis] - anchors[:, axis, None]) ** 2) / ANCHOR_VARIANCE)
        for axis in (0, 1)
    )
    shift = torch.einsum("bah,baw,bac->bhwc", rows, columns, offsets)
    grid = torch.stack([axes[0][:, :, None].expand(-1, -1, size[1]), axes[1][:, None].expand(-1, size[0], -1)], dim=3)
    return torch.minimum((grid + shift).clamp_(min=0), whole - 1)
