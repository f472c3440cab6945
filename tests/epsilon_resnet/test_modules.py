"""The gate, TensorFlow's padding, pre-activation blocks and initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from epsilon_resnet import modules
from epsilon_resnet.models import Config, build_model
from epsilon_resnet.modules import same_padding, strict_identity


def test_a_closed_block_is_computed_and_gets_zero_gradients_so_that_weight_decay_acts():
    torch.manual_seed(0)
    block = modules.CifarBlock(16, 16)
    residual, shortcut = block(torch.randn(4, 16, 8, 8))
    output, _ = strict_identity(residual, shortcut, epsilon=1e3)
    assert torch.equal(output, shortcut)
    output.square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert block.bn1.num_batches_tracked == 1, "its running statistics go on"
    before = block.conv2.weight.detach().norm()
    torch.optim.SGD(block.parameters(), lr=0.1, weight_decay=0.5).step()
    assert block.conv2.weight.norm().item() == pytest.approx(0.95 * before.item())


def test_one_response_of_one_image_opens_the_block_for_the_whole_batch():
    residual, shortcut = torch.zeros(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    residual[:] = 0.25
    assert torch.equal(strict_identity(residual, shortcut, 0.25)[0], shortcut), "epsilon itself is inside"
    residual[2, 1, 3, 3] = -0.26
    output, peak = strict_identity(residual, shortcut, 0.25)
    assert torch.equal(output, shortcut + residual) and peak.item() == pytest.approx(0.26)


def test_comparison_and_formula_agree_off_the_ramp():
    excess = torch.tensor([0, 1e-9, 5e-7, 9.9e-7, 1.01e-6, 1e-5, 1.0, 100.0], dtype=torch.float64)
    assert torch.equal(modules.gate_weight(excess), (~modules.is_closed(excess, 0.0)).double())


def test_a_nan_leaves_the_gate_open_so_that_the_loss_shows_it():
    residual = torch.full((1, 1, 2, 2), math.nan)
    assert strict_identity(residual, torch.zeros(1, 1, 2, 2), 5.0)[0].isnan().all()


def test_half_precision_compares_in_float32():
    residual = torch.full((1, 1, 1, 2), 2.5, dtype=torch.bfloat16)
    output, peak = strict_identity(residual, torch.ones_like(residual), 2.499)
    assert peak.dtype == torch.float32 and output.dtype == torch.bfloat16
    assert output.flatten().tolist() == [3.5, 3.5]


@pytest.mark.parametrize("size", (224, 112, 56, 32, 8, 7, 5, 1))
@pytest.mark.parametrize(("kernel", "stride"), ((7, 2), (3, 2), (3, 1), (1, 2)))
def test_same_padding(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    assert (size + before + after - kernel) // stride + 1 == math.ceil(size / stride)
    assert after - before in (0, 1)


def test_convolution_with_stride_2_pads_the_end_only():
    layer = modules.SameConv2d(1, 1, 3, stride=2)
    x = torch.randn(1, 1, 6, 8)
    assert torch.equal(layer(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), layer.weight, stride=2))
    assert (same_padding(224, 7, 2), same_padding(32, 3, 2)) == ((2, 3), (0, 1))


def test_cifar_shortcut_averages_and_pads_channels_on_both_sides():
    x = torch.randn(2, 16, 4, 4)
    y = modules.cifar_shortcut(x, 32)
    assert torch.equal(y[:, 8:24], F.avg_pool2d(x, 2)) and not y[:, :8].any() and not y[:, 24:].any()


def test_the_first_block_of_a_group_takes_its_imagenet_shortcut_from_the_activated_input():
    block = modules.ImagenetBlock(8, 16, 2, first=False, opens_group=True).eval()
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(block(x)[1], block.convshortcut(F.relu(block.preact(x))))
    inner = modules.ImagenetBlock(16, 16, 1, first=False, opens_group=False).eval()
    y = torch.randn(1, 16, 3, 3)
    assert inner(y)[1] is y


def test_initial_weights():
    torch.manual_seed(0)
    weight = modules.SameConv2d(64, 64, 3).weight
    sigma = math.sqrt(1.3 * 2 / (9 * 64))
    assert weight.abs().max() <= 2 * sigma
    assert weight.std().item() == pytest.approx(0.8796 * sigma, rel=0.02)  # of a normal cut at two sigma
    linear = modules.classifier(64, 10)
    assert not linear.bias.any() and linear.weight.abs().max() <= 2 * math.sqrt(2.6 / 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", 18), "unknown architecture"),
        (("imagenet", 20), "no depth 20"),
        (("cifar", 1), "at least 2"),
        (("cifar", 3, 10, True, (3, 3)), "belong together"),
        (("cifar", 3, 10, True, (3, 3, 4), (0, 0, 0)), "does not fit"),
        (("cifar", 3, 10, True, (3, 3, 3), (1, 0, 0)), "does not fit"),
    ],
)
def test_networks_that_do_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        Config(*arguments)


def test_negative_epsilon_is_refused():
    with pytest.raises(ValueError, match="epsilon must be 0 or more, not -1"):
        build_model(Config("cifar", 2), -1)


def test_torch_compile_sees_one_graph_and_exports():
    model = build_model(Config("cifar", 2), 3.0).eval()
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),))
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(model(x), exported.module()(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
