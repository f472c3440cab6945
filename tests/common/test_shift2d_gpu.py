"""shift2d on a CUDA device: values, streams, CUDA graphs, several devices."""

import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.kernels import launch, shift2d, shift2d_cuda, shift2d_reference
from tests.common.test_shift2d import LAYOUTS, random_case, same_bits

pytestmark = pytest.mark.gpu
module = importlib.import_module("common.kernels.shift2d")


@pytest.fixture(autouse=True)
def cupy():
    if module._cuda_kernel() is None:
        pytest.skip("CuPy is not installed, or cannot compile here")


@pytest.mark.parametrize("seed", range(4))
def test_equals_reference(seed):
    """1,000 random cases, forward and backward, bit by bit."""
    generator = random.Random(seed)
    for _ in range(250):
        x, kernel_size, dilation = random_case(generator)
        x = x.cuda()
        for direction in (1, -1):
            y = torch.ops.effnets.shift2d(x, kernel_size, dilation, direction)
            expected = shift2d_reference(x, kernel_size, dilation, direction)
            assert same_bits(y, expected), (x.shape, x.stride(), x.dtype, kernel_size, dilation, direction)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name):
    x = LAYOUTS[name](torch.randn(3, 20, 6, 7, device="cuda"))
    y = shift2d(x)
    fake = shift2d(torch.empty_strided(x.shape, x.stride(), device="meta"))
    assert torch.equal(y, shift2d_reference(x)) and y.stride() == fake.stride()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
def test_every_kernel(dtype):
    """All of shift2d.cu, by images whose rows, and pixels, are multiples of 16, 8, ... bytes, or are not."""
    item, reached = dtype.itemsize, set()
    shapes = [(3, 144, 32, 32), (2, 144, 9, 12), (2, 144, 56, 4), (1, 145, 33, 2), (2, 145, 8, 7), (300, 32, 8, 8)]
    for shape in shapes:
        for channels_last in (False, True):
            layout = torch.channels_last if channels_last else torch.contiguous_format
            x = torch.randint(-100, 100, shape, device="cuda").to(dtype).contiguous(memory_format=layout)
            for dilation, direction in ((1, 1), (1, -1), (2, 1), (50, 1)):
                reached.add(shift2d_cuda.plan(shape, item, 16, 3, dilation, direction, channels_last)[0])
                y = torch.ops.effnets.shift2d(x, 3, dilation, direction)
                assert torch.equal(y, shift2d_reference(x, 3, dilation, direction)), (
                    shape,
                    layout,
                    dilation,
                    direction,
                )
    planes = {f"shift2d_planes_{size}" for size in (1, 2, 4, 8, 16) if size >= item}
    assert reached == {*planes, f"shift2d_rows_{item}", f"shift2d_runs_{item}"}


def test_few_compilations(tmp_path):
    """50 shapes, both layouts: at most 8 compiled files, and none in a second process."""
    code = (
        "import torch; from common.kernels import shift2d, shift_conv1x1\n"
        "for size in range(1, 51):\n"
        "    for layout in (torch.contiguous_format, torch.channels_last):\n"
        "        x = torch.randn(2, 8 * size, size, 60 - size, device='cuda').contiguous(memory_format=layout)\n"
        "        shift2d(x), shift_conv1x1(x, torch.randn(size, 8 * size, 1, 1, device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    root, written = Path(__file__).resolve().parents[2], []
    for _ in range(2):
        environment = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)
        written.append({(path.name, path.stat().st_ino) for path in tmp_path.iterdir()})
    assert 1 <= len(written[0]) <= 8 and written[1] == written[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(128, 48, 32, 32), (8, 67, 224, 224), (70000, 9, 4, 4), (1, 9, 70000, 8)])
def test_large(shape, layout):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        x.requires_grad_()
        y = shift2d(x)
        (gradient,) = torch.autograd.grad(y, x, x)
        assert torch.equal(y, shift2d_reference(x)) and torch.equal(gradient, shift2d_reference(x, direction=-1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_to_the_31_elements(layout):
    x = torch.randint(-100, 100, (4, 9, 7800, 7800), dtype=torch.int8, device="cuda").contiguous(memory_format=layout)
    assert x.numel() > 2**31 and torch.equal(shift2d(x), shift2d_reference(x))


def test_runs_on_the_current_stream():
    """Work queued before and after on a side stream is in order with the kernel, without a synchronisation between."""
    stream = torch.cuda.Stream()
    x = torch.zeros(64, 144, 64, 64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.normal_()
        y = shift2d(x) + 0
    stream.synchronize()
    assert torch.equal(y, shift2d_reference(x))


def test_does_not_synchronise():
    x = torch.randn(8, 18, 16, 16, device="cuda")
    shift2d(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        event = torch.cuda.Event()
        shift2d(x)
        event.record()
        assert not event.query(), "the call waited for the device"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    """Captured, forward and backward, and replayed on new contents."""
    x = torch.randn(8, 144, 32, 32, device="cuda", requires_grad=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(shift2d(x), x, torch.ones_like(x))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = shift2d(x)
        (gradient,) = torch.autograd.grad(y, x, y)
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
        graph.replay()
        assert torch.equal(y, shift2d_reference(x))
        assert torch.equal(gradient, shift2d_reference(y, direction=-1))


def test_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for index in range(torch.cuda.device_count()):
        x = torch.randn(2, 20, 9, 9, device=f"cuda:{index}")
        assert torch.equal(shift2d(x), shift2d_reference(x))


def test_compile_and_opcheck():
    x = torch.randn(2, 19, 8, 8, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.effnets.shift2d.default, (x, 3, 1, 1))
    compiled = torch.compile(lambda x: shift2d(x * 2) + 1, fullgraph=True)
    assert torch.equal(compiled(x), shift2d(x * 2) + 1)


def test_autocast_keeps_the_dtype():
    x = torch.randn(1, 9, 3, 3, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        assert shift2d(x).dtype == torch.float32


def test_launch_checks_its_arguments():
    x = torch.zeros(2, 3, 4, 4, device="cuda")
    for wrong, error in ((1.0, TypeError), (1, TypeError), (x.mT, ValueError), (x.cpu(), ValueError)):
        with pytest.raises(error, match="^launch: "):
            launch.launch("shift2d", "shift2d_planes_4", (1, 1, 1), (1, 1, 1), x, wrong)


def test_without_cupy():
    """The plain path, and one line in the log."""
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import torch; from common.kernels import shift2d, shift2d_reference\n"
        "for _ in range(2):\n"
        "    x = torch.randn(1, 9, 4, 4, device='cuda'); assert torch.equal(shift2d(x), shift2d_reference(x))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.startswith("shift2d: plain PyTorch on CUDA"), done.stderr
    assert len(done.stderr.splitlines()) == 1
