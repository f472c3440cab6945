"""Compile CUDA source with NVRTC through ctypes: no driver, no device and no CuPy needed."""

import ctypes
import ctypes.util
import functools
import os
import site
import sys
from pathlib import Path

import pytest


def _folders():
    for root in {*map(Path, sys.path), *map(Path, site.getsitepackages())}:
        yield from (root / "nvidia").glob("*/lib")  # the wheels that torch brings: nvidia/cu13 or nvidia/cuda_nvrtc
        yield root / "torch" / "lib"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "lib64"
    yield from Path("/usr/local").glob("cuda*/lib64")


@functools.cache
def library():
    """The NVRTC library; skips the test, loudly, where none is installed."""
    candidates = [str(path) for folder in _folders() for path in sorted(folder.glob("libnvrtc*.so*"))]
    for name in [*candidates, ctypes.util.find_library("nvrtc")]:
        # libnvrtc.alt is the same compiler built otherwise.
        if name is None or "builtins" in name or ".alt." in name:
            continue
        try:
            for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so*")):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # which it does not look for beside itself
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("NVRTC not found (wheel nvidia-cuda-nvrtc, or a CUDA toolkit): CUDA sources are not compiled")


def supported_architectures():
    """Compute capabilities that this NVRTC compiles for, as ints: [75, 80, ...]."""
    count = ctypes.c_int()
    _call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _call("nvrtcGetSupportedArchs", numbers)
    return list(numbers)


def compile_source(text, name, options):
    """(succeeded, log, PTX) of the program `text`."""
    program = ctypes.c_void_p()
    _call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    try:
        flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        status = library().nvrtcCompileProgram(program, len(options), flags)
        log = _text(program, "nvrtcGetProgramLog")
        return status == 0, log, _text(program, "nvrtcGetPTX") if status == 0 else ""
    finally:
        _call("nvrtcDestroyProgram", ctypes.byref(program))


def _text(program, function):
    size = ctypes.c_size_t()
    _call(f"{function}Size", program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    _call(function, program, buffer)
    return buffer.value.decode()


def _call(function, *arguments):
    status = getattr(library(), function)(*arguments)
    assert status == 0, f"{function}: NVRTC error {status}"
