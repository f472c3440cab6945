"""bitshift.cu and multiply.cu without a GPU: run on the host under the sanitizers, bit-equal to independent results.

(test_kernel_sources.py compiles them for every architecture.)
"""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.kernels import bitshift_cuda, bitshift_int8_cuda, launch, pack_shift_weights
from common.kernels.bitshift_reference import Weights
from tests.common.bitshift_cases import CODES, exponents, fixed_conv2d, fixed_linear, random_parts, random_weights
from tests.host.gxx import HostKernels


@pytest.fixture(scope="module")
def host_bitshift(tmp_path_factory):
    return HostKernels("bitshift", tmp_path_factory.mktemp("host"))


def integers(shape, seed, most=1000):
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).int()


def padded(x):
    return F.pad(x, (0, -x.shape[1] % 8)).numpy()


def codes(packed):
    return (packed.codes.numpy(), 0)  # on a 16-byte boundary, as torch allocates


def linear_case(scheme, bits, rows, shape, fixed, seed):
    """(launch, expected): float sums of integers and of weights down to 2**-6 are exact, whatever their order."""
    shift, sign = random_parts(shape, scheme, bits, seed, most=12)
    if not fixed:
        shift = shift.clamp(-6 if scheme != "S3" else 0, 3)
    packed = pack_shift_weights((shift, sign), bits, scheme)
    x = integers((rows, shape[1]), seed)
    expected = fixed_linear(x, shift, sign) if fixed else x.float() @ (sign * 2.0**shift).T
    x = padded(x if fixed else x.float())
    y = np.full(expected.shape, 77, np.int64 if fixed else np.float32)
    name, grid, block, sizes = bitshift_cuda.plan_linear(*x.shape, shape[0], packed.bits, fixed)
    arguments = [codes(packed), x, y, *map(np.int32, (*sizes, packed.base, packed.zero))]
    return (name, grid, block, arguments), expected


def run(host, cases):
    for (launched, expected), arrays in zip(cases, host.run([launched for launched, _ in cases]), strict=True):
        assert np.array_equal(arrays[-1], expected.numpy()), (launched[:3], expected.shape)


@pytest.mark.parametrize("fixed", [False, True])
def test_linear(host_bitshift, fixed):
    shapes = [(1, 1), (33, 20), (10, 150), (70, 8)]
    cases = []
    for number, ((scheme, bits), shape) in enumerate(itertools.product(CODES, shapes)):
        cases.append(linear_case(scheme, bits, (1, 2, 5)[number % 3], shape, fixed, seed=number))
    run(host_bitshift, cases)
    reached = {launched[0] for launched, _ in cases}
    assert reached == {name for name in host_bitshift.names if name.startswith("bitshift_linear_fixed") == fixed} - {
        name for name in host_bitshift.names if not name.startswith("bitshift_linear")
    }


def test_linear_on_a_small_grid(host_bitshift):
    """As for a layer too large for a thread block per panel and tile."""
    (name, _, block, arguments), expected = linear_case("PS", 4, 7, (100, 40), False, 3)
    run(
        host_bitshift,
        [((name, (1, 1, 1), block, arguments), expected), ((name, (2, 3, 1), block, arguments), expected)],
    )


@pytest.mark.parametrize("scheme, bits", CODES)
def test_unpack(host_bitshift, scheme, bits):
    """Every code of the scheme; a convolution channels-last, a linear layer transposed."""
    conv = random_weights((5, 7, 3, 3), scheme, bits)
    packed = pack_shift_weights(conv, bits, scheme)
    blocks = packed.nbytes // (32 * packed.bits)
    name, grid, block = bitshift_cuda.plan_unpack(blocks, packed.bits)
    y, last = np.zeros(blocks * 256, np.float32), tuple(map(np.int32, (packed.base, packed.zero)))
    sizes = np.int64(blocks), np.int32(1), np.int64(256), np.int64(32)
    linear = random_weights((40, 20), scheme, bits)
    packed_linear = pack_shift_weights(linear, bits, scheme)
    z, sizes_linear = np.zeros((24, 64), np.float32), (np.int64(6), np.int32(3), np.int64(32), np.int64(64))
    arguments = [codes(packed), y, *sizes, *last], [codes(packed_linear), z, *sizes_linear, *last]
    (_, y), (_, z) = host_bitshift.run([(name, grid, block, arguments[0]), (name, (1, 1, 1), (32, 2, 1), arguments[1])])
    assert np.array_equal(y[: conv.numel()], conv.permute(0, 2, 3, 1).numpy().ravel())
    assert np.array_equal(z[:20, :40], linear.numpy().T)


def random_geometry(generator):
    return (
        (generator.choice((1, 2)), generator.choice((1, 3))),
        (generator.choice((0, 1)), generator.choice((0, 2))),
        (generator.choice((1, 2)), generator.choice((1, 2))),
        generator.choice((1, 2)),
    )


def test_conv2d_fixed(host_bitshift):
    generator, cases = random.Random(0), []
    for number, (scheme, bits) in enumerate(CODES):
        geometry = random_geometry(generator)
        weight_shape = (4, 3, generator.choice((1, 3)), generator.choice((1, 2)))
        shift, sign = random_parts(weight_shape, scheme, bits, number, most=12)
        packed = pack_shift_weights((shift, sign), bits, scheme)
        x = integers((2, 3 * geometry[3], 7, 6), number, most=2**18)
        expected = fixed_conv2d(x, shift, sign, *geometry)
        sizes = bitshift_cuda.conv2d_sizes(x.shape, weight_shape, expected.shape, *geometry)
        last = map(np.int32, (*sizes, packed.base, packed.zero))
        grid, block = bitshift_cuda.plan_outputs(expected.numel())
        y = np.zeros(expected.shape, np.int64)
        arguments = [codes(packed), x.numpy(), y, *last]
        cases.append(((f"bitshift_conv2d_fixed_{packed.bits}", grid, block, arguments), expected))
    run(host_bitshift, cases)
    assert {launched[0] for launched, _ in cases} == {n for n in host_bitshift.names if "conv2d" in n}


def test_multiply(tmp_path):
    """On integers, where any order of additions gives the same bits."""
    host, generator, cases = HostKernels("multiply", tmp_path), random.Random(1), []
    for seed in range(10):
        geometry = random_geometry(generator)
        x, weight = integers((2, 3 * geometry[3], 7, 6), seed).float(), integers((4, 3, 3, 2), seed).float()
        expected = F.conv2d(x.double(), weight.double(), None, *geometry).float()
        sizes = bitshift_cuda.conv2d_sizes(x.shape, weight.shape, expected.shape, *geometry)
        grid, block = bitshift_cuda.plan_outputs(expected.numel())
        arguments = [weight.numpy(), x.numpy(), np.zeros(expected.shape, np.float32), *map(np.int32, sizes)]
        cases.append((("multiply_conv2d", grid, block, arguments), expected))
        x, weight = integers((5, 11), seed, 99).float(), integers((300, 11), seed, 99).float()
        y = np.zeros((5, 300), np.float32)
        cases.append(
            (
                ("multiply_linear", (3, 1, 1), block, [weight.numpy(), x.numpy(), y, *map(np.int32, (5, 11, 300))]),
                x @ weight.T,
            )
        )
    run(host, cases)


@pytest.mark.parametrize("scheme, bits", [(scheme, bits) for scheme, bits in CODES if bits < 5 - (scheme == "Q")])
def test_int8(host_bitshift, scheme, bits):
    """Integers in units of the smallest magnitude; zeros behind an odd number of blocks."""
    launches, expected = [], []
    for rows, columns in ((70, 20), (32, 32), (1, 1)):
        weight = random_weights((rows, columns), scheme, bits)
        packed = pack_shift_weights(weight, bits, scheme)
        panels, blocks = -(-rows // 32), -(-columns // 8)
        y = np.full((panels * 32, -(-blocks // 2) * 16), 77, np.int8)
        sizes = map(np.int32, (panels, blocks, packed.zero))
        launches.append((*bitshift_int8_cuda.plan(panels, blocks, bits), [codes(packed), y, *sizes]))
        expected.append((weight / 2.0 ** exponents(scheme, bits)[0]).char().numpy())
    for (_, y), wanted in zip(host_bitshift.run(launches), expected, strict=True):
        rows, columns = wanted.shape
        assert np.array_equal(y[:rows, :columns], wanted)
        assert not y[:, -(-columns // 8) * 8 :].any()


def test_int8_wrapper(host_bitshift, monkeypatch):
    """The library's product on the kernel's integers: few rows, odd sizes, the fill cut off again."""
    monkeypatch.setattr(launch, "launch", host_bitshift.launch)
    shift, sign = random_parts((33, 20), "PS", 4)
    packed, x = pack_shift_weights((shift, sign), 4, "PS"), integers((40, 20), 5, most=127).to(torch.int8)
    weights = Weights(packed.codes, packed.shape, packed.bits, packed.base, packed.zero)
    expected = x.int() @ (sign * 2 ** (shift + 6)).int().T
    assert all(torch.equal(bitshift_int8_cuda.linear(x[:rows], weights), expected[:rows]) for rows in (1, 40))


def test_host_run_detects_faults(host_bitshift):
    """Too few codes must end the host program: otherwise the runs above prove nothing."""
    (name, grid, block, arguments), _ = linear_case("PS", 4, 1, (33, 20), True, 0)
    short = [(arguments[0][0][:-4].copy(), 0), *arguments[1:]]
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        host_bitshift.run([(name, grid, block, short)])


def test_plans_stay_within_the_limits():
    for rows, inputs, outputs in ((1, 8, 1), (10**6, 25088, 4096), (5, 25088, 100000)):
        for bits, fixed in itertools.product(range(2, 7), (False, True)):
            _, grid, block, sizes = bitshift_cuda.plan_linear(rows, inputs, outputs, bits, fixed)
            assert np.prod(block) <= 1024 and block[1] <= bitshift_cuda.WARPS and grid[1] <= 65535
            assert min(grid) >= 1 and max(sizes) < 2**31
    assert bitshift_cuda.plan_outputs(2**40)[0][0] <= 65535 and bitshift_cuda.plan_unpack(2**40, 4)[1][0] <= 65535
