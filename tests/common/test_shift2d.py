"""shift2d: against its definition bit for bit, against convolution, and as a torch operator."""

import concurrent.futures
import multiprocessing
import random

import pytest
import torch
import torch.nn.functional as F

from common.kernels import shift2d, shift2d_reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def random_case(rng):
    """Shape, kernel size, dilation, dtype, layout: odd sizes, spare channels, offsets beyond the image, no images."""
    kernel_size, dilation = rng.choice((1, 2, 3, 3, 3, 4, 5, 7)), rng.choice((1, 1, 2, 3, 9))
    shape = (rng.choice((0, 1, 2, 3)), rng.randint(1, 60), rng.randint(1, 12), rng.randint(1, 40))
    return (
        shape,
        kernel_size,
        dilation,
        rng.choice(DTYPES),
        rng.choice(("nchw", "channels_last", "strided", "expanded")),
    )


def make(shape, dtype, layout):
    n, c, h, w = shape
    if layout == "strided":
        return torch.randn(n, c, h + 3, 2 * w).to(dtype)[:, :, 2:-1, ::2]
    if layout == "expanded":
        return torch.randn(n, c, h, 1).to(dtype).expand(n, c, h, w)
    x = torch.randn(shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def bits(x):
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


@pytest.mark.parametrize("batch", range(12))
def test_equals_the_reference_bit_for_bit(batch):
    rng = random.Random(batch)
    torch.manual_seed(batch)
    for _ in range(100):
        shape, kernel_size, dilation, dtype, layout = random_case(rng)
        x = make(shape, dtype, layout).requires_grad_()
        y = shift2d(x, kernel_size, dilation)
        assert torch.equal(bits(y), bits(shift2d_reference(x, kernel_size, dilation)))
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last if is_channels_last else torch.contiguous_format)
        grad = make(shape, dtype, rng.choice(("nchw", "channels_last", "expanded")))
        y.backward(grad)
        assert torch.equal(bits(x.grad), bits(shift2d_reference(grad, kernel_size, dilation, -1)))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (3, 2), (5, 1), (3, 7), (7, 3)])
def test_the_reference_is_a_depthwise_convolution(kernel_size, dilation):
    channels, k = 2 * kernel_size**2 + 3, kernel_size
    weight = torch.zeros(channels, 1, k, k)
    for c in range(channels):
        tap = (c // k % k, c % k) if c < 2 * k * k else (k // 2, k // 2)
        weight[c, 0][tap] = 1
    x = torch.randn(2, channels, 6, 9)
    expected = F.conv2d(x, weight, padding=dilation * (k // 2), dilation=dilation, groups=channels)
    assert torch.equal(shift2d_reference(x, k, dilation), expected)


def test_large_enough_for_several_threads():
    for layout in ("nchw", "channels_last"):
        x = make((8, 48, 32, 32), torch.float32, layout)
        assert torch.equal(shift2d(x), shift2d_reference(x))


def test_it_is_a_copy_where_nothing_moves():
    x = torch.randn(2, 8, 4, 4)
    for y in (shift2d(x), shift2d(x, 1)):
        assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kernel_size", (2, 3))
def test_gradients(kernel_size):
    x = torch.randn(1, kernel_size**2 + 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift2d(x, kernel_size), x)
    assert torch.autograd.gradgradcheck(lambda x: shift2d(x, kernel_size), x)


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "strided"))
def test_operator_contract(layout):
    x = make((2, 11, 4, 5), torch.float32, layout).requires_grad_()
    torch.library.opcheck(torch.ops.effnets.shift2d.default, (x, 3, 1, 1))


def test_compile_export_and_autocast(tmp_path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 18, 1)

        def forward(self, x):
            return shift2d(self.conv(x)).relu()

    block, x = Block(), torch.randn(2, 4, 6, 6)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert block.conv.weight.grad is not None
    torch.export.save(torch.export.export(block, (x,)), tmp_path / "block.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "block.pt2").module()(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert shift2d(block.conv(x)).dtype == torch.bfloat16 and shift2d(x).dtype == torch.float32


def test_vmap_is_a_loop():
    x = torch.randn(3, 2, 9, 4, 4)
    assert torch.equal(torch.vmap(shift2d)(x), torch.stack([shift2d(part) for part in x]))


def test_several_threads_may_call_at_once():
    inputs = [torch.randn(8, 36, 32, 32) for _ in range(8)]
    before = torch.get_num_threads()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for x, y in zip(inputs * 5, pool.map(shift2d, inputs * 5), strict=True):
            assert torch.equal(y, shift2d_reference(x))
    assert torch.get_num_threads() == before


def _in_child(queue):
    x = torch.ones(8, 36, 32, 32)
    queue.put(bool(torch.equal(shift2d(x), shift2d_reference(x))))


def test_it_works_after_a_fork():
    shift2d(torch.randn(8, 36, 32, 32))  # the parent has used its threads
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60)
    child.join()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(3, 4, 4),), ValueError, "must have 4 dimensions"),
        ((torch.randn(1, 9, 4, 4), 0), ValueError, "kernel_size must be at least 1 .*not 0"),
        ((torch.randn(1, 9, 4, 4), 3, 0), ValueError, "dilation must be at least 1 .*not 0"),
        ((torch.randn(1, 9, 4, 4), 3.0), TypeError, "kernel_size must be an int, not float"),
        (([1.0],), TypeError, "x must be a tensor, not list"),
        ((torch.randn(1, 9, 4, 4).to_sparse(),), TypeError, "must be dense"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        shift2d(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", range(6))
def test_cuda_equals_the_reference(batch):
    rng = random.Random(batch)
    for _ in range(100):
        shape, kernel_size, dilation, dtype, layout = random_case(rng)
        x = make(shape, dtype, layout)
        for direction in (1, -1):
            y = torch.ops.effnets.shift2d(x.cuda(), kernel_size, dilation, direction)
            assert torch.equal(bits(y.cpu()), bits(shift2d_reference(x, kernel_size, dilation, direction)))


@pytest.mark.gpu
def test_cuda_graph_and_other_streams():
    x = torch.randn(8, 36, 32, 32, device="cuda")
    expected = shift2d(x)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(shift2d(x), expected)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        y = shift2d(x)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)
