"""shift_conv1x1.cu without a GPU: run on the host under the sanitizers, on numbers whose sums are exact in any order.

(test_kernel_sources.py compiles it for every architecture.)
"""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.kernels import shift2d_reference, shift_conv1x1_cuda
from tests.host.gxx import HostKernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
BITS = {2: torch.int16, 4: torch.int32}
# (batch, channels in runs of 16 bytes, height, width), stride, kernel_size, dilation: a part of a tile, several images
# in one, several tiles in each direction, and shifts beyond the image. Thread blocks are slow here, so few.
SHAPES = [
    ((1, 5, 3, 7), 1, 3, 1),
    ((5, 2, 8, 8), 1, 3, 1),
    ((1, 3, 9, 40), 1, 3, 2),
    ((2, 7, 7, 5), 2, 2, 1),
    ((1, 1, 4, 33), 3, 1, 1),
    ((1, 7, 2, 3), 1, 5, 40),
]
OUTPUTS = {16: (16, 5), 32: (20, 32), 64: (64, 70)}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostKernels(
        "shift_conv1x1", tmp_path_factory.mktemp("host"), ["-O0"]
    )  # there is more to compile than to run


def bits(tensor, axes):
    return tensor.permute(axes).contiguous().view(BITS[tensor.element_size()]).numpy()


def host_case(generator, kind, channels_last, outputs, case):
    """(launch on the host, expected bits) of one call."""
    (batch, runs, height, width), stride, kernel_size, dilation = case
    item = DTYPES[kind].itemsize
    shape = (batch, runs * 16 // item, height, width)
    name, grid, block, sizes = shift_conv1x1_cuda.plan(
        shape, outputs, kind, item, stride, kernel_size, dilation, channels_last
    )
    draw = torch.Generator().manual_seed(generator.randrange(2**30))
    x, weight, bias = (torch.randint(-5, 6, size, generator=draw).to(DTYPES[kind])
                       for size in (shape, (outputs, shape[1], 1, 1), (outputs,)))  # fmt: skip
    has_bias = generator.random() < 0.5
    exact = F.conv2d(shift2d_reference(x, kernel_size, dilation).double(), weight.double(),
                     bias.double() if has_bias else None, stride)  # fmt: skip
    axes = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    expected = bits(exact.float().to(DTYPES[kind]), axes)
    arrays = [(bits(x, axes), 0), (bits(weight, (0, 1, 2, 3)), 0), bits(bias, (0,)), np.full_like(expected, 77)]
    return (name, grid, block, [*arrays, np.int32(has_bias), *map(np.int32, sizes)]), expected


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", DTYPES)
def test_runs_on_the_host(host, kind, channels_last):
    """Bit-equal to the definition, in bounds, aligned, no undefined behaviour; every kernel is reached."""
    generator, cases = random.Random(0), []
    for number, case in enumerate(SHAPES):
        for size in OUTPUTS if number == 1 else [generator.choice(list(OUTPUTS))]:
            cases.append(host_case(generator, kind, channels_last, OUTPUTS[size][number % 2], case))
    for (launched, expected), arrays in zip(cases, host.run([launched for launched, _ in cases]), strict=True):
        assert np.array_equal(arrays[-1], expected), (launched[:3], [int(size) for size in launched[3][4:]])
    prefix = f"shift_conv1x1_{kind}_{'rows' if channels_last else 'planes'}_"
    assert {launched[0] for launched, _ in cases} == {name for name in host.names if name.startswith(prefix)}


def test_every_kernel_is_planned(host):
    names = {f"shift_conv1x1_{kind}_{layout}_{size}" for kind, layout, size in
             itertools.product(DTYPES, ("planes", "rows"), OUTPUTS)}  # fmt: skip
    assert names == set(host.names)


def test_host_run_detects_faults(host):
    """A wrong size must end the host program: otherwise the runs above prove nothing."""
    (name, grid, block, arguments), _ = host_case(random.Random(1), "bf16", True, 16, SHAPES[1])
    short = arguments[0][0].ravel()[:-8].copy()
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        host.run([(name, grid, block, [(short, 0), *arguments[1:]])])


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_tiles_fit_and_cover(stride):
    for height, width in ((8, 8), (32, 32), (7, 7), (56, 57), (224, 224), (1, 1000), (1000, 1)):
        for around in ((1, 1), (2, 2), (0, 5)):
            tile = shift_conv1x1_cuda.tile_of(64, height, width, stride, around)
            images, rows, columns = tile
            staged = ((rows - 1) * stride + 1 + 2 * around[0]) * ((columns - 1) * stride + 1 + 2 * around[1])
            assert min(tile) >= 1 and images * rows * columns <= 256 and images * staged <= shift_conv1x1_cuda.SLOTS
            assert images == 1 or (rows, columns) == (height, width)
    assert shift_conv1x1_cuda.tile_of(1, 9, 9, 1, (20, 20)) is None


def test_plan_refuses_what_the_kernels_cannot_take():
    def plan(shape, outputs=16, item=2, stride=1, kernel_size=3, dilation=1, channels_last=True):
        return shift_conv1x1_cuda.plan(shape, outputs, "bf16", item, stride, kernel_size, dilation, channels_last)

    assert plan((1, 8, 4, 4)) and plan((1024, 576, 8, 8), 64) and plan((128, 144, 32, 32), channels_last=False)
    assert plan((1, 12, 4, 4)) is None, "a pixel is not a multiple of 16 bytes"
    assert plan((2**20, 8, 64, 64)) is None, "2**31 pixels or more"
    assert plan((1, 2**25, 8, 8), channels_last=False) is None, "2**31 elements in an image"
    assert plan((1, 8, 4, 4), outputs=2**23) is None, "2**16 blocks of outputs or more"


def test_rounding_to_tf32_follows_the_settings(monkeypatch):
    monkeypatch.setattr(shift_conv1x1_cuda, "_has_tensor_cores", lambda device: True)
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed, kind in ((True, "tf32"), (False, "fp32")):
            torch.backends.cudnn.allow_tf32 = allowed
            assert shift_conv1x1_cuda._kind(torch.float32, 0) == kind
            assert shift_conv1x1_cuda._kind(torch.bfloat16, 0) == "bf16"
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert shift_conv1x1_cuda._kind(torch.float64, 0) is None
    monkeypatch.setattr(shift_conv1x1_cuda, "_has_tensor_cores", lambda device: False)
    assert [shift_conv1x1_cuda._kind(dtype, 0) for dtype in (torch.float32, torch.float16)] == ["fp32", None]
