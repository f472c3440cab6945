"""The CPU kernels of bitshift in a process: threads, forks, other processors, and what happens without numba."""

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.kernels import bitshift_conv2d, bitshift_linear, pack_shift_weights, threads
from common.kernels.shift2d import memory_format_of
from tests.common.bitshift_cases import CODES, random_weights

ROOT = Path(__file__).resolve().parents[2]
module = importlib.import_module("common.kernels.bitshift")


@pytest.fixture
def numba():
    pytest.importorskip("numba")
    assert module._cpu_kernels(), "numba is there, but the kernels do not load"


@pytest.fixture(params=["openmp", "pool"])
def pool(request, monkeypatch, numba):
    """Both ways to use several threads, with 3 of them whatever the machine has."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "_openmp_parallel", lambda: None)
    elif threads._openmp_parallel() is None:
        pytest.skip("torch has no GNU OpenMP here")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    torch.set_num_threads(before)


@functools.cache
def large_layer():
    """(x, packed, sums) on integers, so that any order of additions gives the same bits; shared among threads."""
    weight = random_weights((700, 2100), "PS", 4)
    x = torch.randint(-8, 9, (5, 2100)).float()
    return x, pack_shift_weights(weight, 4, "PS"), F.linear(x.double(), weight.double()).float()


def test_several_threads(pool):
    """One row, several, and fixed point: the same bits as on one thread."""
    x, packed, expected = large_layer()
    for arithmetic in ("float", "fixed"):
        threaded = [bitshift_linear(x[:rows], packed, arithmetic=arithmetic) for rows in (1, 5)]
        torch.set_num_threads(1)
        alone = [bitshift_linear(x[:rows], packed, arithmetic=arithmetic) for rows in (1, 5)]
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(threaded, alone, strict=True))
        if arithmetic == "float":
            assert torch.equal(threaded[1], expected)


def test_concurrent_callers(pool):
    x, packed, expected = large_layer()
    wrong, barrier = [], threading.Barrier(4)

    def call():
        barrier.wait()
        for _ in range(5):
            for rows in (1, 5):
                if not torch.equal(bitshift_linear(x[:rows], packed), expected[:rows]):
                    wrong.append(rows)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers) and not wrong


def _in_child(x, packed, expected, connection):
    # NumPy compares: torch's own threads are dead in a forked process, its larger operations would hang.
    connection.send(np.array_equal(bitshift_linear(x, packed).numpy(), expected.numpy()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork(pool):
    x, packed, expected = large_layer()
    context = multiprocessing.get_context("fork")
    assert torch.equal(bitshift_linear(x, packed), expected)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(x, packed, expected, sender))
    child.start()
    assert receiver.poll(60), "the forked process hangs"
    assert receiver.recv() is True
    child.join(60)
    assert child.exitcode == 0


ON_ANOTHER = """
import torch, torch.nn.functional as F
from common.kernels import bitshift_linear, bitshift_conv2d, pack_shift_weights
from common.kernels.shift2d import memory_format_of
from tests.common.bitshift_cases import CODES, random_weights
from common.kernels import codes_cpu_avx2, vectors
assert not vectors.has_avx512() and codes_cpu_avx2.available() == {assembly}
for scheme, bits in CODES:
    weight = random_weights((40, 24), scheme, bits)
    packed, x = pack_shift_weights(weight, bits, scheme), torch.randint(-8, 9, (3, 24)).float()
    for rows in (1, 3):
        expected = F.linear(x[:rows].double(), weight.double())
        assert ((bitshift_linear(x[:rows], packed) - expected).abs() <= 1e-5 * expected.abs().max()).all()
    conv = random_weights((5, 7, 3, 3), scheme, bits)
    assert torch.equal(pack_shift_weights(conv, bits, scheme).unpack(), conv)
    weights = pack_shift_weights(conv, bits, scheme)
    x = torch.zeros(1, 7, 3, 3); x[0, 6, 2, 1] = 1
    assert torch.equal(bitshift_conv2d(x, weights)[0, :, 0, 0], conv[:, 6, 2, 1])
    conv, x = random_weights((16, 32, 3, 3), scheme, bits), torch.randint(-8, 9, (1, 32, 5, 5)).float()
    y, expected = bitshift_conv2d(x, pack_shift_weights(conv, bits, scheme)), F.conv2d(x.double(), conv.double())
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()
"""


def test_assembly_where_the_processor_takes_it(numba):
    """Otherwise every test would pass without it."""
    features = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    available = importlib.import_module("common.kernels.codes_cpu_avx2").available()
    assert available == (features.get("avx2", False) and features.get("fma", False))


def _without(feature):
    """Variables with which numba compiles for this processor without AVX (and what needs it), AVX-512 or FMA."""
    if feature == "avx":
        return {"NUMBA_ENABLE_AVX": "0"}
    features = importlib.import_module("llvmlite.binding").get_host_cpu_features()
    if not features.get(feature):
        pytest.skip("instruction set")
    features.update({name: False for name in features if name == feature or name.startswith("avx512")})
    return {"NUMBA_CPU_FEATURES": features.flatten()}


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["avx", "fma", "avx512f"])
def test_on_a_processor_without(numba, tmp_path, feature):
    """Weights made in the instructions that LLVM chooses; without AVX, the bytes of floats computed, not looked up.
    Without AVX-512, what other tests reach on other processors only."""
    option = _without(feature)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path), **option}
    command = [sys.executable, "-c", ON_ANOTHER.replace("{assembly}", str(feature == "avx512f"))]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("scheme, bits", CODES)
def test_kernels_unpack_what_was_packed(numba, scheme, bits):
    weight = random_weights((5, 70, 3, 3), scheme, bits)
    packed = pack_shift_weights(weight, bits, scheme)
    assert torch.equal(module._cpu_kernels().unpack(module._weights(packed, "test", 4)), weight)


# (N, C, H, W), outputs, kernel, stride, padding, dilation, bias
@pytest.mark.parametrize("of_x, of_weights", [(-120, 90), (100, -90), (120, -90), (0, 60), (-60, -60), (-148, 90)])
@pytest.mark.parametrize("scheme, bits", CODES)
def test_one_row_far_from_one(numba, scheme, bits, of_x, of_weights):
    """One row is multiplied by scaled weights and scaled itself: what float32 can hold must come out."""
    weight = random_weights((70, 40), scheme, bits) * 2.0**of_weights
    x = torch.randint(-8, 9, (1, 40), generator=torch.Generator().manual_seed(0)).float() * 2.0**of_x
    expected = F.linear(x.double(), weight.double())
    magnitude = F.linear(x.double().abs(), weight.double().abs())
    y = bitshift_linear(x, pack_shift_weights(weight, bits, scheme)).double()
    assert ((y - expected).abs() <= magnitude * 1e-6).all()
    assert expected.any() and expected.float().isfinite().all()


@pytest.mark.parametrize("shape", [(25088,), (1, 1, 25088)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scheme, bits", CODES)
def test_a_long_row(numba, scheme, bits, has_bias, shape):
    """Sums of sums: the error does not grow with the length. Also the sizes that take the shortest way."""
    generator = torch.Generator().manual_seed(0)
    weight = random_weights((64, 25088), scheme, bits)
    x, bias = torch.randn(shape, generator=generator), torch.randn(64, generator=generator) if has_bias else None
    packed = pack_shift_weights(weight, bits, scheme)
    assert module._one_row(x, packed, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    y = bitshift_linear(x, packed, bias)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("scheme, bits", CODES)
def test_one_row_with_a_value_that_is_no_number(numba, scheme, bits, value):
    weight = random_weights((70, 40), scheme, bits)
    x = torch.arange(40.0)[None]
    x[0, 7] = value
    y, expected = bitshift_linear(x, pack_shift_weights(weight, bits, scheme)), F.linear(x, weight)
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert not torch.isfinite(y).any()


SMALL_CONVOLUTIONS = [
    ((1, 64, 14, 14), 32, (3, 3), (1, 1), (1, 1), (1, 1), True),
    ((2, 32, 9, 7), 16, (3, 2), (2, 1), (1, 0), (1, 2), True),
    ((1, 256, 7, 7), 64, (1, 1), (1, 1), (0, 0), (1, 1), False),
    ((3, 16, 5, 5), 48, (1, 1), (2, 2), (0, 0), (1, 1), False),
    ((1, 48, 1, 1), 16, (3, 3), (1, 1), (1, 2), (1, 1), True),
    ((2, 512, 7, 7), 16, (3, 3), (1, 1), (1, 1), (1, 1), False),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", SMALL_CONVOLUTIONS, ids=str)
def test_small_convolutions(pool, case, layout, monkeypatch):
    """Multiplied from the codes, without the library: every code, on three threads."""
    monkeypatch.setattr(importlib.import_module("common.kernels.bitshift_cpu"), "equals_library", lambda: True)
    torch.manual_seed(0)
    shape, outputs, kernel, *geometry, biased = case
    bias = torch.randint(-8, 9, (outputs,)).float() if biased else None
    for scheme, bits in (("PS", 4), ("Q", 5), ("S3", 3), ("PS", 6), ("PS", 2)):
        weight = random_weights((outputs, shape[1], *kernel), scheme, bits)
        packed = pack_shift_weights(weight, bits, scheme)
        x = torch.randint(-8, 9, shape).float().contiguous(memory_format=layout)
        assert _is_multiplied_here(packed, x, geometry)
        y = bitshift_conv2d(x, packed, bias, *geometry)
        expected = F.conv2d(x.double(), weight.double(), bias if bias is None else bias.double(), *geometry)
        assert y.stride() == expected.float().contiguous(memory_format=memory_format_of(x)).stride()
        assert (y - expected).abs().max() <= 1e-6 * expected.abs().max()


def _is_multiplied_here(packed, x, geometry):
    from common.kernels import bitshift_cpu
    from common.kernels.bitshift_pack import output_size

    return bitshift_cpu._is_small(output_size(x.shape, packed.shape, *geometry), packed.shape, 1)


def test_kernels_are_compiled_again_when_any_of_their_sources_changed(numba):
    """numba's cache on disk would keep what it has: it heeds the entry's file only. So files' names hold a digest."""
    from common.kernels import bitshift_cpu_kernels

    threads.compiled(bitshift_cpu_kernels.one_row_entry)
    assert bitshift_cpu_kernels.one_row_entry.__qualname__ == f"one_row_entry_{threads._sources()}"


@pytest.mark.parametrize("why", ["missing", "switched off"])
def test_without_numba(why, monkeypatch, caplog):
    """The plain path, and one line in the log."""
    if why == "missing":
        monkeypatch.setitem(sys.modules, "numba", None)
        for name in ("bitshift_cpu", "bitshift_cpu_kernels", "codes_cpu", "product_cpu", "rows_cpu_avx512", "vectors"):
            monkeypatch.delitem(sys.modules, f"common.kernels.{name}", raising=False)
            monkeypatch.delattr(f"common.kernels.{name}", raising=False)
    else:
        numba = pytest.importorskip("numba")
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    monkeypatch.setitem(module._KERNELS, "cpu", functools.cache(module._cpu_kernels.__wrapped__))
    x, packed, expected = large_layer()
    for _ in range(2):
        assert torch.equal(bitshift_linear(x, packed), expected)
    (record,) = caplog.records
    assert record.name == "effnets" and record.levelname == "WARNING"
    assert record.getMessage().startswith("bitshift: plain PyTorch on the CPU")
