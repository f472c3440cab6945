"""The CUDA sources of the quantisers, compiled by NVRTC, and run on the host against plain PyTorch."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
import torch

from deepshift import quantizers
from deepshift.quantizers import CUDA_KERNELS, LN2, ps_weight, q_weight, round_to_fixed
from tests.host import nvrtc

INPUTS = {"round_to_fixed": 1, "ps_weight": 2, "ps_gradient": 2, "q_weight": 1}


def wrapper(name, head):
    """A loop over all elements, as a function of pointers, numbers and a count."""
    source, numbers, outputs = CUDA_KERNELS[name]
    pointers = [f"in{i}" for i in range(INPUTS[name])], [f"out{i}" for i in range(outputs)]
    parameters = [f"float* {pointer}" for pointer in pointers[0] + pointers[1]] + [f"float {n}" for n in numbers]
    arguments = [f"{pointer}[i]" for pointer in pointers[0]] + [*numbers] + [f"{pointer}[i]" for pointer in pointers[1]]
    loop = f"for (int i = 0; i < count; ++i) {name}<float>({', '.join(arguments)});"
    return f"{source}\n{head} run_{name}({', '.join(parameters)}, int count) {{ {loop} }}\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++ not found: the CUDA sources are not run on the host")
    folder = tmp_path_factory.mktemp("host")
    code = "#include <cmath>\nusing namespace std;\n" + "".join(
        wrapper(name, 'extern "C" void') for name in CUDA_KERNELS
    )
    (folder / "kernels.cpp").write_text(code)
    command = [
        "g++",
        "-O1",
        "-Wall",
        "-Werror",
        "-ffp-contract=off",
        "-shared",
        "-fPIC",
        "kernels.cpp",
        "-o",
        "kernels.so",
    ]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(host, name, *inputs, **numbers):
    """Outputs of a kernel as tensors."""
    outputs = [torch.empty_like(inputs[0]) for _ in range(CUDA_KERNELS[name][2])]
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, *outputs)]
    values = [ctypes.c_float(numbers[number]) for number in CUDA_KERNELS[name][1]]
    getattr(host, f"run_{name}")(*pointers, *values, ctypes.c_int(inputs[0].numel()))
    return outputs


def some_values(seed, scale=1.0):
    values = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * scale
    values[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    return values


def test_activations(host):
    x = some_values(0, 10)
    numbers = {"scale": 32.0, "inverse": 1 / 32, "low": -4.0, "high": 3.0}
    assert torch.equal(run(host, "round_to_fixed", x, **numbers)[0], round_to_fixed(x, 3, 5))


def test_ps_weights_and_gradient(host):
    shift, sign = some_values(1, 8), some_values(2)
    clamped, weight = run(host, "ps_weight", shift, sign, low=-14.0, high=0.0)
    expected = ps_weight(parameter := torch.nn.Parameter(shift.clone()), sign, (-14, 0))
    assert torch.equal(clamped, parameter.data) and torch.equal(weight, expected.detach())
    grad = some_values(3)
    torch.testing.assert_close(run(host, "ps_gradient", weight, grad)[0], weight * LN2 * grad)


def test_q_weights(host):
    weight = some_values(4, 0.3) ** 3
    clamped, rounded = run(host, "q_weight", weight, low=2.0**-15, high=1.0)
    expected = q_weight(parameter := torch.nn.Parameter(weight.clone()), (-15, 0))
    assert torch.equal(clamped, parameter.data) and torch.equal(rounded, expected.detach())


@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_compiles(name):
    architectures = [a for a in (80, 90, 100) if a in nvrtc.supported_architectures()]
    assert architectures
    for architecture in architectures:
        text = wrapper(name, 'extern "C" __global__ void')
        options = [f"--gpu-architecture=compute_{architecture}", "-default-device"]  # as PyTorch compiles such source
        done, log, _ = nvrtc.compile_source(text, f"{name}.cu", options)
        assert done, log


def test_an_unusable_kernel_is_said_once_and_replaced(monkeypatch, caplog):
    monkeypatch.setattr(quantizers, "_refused", set())
    monkeypatch.setattr(quantizers, "_cuda_kernel", lambda name: 1 / 0)

    class OnGpu:
        is_cuda, dtype = True, torch.float32

    for _ in range(2):
        assert quantizers._on_cuda("q_weight", OnGpu(), low=0.0, high=1.0) is None
    assert len(caplog.records) == 1 and "q_weight takes several passes" in caplog.text


def test_kernels_results_reach_weights_and_gradients(host, monkeypatch):
    """ps_weight and q_weight as on a GPU, the kernels run on the host."""

    def on_host(name, *tensors, **numbers):
        found = run(host, name, *(tensor.detach().contiguous() for tensor in tensors), **numbers)
        return found[0] if len(found) == 1 else tuple(found)

    results = []
    for function in (quantizers._on_cuda, on_host):
        monkeypatch.setattr(quantizers, "_on_cuda", function)
        shift, sign, weight = (torch.nn.Parameter(some_values(seed, 4)) for seed in (5, 6, 7))
        y = ps_weight(shift, sign, (-14, 0)) * q_weight(weight, (-15, 0))
        (y * torch.from_numpy(np.arange(2000, dtype=np.float32))).sum().backward()
        results.append([y.detach(), *(p.data for p in (shift, sign, weight)), *(p.grad for p in (shift, sign, weight))])
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-6, atol=0)


@pytest.mark.gpu
def test_weights_on_a_gpu_are_one_kernel():
    for function, tensors, bits in ((ps_weight, 2, (-14, 0)), (q_weight, 1, (-15, 0))):
        values = [some_values(seed, 4) for seed in range(tensors)]
        on_cpu = function(*(torch.nn.Parameter(value.clone()) for value in values), bits)
        on_gpu = [torch.nn.Parameter(value.cuda()) for value in values]
        assert torch.equal(function(*on_gpu, bits).cpu(), on_cpu)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function(*on_gpu, bits)
            torch.cuda.synchronize()
        kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1
