"""The CUDA sources without a GPU: compiled by NVRTC for every architecture, run on the host under the sanitizers."""

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.kernels import launch, shift2d_cuda, shift2d_reference
from tests.host import nvrtc
from tests.host.gxx import HostKernels

STEMS = sorted(path.stem for path in Path(launch.__file__).parent.glob("*.cu"))
OTHERS = ("75", "90a", "100")  # the oldest, and what a change for one may break on the next; ten seconds or more each
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.mark.parametrize("architecture", ["80", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("stem", STEMS)
def test_compiles_for_every_architecture(stem, architecture):
    if int(architecture.rstrip("a")) not in nvrtc.supported_architectures():
        pytest.skip(f"this NVRTC does not know sm_{architecture}: {nvrtc.supported_architectures()}")
    options = [*launch.OPTIONS, f"--gpu-architecture=sm_{architecture}"]
    succeeded, log, _ = nvrtc.compile_source(launch.source(stem), f"{stem}.cu", options)
    assert succeeded and not log.strip("\0\n "), log


def test_nvrtc_reports_errors():
    succeeded, log, _ = nvrtc.compile_source("int main( {", "broken.cu", launch.OPTIONS)
    assert not succeeded and "broken.cu(1)" in log


@pytest.mark.parametrize("stem", STEMS)
def test_source_includes_nothing(stem):
    assert not re.search(r"^\s*#\s*include", launch.source(stem), flags=re.M)


def test_wide_accesses():
    """Rows of 16-byte chunks move in 16-byte loads and stores; inside the loops nothing is divided."""
    options = [*launch.OPTIONS, "--gpu-architecture=compute_80"]
    _, _, ptx = nvrtc.compile_source(launch.source("shift2d"), "shift2d.cu", options)
    kernel = re.search(r"\.entry shift2d_planes_16\(.*?^}", ptx, flags=re.S | re.M).group()
    assert re.search(r"ld\.global(\.nc)?\.v2\.[ub]64", kernel) and re.search(r"st\.global\.v2\.[ub]64", kernel)
    loads = [match.start() for match in re.finditer(r"ld\.global", kernel)]
    assert not [match.start() for match in re.finditer(r"\b(div|rem)\.", kernel) if match.start() > loads[0]]


@pytest.fixture(scope="module")
def host_shift2d(tmp_path_factory):
    return HostKernels("shift2d", tmp_path_factory.mktemp("host"))


def _random_case(generator):
    kernel_size = generator.choice((1, 2, 3, 3, 3, 4, 5))
    channels = max(kernel_size**2, generator.choice((4, 10, 18, 40, 48, 67)))
    height, width = generator.choice((1, 2, 7, 13)), generator.choice((1, 3, 4, 8, 14, 16, 32))
    dilation, direction = generator.choice((1, 1, 2, 5, 40)), generator.choice((1, -1))
    return (generator.choice((1, 2, 3)), channels, height, width), kernel_size, dilation, direction


def _host_case(generator, most_blocks=None):
    """(launch on the host, expected bytes) of one random call."""
    shape, *move = _random_case(generator)
    item, channels_last = generator.choice((1, 2, 4, 8)), generator.choice((False, True))
    offset = generator.choice((0, 0, 8, 4, 2, 1)) // item * item  # tensors are aligned to their elements
    x = torch.arange(np.prod(shape)).mul(37).remainder(251).sub(125).view(shape).to(INTEGERS[item])
    axes = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    dense = x.permute(axes).contiguous().numpy()
    expected = shift2d_reference(x, *move).permute(axes).contiguous().numpy()
    name, grid, block, sizes = shift2d_cuda.plan(shape, item, offset | 16, *move, channels_last)
    if most_blocks:  # as for a tensor too large for one block per tile
        grid = tuple(min(n, most_blocks) for n in grid)
    poison = np.full_like(dense, 77)
    return (name, grid, block, [(dense, offset), (poison, offset), *map(np.int32, sizes)]), expected


@pytest.mark.parametrize("most_blocks", [None, 1, 2])
def test_shift2d_runs_on_the_host(host_shift2d, most_blocks):
    """Bit-equal to the reference, in bounds, aligned, no undefined behaviour, for any grid; every kernel is reached."""
    generator = random.Random(0)
    cases = [_host_case(generator, most_blocks) for _ in range(400)]
    results = host_shift2d.run([launched for launched, _ in cases])
    for (launched, expected), (_, y) in zip(cases, results, strict=True):
        assert np.array_equal(y, expected), launched[:3]
    assert {launched[0] for launched, _ in cases} == set(host_shift2d.names)


def test_host_run_detects_faults(host_shift2d):
    """A wrong size must end the host program: otherwise the run above proves nothing."""
    x = np.zeros((1, 9, 4, 4), np.int32)
    name, grid, block, sizes = shift2d_cuda.plan(x.shape, 4, 16, 3, 1, 1, False)
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        host_shift2d.run([(name, grid, block, [x, x[:, :8].copy(), *map(np.int32, sizes)])])
    with pytest.raises(AssertionError, match="misaligned"):
        host_shift2d.run([(name, grid, block, [(x, 4), (x, 4), *map(np.int32, sizes)])])


def test_plan_covers_large_tensors():
    """Sizes with 32-bit indices beyond the grid's limits, and the refusal of larger ones."""
    _, grid, block, sizes = shift2d_cuda.plan((200000, 16, 8, 8), 2, 16, 3, 1, 1, False)
    assert grid[2] == 65535 and np.prod(block) <= 256 and max(sizes) < 2**31
    _, grid, block, _ = shift2d_cuda.plan((1, 9, 10**6, 3), 4, 16, 3, 1, -1, True)
    assert grid[1] == 65535 and np.prod(block) <= 256
    assert shift2d_cuda.plan((1, 9, 2**30, 1), 1, 16, 3, 1, 1, False) is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks_are_well_formed(channels_last):
    for channels in (9, 16, 144, 1000):
        for height, width in ((1, 1), (7, 7), (32, 32), (56, 56), (224, 224)):
            for item in (1, 2, 4, 8):
                plan = shift2d_cuda.plan((2, channels, height, width), item, 16, 3, 1, 1, channels_last)
                _, _, (x, y, z), _ = plan
                assert 1 <= x * y * z <= shift2d_cuda.THREADS and z <= 64 and (x & (x - 1) == 0 or x % 32 == 0)


def test_launch_refuses_what_is_not_on_a_device():
    for arguments, error in (((torch.zeros(3), np.int32(1)), ValueError), ((np.int32(1),), TypeError), ((), TypeError)):
        with pytest.raises(error, match="^launch: .*CUDA"):
            launch.launch("shift2d", "shift2d_planes_4", (1, 1, 1), (1, 1, 1), *arguments)
