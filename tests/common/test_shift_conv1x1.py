"""shift_conv1x1 against its definition, and against a convolution with a 3x3 kernel that has one tap per channel."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from common.kernels import (
    gains_from_tap_order,
    shift2d,
    shift_conv1x1,
    shift_conv1x1_reference,
    tap_order,
    threads,
)

module = importlib.import_module("common.kernels.shift_conv1x1")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
# (N, C, H, W), outputs, stride, kernel_size, dilation
CASES = [
    ((2, 48, 32, 32), 16, 1, 3, 1),
    ((3, 96, 16, 16), 32, 2, 3, 1),
    ((5, 192, 8, 8), 64, 1, 3, 1),
    ((1, 40, 5, 7), 16, 1, 3, 1),  # some channels are copied
    ((2, 56, 9, 4), 48, 3, 5, 1),
    ((2, 24, 6, 6), 16, 2, 3, 2),
    ((1, 16, 3, 2), 16, 1, 3, 5),  # shifts beyond the image
    ((2, 8, 4, 4), 32, 1, 3, 1),  # fewer channels than taps: nothing moves
    ((2, 16, 4, 4), 16, 2, 2, 1),
    ((1, 16, 40, 300), 16, 1, 3, 1),  # several bands
    ((2, 104, 41, 40), 32, 2, 3, 1),
    ((2, 200, 12, 12), 192, 1, 3, 1),  # more products than the list of cache lines is long
    ((2, 13, 5, 5), 16, 1, 3, 1),  # channels that the kernel does not take
    ((2, 12, 5, 5), 10, 1, 3, 1),  # outputs that the kernel does not take
    ((0, 16, 4, 4), 16, 1, 3, 1),
]


def random_case(shape, outputs, layout="channels-last", dtype=torch.float32, whole=True):
    """(x, weight, bias): small integers, so that any order of additions gives the same bits, unless not `whole`."""
    generator = torch.Generator().manual_seed(hash((shape, outputs)) % 1000)
    make = (lambda *size: torch.randint(-8, 9, size, generator=generator).to(dtype)) if whole else (
        lambda *size: torch.randn(size, generator=generator).to(dtype))  # fmt: skip
    x = make(*shape).contiguous(memory_format=LAYOUTS[layout])
    return x, make(outputs, shape[1], 1, 1), make(outputs)


def tap_convolution(x, weight, bias, stride, kernel_size, dilation):
    """The same by a dense convolution: weight[o, c] at the tap of channel c's shift."""
    channels, k = weight.shape[1], kernel_size
    dense = torch.zeros(len(weight), channels, k, k)
    for c in range(channels):
        moves = c < channels // (k * k) * (k * k)
        row, column = (c // k % k, c % k) if moves else (k // 2, k // 2)
        dense[:, c, row, column] = weight[:, c, 0, 0]
    reach = k // 2 * dilation
    y = F.conv2d(F.pad(x, (reach, reach, reach, reach)), dense, bias, stride, 0, dilation)
    return y[:, :, : -(-x.shape[2] // stride), : -(-x.shape[3] // stride)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_layout(case, layout):
    shape, outputs, *sizes = case
    x, weight, bias = random_case(shape, outputs, layout)
    for b in (bias, None):
        y = shift_conv1x1(x, weight, b, *sizes)
        expected = shift_conv1x1_reference(x, weight, b, *sizes)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        if x.numel():
            assert torch.equal(y, tap_convolution(x, weight, b, *sizes))
        order = tap_order(shape[1], sizes[1])
        ordered = x[:, order].contiguous(memory_format=LAYOUTS[layout]), weight[:, order], b, *sizes
        for function in (shift_conv1x1, shift_conv1x1_reference):
            by_tap = function(*ordered, by_tap=True)
            assert torch.equal(by_tap, y) and by_tap.stride() == y.stride()


def test_tap_order():
    """A 3x3 kernel: the middle with the channels that stay, the taps beside it, above and below it, the corners."""
    taps = [4, 13, 18, 19, 3, 12, 5, 14, 1, 10, 7, 16, 0, 9, 2, 11, 6, 15, 8, 17]
    assert tap_order(20).tolist() == taps
    assert tap_order(8).tolist() == list(range(8))
    for kernel_size in (1, 2, 5):
        assert sorted(tap_order(60, kernel_size).tolist()) == list(range(60))


def test_tap_order_is_worth_it_where_the_kernel_runs(monkeypatch):
    pytest.importorskip("numba")
    kernels = importlib.import_module("common.kernels.shift_conv1x1_cpu")
    monkeypatch.setattr(kernels, "equals_library", lambda: True)
    weight = torch.zeros(16, 48, 1, 1)
    assert gains_from_tap_order(weight) and gains_from_tap_order(weight, 5, 2)
    for other in (weight.double(), weight[:, :12], weight[:10], weight.to("meta")):
        assert not gains_from_tap_order(other)
    assert not gains_from_tap_order(weight, 3, 9), "beyond the kernel's reach"
    monkeypatch.setattr(kernels, "equals_library", lambda: False)
    assert not gains_from_tap_order(weight)
    monkeypatch.setattr(module, "_KERNELS", {})
    assert not gains_from_tap_order(weight)


def test_order_of_the_shift_where_a_kernel_has_no_other(monkeypatch):
    """As on a GPU: its kernel gets the channels as shift2d wants them."""
    x, weight, bias = random_case((2, 48, 6, 6), 16)
    order, given = tap_order(48), []
    monkeypatch.setattr(module, "_TAKES_TAP_ORDER", ())
    monkeypatch.setattr(module, "_KERNELS", {"cpu": lambda: lambda *a: given.append(a)})
    y = torch.ops.effnets.shift_conv1x1(x[:, order], weight[:, order], bias, 2, 3, 1, True)
    (called,) = given
    assert torch.equal(called[0], x) and torch.equal(called[1], weight) and called[4:] == (2, 3, 1)
    assert torch.equal(y, shift_conv1x1_reference(x, weight, bias, 2))


def test_float_sums():
    x, weight, bias = random_case((3, 192, 8, 8), 64, whole=False)
    y, expected = shift_conv1x1(x, weight, bias), shift_conv1x1_reference(x.double(), weight.double(), bias.double())
    assert (y - expected).abs().max() < 2e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    x, weight, bias = random_case((2, 18, 5, 5), 16, dtype=dtype)
    y = shift_conv1x1(x, weight, bias)
    assert y.dtype == dtype and torch.equal(y, shift_conv1x1_reference(x, weight, bias))


def test_any_number_of_threads_gives_the_same_bits():
    x, weight, bias = random_case((9, 48, 32, 32), 16, whole=False)
    before = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(shift_conv1x1(x, weight, bias))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_kernel_runs(monkeypatch):
    """Where numba and the processor allow it the shifted tensor is not made: the kernel says that it did the work."""
    pytest.importorskip("numba")
    kernel = module._cpu_kernel()
    assert kernel is not None, "it does not compile"
    monkeypatch.setattr(importlib.import_module("common.kernels.shift_conv1x1_cpu"), "equals_library", lambda: True)
    x, weight, bias = random_case((2, 48, 32, 32), 16)
    y = torch.full((2, 16, 32, 32), float("nan")).contiguous(memory_format=torch.channels_last)
    assert kernel(x, weight, bias, y, 1, 3, 1)
    assert torch.equal(y, shift_conv1x1_reference(x, weight, bias))
    assert not kernel(x.contiguous(), weight, bias, y, 1, 3, 1)


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(module, "_KERNELS", {})
    x, weight, bias = random_case((2, 48, 6, 6), 16)
    assert module._prepared(x, weight, bias, 2, 3, 1, False) is None
    assert torch.equal(shift_conv1x1(x, weight, bias, 2), shift_conv1x1_reference(x, weight, bias, 2))


def test_strided_input():
    x, weight, bias = random_case((2, 48, 8, 12), 16)
    view = x.transpose(2, 3)[:, :, ::2]
    assert torch.equal(shift_conv1x1(view, weight, bias), shift_conv1x1_reference(view, weight, bias))


def test_gradients():
    x, weight, bias = (each.double().requires_grad_() for each in random_case((1, 11, 4, 4), 2))
    assert torch.autograd.gradcheck(lambda *a: shift_conv1x1(*a, 2), (x, weight, bias))
    tangent = torch.ones_like(x)
    _, moved = torch.func.jvp(lambda x: shift_conv1x1(x, weight.detach()), (x.detach(),), (tangent,))
    assert torch.equal(moved, F.conv2d(shift2d(tangent), weight.detach()))


def test_operator():
    x, weight, bias = random_case((2, 18, 6, 6), 16)
    torch.library.opcheck(torch.ops.effnets.shift_conv1x1.default, (x, weight, bias, 2, 3, 1))
    compiled = torch.compile(lambda x: shift_conv1x1(x, weight, bias, 2) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), shift_conv1x1(x, weight, bias, 2) + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert shift_conv1x1(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(x=torch.zeros(2, 18, 6)), ValueError, "shapes"),
        (dict(weight=torch.zeros(16, 18, 3, 3)), ValueError, "shapes"),
        (dict(bias=torch.zeros(3)), ValueError, "bias"),
        (dict(weight=torch.zeros(16, 18, 1, 1).double()), TypeError, "one dtype"),
        (dict(stride=0), ValueError, "stride"),
        (dict(kernel_size=0), ValueError, "kernel_size"),
    ],
)
def test_refused(change, error, words):
    arguments = dict(x=torch.zeros(2, 18, 6, 6), weight=torch.zeros(16, 18, 1, 1), bias=None)
    with pytest.raises(error, match=words):
        shift_conv1x1(**{**arguments, **change})


def test_threads_in_a_pool(monkeypatch):
    """Without GNU OpenMP."""
    monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    x, weight, bias = random_case((9, 48, 32, 32), 16)
    y = shift_conv1x1(x, weight, bias)
    torch.set_num_threads(before)
    assert torch.equal(y, shift_conv1x1_reference(x, weight, bias))
