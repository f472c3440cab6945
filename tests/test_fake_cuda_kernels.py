"""Launches of our CUDA kernels without a GPU: arguments against the PTX of the same source, sizes against CUDA's."""

import itertools
from pathlib import Path

import pytest
import torch

from common.kernels import (
    PackedShiftWeights,
    bitshift_conv2d,
    bitshift_linear,
    bitshift_naive_cuda,
    launch,
    multiply_conv2d,
    multiply_linear,
    shift2d,
    shift_conv1x1,
)
from common.kernels.bitshift_pack import code_bytes
from tests.fake import kernels
from tests.fake.child import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Usual sizes, odd ones, and some that no GPU holds: nothing is computed here, but grids and 32-bit sizes have ends.
IMAGES = [(2, 16, 32, 32), (1, 9, 1, 1), (3, 67, 7, 13), (2, 40, 14, 9), (256, 1024, 14, 14), (200_000, 16, 8, 8),
          (1, 16, 70_000, 3), (65_536, 144, 32, 32), (4, 64, 30_000, 30_000)]  # fmt: skip
ROWS, MATRICES = (1, 3, 40, 70_000), [(7, 5), (4096, 11_008), (1_000_000, 8)]
CONVOLUTIONS = [((16, 32, 3, 3), 1, 1), ((10, 12, 1, 1), 2, 0), ((64, 8, 5, 5), 1, 2)]


def packed_weights(shape, bits):
    codes = torch.empty(code_bytes(shape, bits), dtype=torch.uint8, device="cuda")
    return PackedShiftWeights(codes, bits, "PS", 1 - 2 ** (bits - 1), True, shape)


def shifts():
    integers = (torch.uint8, torch.int64)
    for shape, dtype, layout, size in itertools.product(IMAGES, (*DTYPES, *integers), LAYOUTS, (3, 2)):
        x = torch.empty(shape, dtype=dtype, device="cuda").contiguous(memory_format=layout)
        shift2d(x, size), shift2d(x, 3, dilation=2)
        if x.is_floating_point():
            shift2d(x.requires_grad_(), size).sum().backward()
    odd = torch.empty(2 * 16 * 4 * 5 + 1, dtype=torch.float32, device="cuda")[1:]  # an address that 16 does not divide
    shift2d(odd.view(2, 16, 4, 5)), shift2d(odd.view(2, 4, 5, 16).permute(0, 3, 1, 2))


@torch.no_grad()
def fused_shifts():
    for allowed, shape, dtype, layout in itertools.product((True, False), IMAGES, DTYPES, LAYOUTS):
        torch.backends.cudnn.allow_tf32 = allowed
        x = torch.empty(shape, dtype=dtype, device="cuda").contiguous(memory_format=layout)
        for outputs, stride in ((16, 1), (20, 2), (144, 1)):
            weight = torch.empty(outputs, shape[1], 1, 1, dtype=dtype, device="cuda")
            shift_conv1x1(x, weight, None if stride == 1 else weight[:, 0, 0, 0], stride)


@torch.no_grad()
def packed_linear_layers():
    for bits, shape in itertools.product(range(2, 7), MATRICES):
        packed = packed_weights(shape, bits)
        bias = torch.empty(shape[0], device="cuda")
        for rows, dtype in itertools.product(ROWS, DTYPES):
            x = torch.empty(rows, shape[1], dtype=dtype, device="cuda")
            bitshift_linear(x, packed), bitshift_linear(x, packed, bias.to(dtype))
            if dtype == torch.float32 and shape[0] < 10_000:
                bitshift_linear(x, packed, arithmetic="fixed")
                if bits <= 4:
                    bitshift_linear(x, packed, bias, arithmetic="int8", activation_bits=(4, 4))


@torch.no_grad()
def packed_convolutions():
    for bits, (shape, stride, padding), dtype in itertools.product(range(2, 7), CONVOLUTIONS, DTYPES):
        packed = packed_weights(shape, bits)
        for batch, layout in itertools.product((1, 70_000), LAYOUTS):
            x = torch.empty(batch, shape[1], 9, 11, dtype=dtype, device="cuda").contiguous(memory_format=layout)
            bitshift_conv2d(x, packed, None, stride, padding)
            if dtype == torch.float32:
                bitshift_conv2d(x, packed, None, stride, padding, arithmetic="fixed")


@torch.no_grad()
def naive_layers():
    for shape, stride, padding in CONVOLUTIONS:
        weight, codes = torch.empty(shape, device="cuda"), torch.empty(shape, dtype=torch.int32, device="cuda")
        for batch in (1, 70_000):
            x = torch.empty(batch, shape[1], 9, 11, device="cuda")
            bitshift_naive_cuda.conv2d(x, weight, stride, padding), bitshift_naive_cuda.conv2d(x.int(), codes, stride)
            multiply_conv2d(x, weight, weight[:, 0, 0, 0].clone(), stride, padding)
    for rows, shape in itertools.product(ROWS, MATRICES):
        multiply_linear(torch.empty(rows, shape[1], device="cuda"), torch.empty(shape, device="cuda"))


PROBE = "nothing"  # the source of what is launched once, to learn whether launches work
CALLS = {  # the sources that each function reaches
    shifts: ("shift2d",),
    fused_shifts: ("shift_conv1x1", "shift2d"),
    packed_linear_layers: ("bitshift", "bitshift_half"),
    packed_convolutions: ("bitshift", "bitshift_half"),
    naive_layers: ("bitshift_naive", "multiply"),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each function launches, found once."""
    found = {}

    def of(call):
        if call not in found:
            found[call] = run(call, folder=tmp_path_factory.mktemp(call.__name__))
            assert found[call]["status"] == 0 and not found[call]["notes"], found[call].text
        return found[call]["launches"]

    return of


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_launches_fit_kernels_and_limits(call, launched):
    launches = launched(call)
    faults = {fault for each in launches for fault in kernels.faults(each)}
    assert launches and not faults, faults
    assert {each["stem"] for each in launches} == {*CALLS[call], PROBE}


@pytest.mark.parametrize("stem", sorted({stem for stems in CALLS.values() for stem in stems}))
def test_every_kernel_is_launched(stem, launched):
    calls = [call for call, stems in CALLS.items() if stem in stems]
    names = {each["name"] for call in calls for each in launched(call) if each["stem"] == stem}
    missing = set(kernels.entries(stem)) - names
    assert not missing, f"nothing launches {sorted(missing)} of {stem}.cu"


def test_every_source_is_here():
    sources = {path.stem for path in Path(launch.__file__).parent.rglob("*.cu")}
    assert sources == {PROBE, *(stem for stems in CALLS.values() for stem in stems)}
