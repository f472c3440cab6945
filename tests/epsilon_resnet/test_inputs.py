"""What the networks are fed: CIFAR's offsets and mean, SVHN's distortions, ImageNet's crop and colours."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.data import DataError, ImageSet
from epsilon_resnet import imagenet_inputs, inputs


def image_set(count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ImageSet(images, torch.arange(count) % 10, [str(n) for n in range(10)], "made up")


def test_mean_image_is_over_training_and_test_images():
    train, test = image_set(5, 1), image_set(3, 2)
    expected = torch.cat([train.images, test.images]).double().mean(0)
    assert torch.allclose(inputs.pixel_mean(train, test).double(), expected, atol=1e-4)


def test_cifar_crops_never_use_the_last_offset_and_divide_by_128():
    white = ImageSet(
        torch.full((512, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(512, dtype=torch.long), ["0"], "w"
    )
    mean = torch.full((3, 32, 32), 127.0)
    loader = inputs.training_loader("cifar10", white, 512, mean, seed=3, device="cpu")
    ((images, _),) = inputs.EpochBatches(loader, 512, 1, inputs.DIVISOR)
    assert set(images.unique().tolist()) == {1.0, -127 / 128}, "borders are minus the mean"
    black = images[:, 0] < 0
    top, bottom = black[:, :, 16].float().argmin(1), black[:, :, 16].flip(1).float().argmin(1)
    assert sorted(set((top - bottom).tolist())) == list(range(-3, 5)), "offsets 0..7, the first puts 4 rows above"


def test_epochs_have_full_batches_only_and_go_on_where_one_pass_is_too_short():
    loader = inputs.training_loader("cifar10", image_set(10), 4, torch.zeros(3, 32, 32), seed=1, device="cpu")
    one = list(inputs.EpochBatches(loader, 4, 2))
    assert [len(targets) for _, targets in one] == [4, 4]
    batches = inputs.EpochBatches(loader, 4, 5)  # three passes, the last cut short
    batches.set_epoch(1)
    epoch = list(batches)
    assert [len(targets) for _, targets in epoch] == [4] * 5 and batches.num_images == 20
    again = list(batches)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(epoch, again, strict=True))
    with pytest.raises(DataError, match="10 training images are fewer than a batch of 16"):
        inputs.EpochBatches(
            inputs.training_loader("cifar10", image_set(10), 16, torch.zeros(3, 32, 32), seed=1, device="cpu"), 16, 1
        )


def test_each_process_tests_whole_batches():
    mean = torch.zeros(3, 32, 32)
    images = image_set(300)
    parts = [inputs.test_batches(images, mean, device="cpu", rank=rank, world_size=2) for rank in (0, 1)]
    assert [[len(targets) for _, targets in part] for part in parts] == [[128, 44], [128]]


def test_svhn_distortions_at_their_middle_change_nothing():
    images = image_set(4).images
    draws, corner = torch.full((4, 10), 0.5), torch.full((4, 2), 4)
    assert torch.allclose(inputs.distort(images, draws, corner), images.float(), atol=1e-3)


def test_svhn_deformation_is_the_formula():
    """Against a loop over pixels: position + sum of Gaussian weights times offsets, bilinear, cut at the border."""
    images = image_set(1).images
    draws = torch.rand(1, 10, generator=torch.Generator().manual_seed(5))
    draws[:, :2] = torch.tensor([0.9, 0.2])
    ours = inputs.distort(images, draws, torch.tensor([[1, 6]]))[0]
    canvas = F.pad(images.double(), (4, 4, 4, 4))[0] + (2 * draws[0, 0].double() - 1) * 10
    canvas = canvas.clamp(0, 255)
    mean = canvas.mean((1, 2), keepdim=True)
    canvas = ((canvas - mean) * (0.8 + 0.4 * draws[0, 1].double()) + mean).clamp(0, 255)
    offsets = (2 * draws[0, 2:].double().view(4, 2) - 1) * 3
    for row, column in ((0, 0), (31, 31), (10, 20), (25, 3)):
        y, x = row + 1.0, column + 6.0
        weights = [math.exp(-((y / 40 - a) ** 2 + (x / 40 - b) ** 2) / 0.2) for a, b in inputs.ANCHORS]
        at = [min(max(p + sum(w * o[axis].item() for w, o in zip(weights, offsets, strict=True)), 0), 39)
              for axis, p in enumerate((y, x))]  # fmt: skip
        top, left = (min(int(p), 38) for p in at)
        down, right = at[0] - top, at[1] - left
        window = canvas[:, top : top + 2, left : left + 2]
        kernel = torch.tensor([[(1 - down) * (1 - right), (1 - down) * right], [down * (1 - right), down * right]])
        expected = (window * kernel.double()).sum((1, 2))
        assert torch.allclose(ours[:, row, column].double(), expected, atol=2e-2)


def test_svhn_batches_depend_on_seed_and_epoch_only():
    loader = inputs.training_loader("svhn", image_set(16), 8, torch.zeros(3, 32, 32), seed=1, device="cpu")
    first = [images for images, _ in loader]
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, loader, strict=True))
    loader.set_epoch(1)
    assert not torch.equal(first[0], next(iter(loader))[0])
    parts = [
        inputs.training_loader(
            "svhn", image_set(16), 8, torch.zeros(3, 32, 32), seed=1, device="cpu", rank=rank, world_size=2
        )
        for rank in (0, 1)
    ]
    both = torch.cat([next(iter(part))[0] for part in parts])
    assert torch.allclose(both, first[0], atol=1e-3)


def test_svhn_trains_on_train_and_extra():
    assert inputs.SPLITS["svhn"] == ("train+extra", "test")


def test_the_originals_data_folder(monkeypatch):
    monkeypatch.delenv("TENSORPACK_DATASET", raising=False)
    assert inputs.data_folder(None, "cifar10") == "./data" and inputs.data_folder("/d", "svhn") == "/d"
    monkeypatch.setenv("TENSORPACK_DATASET", "/packs")
    assert inputs.data_folder(None, "svhn") == "/packs/svhn_data"


def test_imagenet_crops_have_the_areas_and_shapes_of_the_recipe():
    generator = np.random.default_rng(0)
    boxes = [imagenet_inputs.crop_box(300, 400, generator.uniform) for _ in range(500)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 400 and 0 <= top < bottom <= 300
        assert 0.078 <= (right - left) * (bottom - top) / 120_000 <= 1.0
        assert 0.73 <= (right - left) / (bottom - top) <= 1.37
    assert imagenet_inputs.crop_box(10, 1000, generator.uniform) is not None


def test_an_image_that_fits_no_crop_is_taken_whole():
    assert imagenet_inputs.crop_box(2, 1000, lambda low, high: high) == (0, 0, 1000, 2)


def test_imagenet_distortions_are_repeatable_and_leave_bytes():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    first, again, other = (
        imagenet_inputs.distort(image, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_a_damaged_image_is_named(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "class").mkdir(parents=True)
        (tmp_path / split / "class" / "bad.jpg").write_bytes(b"no image")
    loader = imagenet_inputs.ImagenetLoader(
        tmp_path, 1, mean=imagenet_inputs.MEAN, std=imagenet_inputs.STD, size=32, workers=0, limit=None, seed=0,
        device="cpu", rank=0, world_size=1, channels_last=False,
    )  # fmt: skip
    with pytest.raises(DataError, match="bad.jpg cannot be read as an image"):
        list(loader)


def test_real_imagenet_folder(shared_dir):
    loader = imagenet_inputs.ImagenetLoader(
        shared_dir / "data" / "imagenette-mini", 4, mean=imagenet_inputs.MEAN, std=imagenet_inputs.STD, size=64,
        workers=0, limit=8, seed=0, device="cpu", rank=0, world_size=1, channels_last=False,
    )  # fmt: skip
    batches = list(loader)
    assert [images.shape for images, _ in batches] == [(4, 3, 64, 64)] * 2
    assert all(-3 < images.mean() < 3 and images.std() > 0.3 for images, _ in batches)
