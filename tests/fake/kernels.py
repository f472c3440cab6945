"""A stand-in for CuPy that notes launches, and what CUDA would check of them, against the PTX of the same sources."""

import contextlib
import functools
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

from common.kernels import launch

MOST_BLOCKS = (2**31 - 1, 65535, 65535)
MOST_THREADS = (1024, 1024, 64)
MOST_THREADS_PER_BLOCK = 1024
MOST_SHARED = 48 * 1024  # bytes, without asking for more


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
def entries(stem: str, *options) -> dict[str, dict]:
    """Of every kernel of <stem>.cu: its parameters ("u64", "u32", "f32", …), bytes of shared memory, most threads."""
    from tests.host import nvrtc

    # Without optimisation, which changes neither and takes most of the time.
    options = [*launch.OPTIONS, "--gpu-architecture=compute_80", *options]
    succeeded, log, ptx = nvrtc.compile_source(launch.source(stem), f"{stem}.cu", options)
    assert succeeded, log
    found = {}
    for match in re.finditer(r"\.entry (\w+)\((.*?)\)(.*?)^\}", ptx, flags=re.S | re.M):
        name, parameters, body = match.groups()
        most = re.search(r"\.maxntid (\d+), (\d+), (\d+)", body)
        shared = [int(size) * (int(width) // 8) for width, size in re.findall(r"\.shared[^;]*\.b(\d+) \S+\[(\d+)\]", body)]
        found[name] = {"parameters": re.findall(r"\.param \.(\w+)", parameters), "shared": sum(shared),
                       "threads": int(np.prod([int(n) for n in most.groups()])) if most else MOST_THREADS_PER_BLOCK}  # fmt: skip
    return found


def faults(call: dict) -> list[str]:
    """What CUDA would refuse, or CuPy would not notice, of a launch."""
    kernel = entries(call["stem"]).get(call["name"])
    if kernel is None:
        return [f"{call['stem']}.cu has no kernel {call['name']}"]
    found = []
    wanted = [_fits(parameter) for parameter in kernel["parameters"]]
    if len(wanted) != len(call["kinds"]) or not all(kind in fit for kind, fit in zip(call["kinds"], wanted, strict=True)):
        found.append(f"arguments {call['kinds']} for parameters {kernel['parameters']}")
    for what, given, most in (("grid", call["grid"], MOST_BLOCKS), ("block", call["block"], MOST_THREADS)):
        if len(given) != 3 or not all(1 <= size <= limit for size, limit in zip(given, most, strict=True)):
            found.append(f"{what} {given} is beyond {most}")
    if np.prod(call["block"]) > kernel["threads"]:
        found.append(f"block {call['block']} has more than the kernel's {kernel['threads']} threads")
    if kernel["shared"] + call["shared"] > MOST_SHARED:
        found.append(f"{kernel['shared']} + {call['shared']} bytes of shared memory are more than {MOST_SHARED}")
    return [f"{call['name']}: {each}" for each in found]


def _fits(parameter):
    """NumPy's kinds for a type of PTX, in which integers have no sign."""
    size = int(parameter[1:]) // 8
    return (f"f{size}",) if parameter[0] == "f" else (f"i{size}", f"u{size}")
