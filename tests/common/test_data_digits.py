"""The embedded digits: the same everywhere, split by class, and as an image folder."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import DataError, digits, load_digits_set, write_digits_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_shapes_and_split(channels, size):
    train, test = (load_digits_set(split, channels=channels, size=size) for split in ("train", "test"))
    assert train.images.shape == (1442, channels, size, size) and test.images.shape == (355, channels, size, size)
    assert train.images.dtype == torch.uint8 and train.classes == [str(i) for i in range(10)]
    for image_set in (train, test):
        share = torch.bincount(image_set.targets, minlength=10) / len(image_set)
        assert share.min() > 0.095 and share.max() < 0.105, "a class is over- or under-represented"
    together = {image.numpy().tobytes() for image_set in (train, test) for image in image_set.images}
    assert len(together) == 1797, "an image is in both splits"


def test_pixels_are_the_same_on_every_machine():
    """Checksums of the tensors: recorded results on the embedded data rest on them."""
    for split, channels, size, expected in [
        ("train", 1, 28, "bbe977c6eb192d7353abd84e3b9c3fa4e4e21b471145b30d39ee4cdb7e992253"),
        ("test", 3, 32, "9b568601373cf83bfdc634c5464b59331c0336af3b46111f41932dfdecab9ced"),
    ]:
        image_set = load_digits_set(split, channels=channels, size=size)
        content = image_set.images.numpy().tobytes() + image_set.targets.numpy().astype("<i8").tobytes()
        assert hashlib.sha256(content).hexdigest() == expected


def test_enlarging_is_bilinear_and_keeps_the_range():
    images = np.random.default_rng(0).integers(0, 17, (20, 8, 8))
    images[0], images[1] = 0, 16
    for size in (8, 9, 28, 32, 64):
        enlarged = digits._enlarge(images, size)
        source = torch.from_numpy(images)[:, None].double() * 255 / 16
        expected = torch.nn.functional.interpolate(source, size=(size, size), mode="bilinear", align_corners=False)[
            :, 0
        ]
        assert np.abs(enlarged - expected.numpy()).max() <= 0.5 + 1e-9
        assert (enlarged[0] == 0).all() and (enlarged[1] == 255).all()


def test_unknown_splits_and_small_sizes_are_refused():
    with pytest.raises(ValueError, match="choose train or test"):
        load_digits_set("val")
    with pytest.raises(ValueError, match="smaller"):
        load_digits_set("train", size=7)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_digits_set("train")


def test_folder_is_written_once_by_several_processes(tmp_path):
    root = tmp_path / "deep" / "digits"
    code = "import sys; from common.data import write_digits_folder; write_digits_folder(sys.argv[1])"
    processes = [subprocess.Popen([sys.executable, "-c", code, root], cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*.png")}
    assert len(written) == 1797 and {path.parent.parent.name for path in written} == {"train", "val"}
    assert sorted(path.name for path in root.parent.iterdir()) == [".digits.lock", "digits"]
    assert write_digits_folder(root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.png")} == written
    test = load_digits_set("test", size=digits.FOLDER_SIZE)
    for index in (0, 354):
        pixels = np.asarray(Image.open(root / "val" / str(int(test.targets[index])) / f"{index:04d}.png"))
        assert np.array_equal(pixels, test.images[index, 0])


def test_incomplete_folders_and_other_files_are_left_alone(tmp_path):
    root = write_digits_folder(tmp_path / "digits")
    victim = next((root / "val" / "3").iterdir())
    victim.unlink()
    with pytest.raises(DataError, match=r"val has 354 of 355 digits; delete .*digits and run again") as caught:
        write_digits_folder(root)
    assert "\n" not in str(caught.value) and not victim.exists()
    (tmp_path / "file").write_text("something else")
    for occupied in (tmp_path / "file", tmp_path / "file" / "digits"):
        with pytest.raises(DataError, match="file"):
            write_digits_folder(occupied)
    assert (tmp_path / "file").read_text() == "something else"


@pytest.mark.parametrize(("owner", "function"), [(Image.Image, "save"), (digits.os, "replace")])
def test_a_failed_writer_leaves_no_folder_that_looks_complete(tmp_path, monkeypatch, owner, function):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, function, fail)
    with pytest.raises(DataError, match="No space left on device"):
        write_digits_folder(tmp_path / "digits")
    assert [path.name for path in tmp_path.iterdir()] == [".digits.lock"]
    monkeypatch.undo()
    assert write_digits_folder(tmp_path / "digits").is_dir()
