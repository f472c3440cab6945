"""bitshift and multiply on a CUDA device: values, streams, CUDA graphs."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from common.kernels import bitshift_conv2d, bitshift_linear, multiply_conv2d, multiply_linear, pack_shift_weights
from tests.common.bitshift_cases import CODES, fixed_conv2d, fixed_linear, random_parts, random_weights

pytestmark = pytest.mark.gpu
module = importlib.import_module("common.kernels.bitshift")


@pytest.fixture(autouse=True)
def cupy():
    if module._cuda_kernels() is None:
        pytest.skip("CuPy is not installed, or cannot compile here")


@pytest.mark.parametrize("scheme, bits", [code for code in CODES if code != ("S3", 6)])
def test_layers(scheme, bits):
    for seed, (outputs, inputs) in enumerate([(1, 1), (33, 20), (500, 1000)]):
        shift, sign = random_parts((outputs, inputs), scheme, bits, seed, most=12)
        weight, packed = sign * 2.0**shift, pack_shift_weights((shift, sign), bits, scheme).to("cuda")
        for rows in (1, 2, 7, 100):
            x = torch.randn(rows, inputs)
            bound = 2**-24 * (inputs + 2) * F.linear(x.abs().double(), weight.abs().double())
            y = bitshift_linear(x.cuda(), packed).cpu()
            assert ((y - F.linear(x.double(), weight.double())).abs() <= bound).all()
            x = torch.randint(-(2**10), 2**10, (rows, inputs)).int()
            y = bitshift_linear(x.cuda(), packed, arithmetic="fixed").cpu()
            assert torch.equal(y.long(), fixed_linear(x, shift, sign))


@pytest.mark.parametrize("scheme, bits", [code for code in CODES if code != ("S3", 6)])
def test_convolutions(scheme, bits):
    geometry = (2, 1), (1, 2), (1, 2), 2
    shift, sign = random_parts((8, 3, 3, 2), scheme, bits, most=12)
    packed = pack_shift_weights((shift, sign), bits, scheme).to("cuda")
    assert torch.equal(module._cuda_kernels().unpack(module._weights(packed, "test", 4)).cpu(), sign * 2.0**shift)
    x = torch.randint(-1000, 1000, (2, 6, 9, 8)).int()
    y = bitshift_conv2d(x.cuda(), packed, None, *geometry, arithmetic="fixed").cpu()
    assert torch.equal(y.long(), fixed_conv2d(x, shift, sign, *geometry))
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = bitshift_conv2d(x.cuda().float(), packed, None, *geometry)
    expected = F.conv2d(x.double(), (sign * 2.0**shift).double(), None, *geometry)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-3)


def test_multiply():
    x, weight = torch.randn(5, 300, device="cuda"), torch.randn(70, 300, device="cuda")
    torch.testing.assert_close(multiply_linear(x, weight), (x.double() @ weight.double().T).float(), rtol=0, atol=1e-3)
    x, weight = torch.randn(2, 6, 9, 8, device="cuda"), torch.randn(8, 3, 3, 2, device="cuda")
    geometry = (2, 1), (1, 2), (1, 2), 2
    expected = F.conv2d(x.double(), weight.double(), None, *geometry).float()
    torch.testing.assert_close(multiply_conv2d(x, weight, None, *geometry), expected, rtol=0, atol=1e-4)


def test_cuda_graph_and_side_stream():
    """Captured after one call, fixed point too, and replayed on new contents."""
    weight = random_weights((100, 200), "PS", 4)
    packed, x = pack_shift_weights(weight, 4, "PS").to("cuda"), torch.zeros(3, 200, device="cuda")

    def layer():
        return bitshift_linear(x, packed), bitshift_linear(x, packed, arithmetic="fixed")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = layer()
    x.copy_(torch.randint(-8, 9, x.shape))
    graph.replay()
    expected = F.linear(x.double(), weight.double().cuda()).float()
    torch.testing.assert_close(outputs[0], expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(outputs[1], expected, rtol=0, atol=200 / 2**16)


def test_does_not_synchronise():
    packed = pack_shift_weights(random_weights((64, 64), "PS", 4), 4, "PS").to("cuda")
    x = torch.randn(2, 64, device="cuda")
    bitshift_linear(x, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bitshift_linear(x, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
