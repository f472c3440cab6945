"""Run a compiled CPU kernel on as many threads as torch uses, without touching torch's setting.

numba's parallel layers are avoided on purpose: `workqueue` aborts the process when two Python threads call at once
(autograd, DDP hooks, DataParallel), the OpenMP layer dies in a process forked after its first use (loader workers), and
TBB is rarely installed. Instead a kernel runs in the OpenMP team that torch itself uses: a second pool would compete
with torch's threads, which spin for milliseconds after each operation. A forked process, whose copy of that team is
dead, and a torch without GNU OpenMP use Python threads of our own, side by side because kernels need no interpreter.
"""

import ctypes
import functools
import hashlib
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

MIN_PARALLEL_BYTES = 512 * 1024  # below this, waking the other threads takes longer than the work
GRAIN_BYTES = 128 * 1024
LARGE = 32 * 2**20  # bytes of a block that glibc maps afresh each time
_forked = False


@functools.cache
def _openmp_parallel():
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP library that torch has loaded, or None."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        parallel = library.GOMP_parallel  # found in the library's dependencies
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@functools.cache
def cache_bytes():
    """Size of the last-level cache: the largest that Linux lists, 32 MiB where it lists none."""
    units, sizes = {"K": 2**10, "M": 2**20, "G": 2**30}, []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text))
    return max(sizes, default=32 * 2**20)


@functools.cache
def _libc():
    return ctypes.CDLL(None)


@functools.cache
def _pool():
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="effnets-kernel")


def _after_fork():
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Kernel:
    """A C function void(int64 *), given as numba's cfunc, for `run`; see there for what it is called with."""

    def __init__(self, compiled):
        self.compiled = compiled  # keeps the code alive
        self.address = compiled.address
        self.call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)  # releases the interpreter's lock


@functools.cache
def _sources():
    """Digest of all that may be compiled together: this folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def compiled(entry):
    """The Kernel of a Python function of one pointer to int64, compiled by numba once and kept on disk."""
    from numba import cfunc, types

    # numba's cache heeds changes of the entry's own file only, and files by this name.
    entry.__qualname__ = f"{entry.__name__}_{_sources()}"
    signature = types.void(types.CPointer(types.int64))
    try:
        function = cfunc(signature, cache=True)(entry)
    except Exception:  # of the cache (no place to write, full disk, damaged file); any other comes again without it
        function = cfunc(signature)(entry)
    return Kernel(function)


def advise_large_pages(tensor):
    """Ask Linux for 2 MiB pages under a new CPU tensor that will be written in full; does nothing elsewhere.

    glibc maps a block of more than LARGE bytes afresh each time, and its first touch in pages of 4 KiB takes several
    times as long as the work. Smaller blocks are reused, their pages present.
    """
    size = tensor.numel() * tensor.element_size()
    if size > LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_HUGEPAGE)


def thread_count(items, item_bytes):
    """1, or torch.get_num_threads() where `items` pieces of `item_bytes` bytes are enough work to share.

    Nothing in between: a smaller OpenMP team would end the threads that torch's next operation needs.
    """
    return torch.get_num_threads() if items > 1 and items * item_bytes >= MIN_PARALLEL_BYTES else 1


@functools.cache
def _words(count):
    return ctypes.c_int64 * count


class _Scratch(threading.local):
    """Memory of each calling thread that stays: fresh pages cost more than small kernels."""

    buffer, size = None, 0

    def address(self, size):
        if size > self.size:
            self.buffer, self.size = (ctypes.c_uint8 * (size + 64))(), size
        return -(-ctypes.addressof(self.buffer) // 64) * 64 if size else 0


_scratch = _Scratch()


def run(kernel, arguments, items, item_bytes, scratch_bytes=0, zeroed=False, grain=0):
    """Call a Kernel on every thread; return when all `items` pieces of work, of `item_bytes` bytes each, are done.

    It gets: address of two counters, scratch, scratch_bytes, grain, items, then `arguments` (integers). It takes
    `grain` items (0: as many as 128 KiB) at a time by adding atomically to the first counter until `items` is reached,
    so a slow thread leaves its share to the others. Its own `scratch_bytes` bytes, `zeroed` if so asked, are at
    scratch + scratch_bytes * (second counter)++.
    """
    prepared(kernel, items, item_bytes, scratch_bytes, zeroed, grain)(*arguments)


def prepared(kernel, items, item_bytes, scratch_bytes=0, zeroed=False, grain=0):
    """`run` as a function of the arguments, for calls that differ in these only."""
    grain, scratch_bytes = grain or max(1, GRAIN_BYTES // max(1, item_bytes)), -(-scratch_bytes // 64) * 64

    def call(*arguments):
        threads = thread_count(items, item_bytes)
        scratch = _scratch.address(threads * scratch_bytes)
        if zeroed:
            ctypes.memset(scratch, 0, threads * scratch_bytes)
        share = items if threads == 1 else grain
        block = _words(7 + len(arguments))(0, 0, 0, scratch, scratch_bytes, share, items, *arguments)
        address = ctypes.addressof(block)
        block[2] = address  # the counters are the two words before it
        if threads == 1:
            kernel.call(address + 16)
            return
        parallel = None if _forked else _openmp_parallel()
        if parallel:
            parallel(kernel.address, address + 16, threads, 0)
        else:
            _run_in_pool(kernel.call, address + 16, threads)

    return call


def _run_in_pool(call, block, threads):
    helpers = []
    try:
        for _ in range(threads - 1):
            helpers.append(_pool().submit(call, block))
    except RuntimeError:
        pass  # the interpreter is shutting down and starts no threads: this one does all the work
    call(block)
    # A helper that has not started by now has nothing left to do: take it back instead of waiting for it.
    for helper in helpers:
        if not helper.cancel():
            helper.result()
