"""TensorLoader: what it yields depends on (seed, epoch) only, whatever the number of ranks, and survives a resume."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.data import DataError, ImageSet, TensorLoader, load_digits_set
from common.data.sharding import global_batches, seeded_generator, shard

ROOT = Path(__file__).resolve().parents[2]
CROP = {"train": True, "pad": 4, "flip": True}


@pytest.fixture(scope="module")
def digits():
    return load_digits_set("train", channels=3, size=32)


@pytest.fixture(scope="module")
def numbered():
    """1,003 images whose target is their own number, for following each of them."""
    count = 1003
    images = torch.randint(1, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(images, torch.arange(count), [str(i) for i in range(count)], "numbered")


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    return list(loader)


def same(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b)
        for batch, other in zip(batches, others, strict=True)
        for a, b in zip(batch, other, strict=True)
    )


def test_an_epoch_has_every_image_once_in_shuffled_order(numbered):
    loader = TensorLoader(numbered, 100, **CROP)
    order = torch.cat([targets for _, targets in epoch_of(loader, 0)])
    assert len(loader) == 11 and loader.batch_sizes == [100] * 10 + [3] and loader.num_images == 1003
    assert not torch.equal(order, torch.arange(1003))
    assert torch.equal(order.sort().values, torch.arange(1003))


def test_batches_depend_on_seed_and_epoch_only(digits):
    first = epoch_of(TensorLoader(digits, 128, seed=5, **CROP), 3)
    torch.manual_seed(999)
    again = TensorLoader(digits, 128, seed=5, **CROP)
    epoch_of(again, 7)
    before = torch.get_rng_state()
    assert same(first, epoch_of(again, 3))
    assert torch.equal(before, torch.get_rng_state()), "the loader used the global generator"
    for seed, epoch in [(5, 4), (4, 3), (4, 4), (3, 5), (8, 0), (0, 8)]:  # also the same sum of seed and epoch
        assert not same(first, epoch_of(TensorLoader(digits, 128, seed=seed, **CROP), epoch))


def test_pixels_do_not_depend_on_the_batch_size(digits):
    batches = [epoch_of(TensorLoader(digits, size, **CROP), 1) for size in (50, 128)]
    images = [torch.cat([images for images, _ in epoch]) for epoch in batches]
    assert torch.equal(*images)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [4, 64, 167, 2000])  # 167 leaves 1 image of 1003, 64 leaves 43
def test_ranks_share_each_batch(numbered, train, world_size, batch_size):
    fixed = {"train": train, "pad": 2, "flip": True, "mean": (0.5,), "std": (0.25,)}
    whole = epoch_of(TensorLoader(numbered, batch_size, **fixed), 2)
    loaders = [TensorLoader(numbered, batch_size, rank=r, world_size=world_size, **fixed) for r in range(world_size)]
    ranks = [epoch_of(loader, 2) for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1 and len({tuple(loader.batch_sizes) for loader in loaders}) == 1
    for step, parts in enumerate(zip(*ranks, strict=True)):
        sizes = [len(targets) for _, targets in parts]
        assert sum(sizes) == loaders[0].batch_sizes[step] and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    images, targets = (torch.cat([part[i] for step in zip(*ranks, strict=True) for part in step]) for i in (0, 1))
    assert torch.equal(targets, torch.cat([targets for _, targets in whole]))
    assert torch.equal(images, torch.cat([images for images, _ in whole]))
    if 1003 % batch_size >= world_size or world_size == 1:
        assert loaders[0].batch_sizes == [len(targets) for _, targets in whole], "the steps changed with the ranks"


def test_evaluation_is_in_order_and_unchanged(digits):
    loader = TensorLoader(digits, 100, train=False, pad=4, flip=True, seed=3)
    batches = epoch_of(loader, 9)
    assert torch.equal(torch.cat([targets for _, targets in batches]), digits.targets)
    assert torch.equal(torch.cat([images for images, _ in batches]), digits.images.to(torch.float32) / 255)


def test_resume_continues_with_the_same_batches(digits):
    loader = TensorLoader(digits, 128, seed=11, **CROP)
    loader.set_epoch(4)
    state, expected = loader.state_dict(), list(loader)
    assert all(type(value) is int for value in state.values()), "a checkpoint holds plain values"
    resumed = TensorLoader(digits, 128, **CROP)
    resumed.load_state_dict(state)
    assert same(expected, list(resumed))


def test_offsets_and_flips_are_uniform_and_independent():
    """One white pixel in each of 20,000 black images tells where it was moved: chi-squared against uniform."""
    count, middle = 20_000, 4
    images = torch.zeros(count, 1, 9, 10, dtype=torch.uint8)
    images[:, 0, middle, middle] = 255  # of 10 columns: a flip moves it to 5, plus the offset
    batch = torch.cat(
        [
            b
            for b, _ in TensorLoader(
                ImageSet(images, torch.arange(count), [], "dot"), 500, train=True, pad=2, flip=True
            )
        ]
    )
    rows, columns = batch.sum((1, 3)).nonzero(), batch[:, 0].flatten(1).argmax(1)
    assert len(rows) == count, "a dot was lost or doubled"
    top = torch.bincount(columns // 10, minlength=9)[2:7]
    assert top.sum() == count and chi_squared(top) < 18.5  # 4 degrees of freedom, p = 0.001
    flipped = [
        d
        for b, t in TensorLoader(ImageSet(images, torch.arange(count), [], "dot"), 500, train=True, flip=True)
        for d in b[:, 0, middle, 5]
    ]
    share = sum(bool(value) for value in flipped) / count
    assert abs(share - 0.5) < 0.0125  # 3.5 standard deviations
    straight = torch.cat(
        [b for b, _ in TensorLoader(ImageSet(images, torch.arange(count), [], "dot"), 500, train=True, pad=2)]
    )
    pairs = torch.bincount(straight[:, 0].flatten(1).argmax(1), minlength=90).view(9, 10)[2:7, 2:7]
    assert pairs.sum() == count and chi_squared(pairs.flatten()) < 51.2  # 24 degrees of freedom, p = 0.001


def chi_squared(observed):
    expected = observed.sum() / len(observed)
    return float(((observed - expected) ** 2 / expected).sum())


def test_crop_offsets_limits_what_is_drawn():
    """epsilon-ResNet draws 0..7 of 0..8: the dot moves by 4 to -3 and never by -4."""
    images = torch.zeros(5000, 1, 16, 16, dtype=torch.uint8)
    images[:, 0, 8, 8] = 1
    image_set = ImageSet(images, torch.arange(5000), [], "dot")
    for offsets, expected in [(8, range(5, 13)), (None, range(4, 13)), (1, [12])]:
        loader = TensorLoader(image_set, 1000, train=True, pad=4, crop_offsets=offsets)
        places = torch.cat([batch for batch, _ in loader])[:, 0].nonzero()[:, 1:]
        assert sorted(set(places[:, 0].tolist())) == sorted(set(places[:, 1].tolist())) == list(expected)


def test_pixel_mean_of_the_set(digits):
    mean = digits.images.double().mean(0).float()
    batches = epoch_of(TensorLoader(digits, 500, train=False, pixel_mean=mean), 0)
    assert torch.equal(torch.cat([images for images, _ in batches]), digits.images.float() - mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_type_and_memory_format(digits, dtype):
    loader = TensorLoader(digits, 64, dtype=dtype, channels_last=True, mean=(0.5,) * 3, std=(0.25,) * 3, **CROP)
    images, targets = next(iter(loader))
    plain, _ = next(iter(TensorLoader(digits, 64, mean=(0.5,) * 3, std=(0.25,) * 3, **CROP)))
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert torch.equal(images, plain.to(dtype)) and targets.dtype == torch.int64


@pytest.mark.gpu
def test_gpu_yields_the_same_batches(digits):
    fixed = {"mean": (0.5,) * 3, "std": (0.25,) * 3, **CROP}
    on_gpu = epoch_of(TensorLoader(digits, 128, device="cuda", **fixed), 1)
    assert same(
        [(images.cpu(), targets.cpu()) for images, targets in on_gpu], epoch_of(TensorLoader(digits, 128, **fixed), 1)
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pad": -1}, "padding"),
        ({"pad": 4, "crop_offsets": 10}, r"offsets 0\.\.8, not 10"),
        ({"crop_offsets": 0}, "not 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"batch_size": 3, "world_size": 4}, "batch size 3 is smaller than the number of processes"),
        ({"world_size": 5000, "batch_size": 5000}, "cannot be shared by 5000 processes"),
    ],
)
def test_arguments_out_of_range(digits, changes, text):
    with pytest.raises(ValueError, match=text):
        TensorLoader(digits, **{"batch_size": 10, "train": True, **changes})


def test_bounds_cover_everything_once():
    for count, size, world_size in [(10, 3, 1), (10, 3, 2), (10, 3, 3), (9, 3, 3), (2, 128, 2), (1003, 167, 4)]:
        batches = global_batches(count, size, world_size)
        bounds = [shard(*batch, rank, world_size) for batch in batches for rank in range(world_size)]
        assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))


def test_generators_of_different_keys_differ_and_stay():
    seen = {
        int(torch.randint(2**62, (1,), generator=seeded_generator(seed, epoch)))
        for seed in range(30)
        for epoch in range(30)
    }
    assert len(seen) == 900
    # A change here would change every seeded run that anybody recorded.
    assert torch.randperm(8, generator=seeded_generator(0, 0)).tolist() == [1, 3, 0, 6, 7, 2, 5, 4]


def test_image_set_subset_and_shapes(digits):
    part = digits.subset(10)
    assert len(part) == 10 and torch.equal(part.images, digits.images[:10]) and part.classes == digits.classes
    assert len(digits.subset(10**6)) == len(digits)
    with pytest.raises(DataError, match="--train-size must be at least 1"):
        digits.subset(0)
    with pytest.raises(ValueError, match="uint8"):
        ImageSet(digits.images.float(), digits.targets, [], "wrong")
    with pytest.raises(ValueError, match="targets"):
        ImageSet(digits.images, digits.targets[1:], [], "wrong")


def test_importing_is_light():
    code = (
        "import sys, pkgutil, importlib, common.data\n"
        "names = [module.name for module in pkgutil.iter_modules(common.data.__path__)]\n"
        "for name in names: importlib.import_module('common.data.' + name)\n"
        "print([name for name in ('numba', 'cupy', 'sklearn', 'scipy', 'torchvision', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
