"""CUDA kernels of shift_conv1x1: which of shift_conv1x1.cu, on how many threads. CuPy is imported on first use."""

import functools

import numpy as np
import torch

from common.kernels import launch
from common.kernels.shift2d import memory_format_of

PIXELS = 256  # outputs of a block, and its threads
SLOTS = 400  # inputs that a block can stage for them, those around included (channels-last)
RUN = 16  # bytes
WIDEST = 32  # columns of a tile: in wider ones so few rows fit that those around them are a larger share
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _parts(size, most):
    """Length of the equal parts, at most `most`, that `size` is cut into."""
    return -(-size // -(-size // most))


def tile_of(batch, out_height, out_width, stride, around):
    """(images, rows, columns) of output of a block, or None if not even one fits.

    around: how far the shift reaches in rows and columns. An output takes a thread, an input there a slot.
    """
    columns = _parts(out_width, WIDEST)
    rows = _parts(out_height, max(1, PIXELS // columns))
    images = min(batch, PIXELS // (rows * columns)) if (rows, columns) == (out_height, out_width) else 1
    while True:
        staged = [(size - 1) * stride + 1 + 2 * more for size, more in zip((rows, columns), around, strict=True)]
        if images * staged[0] * staged[1] <= SLOTS:
            return images, rows, columns
        if images > 1:
            images -= 1
        elif rows > 1:
            rows = _parts(out_height, rows - 1)
        elif columns > 1:
            columns = _parts(out_width, columns - 1)
        else:
            return None


def plan(x_shape, outputs, kind, item, stride, kernel_size, dilation, channels_last):
    """(kernel name, grid, block, int arguments from batch on) for x (N, C, H, W); None where no kernel takes the sizes.

    kind: bf16, fp16, tf32 or fp32, with `item` bytes per element.
    """
    batch, channels, height, width = x_shape
    out_height, out_width = -(-height // stride), -(-width // stride)
    image, pixels = channels * height * width, batch * out_height * out_width
    small = max(image, batch * height * width, pixels + PIXELS, kernel_size * max(height, width)) < 2**31
    if not small or kernel_size**2 >= 2**31 or channels * item % RUN or stride >= 2**15:
        return None
    steps = min(dilation, height), min(dilation, width)
    tile, blocks = (1, 1, 1), -(-pixels // PIXELS)
    if channels_last:
        tile = tile_of(batch, out_height, out_width, stride, [step * (kernel_size // 2) for step in steps])
        if tile is None:
            return None
        blocks = -(-batch // tile[0]) * -(-out_height // tile[1]) * -(-out_width // tile[2])
    most = next((size for size in (16, 32) if outputs <= size), 64)
    grid = (blocks, -(-outputs // most), 1)
    if blocks >= 2**31 or grid[1] >= 2**16:
        return None
    sizes = (*x_shape, outputs, out_height, out_width, stride, kernel_size, *steps, *tile)
    return f"shift_conv1x1_{kind}_{'rows' if channels_last else 'planes'}_{most}", grid, (PIXELS, 1, 1), sizes


@functools.lru_cache(maxsize=1024)
def _ready(*call):
    """`plan`, as launch takes it."""
    chosen = plan(*call)
    return chosen and (*chosen[:3], tuple(map(np.int32, chosen[3])))


def load():
    """Raises ImportError, or what CuPy raises, where kernels cannot be compiled and launched here."""
    launch.load("shift_conv1x1", "shift_conv1x1_fp32_planes_16", torch.cuda.current_device())


@functools.cache
def _has_tensor_cores(device):
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _kind(dtype, device):
    """Name of the kernels' arithmetic for a dtype, or None. TF32 where PyTorch lets cuDNN's convolutions use it."""
    name, has_cores = NAMES.get(dtype), _has_tensor_cores(device)
    if name == "fp32":
        return "tf32" if has_cores and tf32_is_allowed() else name
    return name if has_cores else None


def tf32_is_allowed():
    """Whether PyTorch's settings let a float32 convolution round its factors to TF32 (its default)."""
    settings = torch.backends.cudnn
    precision = getattr(getattr(settings, "conv", None), "fp32_precision", "none")  # torch 2.9 and newer
    return settings.allow_tf32 if precision == "none" else precision == "tf32"


def shift_conv1x1_cuda(x, weight, bias, y, stride, kernel_size, dilation):
    """Write conv2d(shift2d(x, kernel_size, dilation), weight, bias, stride) into y, all on one CUDA device, not empty.

    x: (N, C, H, W), y: (N, out, ceil(H / stride), ceil(W / stride)), dense in one layout; weight: (out, C, 1, 1), bias:
    (out,) or None; one dtype. Returns False, and does nothing, unless that is float32, bfloat16 or float16 (these on
    compute capability 8.0 or newer), C a multiple of 16 bytes, and, channels-last, the shift's reach within a tile.
    """
    kind, channels_last = _kind(x.dtype, x.device), memory_format_of(x) is torch.channels_last
    weight = weight.contiguous()
    if kind is None or (weight.data_ptr() | (x.data_ptr() if channels_last else 0)) % RUN:
        return False
    chosen = _ready(x.shape, len(weight), kind, x.element_size(), stride, kernel_size, dilation, channels_last)
    if chosen is None:
        return False
    name, grid, block, sizes = chosen
    has_bias = np.int32(bias is not None)
    bias = weight if bias is None else bias.contiguous()
    launch.launch("shift_conv1x1", name, grid, block, x, weight, bias, y, has_bias, *sizes)
    return True
