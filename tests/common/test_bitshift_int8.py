"""arithmetic="int8": exact integers, equal to an int64 reference; on the CPU, which is the definition."""

import pytest
import torch

from common.kernels import bitshift_conv2d, bitshift_linear, pack_shift_weights
from tests.common.bitshift_cases import CODES, exponents, random_parts

FITTING = [(scheme, bits) for scheme, bits in CODES if bits < (4 if scheme == "Q" else 5)]


def case(scheme, bits, rows, shape, seed=0):
    """(packed, int8 x, int64 sums of x * w in units of the smallest magnitude)."""
    shift, sign = random_parts(shape, scheme, bits, seed)
    x = torch.randint(-128, 128, (rows, shape[1]), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    integers = sign * 2 ** (shift - exponents(scheme, bits)[0])
    assert integers.abs().max() <= 64
    sums = (x.long()[:, None] * integers).sum(-1)
    return pack_shift_weights((shift, sign), bits, scheme), x, sums


@pytest.mark.parametrize("scheme, bits", FITTING)
@pytest.mark.parametrize("rows, shape", [(1, (1, 1)), (5, (33, 20)), (40, (70, 300))])
def test_equals_the_integers(scheme, bits, rows, shape):
    packed, x, sums = case(scheme, bits, rows, shape)
    y = bitshift_linear(x, packed, arithmetic="int8")
    assert y.dtype == torch.int32 and torch.equal(y.long(), sums)
    bias = torch.arange(shape[0], dtype=torch.int32)
    assert torch.equal(bitshift_linear(x[None], packed, bias, arithmetic="int8").long(), (sums + bias)[None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_floating_activations(dtype):
    """Truncated, cut off at the ends, NaN 0; then the plain product with the weights, rounded once."""
    packed, x, _ = case("PS", 4, 6, (10, 64))
    bias = torch.arange(10).to(dtype)
    values = (x.double() / 16).to(dtype) + torch.where(x < 0, -1, 1).to(dtype) / 64
    values[0, :3] = torch.tensor([1000.0, -1000.0, float("nan")])
    seen = x.double() / 16
    seen[0, :3] = torch.tensor([127 / 16, -128 / 16, 0.0])
    expected = (seen @ packed.unpack().double().T + bias.double()).to(dtype)
    y = bitshift_linear(values, packed, bias, arithmetic="int8", activation_bits=(4, 4))
    assert y.dtype == dtype and torch.equal(y, expected)
    values.requires_grad_()
    with pytest.raises(RuntimeError):
        bitshift_linear(values, packed, bias, arithmetic="int8", activation_bits=(4, 4)).sum().backward()


def test_longest_sums_are_exact():
    """All weights 64, all inputs -128: beyond float32's integers, within int32."""
    packed = pack_shift_weights(torch.full((1, 2**17), 64.0), 4, "S3")
    x = torch.full((1, 2**17), -128, dtype=torch.int8)
    x[0, 0] = -127
    # In units of 1: the scheme's smallest magnitude, which these weights do not use.
    assert bitshift_linear(x, packed, arithmetic="int8").item() == -(2**30) + 64


def test_compiles_and_has_no_batch_limits():
    packed, x, sums = case("S3", 3, 3, (8, 16))
    compiled = torch.compile(lambda x: bitshift_linear(x, packed, arithmetic="int8"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x).long(), sums)
    assert bitshift_linear(x[:0], packed, arithmetic="int8").shape == (0, 8)


def test_errors():
    packed, x, _ = case("S3", 3, 3, (8, 16))
    for scheme, bits in (("Q", 4), ("PS", 5)):
        wide = pack_shift_weights(random_parts((8, 16), scheme, bits), bits, scheme)
        with pytest.raises(ValueError, match="int8 ends at"):
            bitshift_linear(x, wide, arithmetic="int8")
    with pytest.raises(ValueError, match=r"activation_bits of 1 to 8 in all, for example \(4, 4\), not 16 and 16"):
        bitshift_linear(x.float(), packed, arithmetic="int8")
    with pytest.raises(ValueError, match="two integers"):
        bitshift_linear(x.float(), packed, arithmetic="int8", activation_bits="all")
    with pytest.raises(TypeError, match="floating or int8"):
        bitshift_linear(x.int(), packed, arithmetic="int8")
    with pytest.raises(ValueError, match=r"shape \(\.\.\., 16\)"):
        bitshift_linear(x[:, 1:], packed, arithmetic="int8")
    with pytest.raises(ValueError, match="be int32"):
        bitshift_linear(x, packed, torch.zeros(8), arithmetic="int8")
    with pytest.raises(ValueError, match="arithmetic"):
        shift, sign = random_parts((8, 4, 1, 1), "S3", 3)
        bitshift_conv2d(torch.zeros(1, 4, 2, 2), pack_shift_weights((shift, sign), 3, "S3"), arithmetic="int8")
