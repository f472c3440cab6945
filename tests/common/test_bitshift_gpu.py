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
def cupy(monkeypatch):
    """Kernels there are, and the library adds in float32 as they do."""
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
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


HALF = [(scheme, bits, dtype) for scheme, bits in CODES for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize("scheme, bits, dtype", HALF)
def test_half_is_exact_on_integers(scheme, bits, dtype):
    """Sums that float32 holds exactly, rounded once: bit-equal, for every kernel, rows on both sides of each limit."""
    for seed, (outputs, inputs) in enumerate([(1, 1), (33, 20), (300, 1000), (64, 4104)]):
        shift, sign = random_parts((outputs, inputs), scheme, bits, seed, most=10)
        shift = shift.clamp(-6 if scheme != "S3" else 0, 3)
        packed = pack_shift_weights((shift, sign), bits, scheme).to("cuda")
        bias = torch.randint(-99, 100, (outputs,)).float()
        for rows in (1, 2, 8, 9, 32, 33, 64, 65):
            x = torch.randint(-9, 10, (rows, inputs)).float()
            expected = (x @ (sign * 2.0**shift).T + bias).to(dtype)
            y = bitshift_linear(x.to("cuda", dtype), packed, bias.to("cuda", dtype))
            assert torch.equal(y.cpu(), expected), (rows, outputs, inputs)
            assert torch.equal(bitshift_linear(x.to("cuda", dtype), packed, bias.cuda()).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 8, 16, 64, 100])
def test_half_on_large_layers(rows, dtype):
    """As the definition, to float32 sums and one rounding; again and again the same bits; x off its boundary too."""
    weight = random_weights((4096, 4096), "PS", 4)
    packed, x = pack_shift_weights(weight, 4, "PS").to("cuda"), torch.randn(rows * 4096 + 1).to(dtype)
    y = [bitshift_linear(x[1:].view(rows, 4096).cuda(), packed) for _ in range(3)]
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])
    assert torch.equal(y[0], bitshift_linear(x.cuda()[1:].view(rows, 4096), packed))
    x, weight = x[1:].view(rows, 4096).double().cuda(), weight.double().cuda()
    bound = 2.0**-11 * 8 * (x @ weight.T).abs() + 2.0**-24 * 4096 * (x.abs() @ weight.abs().T)
    assert ((y[0].double() - x @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize("scheme, bits, dtype", HALF)
def test_half_unpacks_exactly(scheme, bits, dtype):
    half = importlib.import_module("common.kernels.bitshift_half_cuda")
    for shape, unpack in (((70, 20), half.unpack_rows), ((5, 7, 3, 3), half.unpack_flat)):
        weight = random_weights(shape, scheme, bits, most=14)
        weights = module._weights(pack_shift_weights(weight, bits, scheme).to("cuda"), "test", len(shape))
        if half.usable(dtype, weights):
            assert torch.equal(unpack(weights, dtype).cpu().float(), weight)
        else:
            assert dtype == torch.float16 and weights.bits == 6


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_convolutions(dtype, layout):
    """Exact on integers; grouped, strided, dilated; x's dtype and memory format."""
    geometry = (2, 1), (1, 2), (1, 2), 2
    for scheme, bits in [("PS", 4), ("Q", 4), ("S3", 3), ("PS", 2)]:
        shift, sign = random_parts((16, 8, 3, 2), scheme, bits)
        weight = sign * 2.0 ** shift.clamp(-4, 3)
        packed = pack_shift_weights(weight, bits, scheme).to("cuda")
        x, bias = torch.randint(-9, 10, (2, 16, 9, 8)).float(), torch.randint(-9, 10, (16,)).float()
        on_gpu = x.to("cuda", dtype).contiguous(memory_format=layout)
        y = bitshift_conv2d(on_gpu, packed, bias.to("cuda", dtype), *geometry)
        assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
        assert torch.equal(y.cpu(), F.conv2d(x, weight, bias, *geometry).to(dtype).contiguous(memory_format=layout))


@pytest.mark.parametrize("scheme, bits", [("PS", 4), ("S3", 4), ("S3", 3), ("Q", 3), ("PS", 2)])
def test_int8_equals_the_definition(scheme, bits):
    for rows, (outputs, inputs) in ((1, (1, 1)), (16, (33, 20)), (17, (64, 40)), (1024, (300, 1000))):
        packed = pack_shift_weights(random_weights((outputs, inputs), scheme, bits), bits, scheme)
        x = torch.randint(-128, 128, (rows, inputs)).to(torch.int8)
        y = bitshift_linear(x.cuda(), packed.to("cuda"), arithmetic="int8")
        assert y.dtype == torch.int32 and torch.equal(y.cpu(), bitshift_linear(x, packed, arithmetic="int8"))


def test_naive_convolutions():
    naive = importlib.import_module("common.kernels.bitshift_naive_cuda")
    shift, sign = random_parts((20, 5, 3, 3), "PS", 5)
    codes = naive.shift_codes(pack_shift_weights((shift, sign), 5, "PS").to("cuda"))
    x = torch.randint(-(2**20), 2**20, (2, 5, 9, 8)).int()
    expected = fixed_conv2d(x, shift, sign, (2, 2), (1, 1), (1, 1), 1)
    assert torch.equal(naive.conv2d(x.cuda(), codes, 2, 1).cpu().long(), expected)
    x, weight = torch.randint(-9, 10, (2, 5, 9, 8)).float(), sign.float()
    assert torch.equal(naive.conv2d(x.cuda(), weight.cuda(), 2, 1).cpu(), F.conv2d(x, weight, None, 2, 1))


def test_half_layers_in_graphs_and_streams():
    """Layers whose sums several thread blocks share: two in a graph, replayed while the same runs on other streams."""
    weight = random_weights((512, 8192), "PS", 4)
    packed, x = pack_shift_weights(weight, 4, "PS").to("cuda"), torch.zeros(4, 8192, device="cuda").bfloat16()
    values = torch.randint(-2, 3, x.shape).bfloat16()
    expected = (values.float() @ weight.T).bfloat16().cuda()
    bitshift_linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [bitshift_linear(x, packed), bitshift_linear(x.clone(), packed)]
    x.copy_(values)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(bitshift_linear(x, packed))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in outputs)


def test_half_and_int8_do_not_synchronise():
    packed = pack_shift_weights(random_weights((512, 4096), "PS", 4), 4, "PS").to("cuda")
    conv = pack_shift_weights(random_weights((16, 8, 3, 3), "PS", 4), 4, "PS").to("cuda")
    x, image = torch.randn(2, 4096, device="cuda").bfloat16(), torch.randn(1, 8, 9, 9, device="cuda").half()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            bitshift_linear(x, packed)
            bitshift_linear(x.repeat(50, 1), packed)
            bitshift_linear(x, packed, arithmetic="int8", activation_bits=(4, 4))
            bitshift_conv2d(image, conv)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiles():
    packed = pack_shift_weights(random_weights((64, 64), "PS", 4), 4, "PS").to("cuda")
    x = torch.randint(-2, 3, (2, 64), device="cuda").bfloat16()

    def layers(x):
        return bitshift_linear(x, packed) + bitshift_linear(x, packed, arithmetic="int8", activation_bits=(8, 0))

    assert torch.equal(torch.compile(layers, backend="aot_eager", fullgraph=True)(x), layers(x))
