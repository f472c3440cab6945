"""Packed power-of-two weights and their layers: every path against independent formulas."""

import importlib
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.kernels import (
    PackedShiftWeights,
    bitshift_conv2d,
    bitshift_linear,
    multiply_conv2d,
    multiply_linear,
    overflow_count,
    pack_shift_weights,
)
from tests.common.bitshift_cases import CODES, exponents, fixed_conv2d, fixed_linear, random_parts, random_weights

module = importlib.import_module("common.kernels.bitshift")
bitshift_fixed = importlib.import_module("common.kernels.bitshift_fixed")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "deepshift.json"
SHAPES = [(1, 1), (3, 5), (32, 8), (33, 100), (7, 3, 3, 3), (4, 1, 1, 2), (0, 4), (5, 0)]


@pytest.fixture(params=["numba", "plain"])
def path(request, monkeypatch):
    """Both CPU paths; where numba is missing its half is skipped, visibly."""
    if request.param == "plain":
        monkeypatch.setitem(module._KERNELS, "cpu", lambda: None)
    else:
        pytest.importorskip("numba")
        assert module._cpu_kernels(), "numba is there, but the kernels do not load"
    return request.param


def integers(shape, most, seed=0):
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).int()


@pytest.mark.parametrize("scheme, bits", CODES)
@pytest.mark.parametrize("base", [0, 3, -5])
def test_round_trip(scheme, bits, base):
    """Every code, from weights and from (shift, sign), with weights above 1 and ranges moved down."""
    for seed, shape in enumerate(SHAPES):
        shift, sign = random_parts(shape, scheme, bits, seed)
        weight = sign * 2.0 ** (shift + base)
        for given in (weight, weight.double(), (shift + base, sign), ((shift + base).float(), sign.float())):
            packed = pack_shift_weights(given, bits, scheme)
            assert packed.bits == bits and torch.equal(packed.unpack(), weight)
    low, high = exponents(scheme, bits)
    every = [s * 2.0 ** (e + base) for e in range(low, high + 1) for s in (1, -1)] + ([0.0] if scheme != "Q" else [])
    assert pack_shift_weights(torch.tensor([every]), bits, scheme).unpack().tolist() == [every]


def test_size_and_state(tmp_path):
    """4 bits a weight, saved and loaded without executing anything."""
    weight = random_weights((64, 64, 3, 3), "PS", 4)
    packed = pack_shift_weights(weight, 4, "PS")
    assert packed.nbytes == weight.numel() // 2
    torch.save(packed.state(), tmp_path / "weights.pt")
    loaded = PackedShiftWeights.from_state(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(loaded.unpack(), weight) and loaded.shape == (64, 64, 3, 3)


def test_state_is_checked():
    state = pack_shift_weights(torch.ones(4, 8), 4, "PS").state()
    changes = [{"version": 2}, {"codes": state["codes"][1:]}, {"bits": 9}, {"shape": [4, 9, 1]}, {"base": 200}]
    for change in changes:
        with pytest.raises(ValueError, match="^packed weights: "):
            PackedShiftWeights.from_state({**state, **change})
    with pytest.raises(ValueError, match="'bits' is missing"):
        PackedShiftWeights.from_state({k: v for k, v in state.items() if k != "bits"})


def test_zeros_in_q_weights():
    """They take the code of an unused smallest magnitude, or one bit more; six bits have none more."""
    free, full = torch.tensor([[1.0, -0.25, 0.0]]), torch.tensor([[1.0, -0.125, 0.0]])
    assert pack_shift_weights(free, 3, "Q").bits == 3 and pack_shift_weights(full, 3, "Q").bits == 4
    for weight in (free, full, torch.zeros(2, 3)):
        assert torch.equal(pack_shift_weights(weight, 3, "Q").unpack(), weight)
    with pytest.raises(ValueError, match="every magnitude and zero"):
        pack_shift_weights(torch.tensor([[1.0, 2.0**-31, 0.0]]), 6, "Q")


ONES = torch.ones(2, 2)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.tensor([[float("nan")]]), 4, "PS"), ValueError, "NaN or infinity"),
        ((torch.tensor([[float("-inf")]]), 4, "PS"), ValueError, "NaN or infinity"),
        ((torch.tensor([[0.3]]), 4, "PS"), ValueError, "0.3 is neither 0 nor a power of two"),
        ((torch.tensor([[1.0, 2.0**-7]]), 4, "PS"), ValueError, "from -7 to 0 do not fit 4-bit PS codes, which hold 7"),
        ((torch.tensor([[1.0, 8.0]]), 3, "S3"), ValueError, "do not fit 3-bit S3"),
        ((ONES, 1, "PS"), ValueError, "bits must be an integer from 2 to 6, not 1"),
        ((ONES, 7, "PS"), ValueError, "bits"),
        ((ONES, 4, "XY"), ValueError, "scheme must be one of PS, Q, S3"),
        ((ONES[0], 4, "PS"), ValueError, "shape must be"),
        ((ONES.int(), 4, "PS"), TypeError, "floating tensor or a pair"),
        (((ONES * 0.5, ONES), 4, "PS"), ValueError, "round them first"),
        (((ONES, ONES * 2), 4, "PS"), ValueError, "round them first"),
        (((ONES, ONES[:1]), 4, "PS"), ValueError, "one shape"),
        (((ONES * 200, ONES), 4, "PS"), ValueError, "beyond float32"),
    ],
)
def test_packing_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        pack_shift_weights(*arguments)


def close(y, expected, magnitude, terms):
    """Float32 sums in any order: half a unit in the last place of the sum of magnitudes for each addition."""
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert ((y.double() - expected).abs() <= 2**-24 * (terms + 2) * magnitude).all()


@pytest.mark.parametrize("scheme, bits", CODES)
def test_linear(path, scheme, bits):
    """Around every switch of method: one row, pairs of rows, many; sizes that fill no panel, no block."""
    for seed, (outputs, inputs) in enumerate([(1, 1), (33, 7), (64, 72), (100, 150), (7, 600)]):
        weight = random_weights((outputs, inputs), scheme, bits, seed).double()
        packed = pack_shift_weights(weight, bits, scheme)
        bias = torch.randn(outputs)
        for rows in (1, 2, 3, 129):
            x = torch.randn(rows, inputs)
            magnitude = F.linear(x.abs().double(), weight.abs(), bias.abs().double())
            close(bitshift_linear(x, packed, bias), F.linear(x.double(), weight, bias.double()), magnitude, inputs)
            close(bitshift_linear(x, packed), F.linear(x.double(), weight), magnitude, inputs)


@pytest.mark.parametrize("scheme, bits", [code for code in CODES if code != ("S3", 6)])  # 2**30 is refused
def test_fixed_linear(path, scheme, bits):
    """Bit-equal to exact integers, every product rounded down."""
    for seed, shape in enumerate([(1, 1), (33, 7), (40, 90)]):
        shift, sign = random_parts(shape, scheme, bits, seed, most=12)
        packed, x = pack_shift_weights((shift, sign), bits, scheme), integers((5, shape[1]), 2**10, seed)
        bias = integers(shape[:1], 1000)
        y = bitshift_linear(x, packed, bias, arithmetic="fixed")
        assert y.dtype == torch.int32 and torch.equal(y.long(), fixed_linear(x, shift, sign) + bias)


def geometries():
    generator = random.Random(0)
    for _ in range(12):
        pair = [(generator.choice(a), generator.choice(a)) for a in ((1, 2, 3), (0, 1, 2), (1, 2))]
        yield *pair, generator.choice((1, 2, 4))


@pytest.mark.parametrize("geometry", list(geometries()), ids=str)
def test_conv2d(path, geometry):
    scheme, bits = CODES[sum(geometry[0]) % len(CODES)]
    for kernel in ((3, 3), (1, 2)):
        weight = random_weights((8, 3, *kernel), scheme, bits)
        packed, bias = pack_shift_weights(weight, bits, scheme), torch.randn(8)
        x = torch.randn(2, 3 * geometry[3], 9, 8)
        expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
        magnitude = F.conv2d(x.abs().double(), weight.abs().double(), bias.abs().double(), *geometry)
        close(bitshift_conv2d(x, packed, bias, *geometry), expected, magnitude, weight[0].numel())
        shift, sign = random_parts((8, 3, *kernel), scheme, bits, most=12)
        packed, x = pack_shift_weights((shift, sign), bits, scheme), integers(x.shape, 2**12)
        y = bitshift_conv2d(x, packed, None, *geometry, arithmetic="fixed")
        assert torch.equal(y.long(), fixed_conv2d(x, shift, sign, *geometry))


def test_fixed_from_floats(path):
    """x and bias are truncated toward zero to the grid; products are rounded down."""
    packed = pack_shift_weights(torch.tensor([[0.5, -0.25]]), 4, "PS")
    x, bias = torch.tensor([[-0.75, 1.99]]), torch.tensor([-0.49])
    # In quarters: x = -3, 7; terms -3 >> 1 = -2 and -(7 >> 2) = -1; bias trunc(-1.96) = -1.
    y = bitshift_linear(x, packed, bias, arithmetic="fixed", activation_bits=(8, 2))
    assert y.tolist() == [[-1.0]] and y.dtype == torch.float32


def test_overflow_is_counted_and_wraps(path, monkeypatch, caplog):
    monkeypatch.setattr(bitshift_fixed, "_overflows", bitshift_fixed._Overflows())
    packed = pack_shift_weights(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), 4, "PS")
    x = torch.tensor([[2**31 - 1, 2**31 - 1], [5, 6]]).int()
    y = bitshift_linear(x, packed, arithmetic="fixed")
    assert y.tolist() == [[-2, 0], [11, -1]] and overflow_count() == 1
    (record,) = caplog.records
    assert "exceed int32" in record.getMessage()
    large = torch.tensor([[40000.0, float("nan")], [1.0, -1e30]])  # in 16 + 16 bits: three cut off, NaN becomes 0
    y = bitshift_linear(large, packed, arithmetic="fixed")
    assert y[0, 0] == (2**31 - 1) / 2**16 and overflow_count(reset=True) == 1 + 3 + 1 and len(caplog.records) == 1
    assert overflow_count() == 0


def test_left_shifts_beyond_int32(path, monkeypatch):
    """Weights above 1 on large inputs: exact, then wrapped and counted."""
    monkeypatch.setattr(bitshift_fixed, "_overflows", bitshift_fixed._Overflows())
    packed = pack_shift_weights(torch.tensor([[4.0, -4.0, 2.0]]), 3, "S3")
    x = torch.tensor([[2**30, 2**30, -5], [2**30, 0, 0]]).int()
    assert bitshift_linear(x, packed, arithmetic="fixed").tolist() == [[-10], [0]] and overflow_count() == 1


def golden():
    return json.loads(GOLDEN.read_text())["functions"]


def golden_layer(case, bits=5):
    packed = pack_shift_weights((torch.tensor(case["shift"]), torch.tensor(case["sign"])), bits, "PS")
    if case["op"] == "linear":
        return lambda *a, **k: bitshift_linear(a[0], packed, a[1], arithmetic="fixed", **k)
    geometry = case.get("stride", 1), case.get("padding", 0)
    return lambda *a, **k: bitshift_conv2d(a[0], packed, a[1], *geometry, arithmetic="fixed", **k)


def test_golden_integers(path):
    cases = golden()["integer_kernels"]
    for case in cases:
        y = golden_layer(case)(torch.tensor(case["x"]).int(), torch.tensor(case["bias"]).int())
        assert y.tolist() == case["y"]
    assert cases


def test_golden_packed_words(path):
    """The original's packed kernel without its defects: shifts to the right by the field, all signs set."""
    for case in golden()["packed_kernels"]:
        if case["base"]:  # the original loses low bits: it shifts to the right before it shifts to the left
            continue
        shift, sign = -torch.tensor(case["right_shift"]), torch.tensor(case["sign"])
        packed = pack_shift_weights((shift, sign), 6, "Q")
        y = bitshift_linear(torch.tensor(case["x"]).int(), packed, torch.tensor(case["bias"]).int(), arithmetic="fixed")
        assert y.tolist() == case["y"]


def test_golden_modules(path):
    """The original's modules on their CPU kernel, bit by bit; its convolution first rounds input and bias down."""
    for case in golden()["kernel_forward_cpu"]:
        x, scale = torch.tensor(case["x"]), 2.0 ** case["activation_bits"][1]
        x = (x * scale).floor() / scale if case["op"] == "conv2d" else x
        bias = torch.tensor(case["bias"])
        bias = (bias * scale).floor() / scale if case["op"] == "conv2d" else bias
        y = golden_layer(case)(x, bias, activation_bits=case["activation_bits"])
        assert torch.equal(y, torch.tensor(case["y_kernel"]))


@pytest.mark.parametrize("arithmetic", ["float", "fixed"])
def test_layouts_and_shapes(path, arithmetic):
    """Leading dimensions, empty batches, non-contiguous x, one vector; x is left alone."""
    packed = pack_shift_weights(random_weights((9, 12), "PS", 4), 4, "PS")

    def layer(x):
        return bitshift_linear(x, packed, arithmetic=arithmetic, activation_bits=(8, 8))

    x = torch.randn(4, 3, 12)
    flat = layer(x.reshape(12, 12))
    torch.testing.assert_close(layer(x), flat.view(4, 3, 9))
    torch.testing.assert_close(layer(x.mT.contiguous().mT), flat.view(4, 3, 9))
    torch.testing.assert_close(layer(x[0, 0]), flat[0])
    assert layer(x[:0]).shape == (0, 3, 9) and layer(x).is_contiguous()
    conv = pack_shift_weights(random_weights((4, 3, 3, 3), "PS", 4), 4, "PS")
    x = torch.randn(2, 3, 6, 7)
    y = bitshift_conv2d(x, conv, arithmetic=arithmetic)
    for same in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        z = bitshift_conv2d(same, conv, arithmetic=arithmetic)
        torch.testing.assert_close(z, y)
        is_last = same.is_contiguous(memory_format=torch.channels_last)
        assert z.is_contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    assert bitshift_conv2d(x[:0], conv, arithmetic=arithmetic).shape == (0, 4, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(path, dtype):
    """The output has x's dtype; half types are accumulated in float32 and rounded once."""
    weight = random_weights((40, 64), "PS", 4)
    x = torch.randn(3, 64).to(dtype)
    y = bitshift_linear(x, pack_shift_weights(weight, 4, "PS"))
    expected = F.linear(x.double(), weight.double()).to(dtype)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


LINEAR, CONV = pack_shift_weights(torch.ones(2, 4), 4, "PS"), pack_shift_weights(torch.ones(2, 2, 3, 3), 4, "PS")
HIGH = pack_shift_weights(torch.full((2, 4), 2.0**17), 4, "PS")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: bitshift_linear(torch.zeros(1, 4), torch.ones(2, 4)), TypeError, "must be PackedShiftWeights"),
        (lambda: bitshift_linear(torch.zeros(1, 4), CONV), ValueError, "2 dimensions"),
        (lambda: bitshift_linear(torch.zeros(1, 5), LINEAR), ValueError, "shape \\(\\.\\.\\., 4\\), not"),
        (lambda: bitshift_linear(torch.zeros(1, 4).long(), LINEAR), TypeError, "x must be floating"),
        (lambda: bitshift_linear(torch.zeros(1, 4).int(), LINEAR), TypeError, "x must be floating"),
        (lambda: bitshift_linear(torch.zeros(1, 4), LINEAR, torch.zeros(3)), ValueError, "bias must have shape"),
        (lambda: bitshift_linear(torch.zeros(1, 4), LINEAR, arithmetic="int"), ValueError, '"float" or "fixed"'),
        (lambda: bitshift_linear(torch.zeros(1, 4), HIGH, arithmetic="fixed"), ValueError, "exponents up to 16"),
        (lambda: bitshift_linear(torch.zeros(1, 4, device="meta"), LINEAR), ValueError, "one device"),
        (lambda: bitshift_conv2d(torch.zeros(1, 2, 2, 9), CONV), ValueError, "more than the padded image"),
        (lambda: bitshift_conv2d(torch.zeros(1, 3, 9, 9), CONV), ValueError, "shape \\(N, 2, H, W\\)"),
        (lambda: bitshift_conv2d(torch.zeros(1, 2, 9, 9), CONV, stride=0), ValueError, "stride must be"),
        (lambda: bitshift_conv2d(torch.zeros(1, 6, 9, 9), CONV, groups=3), ValueError, "groups must divide"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bits", [(0, 8), (17, 16), (8, -1), (8,), "ab", (8, 8, 8)])
def test_wrong_activation_bits(bits):
    with pytest.raises(ValueError, match="^bitshift_linear: activation_bits must be"):
        bitshift_linear(torch.zeros(1, 4), LINEAR, arithmetic="fixed", activation_bits=bits)


def test_multiply():
    x, weight, bias = torch.randn(2, 3, 17), torch.randn(9, 17), torch.randn(9)
    torch.testing.assert_close(multiply_linear(x, weight, bias), F.linear(x, weight, bias))
    for geometry in geometries():
        x, weight = torch.randn(2, 3 * geometry[3], 9, 8), torch.randn(8, 3, 3, 2)
        torch.testing.assert_close(multiply_conv2d(x, weight, None, *geometry), F.conv2d(x, weight, None, *geometry))
    with pytest.raises(ValueError, match="^multiply_linear: shapes"):
        multiply_linear(torch.zeros(1, 4), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="^multiply_linear: .* float32"):
        multiply_linear(torch.zeros(1, 4).double(), torch.zeros(2, 4))
