"""A stand-in for CuPy that notes launches, and what CUDA would check of them, against the PTX of the same sources."""

import contextlib
import functools
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from common.kernels import launch
from tests.host import nvrtc

MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_THREADS = (1024, 1024, 64)
MOST_THREADS_PER_BLOCK = 1024
MOST_SHARED = 48 * 1024  # bytes, besides what a kernel declares, without asking for more


def install(log):
    """Let `import cupy` find the stand-in in this process."""
    cupy = ModuleType("cupy")
    cupy.__version__ = "0 (a stand-in)"
    stream = SimpleNamespace(from_external=lambda external: external.__cuda_stream__()[1])
    version = int((torch.version.cuda or "0").partition(".")[0]) * 1000
    runtime = SimpleNamespace(runtimeGetVersion=lambda: version)
    cupy.cuda = SimpleNamespace(Device=lambda number: contextlib.nullcontext(), Stream=stream, runtime=runtime)
    cupy.RawModule = lambda code, options, backend: SimpleNamespace(
        get_function=functools.partial(_function, log, _stem_of(code))
    )
    sys.modules["cupy"] = cupy


def _stem_of(code):
    return next(path.stem for path in sorted(Path(launch.__file__).parent.rglob("*.cu")) if path.read_text() == code)


def _function(log, stem, name):
    def kernel(grid, block, arguments, *, shared_mem=0, stream=None):
        for argument in arguments:
            if not isinstance(argument, np.generic):
                raise TypeError(f"{name}: an argument is {type(argument).__name__}, of no certain size")
        kinds = [argument.dtype.str[1:] for argument in arguments]
        sizes = {"grid": list(map(int, grid)), "block": list(map(int, block)), "shared": shared_mem}
        log.launch(stem=stem, name=name, kinds=kinds, **sizes)

    return kernel


@functools.cache
def entries(stem: str) -> dict[str, tuple[list[str], int]]:
    """Of every kernel of <stem>.cu: its parameters' types in PTX ("u64", "u32", "f32", ...), and most threads."""
    # Not optimised, which takes a twentieth of the time. (Shared memory that kernels declare is checked where they are
    # compiled for a GPU, in tests/common/test_kernel_sources.py: NVRTC refuses more than there is.)
    options = [*launch.OPTIONS, "--gpu-architecture=compute_80", "--device-debug"]
    succeeded, log, ptx = nvrtc.compile_source(launch.source(stem), f"{stem}.cu", options)
    assert succeeded, log
    found = {}
    for name, parameters, body in re.findall(r"\.entry (\w+)\((.*?)\)(.*?)^\}", ptx, flags=re.S | re.M):
        most = re.search(r"\.maxntid (\d+), (\d+), (\d+)", body)
        threads = math.prod(map(int, most.groups())) if most else MOST_THREADS_PER_BLOCK
        found[name] = re.findall(r"\.param \.(\w+)", parameters), threads
    return found


def faults(call: dict) -> list[str]:
    """What CUDA would refuse, or CuPy would not notice, of a launch."""
    if call["name"] not in entries(call["stem"]):
        return [f"{call['stem']}.cu has no kernel {call['name']}"]
    parameters, threads = entries(call["stem"])[call["name"]]
    found, kinds = [], call["kinds"]
    if len(parameters) != len(kinds) or any(
        kind not in _fits(each) for kind, each in zip(kinds, parameters, strict=True)
    ):
        found.append(f"arguments {kinds} for parameters {parameters}")
    for what, given, most in (("grid", call["grid"], MOST_BLOCKS), ("block", call["block"], MOST_THREADS)):
        if len(given) != 3 or not all(1 <= size <= limit for size, limit in zip(given, most, strict=True)):
            found.append(f"{what} {given} is beyond {most}")
    if math.prod(call["block"]) > threads:
        found.append(f"block {call['block']} has more than the kernel's {threads} threads")
    if call["shared"] > MOST_SHARED:
        found.append(f"{call['shared']} bytes of shared memory are more than {MOST_SHARED}")
    return [f"{call['name']}: {each}" for each in found]


def _fits(parameter):
    """NumPy's kinds for a type of PTX, in which integers have no sign."""
    size = int(parameter[1:]) // 8
    return (f"f{size}",) if parameter[0] == "f" else (f"i{size}", f"u{size}")
