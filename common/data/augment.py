"""Gather, crop, flip and normalise a batch of a data set in memory, equal to torchvision's transforms bit for bit.

Two implementations of one function: vectorised PyTorch for any device, and on the CPU, where numba is installed, one
pass that reads each pixel once and looks its value up in a table of the 256 values that a byte can become.
"""

import functools
import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.data.threads import run_chunks

_log = logging.getLogger(__name__)
PIXELS_PER_CHUNK = 1 << 20  # about a millisecond: a second thread, which PyTorch may keep busy, costs more for less


def augment_batch(
    images: Tensor,
    indices: Tensor,
    top: Tensor | None = None,
    left: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    pad: int = 0,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    pixel_mean: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The images at `indices`, zero-padded by `pad`, cropped to their own size at (top, left), flipped, normalised.

    images: uint8 (N, C, H, W), the whole set. indices: int64 (B,). top, left: int64 (B,) in [0, 2 * pad], None: centre.
    flip: bool (B,), left to right, None: no flip. All on one device. Returns `dtype` (B, C, H, W) on that device.
    mean, std: C floats on the scale 0..1: ToTensor, then Normalize; None: ToTensor only (values / 255).
    pixel_mean: float32 (C, H, W) subtracted from values 0..255 instead. Padding is black, before either.
    backend: "numba" or "torch"; None: the faster one that is there. Both give the same bits.
    Raises ValueError for arguments that do not fit each other, IndexError (on the CPU) for an index or offset out of
    range.
    """
    _check_arguments(images, indices, (top, left, flip), mean, std, pixel_mean)
    if images.device.type == "cpu":  # elsewhere reading the values would wait for the device
        _check_ranges(len(images), indices, top, left, pad)
    if backend is None:
        backend = "numba" if images.device.type == "cpu" and _numba_kernel() is not None else "torch"
    fill = {"numba": _augment_numba, "torch": _augment_torch}[backend]
    crop = (top, left, flip, pad)
    if pixel_mean is None:
        return fill(images, indices, *crop, mean and tuple(mean), std and tuple(std), 255.0, dtype, channels_last)
    batch = fill(images, indices, *crop, None, None, 1.0, torch.float32, channels_last)
    return batch.sub_(pixel_mean).to(dtype)


def _check_arguments(images, indices, draws, mean, std, pixel_mean):
    channels = images.shape[1]
    if images.dtype != torch.uint8 or not images[:1].numel():
        raise ValueError(f"images must be uint8 (N, C, H, W) and not empty: {images.dtype} {tuple(images.shape)}")
    if any(draw is not None and draw.shape != indices.shape for draw in draws):
        raise ValueError("top, left and flip need one value for each index")
    if (draws[0] is None) != (draws[1] is None):
        raise ValueError("give both top and left, or neither")
    if (mean is None) != (std is None) or (mean is not None and pixel_mean is not None):
        raise ValueError("give mean and std, or pixel_mean, or none of them")
    if mean is not None and not (len(mean) == len(std) == channels and all(std)):
        raise ValueError(f"mean and std need one value for each of {channels} channels, std not zero: {mean}, {std}")
    if pixel_mean is not None and pixel_mean.shape != images.shape[1:]:
        raise ValueError(f"pixel_mean must be {tuple(images.shape[1:])}, not {tuple(pixel_mean.shape)}")


def _check_ranges(num_images, indices, top, left, pad):
    for name, values, stop in (("index", indices, num_images), ("top", top, 2 * pad + 1), ("left", left, 2 * pad + 1)):
        if values is not None and len(values):
            low, high = (int(value) for value in values.aminmax())
            if low < 0 or high >= stop:
                raise IndexError(f"{name} out of range: {low}..{high}, allowed 0..{stop - 1}")


@functools.lru_cache(maxsize=32)
def _constants(mean, std, scale, device):
    """Tensors on the device: copying them at every batch would wait for it.

    The divisor is a tensor too, because CUDA multiplies by the reciprocal of a Python number, which rounds differently.
    """
    if mean is not None:
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std))
    return torch.tensor(scale, dtype=torch.float32, device=device), mean, std


def _normalise(batch, mean, std, scale, dtype):
    scale, mean, std = _constants(mean, std, scale, batch.device)
    batch = batch.to(torch.float32).div_(scale)
    return (batch if mean is None else batch.sub_(mean).div_(std)).to(dtype)


def _augment_torch(images, indices, top, left, flip, pad, mean, std, scale, dtype, channels_last):
    batch = images.index_select(0, indices)  # several times faster than images[indices] for uint8
    if top is not None:
        batch = _crop_flip_torch(batch, top, left, flip, pad)
    elif flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
    if channels_last:
        batch = batch.contiguous(memory_format=torch.channels_last)  # while a pixel is one byte
    return _normalise(batch, mean, std, scale, dtype)


def _crop_flip_torch(batch, top, left, flip, pad):
    size, channels, height, width = batch.shape
    columns = torch.arange(width, device=batch.device).expand(size, width)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    rows = top[:, None] + torch.arange(height, device=batch.device)
    source = rows[:, :, None] * (width + 2 * pad) + (columns + left[:, None])[:, None]  # (B, H, W), into the padded
    padded = F.pad(batch, (pad, pad, pad, pad)).flatten(2)
    return padded.gather(2, source.view(size, 1, -1).expand(-1, channels, -1)).view(size, channels, height, width)


@functools.lru_cache(maxsize=32)
def _byte_table(channels, mean, std, scale, dtype):
    """(C, 256): what each byte becomes, as the bits of `dtype` (numba knows neither bfloat16 nor storing float16)."""
    every_byte = torch.arange(256, dtype=torch.uint8).expand(1, channels, 256)[..., None]
    return _bits(_normalise(every_byte, mean, std, scale, dtype)[0, :, :, 0].contiguous())


def _bits(tensor):
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).numpy()


def _augment_numba(images, indices, top, left, flip, pad, mean, std, scale, dtype, channels_last):
    size, (_, channels, height, width) = len(indices), images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    batch = torch.empty((size, channels, height, width), dtype=dtype, memory_format=layout)
    centre = torch.full((size,), pad) if top is None else None
    arrays = (
        images.numpy(),
        indices.numpy(),
        (top if centre is None else centre).numpy(),
        (left if centre is None else centre).numpy(),
        (torch.zeros(size, dtype=torch.bool) if flip is None else flip).numpy(),
        pad,
        _byte_table(channels, mean, std, scale, dtype),
        _bits(batch),
    )
    kernel = _numba_kernel()
    smallest = -(-PIXELS_PER_CHUNK // (channels * height * width))
    run_chunks(lambda start, stop: kernel(*arrays, start, stop), size, smallest)
    return batch


def _crop_flip_lookup(images, indices, top, left, flip, pad, table, batch, start, stop):
    """Images [start, stop) of the batch. Compiled by numba; table and batch hold the same type, whatever it stands for.

    The innermost index is unsigned: a signed one costs a test for Python's negative indices at every pixel (about 2x).
    """
    _, channels, height, width = images.shape
    for b in range(start, stop):
        image = images[indices[b]]
        down, right = top[b] - pad, left[b] - pad
        first = min(width, max(0, -right))  # columns [first, last), before the flip, come from inside the image
        last = max(first, min(width, width - right))
        count, one = np.uintp(last - first), np.uintp(1)
        for c in range(channels):
            values, black = table[c], table[c, 0]
            for y in range(height):
                target = batch[b, c, y]
                if not 0 <= y + down < height:
                    target[:] = black
                    continue
                source = image[c, y + down, first + right : last + right]
                if flip[b]:
                    target[: width - last], target[width - first :] = black, black
                    inside = target[width - last : width - first]
                    for x in range(count):
                        inside[count - one - x] = values[source[x]]
                else:
                    target[:first], target[last:] = black, black
                    inside = target[first:last]
                    for x in range(count):
                        inside[x] = values[source[x]]


@functools.cache
def _numba_kernel():
    """The compiled pass, or None, said once, where numba is not installed or switched off."""
    try:
        import numba

        if numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
    except ImportError as error:
        _log.warning("without numba (%s) augmentation uses PyTorch, about three times slower", error)
        return None
    try:
        return numba.njit(cache=True, nogil=True)(_crop_flip_lookup)
    except RuntimeError:  # no folder that numba may write its cache to
        return numba.njit(nogil=True)(_crop_flip_lookup)
