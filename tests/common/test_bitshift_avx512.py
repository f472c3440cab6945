"""The packed layers' kernels for AVX-512: bfloat16 and bytes as they are, many and few rows, against exact sums."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.kernels import bitshift_conv2d, bitshift_linear, pack_shift_weights
from tests.common.bitshift_cases import CODES, random_weights
from tests.common.test_bitshift_int8 import FITTING, case

ROOT = Path(__file__).resolve().parents[2]
module = importlib.import_module("common.kernels.bitshift")


@pytest.fixture(autouse=True)
def kernels():
    """The module of the CPU's kernels, on a processor that has all the instructions."""
    pytest.importorskip("numba")
    kernels = module._cpu_kernels()
    if not importlib.import_module("common.kernels.vectors").has_avx512():
        pytest.skip("instruction set")
    return kernels


def integers(shape, most=8):
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(0)).float()


def close(y, x, weight):
    """Float32 sums in any order: half a unit in the last place of the sum of magnitudes for each addition."""
    x, weight = x.double(), weight.double()
    assert y.dtype == torch.float32
    bound = 2**-24 * (x.shape[1] + 2) * F.linear(x.abs(), weight.abs())
    assert ((y - F.linear(x, weight)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme, bits", CODES)
def test_rows(kernels, scheme, bits, dtype):
    """Every number of rows of a tile, tiles with rows to spare, many rows, sizes that fill no panel and no block."""
    for outputs, inputs in ((1, 1), (33, 7), (70, 250), (64, 1100)):
        weight = random_weights((outputs, inputs), scheme, bits)
        weights = module._weights(pack_shift_weights(weight, bits, scheme), "test", 2)
        for rows in (1, 2, 3, 4, 5, 8, 9, 17, 128):
            x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
            close(kernels.linear(x, weights), x, weight)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("scheme, bits", [("PS", 4), ("Q", 5), ("S3", 3)])
def test_float32_is_as_exact_as_the_library(kernels, scheme, bits, rows):
    """Products are exact and sums float32: a long sum is no further from float64 than the library's, twice at most."""
    weight, x = random_weights((64, 25088), scheme, bits), torch.randn(rows, 25088)
    expected = F.linear(x.double(), weight.double())
    ours = (bitshift_linear(x, pack_shift_weights(weight, bits, scheme)) - expected).abs().max()
    assert ours <= 2 * (F.linear(x, weight) - expected).abs().max() or ours <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bfloat16_is_rounded_once(rows, has_bias):
    weight, x = random_weights((64, 96), "S3", 3), integers((rows, 96)).bfloat16()
    bias = integers((64,), 100).bfloat16() if has_bias else None
    expected = F.linear(x.float(), weight, None if bias is None else bias.float()).bfloat16()  # whole: exact sums
    y = bitshift_linear(x, pack_shift_weights(weight, 3, "S3"), bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_no_numbers(dtype, value):
    weight, x = random_weights((64, 40), "PS", 4), integers((5, 40)).to(dtype)
    x[2, 7] = value
    y, expected = bitshift_linear(x, pack_shift_weights(weight, 4, "PS")), F.linear(x.float(), weight).to(dtype)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert not torch.isfinite(y[2]).any() and torch.isfinite(y[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("scheme, bits", FITTING)
def test_bytes(kernels, scheme, bits):
    """Equal to integers of 64 bits, for any number of rows, and calculated here."""
    int8 = importlib.import_module("common.kernels.bitshift_int8")
    assert int8._kernels(torch.zeros(1, dtype=torch.int8)) is kernels
    for rows, shape in ((1, (1, 1)), (3, (33, 7)), (8, (64, 72)), (21, (70, 900))):
        packed, x, sums = case(scheme, bits, rows, shape)
        x[0], sums[0] = -128, case(scheme, bits, 1, shape)[2] * 0 + (-128 * _integers(packed)).sum(-1)
        for same in (x, x.T.contiguous().T):
            assert torch.equal(bitshift_linear(same, packed, arithmetic="int8").long(), sums)


def _integers(packed):
    return (packed.unpack().double() * 2.0 ** -(packed.base + packed.zero)).long()


@pytest.mark.parametrize("scheme, bits", CODES)
def test_weights_in_bfloat16(kernels, scheme, bits):
    weight = random_weights((5, 70, 3, 3), scheme, bits)
    weights = module._weights(pack_shift_weights(weight, bits, scheme), "test", 4)
    assert torch.equal(kernels.unpack_half(weights).float(), weight)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("has_bias", [False, True])
def test_convolutions_in_bfloat16(layout, has_bias):
    weight, x = random_weights((32, 16, 3, 3), "S3", 3), integers((2, 16, 9, 8)).bfloat16()
    bias, x = integers((32,)).bfloat16() if has_bias else None, x.contiguous(memory_format=layout)
    expected = F.conv2d(x.float(), weight, bias if bias is None else bias.float(), 2, 1).bfloat16()
    y = bitshift_conv2d(x, pack_shift_weights(weight, 3, "S3"), bias, 2, 1)
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=layout)
    wide = bitshift_conv2d(x, pack_shift_weights(weight, 3, "S3"), None if bias is None else bias.float(), 2, 1)
    assert torch.equal(wide, expected)


IN_TURN = """
import sys, torch
from common.kernels import bitshift_linear, pack_shift_weights
for bits in map(int, sys.argv[1:]):
    weight = torch.ones(32, 8) * 2.0 ** -torch.arange(8).remainder(3)
    x, packed = torch.arange(8.0)[None], pack_shift_weights(weight, bits, "PS")
    assert torch.equal(bitshift_linear(x, packed), x @ weight.T), bits
"""


@pytest.mark.slow
def test_code_compiled_in_several_processes(tmp_path):
    """Functions that one function makes have names of their own: from the cache none is taken for another."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    for bits in (["4"], ["5"], ["4", "5"], ["5", "4"]):
        command = [sys.executable, "-c", IN_TURN, *bits]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
