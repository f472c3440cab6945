"""The CPU kernels in a process: threads, forks, numba's cache, and what happens where numba is missing."""

import functools
import importlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from common.kernels import shift2d, shift2d_reference, threads

ROOT = Path(__file__).resolve().parents[2]
module = importlib.import_module("common.kernels.shift2d")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def numba():
    pytest.importorskip("numba")
    assert module._cpu_kernel(), "numba is there, but the kernels do not load"


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


def large_inputs():
    for layout in LAYOUTS:
        x = torch.randn(8, 72, 31, 33).contiguous(memory_format=layout)
        assert threads.thread_count(8 * 31, x.numel() * 4 // (8 * 31)) == torch.get_num_threads()
        yield x, shift2d_reference(x)


def python(code, **environment):
    """Run `code` in a fresh interpreter at the repository's root; returns (stdout, stderr)."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_number_of_threads(pool, monkeypatch):
    """Follows torch's setting and leaves it alone; a small tensor stays on one thread."""
    used = []
    run_in_pool, openmp = threads._run_in_pool, threads._openmp_parallel()
    monkeypatch.setattr(threads, "_run_in_pool", lambda *a: (used.append(a[-1]), run_in_pool(*a)))
    if pool == "openmp":
        monkeypatch.setattr(threads, "_openmp_parallel", lambda: lambda *a: (used.append(a[2]), openmp(*a)))
    for setting in (1, 2, 3):
        torch.set_num_threads(setting)
        for x, expected in large_inputs():
            assert torch.equal(shift2d(x), expected) and torch.get_num_threads() == setting
        assert used == [] if setting == 1 else used[-2:] == [setting, setting]
    count = len(used)
    shift2d(torch.randn(1, 9, 8, 8))
    assert len(used) == count


def test_every_thread_works(pool):
    """All three run at the same time (each waits for the others), and every piece of the work is taken once."""
    numba = pytest.importorskip("numba")
    fetch_add = importlib.import_module("common.kernels.vectors").fetch_add
    taken = np.zeros(64, np.int64)

    def body(arguments):
        a = numba.carray(arguments, 6)
        fetch_add(a[0] + 8, 1)
        patience = 10**9
        while fetch_add(a[0] + 8, 0) < 3 and patience:
            patience -= 1
        while patience:
            first = fetch_add(a[0], a[3])
            if first >= a[4]:
                return
            for piece in range(first, min(first + a[3], a[4])):
                fetch_add(a[5] + 8 * piece, 1)

    kernel = numba.cfunc(numba.types.void(numba.types.CPointer(numba.types.int64)))(body)
    threads.run(threads.Kernel(kernel), (taken.ctypes.data,), len(taken), threads.GRAIN_BYTES // 4)
    assert (taken == 1).all()


@pytest.fixture
def streaming(numba, monkeypatch):
    """shift2d_cpu as on a machine without caches, where every output is written past them if its place allows it."""
    kernels = importlib.import_module("common.kernels.shift2d_cpu")
    monkeypatch.setattr(threads, "cache_bytes", lambda: 0)
    kernels._plan.cache_clear()
    yield kernels
    kernels._plan.cache_clear()


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("channels, dtype", [(16, torch.bfloat16), (72, torch.float32), (33, torch.int8)])
def test_written_past_the_cache(streaming, pool, channels, dtype, direction):
    """Channels-last, pixels of 32, 288 and 33 bytes, y at a multiple of 32 bytes and not; on several threads too."""
    x = torch.randint(-100, 100, (4, channels, 63, 35)).to(dtype).contiguous(memory_format=torch.channels_last)
    expected, count = shift2d_reference(x, 3, 1, direction), x.numel()
    assert streaming._plan(x.shape, x.element_size(), 3, 1, direction, True)[1][-1] == 1
    for start in (0, 8):  # elements
        storage = torch.full((count + 16,), 77, dtype=dtype)
        y = storage[start : start + count].as_strided(x.shape, x.stride(), start)
        assert streaming.shift2d_cpu(x, y, 3, 1, direction, True)
        assert torch.equal(y, expected)
        assert (storage[:start] == 77).all() and (storage[start + count :] == 77).all()


def test_concurrent_callers(pool):
    """Six Python threads at once, as under DDP hooks, DataParallel and autograd."""
    inputs = list(large_inputs())
    wrong, barrier = [], threading.Barrier(6)

    def call(number):
        barrier.wait()
        for repeat in range(10):
            x, expected = inputs[(number + repeat) % 2]
            if not torch.equal(shift2d(x), expected):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers) and not wrong


def _in_child(x, expected, connection):
    # NumPy compares: torch's own threads are dead in a forked process, its larger operations would hang.
    same = np.array_equal(shift2d(x).numpy(), expected.numpy())
    connection.send((same, torch.get_num_threads(), threads._forked))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork(pool):
    """A process forked after use in the parent, as loader workers are, can use several threads too."""
    context = multiprocessing.get_context("fork")
    for x, expected in large_inputs():
        assert torch.equal(shift2d(x), expected)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_in_child, args=(x, expected, sender))
        child.start()
        assert receiver.poll(60), "the forked process hangs"
        assert receiver.recv() == (True, 3, True)
        child.join(60)
        assert child.exitcode == 0
        assert torch.equal(shift2d(x), expected)  # and the parent goes on


class Shifted(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return shift2d(torch.full((1, 9, 4, 4), float(index)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_in_loader_workers(numba):
    shift2d(torch.randn(8, 72, 31, 33))
    found = torch.cat(list(torch.utils.data.DataLoader(Shifted(), batch_size=2, num_workers=2)))
    expected = torch.stack([shift2d_reference(torch.full((1, 9, 4, 4), float(index))) for index in range(8)])
    assert torch.equal(found, expected)


def test_import_is_light():
    """No optional library is loaded, nothing is printed, and importing takes under 0.3 s after torch."""
    code = (
        "import torch, sys, time; start = time.process_time(); import common.kernels;"
        "print(time.process_time() - start);"
        "print([m for m in ('numba', 'cupy', 'torchvision', 'sklearn') if m in sys.modules])"
    )
    out, err = python(code)
    seconds, loaded = out.splitlines()
    assert float(seconds) < 0.3 and loaded == "[]" and not err


@pytest.mark.parametrize("why", ["missing", "switched off"])
def test_without_numba(why, monkeypatch, caplog):
    """The plain path, and one line in the log."""
    if why == "missing":
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delitem(sys.modules, "common.kernels.shift2d_cpu", raising=False)
        monkeypatch.delattr("common.kernels.shift2d_cpu", raising=False)
    else:
        numba = pytest.importorskip("numba")
        kernels = importlib.import_module("common.kernels.shift2d_cpu")
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
        monkeypatch.setattr(kernels, "load", kernels.load.__wrapped__)
    monkeypatch.setitem(module._KERNELS, "cpu", functools.cache(module._cpu_kernel.__wrapped__))
    for shape in ((2, 9, 4, 4), (2, 20, 5, 5)):
        x = torch.randn(shape)
        assert torch.equal(shift2d(x), shift2d_reference(x))
    (record,) = caplog.records
    assert record.name == "effnets" and record.levelname == "WARNING"
    assert record.getMessage().startswith("shift2d: plain PyTorch on the CPU")


@pytest.fixture
def compile_kernel(numba, monkeypatch, tmp_path):
    """Compiles one kernel anew, with numba's cache in an empty folder."""
    monkeypatch.setattr(importlib.import_module("numba").config, "CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("common.kernels.shift2d_cpu")
    return lambda: threads.compiled.__wrapped__(kernels._planes_entry)


def test_compiled_code_is_cached_between_processes(compile_kernel, tmp_path):
    assert compile_kernel().compiled.cache_hits == 0
    code = (
        "from common.kernels import shift2d_cpu, threads\n"
        "print(threads.compiled(shift2d_cpu._planes_entry).compiled.cache_hits)"
    )
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path))[0] == "1"


@pytest.mark.parametrize("fault", ["no folder can be written", "disk full", "damaged file"])
def test_without_a_usable_cache(compile_kernel, monkeypatch, fault):
    from numba.core import caching

    def no_space(*_):
        raise OSError(28, "No space left on device")

    if fault == "no folder can be written":
        monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    elif fault == "disk full":
        monkeypatch.setattr(caching.IndexDataCacheFile, "save", no_space)
    else:
        monkeypatch.setattr(caching.IndexDataCacheFile, "load", lambda *_: pickle.loads(b"damaged"))
    assert compile_kernel().address
