"""The CUDA sources of S3's quantisers, compiled by NVRTC, and run on the host against plain PyTorch."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from s3 import passes_cpu, passes_cuda
from s3.passes_cuda import gradients_source, weight_source
from s3.quantizers import denseshift_shift_count, denseshift_weight, s3_shift_count, s3_weight
from tests.host import nvrtc

FLAGS = "-O1 -Wall -Werror -ffp-contract=off -shared -fPIC".split()
WEIGHTS = {"s3": s3_weight, "denseshift": denseshift_weight}
# Every method with 2, 3 and 4 bits, as (method, latents).
CASES = [("s3", 2 + s3_shift_count(bits)) for bits in (2, 3, 4)]
CASES += [("denseshift", 1 + denseshift_shift_count(bits)) for bits in (2, 3, 4)]
KERNELS = {f"{method}_weight_{latents}": (weight_source, method, latents) for method, latents in CASES}
KERNELS |= {f"{method}_gradients_{latents}": (gradients_source, method, latents) for method, latents in CASES}


def arity(source, latents):
    """(inputs, outputs) of a kernel."""
    return (latents, 2) if source is weight_source else (2, latents)


def wrapper(name, head):
    """A loop over all elements, as a function of pointers and a count."""
    make, method, latents = KERNELS[name]
    inputs, outputs = arity(make, latents)
    pointers = [*(f"in{i}" for i in range(inputs)), *(f"out{i}" for i in range(outputs))]
    parameters = ", ".join(f"float* {pointer}" for pointer in pointers)
    arguments = ", ".join(f"{pointer}[i]" for pointer in pointers)
    loop = f"for (int i = 0; i < count; ++i) {name}<float>({arguments});"
    return f"{make(method, latents)}\n{head} run_{name}({parameters}, int count) {{ {loop} }}\n"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("g++ not found: the CUDA sources are not run on the host")
    folder = tmp_path_factory.mktemp("host")
    code = "".join(wrapper(name, 'extern "C" void') for name in KERNELS)
    (folder / "kernels.cpp").write_text(f"#include <cmath>\nusing std::sqrt;\n{code}")
    subprocess.run(["g++", *FLAGS, "kernels.cpp", "-o", "kernels.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def stand_in(host, called):
    """What runs a kernel on the host in place of `passes_cuda._run`."""

    def run(name, source, method, latents, outputs, tensors):
        called.append(name)
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        results = tuple(torch.empty_like(tensors[0]) for _ in range(outputs))
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, *results)]
        getattr(host, f"run_{name}")(*pointers, ctypes.c_int(tensors[0].numel()))
        return results

    return run


def latents_and_upstream(count):
    """Every combination of signs, the first four with zeros of both signs and NaN, then random numbers."""
    special, generator = torch.tensor([-1.5, -0.0, 0.0, 2.0, float("nan")]), torch.Generator().manual_seed(0)
    grid = torch.cartesian_prod(*[special] * min(count, 4))
    grid = torch.cat([grid, torch.randn(len(grid), count - min(count, 4), generator=generator)], 1)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * count)
    latents = torch.cat([grid, signs, torch.randn(1000, count, generator=generator)]).T.contiguous()
    return [latent.clone().requires_grad_() for latent in latents], torch.randn(len(latents[0]), generator=generator)


def with_gradients(method, count, device="cpu"):
    latents, upstream = latents_and_upstream(count)
    latents = [latent.detach().to(device).requires_grad_() for latent in latents]
    weight = WEIGHTS[method](*latents)
    weight.backward(upstream.to(device))
    return [weight.detach(), *(latent.grad for latent in latents)]


def assert_same_bits(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu().view(torch.int32), other.view(torch.int32))


@pytest.fixture
def plain(monkeypatch):
    """A function that gives what PyTorch's own operations give on the CPU."""

    def run(method, count):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes_cpu, "_compiled", lambda: None)
            return with_gradients(method, count)

    return run


@pytest.mark.parametrize(("method", "count"), CASES)
def test_kernels_give_the_bits_of_pytorch(method, count, plain, host, monkeypatch):
    """Weights and gradients, to the sign of zero."""
    expected, called = plain(method, count), []
    monkeypatch.setattr(passes_cuda, "_run", stand_in(host, called))
    assert_same_bits(with_gradients(method, count), expected)
    assert called == [f"{method}_weight_{count}", f"{method}_gradients_{count}"]


@pytest.mark.parametrize(("method", "count"), CASES)
def test_gradients_without_their_kernel(method, count, plain, host, monkeypatch):
    """Where only the second kernel fails, the latents' code is enough for PyTorch's operations."""
    expected, run = plain(method, count), stand_in(host, [])
    monkeypatch.setattr(passes_cuda, "_run", lambda name, *args: None if "gradients" in name else run(name, *args))
    assert_same_bits(with_gradients(method, count), expected)


@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name):
    architectures = [a for a in (80, 90, 100) if a in nvrtc.supported_architectures()]
    assert architectures
    for architecture in architectures:
        text = wrapper(name, 'extern "C" __global__ void')
        options = [f"--gpu-architecture=compute_{architecture}", "-default-device"]  # as PyTorch compiles such source
        done, log, _ = nvrtc.compile_source(text, f"{name}.cu", options)
        assert done, log


@pytest.mark.parametrize("name", KERNELS)
def test_pytorch_can_parse_them(name):
    """PyTorch's jiterator finds the entry by a regular expression, and takes at most 8 inputs and 8 outputs."""
    make, method, latents = KERNELS[name]
    inputs, outputs = arity(make, latents)
    parsed = torch.cuda.jiterator._CodeParser(make(method, latents))
    assert parsed.function_name == name and parsed.return_type == "void"
    assert parsed.function_params.count(",") == inputs + outputs - 1 and max(inputs, outputs) <= 8


def test_an_unusable_kernel_is_said_once_and_replaced(monkeypatch, caplog):
    monkeypatch.setattr(passes_cuda, "_refused", set())
    monkeypatch.setattr(passes_cuda, "_kernel", lambda *args: 1 / 0)

    class OnGpu:
        is_cuda, dtype = True, torch.float32

    for _ in range(2):
        assert passes_cuda.weight_and_code("s3", OnGpu(), OnGpu()) is None
    assert len(caplog.records) == 1 and "s3_weight_2 takes several passes" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "count"), CASES)
def test_on_a_gpu_each_direction_is_one_kernel(method, count, plain):
    expected = plain(method, count)
    assert_same_bits(with_gradients(method, count, "cuda"), expected)  # compiles
    latents, upstream = latents_and_upstream(count)
    latents, upstream = [latent.detach().cuda().requires_grad_() for latent in latents], upstream.cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        weight = WEIGHTS[method](*latents)
        gradients = torch.autograd.grad(weight, latents, upstream)
        torch.cuda.synchronize()
    assert not passes_cuda._refused
    assert_same_bits((weight.detach(), *gradients), expected)
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 2, [event.name for event in kernels]


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "count"), CASES)
def test_on_a_gpu_gradients_have_the_layout_of_the_latents(method, count):
    latents = [torch.randn(8, 4, 3, 3).to("cuda", memory_format=torch.channels_last) for _ in range(count)]
    latents = [latent.requires_grad_() for latent in latents]
    weight = WEIGHTS[method](*latents)
    weight.backward(torch.randn(8, 4, 3, 3, device="cuda"))  # in the other layout
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (weight, *(x.grad for x in latents)))
