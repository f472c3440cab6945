"""A CuPy that does not go with PyTorch: noticed at the first kernel, one log line, and PyTorch's path takes over."""

import contextlib
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from common.kernels import launch, shift2d, shift2d_reference

operator = sys.modules["common.kernels.shift2d"]
VERSIONS = {"12": 12090, "13": 13020}


class Cupy(ModuleType):
    """A stand-in that compiles, and launches into nowhere. fails: the name of what raises instead."""

    def __init__(self, version, fails=None):
        super().__init__("cupy")
        self.fails, self.launched = fails, []
        self.cuda = SimpleNamespace(
            Device=lambda number: contextlib.nullcontext(),
            Stream=SimpleNamespace(from_external=lambda stream: stream.address),
            runtime=SimpleNamespace(runtimeGetVersion=lambda: version),
        )

    def RawModule(self, code, options, backend):
        if self.fails == "compile":
            raise RuntimeError("NVRTC_ERROR_INVALID_OPTION: invalid value for --gpu-architecture\nmore lines")
        return SimpleNamespace(get_function=lambda name: lambda *call, **options: self._launch(name, *call, **options))

    def _launch(self, name, grid, block, arguments, stream):
        if self.fails == "launch":
            raise RuntimeError("CUDA_ERROR_INVALID_HANDLE: invalid resource handle")
        self.launched.append((name, grid, block, stream))


@pytest.fixture
def first_kernel(monkeypatch, caplog):
    """call(CuPy) -> lines of the log, after a first shift2d that takes the path of CUDA tensors."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(operator, "_KERNELS", {"cpu": operator._cuda_kernel})
    caches = (operator._cuda_kernel, launch.load, launch._try_out, launch._module, launch._stream)

    def call(cupy):
        for cached in caches:
            cached.cache_clear()
        caplog.clear()
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        x = torch.arange(2 * 9 * 4 * 4.0).view(2, 9, 4, 4)
        with caplog.at_level(logging.WARNING, "effnets"):
            for _ in range(2):
                assert torch.equal(shift2d(x), shift2d_reference(x, 3, 1, 1))
        return [record.getMessage() for record in caplog.records]

    yield call
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(("cupy", "reason"), [
    (Cupy(VERSIONS["12"]), "CuPy is built for CUDA 12, PyTorch for CUDA 13: install cupy-cuda13x instead"),
    (Cupy(VERSIONS["13"], fails="compile"), "RuntimeError: NVRTC_ERROR_INVALID_OPTION: invalid value for --gpu-archit"),
    (Cupy(VERSIONS["13"], fails="launch"), "RuntimeError: CUDA_ERROR_INVALID_HANDLE: invalid resource handle"),
    (None, "import of cupy halted"),
], ids=["another CUDA", "cannot compile", "cannot launch", "cannot be imported"])  # fmt: skip
def test_pytorch_takes_over(cupy, reason, first_kernel):
    (line,) = first_kernel(cupy)
    assert line.startswith("shift2d: plain PyTorch on CUDA, which is slower: CuPy: ") and reason in line
    assert "\n" not in line and (cupy is None or not cupy.launched)


def test_a_cupy_that_fits_is_tried_out_once_for_each_device(first_kernel, monkeypatch):
    cupy = Cupy(VERSIONS["13"])
    first_kernel(Cupy(VERSIONS["12"]))  # clears what is kept
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for device, name in ((0, "shift2d_planes_16"), (0, "shift2d_planes_8"), (1, "shift2d_planes_16")):
        launch.load("shift2d", name, device)
    assert cupy.launched == [("nothing", (1, 1, 1), (1, 1, 1), 7)] * 2


def test_a_pytorch_without_cuda_says_nothing_of_versions(first_kernel, monkeypatch):
    """As one for AMD's GPUs: there is nothing to compare."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setitem(sys.modules, "cupy", Cupy(VERSIONS["12"]))
    launch.load.cache_clear()
    launch._try_out.cache_clear()
    launch.load("shift2d", "shift2d_planes_16", 0)
