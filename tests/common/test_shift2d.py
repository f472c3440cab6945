"""shift2d computes its definition: every path against the reference, and the reference against independent formulas."""

import importlib
import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from common.kernels import shift2d, shift2d_reference

module = importlib.import_module("common.kernels.shift2d")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(params=["numba", "plain"])
def path(request, monkeypatch):
    """Both CPU paths; where numba is missing its half is skipped, visibly."""
    if request.param == "plain":
        monkeypatch.setitem(module._KERNELS, "cpu", lambda: None)
    else:
        pytest.importorskip("numba")
        assert module._cpu_kernel(), "numba is there, but the kernels do not load"
    return request.param


def random_bits(shape, dtype, seed):
    """Tensor of any bit patterns: NaNs, infinities and denormals too."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(-128, 128, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.int8).view(dtype)


def same_bits(a, b):
    integers = BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def random_case(generator):
    """(tensor, kernel_size, dilation): mostly more channels than taps, sizes from 1, any layout and dtype."""
    kernel_size = generator.choice((1, 2, 3, 3, 3, 3, 4, 5))
    channels = kernel_size**2 * generator.randint(0, 3) + generator.randint(0, 9) or 1
    shape = [generator.randint(1, 3), channels, generator.randint(1, 12), generator.randint(1, 20)]
    layout = generator.choice(("NCHW", "NCHW", "NHWC", "NHWC", "strided", "transposed"))
    if layout == "strided":
        shape[3] *= 2
    x = random_bits(shape, generator.choice(FLOATS), generator.randrange(2**31))
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    x = {"strided": x[..., ::2], "transposed": x.mT}.get(layout, x)
    return x, kernel_size, generator.choice((1, 1, 1, 2, 3, 30))


@pytest.mark.parametrize("seed", range(4))
def test_equals_reference(path, seed):
    """1,000 random cases per path, forward and backward, bit by bit."""
    generator = random.Random(seed)
    for _ in range(250):
        x, kernel_size, dilation = random_case(generator)
        case = x.shape, x.stride(), x.dtype, kernel_size, dilation
        assert same_bits(shift2d(x, kernel_size, dilation), shift2d_reference(x, kernel_size, dilation)), case
        back = torch.ops.effnets.shift2d(x, kernel_size, dilation, -1)
        assert same_bits(back, shift2d_reference(x, kernel_size, dilation, -1)), case


@pytest.mark.parametrize("seed", range(2))
def test_gradient_equals_reference(path, seed):
    generator = random.Random(seed)
    for _ in range(100):
        x, kernel_size, dilation = random_case(generator)
        leaf = torch.zeros_like(x).requires_grad_()  # keeps the layout where there are no gaps
        (gradient,) = torch.autograd.grad(shift2d(leaf, kernel_size, dilation), leaf, x)
        assert same_bits(gradient, shift2d_reference(x, kernel_size, dilation, -1)), (x.shape, kernel_size, dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel_size", [2, 3, 5])
def test_large_tensors(path, layout, dtype, kernel_size):
    """Sizes that are shared among threads, with long rows and whole vectors."""
    for shape in ((8, 72, 32, 32), (3, 67, 57, 35), (1, 30, 129, 150)):
        x = random_bits(shape, dtype, 0).contiguous(memory_format=layout)
        assert same_bits(shift2d(x, kernel_size, 2), shift2d_reference(x, kernel_size, 2))


def displaced(x, kernel_size, dilation, direction):
    """The definition, element by element."""
    k, (batch, channels, height, width) = kernel_size, x.shape
    limit = channels // k**2 * k**2
    y = torch.zeros(x.shape, dtype=x.dtype)
    for n, c, i, j in itertools.product(range(batch), range(channels), range(height), range(width)):
        dx = direction * dilation * (c % k - k // 2) if c < limit else 0
        dy = direction * dilation * (c // k % k - k // 2) if c < limit else 0
        if 0 <= i + dy < height and 0 <= j + dx < width:
            y[n, c, i, j] = x[n, c, i + dy, j + dx]
    return y


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("kernel_size, dilation", [(1, 1), (2, 1), (3, 1), (3, 2), (3, 7), (4, 1), (5, 1)])
def test_reference_equals_loops(kernel_size, dilation, direction):
    for shape in ((2, 11, 4, 5), (1, 27, 3, 6), (1, 1, 2, 2), (1, 37, 1, 3)):
        x = torch.randn(shape)
        y = shift2d_reference(x, kernel_size, dilation, direction)
        assert torch.equal(y, displaced(x, kernel_size, dilation, direction))


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (3, 2), (5, 1), (5, 3), (7, 1)])
def test_reference_equals_depthwise_convolution(kernel_size, dilation):
    """A depthwise convolution whose kernels are one-hot moves each channel likewise."""
    k, channels = kernel_size, 3 * kernel_size**2 + 5
    channel = torch.arange(channels)
    tap = torch.where(channel < 3 * k**2, channel % k**2, k**2 // 2)
    weight = F.one_hot(tap, k**2).view(channels, 1, k, k).double()
    x = torch.randn(2, channels, 9, 11, dtype=torch.float64)
    convolved = F.conv2d(x, weight, padding=dilation * (k // 2), dilation=dilation, groups=channels)
    assert torch.equal(shift2d_reference(x, k, dilation), convolved)


def test_known_displacements():
    """Channel c mod 9 reads from row (c % 9) // 3 - 1, column c % 3 - 1 (the original's order); the tenth stays."""
    x = torch.zeros(1, 10, 5, 5)
    x[0, :, 2, 2] = 1
    found = [tuple(map(int, y.nonzero()[0])) for y in shift2d(x)[0]]
    assert found == [(2 - dy, 2 - dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)] + [(2, 2)]


@pytest.mark.parametrize("shape", [(0, 9, 4, 4), (2, 9, 0, 4), (2, 9, 4, 0), (2, 0, 4, 4), (0, 0, 0, 0)])
def test_empty(path, shape):
    x = torch.empty(shape, requires_grad=True)
    y = shift2d(x)
    y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape


def test_fewer_channels_than_taps_is_a_copy(path):
    x = torch.randn(2, 8, 5, 5)
    y = shift2d(x)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dilation", [5, 6, 2**31 - 1])
def test_displacements_beyond_the_image(path, dilation):
    """Only channels that move along neither axis, or not out of the image, keep anything."""
    x = torch.ones(1, 9, 5, 4)
    assert shift2d(x, 3, dilation).sum((0, 2, 3)).tolist() == [0, 0, 0, 0, 20, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e5m2])
def test_other_dtypes(path, dtype):
    x = torch.randint(0, 2, (2, 20, 5, 6)).to(torch.float32).to(dtype)
    wide = torch.complex64 if dtype.is_complex else torch.float32
    assert torch.equal(shift2d(x).to(wide), shift2d_reference(x.to(wide)))


def test_lazy_conjugate_and_negative(path):
    x = torch.randn(1, 9, 4, 4, dtype=torch.complex64)
    assert torch.equal(shift2d(x.conj()), shift2d(x.conj().resolve_conj()))
    assert torch.equal(shift2d(x.conj().imag), shift2d(-x.imag))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT,
    "cropped": lambda x: x[:, :, 1:, :-1],
    "channels-last, cropped": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:, :-1],
    "batch slice": lambda x: x[1:],
    "flat offset": lambda x: x.flatten()[1 : 1 + 2 * 9 * 4 * 5].view(2, 9, 4, 5),
    "expanded": lambda x: x[:1].expand_as(x),
    "one channel": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :1],
    "one pixel": lambda x: x[:, :, :1, :1],
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_layout(path, name, kernel_size):
    """Output strides are those of empty_like in the input's memory format; the fake operator agrees; no aliasing."""
    x = LAYOUTS[name](torch.randn(3, 20, 6, 7))
    y = shift2d(x, kernel_size)
    assert torch.equal(y, shift2d_reference(x, kernel_size))
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert y.stride() == torch.empty_like(x, memory_format=layout).stride()
    fake = shift2d(torch.empty_strided(x.shape, x.stride(), device="meta"), kernel_size)
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_to_the_31_elements(layout):
    side, channels = 15448, 9
    x = torch.empty((1, channels, side, side), dtype=torch.uint8, memory_format=layout)
    assert x.numel() > 2**31
    for row in range(side):
        x[0, :, row] = row % 251
    y = shift2d(x)
    for c, (dy, dx) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
        rows, columns = (slice(max(0, -d), side - max(0, d)) for d in (dy, dx))
        sources, origins = (slice(max(0, d), side + min(0, d)) for d in (dy, dx))
        assert torch.equal(y[0, c, rows, columns], x[0, c, sources, origins])
    assert y[0, 0, 0].sum() == 0 and y[0, 8, -1].sum() == 0 and y[0, 2, :, -1].sum() == 0


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1, 2],), TypeError, "x must be a tensor, not list"),
        ((torch.zeros(2, 3, 4),), ValueError, "x must have 4 dimensions"),
        ((torch.zeros(1, 9, 2, 2), 0), ValueError, "kernel_size must be at least 1"),
        ((torch.zeros(1, 9, 2, 2), -3), ValueError, "kernel_size must be at least 1"),
        ((torch.zeros(1, 9, 2, 2), 3, 0), ValueError, "dilation must be at least 1"),
        ((torch.zeros(1, 9, 2, 2), 3, 10**30), ValueError, "below 2\\*\\*31"),
        ((torch.zeros(1, 9, 2, 2), 3.0), TypeError, "kernel_size must be an int, not float"),
        ((torch.zeros(1, 9, 2, 2), 3, True), TypeError, "dilation must be an int, not bool"),
        ((torch.zeros(1, 9, 2, 2, dtype=torch.complex128),), TypeError, "torch.complex128"),
        ((torch.zeros(1, 9, 2, 2).to_sparse(),), TypeError, "torch.sparse_coo"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^shift2d: .*{message}"):
        shift2d(*arguments)


@pytest.mark.parametrize("arguments", [(0, 1, 1), (3, 0, 1), (3, 1, 0), (3, 1, 2)])
def test_operator_checks_its_arguments(arguments):
    """Called directly, and on fake tensors, the operator is as careful as the function."""
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match="^shift2d: "):
            torch.ops.effnets.shift2d(torch.zeros(1, 9, 2, 2, device=device), *arguments)
