"""bitshift_half.cu without a GPU: run on the host under the sanitizers, bit-equal to independent results.

Activations are integers and weights powers of two, so that sums are exact in float32, in any order, and rounded once.
(test_kernel_sources.py compiles it for every architecture.)
"""

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.kernels import bitshift_cuda, launch, pack_shift_weights
from common.kernels import bitshift_half_cuda as half
from common.kernels.bitshift_reference import Weights
from tests.common.bitshift_cases import CODES, random_parts, random_weights
from tests.host import nvrtc
from tests.host.gxx import HostKernels

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostKernels("bitshift_half", tmp_path_factory.mktemp("host"))


def packed_weights(weight, scheme, bits):
    packed = pack_shift_weights(weight, bits, scheme)
    return Weights(packed.codes, packed.shape, packed.bits, packed.base, packed.zero)


def codes(weights):
    return weights.codes.numpy(), 0  # on a 16-byte boundary, as torch allocates


def as_array(tensor):
    return tensor.contiguous().view(torch.int16).numpy()


def as_tensor(array, dtype):
    return torch.from_numpy(array.copy()).view(dtype)


def linear_case(scheme, bits, dtype, rows, shape, bias=False, processors=8, seed=0, offset=0):
    """(launch, expected): as the wrapper launches it; offset: bytes by which x misses a 16-byte boundary."""
    shift, sign = random_parts(shape, scheme, bits, seed, most=10)
    shift = shift.clamp(-6 if scheme != "S3" else 0, 3)
    weights = packed_weights((shift, sign), scheme, bits)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-99, 100, (rows, shape[1]), generator=generator).float()
    b = torch.randint(-99, 100, shape[:1], generator=generator).float()
    expected = (x @ (sign * 2.0**shift).T + (b if bias else 0)).to(dtype)
    x = F.pad(x, (0, -shape[1] % 8)).to(dtype)
    plan = half.plan_linear(rows, x.shape[1] // 8, shape[0], weights.bits, dtype, processors)
    y = np.full(expected.shape, 77, np.int16)
    partial, arrived = np.full(plan.partials, np.nan, np.float32), np.zeros(plan.counters, np.int32)
    integers = map(np.int32, (*plan.sizes, bias))
    arrays = [codes(weights), (as_array(x), offset), as_array(b.to(dtype)), y, partial, arrived]
    return (*plan[:3], [*arrays, *integers, *half.constants(dtype, weights)]), expected


def run_linear(host, cases):
    launches = [launched for launched, _ in cases]
    for (launched, expected), arrays in zip(cases, host.run(launches), strict=True):
        assert torch.equal(as_tensor(arrays[3], expected.dtype), expected), (launched[:3], expected.shape)
        assert not arrays[5].any(), "counters must end as zeros"


def test_linear(host):
    """Every scheme, format and kernel."""
    shapes, cases = [(150, 72), (33, 20), (1, 1)], []
    for number, ((scheme, bits), dtype) in enumerate(itertools.product(CODES, DTYPES)):
        if dtype == torch.float16 and pack_bits(scheme, bits) > 5:
            continue
        for rows in (1, 9) if number % 2 else (8, 30):
            cases.append(linear_case(scheme, bits, dtype, rows, shapes[(number + rows) % 3], rows > 8, seed=number))
    run_linear(host, cases)
    assert {launched[0] for launched, _ in cases} == {name for name in host.names if "linear" in name}


def pack_bits(scheme, bits):
    return packed_weights(random_weights((4, 4), scheme, bits, most=10), scheme, bits).bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_in_parts(host, dtype):
    """Inputs dealt out to several thread blocks, whose sums the last of them adds; more rows than one block does."""
    cases = [
        linear_case("PS", 4, dtype, 3, (140, 520), processors=8),
        linear_case("PS", 5, dtype, 40, (70, 264), bias=True, processors=16),
    ]
    assert [launched[1] for launched, _ in cases] == [(2, 1, 2), (2, 2, 1)]
    (name, (x, y, _), block, arguments), expected = cases[1]
    partial, arrived = np.full(x * y * 3 * 2048, np.nan, np.float32), np.zeros(x * y, np.int32)
    cases[1] = (name, (x, y, 3), block, [*arguments[:4], partial, arrived, *arguments[6:]]), expected
    run_linear(host, cases)


def test_any_number_of_warps(host):
    (name, grid, _, arguments), expected = linear_case("S3", 3, torch.bfloat16, 5, (64, 200), seed=3)
    run_linear(host, [((name, grid, (32, warps, 1), arguments), expected) for warps in (1, 2, 8)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack(host, dtype):
    """Every code; the rows of a linear layer, a convolution in the order of storage."""
    launches, expected = [], []
    for scheme, bits in CODES:
        weight, conv = (random_weights(shape, scheme, bits, most=14) for shape in ((70, 20), (5, 7, 3, 3)))
        weights, of_conv = packed_weights(weight, scheme, bits), packed_weights(conv, scheme, bits)
        if half.constants(dtype, weights) is None:
            assert dtype == torch.float16 and bits == 6
            continue
        y, sizes = np.zeros((96, 24), np.int16), map(np.int32, (3, 3))
        plan = half.plan_rows(9, weights.bits, dtype)
        launches.append((*plan, [codes(weights), y, *sizes, *half.constants(dtype, weights)]))
        expected.append(weight)
        blocks = of_conv.codes.numel() // (32 * of_conv.bits)
        plan, y = half.plan_flat(blocks, of_conv.bits, dtype), np.zeros(blocks * 256, np.int16)
        launches.append((*plan, [codes(of_conv), y, np.int64(blocks), *half.constants(dtype, of_conv)]))
        expected.append(conv.permute(0, 2, 3, 1).flatten())
    for (_, y), wanted in zip(host.run(launches), expected, strict=True):
        index = tuple(slice(0, size) for size in wanted.shape)
        assert torch.equal(as_tensor(y, dtype).float()[index], wanted)


def test_host_run_detects_faults(host):
    """Too few codes, or codes off their boundary, must not go unnoticed."""
    (name, grid, block, arguments), _ = linear_case("PS", 4, torch.bfloat16, 1, (33, 24))
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        host.run([(name, grid, block, [(arguments[0][0][:-16].copy(), 0), *arguments[1:]])])
    with pytest.raises(AssertionError, match="misaligned"):
        host.run([(name, grid, block, [(arguments[0][0], 4), *arguments[1:]])])


@pytest.fixture
def on_host(host, monkeypatch):
    """The wrappers on tensors of the CPU, as if it were a GPU of 8 multiprocessors."""
    monkeypatch.setattr(launch, "launch", host.launch)
    monkeypatch.setattr(half, "_processors", lambda device: 8)
    monkeypatch.setattr(half._counters, "take", lambda count, device: torch.zeros(count, dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrappers(on_host, dtype):
    """Arguments arrive where the kernels expect them; rows for which weights are unpacked; convolutions; odd sizes."""
    shift, sign = random_parts((70, 260), "PS", 4, most=0)
    weights, weight = packed_weights((shift, sign), "PS", 4), sign * 2.0**shift
    x, bias = torch.randint(-9, 10, (65, 260)).to(dtype), torch.randint(-9, 10, (70,)).float()
    for rows in (65, 9, 2, 0):
        for b in (None, bias):
            y = bitshift_cuda.linear(x[:rows], weights, b)
            expected = (x[:rows].float() @ weight.T + (0 if b is None else b)).to(dtype)
            assert y.dtype == dtype and torch.equal(y, expected)
    off_boundary = x.view(-1)[1:261][None]
    assert torch.equal(half.linear(off_boundary, weights, None), (off_boundary.float() @ weight.T).to(dtype))
    conv = random_weights((6, 4, 3, 2), "S3", 3)
    x = torch.randint(-9, 10, (2, 8, 7, 6)).to(dtype)
    geometry = (2, 1), (1, 0), (1, 2), 2
    y = bitshift_cuda.conv2d(x, packed_weights(conv, "S3", 3), bias[:6], *geometry)
    expected = F.conv2d(x.float(), conv, bias[:6], *geometry).to(dtype)
    assert y.dtype == dtype and torch.equal(y, expected) and y.is_contiguous()


def test_wide_accesses():
    """Codes in 16-byte loads, unpacked weights in 16-byte stores."""
    options = [*launch.OPTIONS, "--gpu-architecture=compute_80"]
    others = r"^BITSHIFT_HALF\((?!bf16, BFloat16, 4|f16, Float16, 3).*\)$"  # need not be compiled again
    source = re.sub(others, "", launch.source("bitshift_half"), flags=re.M)
    _, _, ptx = nvrtc.compile_source(source, "bitshift_half.cu", options)
    kernels = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx, flags=re.S | re.M))
    loads, stores = (rf"{kind}\.global(\.nc)?\.(v4\.[ub]32|v2\.[ub]64)" for kind in ("ld", "st"))
    assert re.search(loads, kernels["bitshift_linear_bf16_4_1"])
    assert all(re.search(stores, kernels[name]) for name in ("bitshift_rows_bf16_4", "bitshift_flat_f16_3"))


def weights_of(bits, base, zero):
    return Weights(torch.zeros(0, dtype=torch.uint8), (0, 0), bits, base, zero)


def test_constants_refuse_what_the_format_cannot_hold():
    assert half.constants(torch.float32, weights_of(4, -7, True)) is None
    assert half.constants(torch.float16, weights_of(6, -31, True)) is None
    assert half.constants(torch.float16, weights_of(4, -26, True)) is None  # 2**-25
    assert half.constants(torch.float16, weights_of(4, 9, True)) is None  # 2**16
    assert half.constants(torch.bfloat16, weights_of(5, 113, True)) is None  # 2**128
    offset, scale = half.constants(torch.bfloat16, weights_of(4, -7, True))
    assert (offset, scale) == (0, (247 << 7) * 0x10001)  # 2**120 makes 2**(m - 127) 2**(m - 7)


@pytest.mark.parametrize("rows", [1, 8, 9, 32, 64])
def test_plans_stay_within_the_limits(rows):
    for inputs, outputs in ((8, 1), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (25088, 100000)):
        plan = half.plan_linear(rows, inputs // 8, outputs, 4, torch.bfloat16, 132)
        groups, row_groups, parts = plan.grid
        assert plan.block[1] in (1, 2, 4, 8) and parts * groups * row_groups <= max(2 * 132, groups * row_groups)
        words, tiles = (4, 1) if rows <= 8 else (2, 4)
        assert groups * 32 * words >= outputs and row_groups * 8 * tiles >= rows and plan.counters < half.COUNTERS
        if inputs >= 4096:
            assert parts * groups * row_groups >= 112, "not enough thread blocks to read memory at its speed"
    assert half.plan_rows(2**40, 4, torch.float16)[1][0] <= 65535


class Streams:
    """What `_Counters` asks of torch.cuda, and of a stream."""

    def __init__(self, monkeypatch):
        self.capturing, self.cuda_stream, self.waits = False, 7, []
        monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)

    def record_event(self):
        return f"filled on stream {self.cuda_stream}"

    def wait_event(self, event):
        self.waits.append((self.cuda_stream, event))


def test_counters_are_never_shared(monkeypatch):
    """A stream keeps its own, and waits once for them to be zeros; every layer of a graph has others."""
    streams, counters, device = Streams(monkeypatch), half._Counters(), torch.device("cpu")
    streams.capturing = True
    assert not counters.take(5, device).any() and not counters.pools
    streams.capturing = False
    first = counters.take(5, device)
    assert counters.take(3, device) is first and counters.take(2000, device) is not first
    streams.cuda_stream = 8
    taken = [counters.take(2000, device), counters.of_stream[device, 7], first]
    assert streams.waits == [(7, "filled on stream 7"), (7, "filled on stream 7"), (8, "filled on stream 7")]
    streams.capturing = True
    taken += [counters.take(half.COUNTERS // 2 - 3000, device) for _ in range(3)]  # the third is not from the pool
    spans = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in taken)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)) and not any(t.any() for t in taken)
    assert len(streams.waits) == 3, "nothing outside may be waited for while a graph is captured"
