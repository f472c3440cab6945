"""augment_batch: torchvision's pixels bit for bit, by either backend, on any thread."""

import logging
import multiprocessing
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common.data import augment, augment_batch, load_dataset, load_digits_set
from common.data.threads import run_chunks

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
BACKENDS = ["torch", "numba"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "numba" and augment._numba_kernel() is None:
        pytest.skip("numba is not installed or switched off")
    return request.param


@pytest.fixture
def numba():
    if augment._numba_kernel() is None:
        pytest.skip("numba is not installed or switched off")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several threads take part also in a small batch."""
    monkeypatch.setattr(augment, "PIXELS_PER_CHUNK", 1 << 12)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def draws(count, pad, seed=0, num_images=None):
    """indices, top, left and flip, the first images with the extreme offsets."""
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(2 * pad + 1, (2, count), generator=generator)
    corners = torch.tensor([[0, 0], [0, 2 * pad], [2 * pad, 0], [2 * pad, 2 * pad]])[:count]
    top[: len(corners)], left[: len(corners)] = corners.T
    indices = torch.randint(num_images or count, (count,), generator=generator)
    return indices, top, left, torch.randint(2, (count,), generator=generator).bool()


def torchvision_batch(images, indices, top, left, flip, pad, mean, std):
    """RandomCrop(size, padding=pad), RandomHorizontalFlip, ToTensor, Normalize on PIL images, with these draws."""
    height, width = images.shape[2:]
    batch = []
    for i, index in enumerate(indices.tolist()):
        array = images[index].permute(1, 2, 0).numpy()
        image = TF.pad(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array), [pad])
        image = TF.crop(image, int(top[i]), int(left[i]), height, width)
        tensor = TF.to_tensor(TF.hflip(image) if flip[i] else image)
        batch.append(tensor if mean is None else TF.normalize(tensor, mean, std))
    return torch.stack(batch)


@pytest.mark.parametrize(
    ("channels", "size", "mean", "std"), [(3, 32, MEAN, STD), (1, 28, (0.1307,), (0.3081,)), (3, 32, None, None)]
)
def test_equals_torchvision_on_digits(backend, channels, size, mean, std):
    images = load_digits_set("train", channels=channels, size=size).images
    draw = draws(200, 4, num_images=len(images))
    batch = augment_batch(images, *draw, pad=4, mean=mean, std=std, backend=backend)
    assert torch.equal(batch, torchvision_batch(images, *draw, 4, mean, std))


def test_equals_torchvision_on_real_cifar10(backend, real_data_dir):
    images = load_dataset("cifar10", real_data_dir, split="train", download=False).images
    draw = draws(1000, 4, seed=1, num_images=len(images))
    batch = augment_batch(images, *draw, pad=4, mean=MEAN, std=STD, backend=backend)
    assert torch.equal(batch, torchvision_batch(images, *draw, 4, MEAN, STD))


def test_every_byte_of_every_constant_equals_torchvision(backend):
    """All 256 values, for the constants of all papers: a table or a reordered formula would differ in some last bit."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    for mean, std in [
        (MEAN, STD),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
        ((0.1307,) * 3, (0.3081,) * 3),
        ((0, 0.5, 1), (1, 0.5, 2)),
    ]:
        expected = TF.normalize(TF.to_tensor(Image.fromarray(images[0].permute(1, 2, 0).numpy())), mean, std)
        assert torch.equal(augment_batch(images, torch.tensor([0]), mean=mean, std=std, backend=backend)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "pad"), [((3, 9, 14), 4), ((1, 7, 5), 0), ((2, 3, 4), 6)])  # 6: wider than the image
def test_backends_agree_bit_for_bit(numba, dtype, channels_last, shape, pad):
    images = torch.randint(256, (50, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = (0.1, 0.2, 0.3)[: shape[0]], (0.3, 0.2, 0.1)[: shape[0]]
    pixel_mean = torch.rand(shape, generator=torch.Generator().manual_seed(4)) * 255
    indices, top, left, flip = draws(40, pad, num_images=50)
    for crop in [(top, left, flip), (top, left, None), (None, None, flip), (None, None, None)]:
        for pixels in [{"mean": mean, "std": std}, {"pixel_mean": pixel_mean}, {}]:
            fixed = {"pad": pad, "dtype": dtype, "channels_last": channels_last, **pixels}
            by_torch, by_numba = (augment_batch(images, indices, *crop, **fixed, backend=name) for name in BACKENDS)
            assert torch.equal(by_torch, by_numba)
            assert by_torch.dtype == by_numba.dtype == dtype
            memory = torch.channels_last if channels_last else torch.contiguous_format
            assert by_torch.is_contiguous(memory_format=memory) and by_numba.is_contiguous(memory_format=memory)


def test_pixel_mean_is_subtracted_after_the_crop(backend):
    images = torch.full((1, 1, 4, 4), 200, dtype=torch.uint8)
    pixel_mean = torch.arange(16.0).view(1, 4, 4) + 0.25
    zero = torch.tensor([0])
    batch = augment_batch(images, zero, zero, zero, pad=1, pixel_mean=pixel_mean, backend=backend)
    expected = torch.full((4, 4), 200.0)
    expected[0, :] = expected[:, 0] = 0  # the black border that this crop shows: it becomes -mean
    assert torch.equal(batch[0, 0], expected - pixel_mean[0])


def test_large_batches_are_split_over_threads_and_empty_ones_work(backend, small_chunks):
    images = torch.randint(256, (300, 3, 32, 32), dtype=torch.uint8)
    draw = draws(300, 4)
    whole = augment_batch(images, *draw, pad=4, mean=MEAN, std=STD, backend=backend)
    single = [
        augment_batch(images, *(d[i : i + 1] for d in draw), pad=4, mean=MEAN, std=STD, backend=backend)
        for i in range(300)
    ]
    assert torch.equal(whole, torch.cat(single))
    assert augment_batch(images, torch.empty(0, dtype=torch.int64), backend=backend).shape == (0, 3, 32, 32)


def test_several_threads_at_once(backend, small_chunks):
    images = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8)
    draw = draws(500, 4)
    expected = augment_batch(images, *draw, pad=4, backend=backend)
    equal = []
    threads = [
        threading.Thread(
            target=lambda: equal.append(torch.equal(augment_batch(images, *draw, pad=4, backend=backend), expected))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 4


def test_after_a_fork(numba, small_chunks):
    images = torch.randint(256, (500, 3, 32, 32), dtype=torch.uint8)
    draw = draws(500, 4)
    expected = augment_batch(images, *draw, pad=4)  # starts the threads that the child will not have

    def check():  # compared by numpy: PyTorch's own threads do not come back after a fork
        sys.exit(0 if np.array_equal(augment_batch(images, *draw, pad=4).numpy(), expected.numpy()) else 3)

    child = multiprocessing.get_context("fork").Process(target=check, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_run_chunks_covers_the_range_once_and_passes_errors_on(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for size, smallest in [(0, 1), (1, 10), (7, 2), (100, 1), (100, 49)]:
            parts = []
            run_chunks(lambda start, stop, parts=parts: parts.append((start, stop)), size, smallest)
            assert sorted(i for start, stop in parts for i in range(start, stop)) == list(range(size))
            assert len(parts) == max(1, min(threads, size // smallest))
        for failing in range(threads):

            def fail(start, stop, first=100 * failing // threads):
                if start == first:
                    raise KeyError("from a part")

            with pytest.raises(KeyError, match="from a part"):
                run_chunks(fail, 100, 1)
    finally:
        torch.set_num_threads(before)


def test_without_numba_pytorch_takes_over_and_says_so_once(monkeypatch, caplog):
    images = load_digits_set("test").images
    draw = draws(100, 4)
    expected = augment_batch(images, *draw, pad=4)
    monkeypatch.setitem(sys.modules, "numba", None)
    augment._numba_kernel.cache_clear()
    caplog.clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert torch.equal(augment_batch(images, *draw, pad=4), expected)
        assert [record.message for record in caplog.records if "numba" in record.message] == caplog.messages
        assert len(caplog.messages) == 1
    finally:
        augment._numba_kernel.cache_clear()


def test_arguments_that_do_not_fit_are_refused(backend):
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    indices, offset = torch.tensor([0, 4]), torch.tensor([0, 8])
    for error, text, changes in [
        (IndexError, r"index out of range: 0\.\.5, allowed 0\.\.4", {"indices": torch.tensor([0, 5])}),
        (IndexError, "index out of range", {"indices": torch.tensor([-1, 0])}),
        (IndexError, "top out of range", {"top": torch.tensor([0, 9]), "left": offset}),
        (IndexError, "left out of range", {"top": offset, "left": torch.tensor([-1, 0])}),
        (ValueError, "one value for each index", {"flip": torch.tensor([True])}),
        (ValueError, "both top and left", {"top": offset}),
        (ValueError, "mean and std", {"mean": MEAN}),
        (ValueError, "mean and std", {"mean": MEAN, "std": STD, "pixel_mean": torch.zeros(3, 8, 8)}),
        (ValueError, "each of 3 channels", {"mean": (0.5,), "std": (0.5,)}),
        (ValueError, "std not zero", {"mean": MEAN, "std": (1.0, 0.0, 1.0)}),
        (ValueError, "pixel_mean must be", {"pixel_mean": torch.zeros(3, 8, 9)}),
        (ValueError, "uint8", {"images": images.float()}),
    ]:
        arguments = {"images": images, "indices": indices, "pad": 4, "backend": backend, **changes}
        with pytest.raises(error, match=text):
            augment_batch(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_equals_cpu_without_waiting_for_the_device(dtype):
    images = torch.randint(256, (200, 3, 32, 32), dtype=torch.uint8)
    draw = draws(100, 4, num_images=200)
    expected = augment_batch(images, *draw, pad=4, mean=MEAN, std=STD, dtype=dtype)
    on_gpu = [tensor.cuda() for tensor in (images, *draw)]
    fixed = {"pad": 4, "mean": MEAN, "std": STD, "dtype": dtype}
    augment_batch(*on_gpu, **fixed)  # constants are copied to the device once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = augment_batch(*on_gpu, **fixed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.cpu(), expected)
