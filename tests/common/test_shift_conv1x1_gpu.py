"""shift_conv1x1 on a CUDA device: values, streams, CUDA graphs, torch.compile, several devices."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from common.kernels import shift2d_reference, shift_conv1x1, tap_order

pytestmark = pytest.mark.gpu
module = importlib.import_module("common.kernels.shift_conv1x1")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
# ShiftResNet's on CIFAR-10, then odd sizes: images of several tiles, several images in a tile, partial tiles.
SHAPES = [
    (64, 48, 32, 32),
    (64, 144, 32, 32),
    (64, 288, 16, 16),
    (64, 576, 8, 8),
    (3, 40, 56, 57),
    (5, 8, 7, 7),
    (1, 72, 1, 999),
]


@pytest.fixture(autouse=True)
def cupy():
    if module._cuda_kernel() is None:
        pytest.skip("CuPy is not installed, or cannot compile here")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("compute capability below 8.0: only float32 is fused")


@pytest.fixture(params=[True, False], ids=["tf32", "fp32"])
def allow_tf32(request):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cudnn.allow_tf32 = before


def integers(shape, dtype, layout=torch.contiguous_format, device="cuda"):
    """Their sums are exact in float32, in any order, and so are TF32's factors."""
    x = torch.randint(-5, 6, shape, device=device).to(dtype)
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x


def definition(x, weight, bias, stride=1, kernel_size=3, dilation=1):
    shifted = shift2d_reference(x, kernel_size, dilation)
    return F.conv2d(shifted.double(), weight.double(), None if bias is None else bias.double(), stride)


def fused(x, weight, bias, *sizes):
    """The kernel's result; fails where there is none for these sizes."""
    sizes = (*sizes, *(1, 3, 1)[len(sizes) :])
    y = module._output(x, weight, sizes[0]).fill_(float("nan"))
    assert module._cuda_kernel()(x, weight, bias, y, *sizes), "no kernel takes these sizes"
    return y


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition(dtype, layout, allow_tf32):
    """Bit by bit, on integers."""
    sizes = itertools.cycle([(1, 3, 1), (2, 3, 1), (1, 3, 2), (3, 2, 1), (1, 5, 1), (1, 1, 1), (2, 3, 2)])
    for (shape, outputs), more in zip(itertools.product(SHAPES, (16, 5, 32, 20, 64, 70)), sizes, strict=False):
        x, weight = integers(shape, dtype, layout), integers((outputs, shape[1], 1, 1), dtype)
        bias = integers((outputs,), dtype) if outputs % 2 else None
        expected = definition(x, weight, bias, *more).float().to(dtype)
        assert torch.equal(fused(x, weight, bias, *more), expected), (shape, outputs, more)
        assert torch.equal(shift_conv1x1(x, weight, bias, *more), expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_channels_by_tap(layout):
    x, weight = integers((4, 40, 9, 8), torch.float32, layout), integers((16, 40, 1, 1), torch.float32)
    order = tap_order(40)
    y = shift_conv1x1(x[:, order].contiguous(memory_format=layout), weight[:, order], None, 2, by_tap=True)
    assert torch.equal(y, shift_conv1x1(x, weight, None, 2)) and y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_error_on_random_numbers(layout, allow_tf32):
    """Relative to the sum of the products' magnitudes: rounding of factors, or of sums, and of the result."""
    most = {torch.float32: 2**-10 if allow_tf32 else 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-10}
    for dtype, bound in most.items():
        x = torch.randn(16, 288, 16, 16, device="cuda").to(dtype).contiguous(memory_format=layout)
        weight = torch.randn(32, 288, 1, 1, device="cuda").to(dtype)
        scale = definition(x.abs(), weight.abs(), None)
        error = (fused(x, weight, None).double() - definition(x, weight, None)).abs() / scale
        assert error.max() <= bound


def test_infinity_and_nan(allow_tf32):
    x = torch.zeros(1, 16, 4, 4, device="cuda")
    x[0, 4, 2, 2], x[0, 13, 1, 1] = float("inf"), float("nan")
    weight = torch.ones(16, 16, 1, 1, device="cuda")
    assert torch.equal(fused(x, weight, None).nan_to_num(7, 8), definition(x, weight, None).float().nan_to_num(7, 8))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_no_kernel_takes(layout):
    for dtype, channels, dilation in ((torch.float64, 16, 1), (torch.bfloat16, 9, 1), (torch.float32, 36, 30)):
        x, weight = integers((2, channels, 64, 64), dtype, layout), integers((16, channels, 1, 1), dtype)
        expected = definition(x, weight, None, dilation=dilation).to(dtype)
        assert torch.equal(shift_conv1x1(x, weight, None, 1, 3, dilation), expected)


def test_gradients_are_those_of_the_definition():
    x, weight = torch.randn(2, 16, 5, 5, device="cuda"), torch.randn(4, 16, 1, 1, device="cuda")
    x.requires_grad_(), weight.requires_grad_()
    results = [torch.autograd.grad(function(x, weight).sum(), (x, weight))
               for function in (shift_conv1x1, module.shift_conv1x1_reference)]  # fmt: skip
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_runs_on_the_current_stream():
    """Work queued before and after on a side stream is in order with the kernel, without a synchronisation between."""
    x, weight = integers((64, 144, 32, 32), torch.bfloat16), integers((16, 144, 1, 1), torch.bfloat16)
    expected, zeros, stream = fused(x, weight, None) + 1, torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        zeros.copy_(x)
        y = shift_conv1x1(zeros, weight) + 1
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph():
    """Captured, and replayed on new contents."""
    x, weight = integers((8, 144, 32, 32), torch.float16), integers((16, 144, 1, 1), torch.float16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        shift_conv1x1(x, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = shift_conv1x1(x, weight)
    for _ in range(2):
        x.copy_(integers(x.shape, x.dtype))
        graph.replay()
        assert torch.equal(y, definition(x, weight, None).half())


def test_compile_and_opcheck():
    x, weight = integers((2, 16, 8, 8), torch.float32), integers((4, 16, 1, 1), torch.float32)
    torch.library.opcheck(torch.ops.effnets.shift_conv1x1.default, (x, weight, None, 1, 3, 1))
    compiled = torch.compile(lambda x, weight: shift_conv1x1(x * 2, weight) + 1, fullgraph=True)
    assert torch.equal(compiled(x, weight), shift_conv1x1(x * 2, weight) + 1)


def test_every_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for index in range(torch.cuda.device_count()):
        x = integers((2, 16, 9, 9), torch.float32, device=f"cuda:{index}")
        weight = integers((4, 16, 1, 1), torch.float32, device=f"cuda:{index}")
        assert torch.equal(fused(x, weight, None), definition(x, weight, None).float())
