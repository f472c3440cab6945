"""The CUDA sources of S3's quantiser, compiled by NVRTC, and run on the host against plain PyTorch."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from s3 import quantizers
from s3.quantizers import CUDA_KERNELS, s3_weight
from tests.host import nvrtc

FLAGS = "-O1 -Wall -Werror -ffp-contract=off -shared -fPIC".split()


def wrapper(name, head):
    """A loop over all elements, as a function of pointers and a count."""
    source, inputs, outputs = CUDA_KERNELS[name]
    pointers = [*(f"in{i}" for i in range(inputs)), *(f"out{i}" for i in range(outputs))]
    parameters = ", ".join(f"float* {pointer}" for pointer in pointers)
    arguments = ", ".join(f"{pointer}[i]" for pointer in pointers)
    loop = f"for (int i = 0; i < count; ++i) {name}<float>({arguments});"
    return f"{source}\n{head} run_{name}({parameters}, int count) {{ {loop} }}\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++ not found: the CUDA sources are not run on the host")
    folder = tmp_path_factory.mktemp("host")
    code = "".join(wrapper(name, 'extern "C" void') for name in CUDA_KERNELS)
    (folder / "kernels.cpp").write_text(code)
    subprocess.run(["g++", *FLAGS, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def run(host, name, *inputs):
    """Outputs of a kernel as tensors; one alone, several as a tuple, as PyTorch returns them."""
    inputs = [tensor.detach().contiguous() for tensor in inputs]
    outputs = tuple(torch.empty_like(inputs[0]) for _ in range(CUDA_KERNELS[name][2]))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, *outputs)]
    getattr(host, f"run_{name}")(*pointers, ctypes.c_int(inputs[0].numel()))
    return outputs[0] if len(outputs) == 1 else outputs


def latents_and_upstream():
    """Every combination of signs, zeros of both signs and NaN, then random numbers."""
    special = torch.tensor([-1.5, -0.0, 0.0, 2.0, float("nan")])
    grid = torch.cartesian_prod(*[special] * 4)
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat([grid, torch.randn(1000, 4, generator=generator)]).T.contiguous()
    return [latent.clone().requires_grad_() for latent in latents], torch.randn(len(latents[0]), generator=generator)


def with_gradients():
    latents, upstream = latents_and_upstream()
    weight = s3_weight(*latents)
    weight.backward(upstream)
    return [weight.detach(), *(latent.grad for latent in latents)]


def test_kernels_give_the_bits_of_pytorch(host, monkeypatch):
    """Weights to the sign of zero; gradients are equal numbers."""
    monkeypatch.setattr(quantizers, "_compiled", lambda: None)
    plain, called = with_gradients(), []
    monkeypatch.setattr(quantizers, "_on_cuda", lambda name, *tensors: called.append(name) or run(host, name, *tensors))
    kernels = with_gradients()
    assert called == ["s3_weight", "s3_gradients"]
    assert torch.equal(kernels[0].view(torch.int32), plain[0].view(torch.int32))
    for found, expected in zip(kernels, plain, strict=True):
        assert torch.equal(found, expected)


def test_other_numbers_of_bits_do_not_use_them(monkeypatch):
    monkeypatch.setattr(quantizers, "_on_cuda", lambda name, *tensors: 1 / 0)
    latents = [torch.randn(5, requires_grad=True) for _ in range(8)]
    for count in (2, 8):
        s3_weight(*latents[:count]).sum().backward()


@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_compiles(name):
    architectures = [a for a in (80, 90, 100) if a in nvrtc.supported_architectures()]
    assert architectures
    for architecture in architectures:
        text = wrapper(name, 'extern "C" __global__ void')
        options = [f"--gpu-architecture=compute_{architecture}", "-default-device"]  # as PyTorch compiles such source
        done, log, _ = nvrtc.compile_source(text, f"{name}.cu", options)
        assert done, log


def test_pytorch_can_parse_them():
    """PyTorch's jiterator finds the entry by a regular expression, and takes at most 8 inputs and 8 outputs."""
    for name, (source, inputs, outputs) in CUDA_KERNELS.items():
        parsed = torch.cuda.jiterator._CodeParser(source)
        assert parsed.function_name == name and parsed.return_type == "void"
        assert parsed.function_params.count(",") == inputs + outputs - 1 and max(inputs, outputs) <= 8


def test_an_unusable_kernel_is_said_once_and_replaced(monkeypatch, caplog):
    monkeypatch.setattr(quantizers, "_refused", set())
    monkeypatch.setattr(quantizers, "_cuda_kernel", lambda name: 1 / 0)

    class OnGpu:
        is_cuda, dtype = True, torch.float32

    for _ in range(2):
        assert quantizers._on_cuda("s3_weight", OnGpu()) is None
    assert len(caplog.records) == 1 and "s3_weight takes several passes" in caplog.text


@pytest.mark.gpu
def test_on_a_gpu_each_direction_is_one_kernel():
    latents, upstream = latents_and_upstream()
    expected = with_gradients()
    on_gpu = [latent.detach().cuda().requires_grad_() for latent in latents]
    upstream = upstream.cuda()
    torch.autograd.grad(s3_weight(*on_gpu), on_gpu, upstream)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        weight = s3_weight(*on_gpu)
        gradients = torch.autograd.grad(weight, on_gpu, upstream)
        torch.cuda.synchronize()
    assert not quantizers._refused
    assert all(torch.equal(a.cpu(), b) for a, b in zip((weight, *gradients), expected, strict=True))
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, [event.name for event in kernels]
