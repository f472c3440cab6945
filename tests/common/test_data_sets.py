"""load_dataset: reads what torchvision reads, verifies first, downloads once, and explains itself in one line.

The real files are large, so most tests make tiny data sets in the same formats and put their checksums in torchvision's
tables; a server on this machine stands for the internet.
"""

import contextlib
import gzip
import hashlib
import http.server
import io
import multiprocessing
import os
import pickle
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from torchvision import datasets as tv

from common.data import DataError, datasets, load_dataset


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def random_bytes(shape, seed):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cifar_files(name, folder):
    """Content of a small data set's files by path, in CIFAR's format: pickled dicts of flat channel-first images."""
    labels, names = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")
    batches = ["data_batch_1", "data_batch_2", "test_batch"] if name == "cifar10" else ["train", "test"]
    content = {
        batch: pickle.dumps({"data": random_bytes((6, 3072), seed), labels: [seed, 0, 1, 2, 3, 4]}, protocol=2)
        for seed, batch in enumerate(batches, 5)
    }
    content["batches.meta" if name == "cifar10" else "meta"] = pickle.dumps({names: [f"class {i}" for i in range(10)]})
    return {f"{folder}/{path}": data for path, data in content.items()}


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, monkeypatch):
    """(name, files, archive) of a small CIFAR whose checksums are in torchvision's class."""
    name, source = request.param, {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[request.param]
    files = cifar_files(name, source.base_folder)
    listed = [[path.split("/")[1], md5(content)] for path, content in files.items()]
    monkeypatch.setattr(
        source, "train_list", [entry for entry in listed if "test" not in entry[0] and "meta" not in entry[0]]
    )
    monkeypatch.setattr(source, "test_list", [entry for entry in listed if "test" in entry[0]])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": listed[-1][1]})
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for path, content in files.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(source, "tgz_md5", md5(archive.getvalue()))
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/nothing-listens-here.tar.gz")
    return name, files, archive.getvalue()


@pytest.fixture
def mnist(monkeypatch):
    """The eight files of a small MNIST, by path."""
    files = {}
    for seed, (split, count) in enumerate([("train", 7), ("t10k", 3)]):
        for kind, shape in [("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))]:
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            plain = header + (random_bytes(shape, seed) // (26 if kind.startswith("labels") else 1)).tobytes()
            files[f"MNIST/raw/{split}-{kind}-ubyte"] = plain
            files[f"MNIST/raw/{split}-{kind}-ubyte.gz"] = gzip.compress(plain)
    names = {path.rsplit("/", 1)[1]: content for path, content in files.items()}
    monkeypatch.setattr(tv.MNIST, "resources", [(n, md5(c)) for n, c in names.items() if n.endswith(".gz")])
    monkeypatch.setattr(tv.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    plain = {name: md5(content) for name, content in names.items() if not name.endswith(".gz")}
    monkeypatch.setattr(datasets, "MNIST_UNPACKED_MD5", plain)
    return files


@pytest.fixture
def svhn(monkeypatch):
    """The three files of a small SVHN: MATLAB arrays (H, W, C, N), labels 1..10."""
    from scipy.io import savemat

    files, table = {}, {}
    for seed, split in enumerate(["train", "test", "extra"]):
        content = io.BytesIO()
        labels = np.array([[10], [1], [9], [seed + 2]], dtype=np.uint8)
        savemat(content, {"X": random_bytes((32, 32, 3, 4), seed), "y": labels}, do_compression=True)
        files[f"{split}_32x32.mat"] = content.getvalue()
        table[split] = [f"http://127.0.0.1:9/{split}", f"{split}_32x32.mat", md5(content.getvalue())]
    monkeypatch.setattr(tv.SVHN, "split_list", table)
    return files


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


@contextlib.contextmanager
def serving(answers):
    """A web server on this machine with these contents by path; yields its address and the list of paths downloaded."""
    downloaded = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            downloaded.append(self.path)
            self.wfile.write(self.answer())

        def answer(self):
            content = answers.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            return content or b""

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def error_of(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        load_dataset(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_cifar_is_what_torchvision_reads(cifar, tmp_path):
    name, files, _ = cifar
    write(tmp_path, files)
    for split in ("train", "test"):
        expected = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name](tmp_path, train=split == "train")
        image_set = load_dataset(name, tmp_path, split=split)
        assert np.array_equal(image_set.images.permute(0, 2, 3, 1).numpy(), expected.data)
        assert image_set.targets.tolist() == expected.targets and image_set.targets.dtype == torch.int64
        assert image_set.classes == expected.classes and image_set.name == name


def test_mnist_is_what_torchvision_reads_packed_or_not(mnist, tmp_path):
    plain = write(tmp_path / "plain", {path: content for path, content in mnist.items() if not path.endswith(".gz")})
    packed = write(tmp_path / "packed", {path: content for path, content in mnist.items() if path.endswith(".gz")})
    for split in ("train", "test"):
        expected = tv.MNIST(plain, train=split == "train")
        for root in (plain, packed):
            image_set = load_dataset("mnist", root, split=split, download=False)
            assert torch.equal(image_set.images, expected.data[:, None])
            assert torch.equal(image_set.targets, expected.targets) and image_set.classes == expected.classes


def test_svhn_is_what_torchvision_reads(svhn, tmp_path):
    write(tmp_path, svhn)
    for split in ("train", "test", "extra"):
        expected, image_set = tv.SVHN(tmp_path, split), load_dataset("svhn", tmp_path, split=split)
        assert np.array_equal(image_set.images.numpy(), expected.data)
        assert image_set.targets.tolist() == expected.labels.tolist() and image_set.targets[0] == 0
        assert image_set.images.is_contiguous() and len(image_set.classes) == 10
    both = load_dataset("svhn", tmp_path, split="train+extra")
    parts = [load_dataset("svhn", tmp_path, split=split) for split in ("train", "extra")]
    assert torch.equal(both.images, torch.cat([part.images for part in parts]))
    assert torch.equal(both.targets, torch.cat([part.targets for part in parts]))


@pytest.mark.parametrize(("name", "source", "count"), [("cifar10", tv.CIFAR10, 50000), ("mnist", tv.MNIST, 60000)])
def test_real_files(real_data_dir, name, source, count):
    image_set = load_dataset(name, real_data_dir, split="train", download=False)
    expected = source(real_data_dir, train=True)
    pixels = (
        image_set.images.permute(0, 2, 3, 1).squeeze(3).numpy()
        if name == "mnist"
        else image_set.images.permute(0, 2, 3, 1).numpy()
    )
    assert np.array_equal(pixels, np.asarray(expected.data)) and len(image_set) == count
    assert image_set.targets.tolist() == list(map(int, expected.targets)) and image_set.classes == expected.classes


def test_real_files_damaged(real_data_dir, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(real_data_dir / "cifar-10-batches-py", folder)
    with open(folder / "data_batch_3", "r+b") as file:
        file.seek(1_000_000)
        byte = file.read(1)
        file.seek(1_000_000)
        file.write(bytes([byte[0] ^ 1]))
    text = error_of("cifar10", tmp_path, split="train")
    assert str(folder / "data_batch_3") in text and "54ebc095f3ab1f0389bbae665268c751" in text
    assert len(load_dataset("cifar10", tmp_path, split="test")) == 10000, "the test split does not need that file"


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"", lambda content: content[:-1] + bytes([content[-1] ^ 1])],
)
def test_a_damaged_file_is_named_with_both_checksums(cifar, mnist, svhn, tmp_path, damage):
    name, files, _ = cifar
    cases = [(name, files, path) for path in files if "test" not in path]
    cases += [("mnist", mnist, "MNIST/raw/train-labels-idx1-ubyte"), ("svhn", svhn, "train_32x32.mat")]
    for name, files, path in cases:
        root = write(tmp_path / path.replace("/", "-"), files)
        damaged = damage(files[path])
        (root / path).write_bytes(damaged)
        text = error_of(name, root, split="train")
        assert str(root / path) in text and md5(files[path]) in text and md5(damaged) in text
        assert "delete it and run again" in text and "restore it" in text
        assert (root / path).read_bytes() == damaged, "the user's file was touched"


def test_nothing_in_an_altered_file_is_executed(cifar, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    name, files, _ = cifar
    for path in files:
        write(tmp_path, files)
        (tmp_path / path).write_bytes(pickle.dumps(Payload()))
        error_of(name, tmp_path, split="test" if "test" in path else "train")
        assert not (tmp_path / "executed").exists()


def test_a_pickle_that_passes_verification_builds_arrays_only(cifar, tmp_path, monkeypatch):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    name, files, _ = cifar
    write(tmp_path, dict.fromkeys(files, pickle.dumps(Payload())))
    monkeypatch.setattr(datasets, "_verified", lambda root, file: pickle.dumps(Payload()))
    assert "posix.mkdir: refused, nothing in it was executed" in error_of(name, tmp_path, split="train")
    assert not (tmp_path / "executed").exists()


def test_absent_and_not_to_be_downloaded(cifar, mnist, svhn, tmp_path):
    for name in (cifar[0], "mnist", "svhn"):
        text = error_of(name, tmp_path / "new", split="train", download=False)
        assert "not found" in text and "--data-dir" in text and "--embedded-data" in text
    assert not (tmp_path / "new").exists()


def test_a_failed_download_says_what_to_do_and_leaves_nothing(cifar, mnist, svhn, tmp_path, capfd):
    for name in (cifar[0], "mnist", "svhn"):
        text = error_of(name, tmp_path, split="train")
        assert f"cannot download or unpack {name}" in text and str(tmp_path) in text
        assert "--data-dir" in text and "--embedded-data" in text
        assert "refused" in text, "the reason is missing"
    assert all(path.name.endswith(".lock") for path in tmp_path.iterdir())


def test_a_download_with_wrong_content_is_refused(cifar, tmp_path, monkeypatch):
    name, _, archive = cifar
    source = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    with serving({"/archive.tar.gz": archive[:-10]}) as (address, _):
        monkeypatch.setattr(source, "url", f"{address}/archive.tar.gz")
        assert "cannot download" in error_of(name, tmp_path, split="train")
    assert all(path.name.endswith(".lock") for path in tmp_path.iterdir())


def test_several_processes_download_once(cifar, tmp_path, monkeypatch):
    name, files, archive = cifar
    source = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    with serving({"/archive.tar.gz": archive}) as (address, downloaded):
        monkeypatch.setattr(source, "url", f"{address}/archive.tar.gz")
        load_dataset(name, tmp_path / "alone", split="train")
        requests_of_one, root = len(downloaded), tmp_path / "together"
        (root / f".{name}.download").mkdir(parents=True)  # as a killed run leaves it
        (root / f".{name}.download" / source.filename).write_bytes(archive[:100])
        context = multiprocessing.get_context("fork")  # the children keep the small data set in torchvision's tables
        processes = [
            context.Process(target=load_dataset, args=(name, root), kwargs={"split": "train"}, daemon=True)
            for _ in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        assert len(load_dataset(name, root, split="test")) == 6  # came with the same archive
    assert len(downloaded) == 2 * requests_of_one >= 2
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {*files, f".{name}.lock"}


def test_mnist_and_svhn_are_downloaded(mnist, svhn, tmp_path, monkeypatch):
    answers = {f"/{path.rsplit('/', 1)[-1]}": content for path, content in {**mnist, **svhn}.items()}
    with serving(answers) as (address, downloaded):
        monkeypatch.setattr(tv.MNIST, "mirrors", [f"{address}/missing/", f"{address}/"])
        table = {split: [f"{address}/{file}", file, sum_] for split, (_, file, sum_) in tv.SVHN.split_list.items()}
        monkeypatch.setattr(tv.SVHN, "split_list", table)
        assert len(load_dataset("mnist", tmp_path, split="test")) == 3
        assert len(load_dataset("mnist", tmp_path, split="train")) == 7
        write(tmp_path, {"train_32x32.mat": svhn["train_32x32.mat"]})
        assert len(load_dataset("svhn", tmp_path, split="train+extra")) == 8
    assert "/extra_32x32.mat" in downloaded and not {"/train_32x32.mat", "/test_32x32.mat"} & set(downloaded)
    assert sorted({path for path in downloaded if path.startswith("/t") and path in answers}) == sorted(
        f"/{path.rsplit('/', 1)[1]}" for path in mnist if path.endswith(".gz")
    )


def test_an_archive_that_is_there_is_unpacked(cifar, tmp_path):
    name, files, archive = cifar
    source = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    (tmp_path / source.filename).write_bytes(archive)
    assert len(load_dataset(name, tmp_path, split="test", download=False)) == 6
    for path in files:
        (tmp_path / path).unlink()
    (tmp_path / source.filename).write_bytes(archive[:-1])
    text = error_of(name, tmp_path, split="test")
    assert str(tmp_path / source.filename) in text and md5(archive) in text and "delete it" in text


def test_an_incomplete_set_is_completed_without_touching_what_is_there(cifar, tmp_path, monkeypatch):
    name, files, archive = cifar
    source = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[name]
    kept, *lost = [path for path in files if "test" not in path]
    write(tmp_path, {kept: files[kept]})
    before = (tmp_path / kept).stat().st_ino
    with serving({"/archive.tar.gz": archive}) as (address, downloaded):
        monkeypatch.setattr(source, "url", f"{address}/archive.tar.gz")
        (tmp_path / kept).write_bytes(b"damaged")
        assert str(tmp_path / kept) in error_of(name, tmp_path, split="train")
        assert downloaded == [], "a damaged file is reported before the download"
        (tmp_path / kept).write_bytes(files[kept])
        load_dataset(name, tmp_path, split="train")
    assert (tmp_path / kept).stat().st_ino == before and all((tmp_path / path).exists() for path in lost)


def test_a_folder_that_cannot_be_written(cifar, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    text = error_of(cifar[0], tmp_path / "file" / "data", split="train")
    assert "cannot write" in text and "--data-dir" in text and "--embedded-data" in text


def test_a_file_that_cannot_be_read(cifar, tmp_path):
    name, files, _ = cifar
    write(tmp_path, files)
    path = next(path for path in files if "test" in path)
    (tmp_path / path).unlink()
    (tmp_path / path).mkdir()
    assert f"cannot read {tmp_path / path}" in error_of(name, tmp_path, split="test")


def test_a_home_folder_is_expanded(cifar, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "sets", cifar[1])
    assert len(load_dataset(cifar[0], "~/sets", split="test", download=False)) == 6


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="choose from mnist, cifar10, cifar100, svhn"):
        load_dataset("cifar", tmp_path, split="train")
    with pytest.raises(ValueError, match="choose from train, test"):
        load_dataset("cifar10", tmp_path, split="extra")


def test_the_folder_of_the_files_themselves_is_taken(cifar, mnist, tmp_path):
    """Not downloaded into: what is there is found. Another folder beside it is not."""
    name, files, _ = cifar
    write(tmp_path, files)
    write(tmp_path, mnist)
    own = os.path.dirname(next(iter(files)))
    for kind, place in ((name, own), ("mnist", "MNIST/raw"), ("mnist", "MNIST")):
        direct = load_dataset(kind, tmp_path, split="test", download=False)
        found = load_dataset(kind, tmp_path / place, split="test", download=False)
        assert torch.equal(found.images, direct.images) and torch.equal(found.targets, direct.targets)
    (tmp_path / "other").mkdir()
    assert "not found" in error_of("mnist", tmp_path / "other", split="test", download=False)
