"""Average pooling under --deterministic: PyTorch's numbers, without the operation that has no fixed order on CUDA."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deepshift import mnist, network
from deepshift.zoo import build_model
from deepshift.zoo.pooling import OrderedAdaptiveAvgPool2d, order_pool_gradients

# Shape of the input, size of the output; whether no input is in two windows.
CASES = [
    ((2, 3, 7, 7), (7, 7), True),
    ((2, 3, 14, 21), 7, True),
    ((2, 3, 8, 8), (4, None), True),
    ((3, 12, 6), (6, 6), True),
    ((2, 3, 1, 1), (7, 7), False),  # VGG on small images
    ((2, 3, 9, 5), (7, 7), False),
    ((2, 3, 13, 13), (6, 6), False),
]


def pooled(pool, images, upstream):
    images = images.detach().requires_grad_()
    output = pool(images)
    output.backward(upstream)
    return output.detach(), images.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "size", "apart"), CASES)
def test_outputs_and_gradients_are_those_of_pytorch(shape, size, apart, channels_last, dtype):
    torch.manual_seed(0)
    images = torch.randn(shape, dtype=dtype)
    if channels_last and len(shape) == 4:
        images = images.to(memory_format=torch.channels_last)
    plain = nn.AdaptiveAvgPool2d(size)
    upstream = torch.randn_like(plain(images))
    expected, expected_gradient = pooled(plain, images, upstream)
    output, gradient = pooled(OrderedAdaptiveAvgPool2d(size), images, upstream)
    assert torch.equal(output, expected) and output.stride() == expected.stride()
    if apart:
        assert torch.equal(gradient, expected_gradient)
    elif dtype is torch.bfloat16:  # PyTorch adds in bfloat16, this in float32: nearer to the gradient in float64
        exact = pooled(plain, images.double(), upstream.double())[1]
        assert (gradient - exact).abs().max() <= (expected_gradient - exact).abs().max()
        assert gradient.dtype == dtype
    else:  # up to 49 summands, in another order
        largest = expected_gradient.abs().max().clamp(min=upstream.abs().max())
        assert (gradient - expected_gradient).abs().max() <= 49 * torch.finfo(dtype).eps * largest


def test_derivative_is_exact():
    images = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(OrderedAdaptiveAvgPool2d((3, 3)), images)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("arch", ["alexnet", "vgg11_bn", "googlenet", "squeezenet1_1", "resnet18"])
@pytest.mark.parametrize("ordered", [False, True])
def test_no_network_of_torchvision_takes_the_gradient_that_has_no_order(arch, ordered):
    """A training step on the meta device, where tensors have no data. Without the replacement some do take it."""
    with torch.device("meta"), Called() as called:
        model = build_model("imagenet", arch)
        if ordered:
            order_pool_gradients(model)
        images = torch.empty(2, 3, 256, 256)  # of another size than 224: no window is a single element
        output = model(images)
        (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
    unordered = "aten::_adaptive_avg_pool2d_backward" in called.names
    assert unordered == (not ordered and arch in ("alexnet", "vgg11_bn"))
    left = [m for m in model.modules() if type(m) is nn.AdaptiveAvgPool2d and m.output_size not in (1, (1, 1))]
    assert not (ordered and left)


@pytest.mark.parametrize("flags", [[], ["--deterministic"]])
def test_the_flag_replaces_them(flags, monkeypatch):
    small = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d((2, 2)), nn.AdaptiveAvgPool2d(1))
    monkeypatch.setattr(network, "build_model", lambda dataset, arch: small)
    built = network.build_network(mnist.parse_args([*flags, "--embedded-data"]), "mnist", lambda text: None)
    kinds = [type(module) for module in built.model[1:]]
    assert kinds == [OrderedAdaptiveAvgPool2d if flags else nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d]
