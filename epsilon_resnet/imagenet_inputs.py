"""ImageNet as the original feeds it: its own crop and colour distortions in worker processes, RGB, 0..1, normalised."""

import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.data import DataError, ImageFolderLoader, augment_batch, write_digits_folder
from common.data.folders import list_images, read_rgb
from common.data.sharding import ShardedLoader, seeded_generator

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
AREA, ASPECT, TRIES = (0.08, 1.0), (0.75, 1.333), 10
BRIGHTNESS, CONTRAST, SATURATION, LIGHTING = 30.0, (0.8, 1.2), 0.4, 0.1
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])  # as in the original: not multiplied by 255, so lighting hardly acts
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
GREY = np.array([0.299, 0.587, 0.114])
FAKE_BATCH_SIZE, FAKE_STEPS = 64, 1000


def folder(data: str | None, embedded: bool) -> Path:
    """The folder with train/ and val/: --data, or the digits as images in ./data/digits_folder."""
    if embedded:
        return write_digits_folder(Path(data or "./data") / "digits_folder")
    if data is None:
        raise DataError("give the ILSVRC12 folder with --data, or use --embedded-data or --fake")
    return Path(data)


def crop_box(height: int, width: int, uniform) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the random crop; the whole image if none of ten tries fits.

    uniform: function (low, high) -> float in [low, high).
    """
    for _ in range(TRIES):
        area, aspect = uniform(*AREA) * height * width, uniform(*ASPECT)
        crop_width, crop_height = int((area * aspect) ** 0.5 + 0.5), int((area / aspect) ** 0.5 + 0.5)
        if uniform(0, 1) < 0.5:
            crop_width, crop_height = crop_height, crop_width
        if 0 < crop_height <= height and 0 < crop_width <= width:
            left = int(uniform(0, max(width - crop_width, 1)))
            top = int(uniform(0, max(height - crop_height, 1)))
            return left, top, left + crop_width, top + crop_height
    return 0, 0, width, height


def _brightness(image, uniform, normal):
    return image + uniform(-BRIGHTNESS, BRIGHTNESS)


def _contrast(image, uniform, normal):
    mean = image.mean((0, 1), keepdims=True)
    return (image - mean) * uniform(*CONTRAST) + mean


def _saturation(image, uniform, normal):
    share = 1 + uniform(-SATURATION, SATURATION)
    return image * share + (image @ GREY)[..., None] * (1 - share)


def _lighting(image, uniform, normal):
    return image + EIGENVECTORS @ (LIGHTING * normal(3) * EIGENVALUES)


def distort(image, size: int, generator: torch.Generator) -> np.ndarray:
    """The original's training distortions of a PIL image (RGB): uint8 (size, size, 3).

    Crop, cubic resize, then brightness, contrast, saturation and lighting in random order, each cut to 0..255, flip.
    """
    from PIL import Image

    def uniform(low, high):
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    def normal(count):
        return torch.randn(count, generator=generator, dtype=torch.float64).numpy()

    cropped = image.crop(crop_box(image.height, image.width, uniform))
    # Cubic interpolation without averaging, as OpenCV's: `resize` of PIL would blur when it shrinks.
    box = (0, 0, cropped.width, cropped.height)
    resized = cropped.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
    pixels = np.asarray(resized)
    steps = (_brightness, _contrast, _saturation, _lighting)
    for index in torch.randperm(len(steps), generator=generator).tolist():
        pixels = steps[index](pixels.astype(np.float64), uniform, normal).clip(0, 255).astype(np.uint8)
    return pixels[:, ::-1] if uniform(0, 1) < 0.5 else pixels


class TrainingImages(Dataset):
    """Distorted training images by key (seed, epoch, index): (uint8 (3, size, size), target), or a DataError."""

    def __init__(self, samples: list[tuple[str, int]], size: int):
        # Arrays, not a million Python strings: counting references to those would copy them into every worker.
        self._paths = np.array([os.fsencode(path) for path, _ in samples])
        self._targets = np.array([target for _, target in samples])
        self._size = size

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, key):
        image = read_rgb(os.fsdecode(self._paths[key[-1]]))
        if isinstance(image, DataError):
            return image
        pixels = distort(image, self._size, seeded_generator(*key))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), int(self._targets[key[-1]])


class ImagenetLoader(ShardedLoader):
    """Training batches: float32 (B, 3, size, size) normalised, and targets. Arguments as ImageFolderLoader's."""

    def __init__(self, root, batch_size, *, mean, std, size, workers, limit, seed, device, rank, world_size,
                 channels_last):  # fmt: skip
        self.classes, samples = list_images(Path(root), "train", limit)
        super().__init__(len(samples), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.images, self.workers, self.device = TrainingImages(samples, size), workers, torch.device(device)
        self._pixels = {"mean": mean, "std": std, "channels_last": channels_last}

    def __iter__(self):
        order = torch.randperm(self.num_images, generator=seeded_generator(self.seed, self.epoch)).tolist()
        keys = [[(self.seed, self.epoch, index) for index in order[start:stop]] for start, stop in self.shards]
        batches = DataLoader(
            self.images,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=_stack_or_error,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # DataLoader draws a number per epoch: not one of the model's
        )
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            images, targets = (tensor.to(self.device, non_blocking=True) for tensor in batch)
            everything = torch.arange(len(images), device=self.device)
            yield augment_batch(images, everything, **self._pixels), targets


def _stack_or_error(items):
    for item in items:
        if isinstance(item, DataError):
            return item
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(targets)


class FakeLoader:
    """--fake: one batch of random uint8 images, normalised, again and again; for benchmarks."""

    def __init__(self, batch_size: int, steps: int, size: int, device, channels_last: bool):
        generator = torch.Generator().manual_seed(0)
        self.device, self.epoch = torch.device(device), 0
        shape = (batch_size, 3, size, size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        self.targets = torch.randint(1000, (batch_size,), generator=generator).to(self.device)
        everything = torch.arange(batch_size, device=self.device)
        self.images = augment_batch(images, everything, mean=MEAN, std=STD, channels_last=channels_last)
        self.num_images, self.batch_sizes, self.shards = batch_size * steps, [batch_size] * steps, [None] * steps

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        for _ in self.shards:
            yield self.images.clone(), self.targets


def validation_loader(root, batch_size, *, size, workers, device, bgr=False, channels_last=False) -> ImageFolderLoader:
    """Validation batches in order: shortest edge 256/224 of the size, centre crop. Folders as torchvision has them.

    bgr: for networks converted from the original, which subtract the constants of RGB from BGR images.
    """
    mean, std = (MEAN[::-1], STD[::-1]) if bgr else (MEAN, STD)
    options = {"size": size, "workers": workers, "device": device, "channels_last": channels_last}
    return ImageFolderLoader(root, batch_size, train=False, mean=mean, std=std, **options)
