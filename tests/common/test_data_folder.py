"""ImageFolderLoader: torchvision's pixels, independent of workers and ranks, and damaged images named."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common.data import DataError, ImageFolderLoader, folders, write_digits_folder
from common.data.folders import read_rgb
from common.data.sharding import seeded_generator

ROOT = Path(__file__).resolve().parents[2]
PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    return write_digits_folder(tmp_path_factory.mktemp("folder") / "digits")


@pytest.fixture
def small_folder(tmp_path):
    """Two classes of three images; train and val are the same."""
    from PIL import Image

    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(3):
                noise = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
                Image.fromarray(noise.numpy()).save(tmp_path / split / label / f"{i}.jpg")
    return tmp_path


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_against_torchvision(root, size, limit):
    """Both splits against ImageFolder with the usual transforms, given the same random numbers image by image."""
    normalise = [transforms.ToTensor(), transforms.Normalize(*PIXELS.values())]
    evaluate = transforms.Compose([transforms.Resize(size * 256 // 224), transforms.CenterCrop(size), *normalise])
    augment = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *normalise])

    reference = ImageFolder(root / "val", evaluate)
    loader = ImageFolderLoader(root, 32, train=False, size=size, workers=0, limit=limit, **PIXELS)
    images, targets = epoch_of(loader, 0)
    count = len(reference) if limit is None else limit
    assert len(images) == count and loader.classes == reference.classes
    places = range(count) if limit is None else [reference.samples.index(sample) for sample in samples_of(loader)]
    for index, place in enumerate(places):
        expected, target = reference[place]
        assert torch.equal(images[index], expected) and targets[index] == target

    reference = ImageFolder(root / "train", augment)
    loader = ImageFolderLoader(root, 32, train=True, size=size, workers=0, limit=limit, seed=3, **PIXELS)
    images, targets = epoch_of(loader, 5)
    order = torch.randperm(loader.num_images, generator=seeded_generator(3, 5)).tolist()
    for position, index in enumerate(order[:40]):
        place = reference.samples.index(samples_of(loader)[index])
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(seeded_generator(3, 5, index).get_state())
            expected, target = reference[place]
        assert torch.equal(images[position], expected) and targets[position] == target


def samples_of(loader):
    dataset = loader._loader.dataset
    return [(os.fsdecode(path), int(target)) for path, target in zip(dataset._paths, dataset._targets, strict=True)]


def test_equals_torchvision_on_digits(digits_folder):
    check_against_torchvision(digits_folder, 32, None)


def test_equals_torchvision_on_photographs(shared_dir):
    check_against_torchvision(shared_dir / "data" / "imagenette-mini", 224, 20)


@pytest.mark.parametrize("train", [True, False])
def test_worker_processes_change_nothing(digits_folder, train):
    loaders = [
        ImageFolderLoader(digits_folder, 50, train=train, size=24, workers=n, limit=400, **PIXELS) for n in (0, 2)
    ]
    first = [epoch_of(loader, 1) for loader in loaders]
    assert equal(*first)
    second = [epoch_of(loader, 2) for loader in loaders]  # the worker processes of the first epoch go on
    assert equal(*second) and equal(first[0], second[0]) != train


def test_the_global_generator_is_left_alone(digits_folder):
    for workers in (0, 1):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        epoch_of(ImageFolderLoader(digits_folder, 10, train=True, size=16, workers=workers, limit=20, **PIXELS), 0)
        assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch(digits_folder, train, world_size):
    fixed = {"train": train, "size": 16, "workers": 0, "limit": 203, **PIXELS}
    whole = epoch_of(ImageFolderLoader(digits_folder, 40, **fixed), 1)
    loaders = [ImageFolderLoader(digits_folder, 40, rank=r, world_size=world_size, **fixed) for r in range(world_size)]
    ranks = [list(loader) for loader in loaders if loader.set_epoch(1) is None]
    assert len({len(loader) for loader in loaders}) == 1 and loaders[0].batch_sizes[0] == 40
    assert sum(loaders[0].batch_sizes) == loaders[0].num_images == 203
    together = [torch.cat([part[i] for step in zip(*ranks, strict=True) for part in step]) for i in (0, 1)]
    assert equal(together, whole)


def test_resume_and_seed(digits_folder):
    fixed = {"train": True, "size": 16, "workers": 0, "limit": 50, **PIXELS}
    loader = ImageFolderLoader(digits_folder, 20, seed=4, **fixed)
    loader.set_epoch(6)
    state, expected = loader.state_dict(), epoch_of(loader, 6)
    resumed = ImageFolderLoader(digits_folder, 20, **fixed)
    assert not equal(epoch_of(resumed, 6), expected)
    resumed.load_state_dict(state)
    assert equal(epoch_of(resumed, resumed.epoch), expected)


def test_limit_takes_from_all_classes(digits_folder):
    loader = ImageFolderLoader(digits_folder, 10, train=True, size=16, workers=0, limit=25, **PIXELS)
    counts = torch.bincount(epoch_of(loader, 0)[1], minlength=10)
    assert counts.tolist() == [3] * 5 + [2] * 5
    whole = ImageFolderLoader(digits_folder, 10, train=False, size=16, workers=0, limit=10**6, **PIXELS)
    assert whole.num_images == 355
    with pytest.raises(DataError, match="--train-size"):
        ImageFolderLoader(digits_folder, 10, train=True, limit=0, **PIXELS)


def test_output_type_and_memory_format(small_folder):
    fixed = {"train": False, "size": 16, "workers": 0, **PIXELS}
    plain, _ = next(iter(ImageFolderLoader(small_folder, 4, **fixed)))
    other, targets = next(iter(ImageFolderLoader(small_folder, 4, dtype=torch.bfloat16, channels_last=True, **fixed)))
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(other, plain.bfloat16()) and targets.tolist() == [0, 0, 0, 1] and targets.dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(small_folder, workers):
    loader = ImageFolderLoader(small_folder, 6, train=True, size=16, workers=workers, **PIXELS)
    victim = small_folder / "train" / "dog" / "1.jpg"
    good = victim.read_bytes()
    for content in (good[: len(good) // 2], b"", b"this is no image", None):
        if content is None:
            victim.unlink()
        else:
            victim.write_bytes(content)
        with pytest.raises(DataError) as caught:
            list(loader)
        text = str(caught.value)
        assert text.startswith(f"{victim} cannot be read as an image") and "\n" not in text and "Traceback" not in text
    victim.write_bytes(good)
    assert sum(len(targets) for _, targets in loader) == 6, "the loader works again once the image is restored"


def test_folders_that_are_not_a_data_set(small_folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    (empty / "train").mkdir()
    (small_folder / "val" / "snake").mkdir()
    for root, train, names in [
        (empty / "nowhere", True, ["nowhere/train", "No such file"]),
        (empty, True, ["train", "class"]),
        (small_folder, False, ["val", "snake"]),
        (small_folder / "train" / "cat" / "0.jpg", True, ["0.jpg"]),
    ]:
        with pytest.raises(DataError) as caught:
            ImageFolderLoader(root, 4, train=train, **PIXELS)
        text = str(caught.value)
        assert all(name in text for name in [*names, "train/ and val/", "--embedded-data"]) and "\n" not in text


KILLED_WORKER = """
import os, signal, sys, threading, time
from common.data import DataError, ImageFolderLoader

def kill():
    while loader._loader._iterator is None:
        time.sleep(0.01)
    os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)

loader = ImageFolderLoader(sys.argv[1], 3, train=False, mean=(0, 0, 0), std=(1, 1, 1), size=16, workers=1)
threading.Thread(target=kill).start()
try:
    list(loader)
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_killed_worker_is_one_line(small_folder):
    """In a process of its own: PyTorch raises from a signal handler, which must not hit the test runner."""
    victim = small_folder / "val" / "dog" / "1.jpg"
    victim.unlink()
    os.mkfifo(victim)  # nobody writes: the worker waits in here until it is killed
    command = [sys.executable, "-c", KILLED_WORKER, small_folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("DataLoader worker") and "Use fewer --workers" in done.stdout
    assert done.stdout.count("\n") == 1, done.stdout


def test_worker_processes_end_with_the_loader(digits_folder):
    """Reference cycles would keep them until some later collection, which then waits five seconds for each."""
    loader = ImageFolderLoader(digits_folder, 10, train=True, size=16, workers=2, limit=20, **PIXELS)
    next(iter(loader))
    workers = loader._loader._iterator._workers
    del loader
    assert not any(worker.is_alive() for worker in workers)


def pixels_of(path, array, mode=None):
    from PIL import Image

    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)
    return read_rgb(str(path))


def test_sixteen_bits_become_eight_by_their_scale(tmp_path):
    """`convert("RGB")` alone makes every value above 255 white."""
    levels = np.array([[0, 128, 257, 32768, 65407, 65535]], dtype=np.uint16)
    for name in ("a.png", "b.tif"):
        found = np.asarray(pixels_of(tmp_path / name, levels))
        assert found.shape == (1, 6, 3) and (found == found[..., :1]).all()
        assert found[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]  # 65535 / 255 = 257 to a level


@pytest.mark.parametrize("array, kind", [
    (np.ones((2, 2), dtype=np.int32), "32-bit integers"), (np.ones((2, 2), dtype=np.float32), "floats"),
])  # fmt: skip
def test_pixels_of_unknown_scale_are_refused_by_file(tmp_path, array, kind):
    found = pixels_of(tmp_path / "deep.tif", array)
    assert isinstance(found, DataError) and str(tmp_path / "deep.tif") in str(found) and kind in str(found)


def test_eight_bits_of_any_mode_are_what_convert_makes_of_them(tmp_path):
    from PIL import Image

    colours = np.random.default_rng(0).integers(256, size=(4, 5, 3), dtype=np.uint8)
    for mode, suffix in (("RGB", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGBA", "png"), ("1", "png")):
        image = Image.fromarray(colours).convert(mode)
        image.save(tmp_path / f"{mode}.{suffix}")
        expected = Image.open(tmp_path / f"{mode}.{suffix}").convert("RGB")
        assert np.array_equal(np.asarray(read_rgb(str(tmp_path / f"{mode}.{suffix}"))), np.asarray(expected))


def load(root, train=True):
    return ImageFolderLoader(root, 4, train=train, size=32, workers=0, **PIXELS)


def test_names_with_a_leading_dot_are_neither_classes_nor_images(small_folder, capsys, monkeypatch):
    """A notebook's folder would shift every label, a file manager's files are no pictures."""
    monkeypatch.setattr(folders, "_told", set())
    before = samples_of(load(small_folder))
    hidden = small_folder / "train" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(small_folder / "train" / "cat" / "0.jpg", hidden)
    (small_folder / "train" / "cat" / "._0.jpg").write_bytes(b"AppleDouble")
    shutil.copytree(hidden, small_folder / "train" / "dog" / ".thumbnails")
    for _ in range(2):
        loader = load(small_folder)
        assert (loader.classes, samples_of(loader)) == (["cat", "dog"], before)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["note"] * 2, "each kind once"
    assert ".ipynb_checkpoints" in told[0] and "._0.jpg" in told[1]


def test_links_out_of_a_class_are_not_followed_and_images_are_read_once(small_folder, tmp_path_factory, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    before = samples_of(load(small_folder))
    (small_folder / "train" / "cat" / "all").symlink_to(small_folder / "train")
    (small_folder / "train" / "cat" / "round").symlink_to(small_folder / "train" / "cat")
    assert samples_of(load(small_folder)) == before
    assert "not followed, a link out of its class" in capsys.readouterr().err
    shutil.move(small_folder / "train" / "dog", elsewhere / "dog")  # a class may be a link, and an image too
    (small_folder / "train" / "dog").symlink_to(elsewhere / "dog")
    shutil.move(elsewhere / "dog" / "1.jpg", elsewhere / "1.jpg")
    (elsewhere / "dog" / "1.jpg").symlink_to(elsewhere / "1.jpg")
    assert samples_of(load(small_folder)) == before


@pytest.mark.parametrize("train", (True, False))
def test_splits_of_different_classes_are_refused(small_folder, train):
    """Labels are places in the list of folders: with other folders the same label is another class."""
    for place in ("train", "val"):
        assert load(small_folder, train).classes == ["cat", "dog"]
        extra = small_folder / place / "ant"
        extra.mkdir()
        shutil.copy(small_folder / "train" / "cat" / "0.jpg", extra)
        with pytest.raises(DataError, match=r"different classes \(ant in one of them only\)"):
            load(small_folder, train)
        shutil.rmtree(extra)
    shutil.rmtree(small_folder / "train")
    assert load(small_folder, train=False).classes == ["cat", "dog"]  # a test needs no training images
