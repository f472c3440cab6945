"""bitshift and multiply as torch operators: opcheck, torch.compile, torch.export, autocast, no gradient."""

import io

import pytest
import torch

from common.kernels import bitshift_conv2d, bitshift_linear, multiply_conv2d, multiply_linear, pack_shift_weights
from tests.common.bitshift_cases import random_weights

LINEAR = pack_shift_weights(random_weights((40, 24), "PS", 4), 4, "PS")
CONV = pack_shift_weights(random_weights((6, 4, 3, 3), "Q", 5), 5, "Q")


def of(packed):
    return list(packed.shape), packed.bits, packed.base, packed.zero


@pytest.mark.parametrize("fraction", [-1, 8])
def test_opcheck(fraction):
    linear, conv = torch.ops.effnets.bitshift_linear.default, torch.ops.effnets.bitshift_conv2d.default
    for x in (torch.randn(3, 24), torch.randn(2, 5, 24), torch.randn(24, 7).T, torch.randn(0, 24)):
        for bias in (None, torch.randn(40)):
            torch.library.opcheck(linear, (x, LINEAR.codes, bias, *of(LINEAR), fraction))
    for x in (torch.randn(2, 8, 9, 7), torch.randn(2, 8, 7, 9).mT, torch.randn(0, 8, 9, 7)):
        geometry = (2, 1), (1, 0), (1, 2), 2
        torch.library.opcheck(conv, (x, CONV.codes, torch.randn(6), *of(CONV), *geometry, fraction))


def test_small_convolution():
    """Through the dispatcher, which passes lists, as well as past it: what is known about sizes is kept by them."""
    packed = pack_shift_weights(random_weights((16, 16, 3, 3), "PS", 4), 4, "PS")
    x = torch.randn(1, 16, 5, 4)
    assert torch.equal(
        bitshift_conv2d(x.requires_grad_(), packed, None, 1, 1), bitshift_conv2d(x.detach(), packed, None, 1, 1)
    )


def test_opcheck_multiply():
    weight = random_weights((6, 4, 3, 3), "Q", 5)
    geometry = (2, 1), (1, 0), (1, 2), 2
    arguments = torch.randn(2, 8, 9, 7), weight, torch.randn(6), *geometry
    torch.library.opcheck(torch.ops.effnets.multiply_conv2d.default, arguments)
    torch.library.opcheck(torch.ops.effnets.multiply_linear.default, (torch.randn(2, 3, 5), torch.randn(4, 5), None))


def layers(x):
    y = bitshift_conv2d(x * 2, CONV, None, 1, 1, 1, 2).relu()
    return bitshift_linear(y.flatten(1)[:, :24], LINEAR, torch.ones(40), arithmetic="fixed", activation_bits=(8, 8))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    torch._dynamo.reset()
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    for size in ((2, 8, 6, 5), (1, 8, 6, 5), (3, 8, 4, 7)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), layers(x), atol=2**-7, rtol=0)


class Layers(torch.nn.Module):
    def forward(self, x):
        return layers(x)


def test_export():
    x = torch.randn(2, 8, 6, 5)
    program = torch.export.export(Layers(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 6, 5)
        torch.testing.assert_close(loaded(x), layers(x), atol=2**-7, rtol=0)


def test_meta():
    for x in (torch.randn(2, 24), torch.randn(2, 24).bfloat16()):
        y = bitshift_linear(x.to("meta"), LINEAR.to("meta"))
        assert (y.shape, y.dtype, y.device.type) == ((2, 40), x.dtype, "meta")
    assert bitshift_conv2d(torch.empty(2, 8, 9, 7, device="meta"), CONV.to("meta"), groups=2).shape == (2, 6, 7, 5)


def test_autocast_keeps_the_dtype():
    x = torch.randn(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bitshift_linear(x, LINEAR)
    assert torch.equal(y, bitshift_linear(x, LINEAR)) and y.dtype == torch.float32


def test_forward_only():
    """Asking for a gradient says why there is none; without a gradient, inference mode and no_grad work."""
    x = torch.randn(2, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match="forward only"):
        bitshift_linear(x, LINEAR).sum().backward()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not bitshift_linear(x, LINEAR).requires_grad


def test_multiply_keeps_leading_dimensions():
    assert multiply_linear(torch.zeros(2, 3, 5), torch.zeros(4, 5)).shape == (2, 3, 4)
    assert multiply_conv2d(torch.zeros(2, 3, 5, 5), torch.zeros(4, 3, 2, 2), padding=1).shape == (2, 4, 6, 6)
