"""Rounding, layers and conversion beyond the recorded cases: every backend, layout and rule once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepshift import quantizers
from deepshift.convert import convert_to_shift, round_shift_weights, shift_layers
from deepshift.modules_ps import Conv2dShift, LinearShift
from deepshift.modules_q import Conv2dShiftQ, LinearShiftQ
from deepshift.optim import Ranger, build_optimizer, parameter_groups
from deepshift.quantizers import fixed_point, q_weight, round_power_of_2, round_to_fixed, round_values
from deepshift.summary import summarise
from deepshift.zoo import build_model

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x[:, :, ::2, 1:],
    "transposed": lambda x: x.transpose(1, 3),
    "empty": lambda x: x[:0],
}


def definition(x, integer_bits, fraction_bits):
    """Sec. 2.3 of the specification in float64, one number at a time, NaN apart."""
    scale, low, high = 2.0**fraction_bits, -(2.0 ** (integer_bits - 1)), 2.0 ** (integer_bits - 1) - 1
    return (torch.floor(x.double() * scale) / scale).clamp(low, high).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [(16, 16), (3, 5), (8, 0)])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_fixed_point_in_every_layout(layout, bits, backend, monkeypatch):
    if backend == "torch":
        monkeypatch.setattr(quantizers, "_numba_round", lambda: None)
    else:
        pytest.importorskip("numba")
    x = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(1)) * 10
    x[0, 0, 0] = torch.tensor([float("inf"), float("-inf"), 1e30, -0.0, 40000.0])
    x = LAYOUTS[layout](x)
    result = round_to_fixed(x, *bits)
    assert torch.equal(result, definition(x, *bits))
    assert torch.equal(result, result.contiguous()) and result.shape == x.shape
    assert round_to_fixed(torch.tensor([float("nan")]), *bits).isnan().all()


def test_several_threads_give_the_same_bits():
    threads = torch.get_num_threads()
    x = torch.randn(2**20 + 3)
    try:
        torch.set_num_threads(3)
        assert torch.equal(round_to_fixed(x, 3, 5), definition(x, 3, 5))
    finally:
        torch.set_num_threads(threads)


def test_gradients_pass_also_where_values_are_cut_off():
    x = torch.tensor([-9.0, 0.3, 9.0], requires_grad=True)
    fixed_point(x, (3, 5)).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert x.grad.tolist() == [1, 2, 3]
    weight = torch.tensor([0.0, 3.0, 1e-9, -0.3], requires_grad=True)
    rounded = q_weight(weight, (-3, 0))
    rounded.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert rounded.tolist() == [0, 1, 0.125, -0.25] and weight.grad.tolist() == [1, 2, 3, 4]


def test_stochastic_rounding_has_the_right_mean():
    torch.manual_seed(0)
    x = torch.full((20000,), -2.3)
    assert set(round_values(x, "stochastic").tolist()) == {-3.0, -2.0}
    assert round_values(x, "stochastic").mean().item() == pytest.approx(-2.3, abs=0.02)
    zeros = round_power_of_2(torch.tensor([0.0, 0.4]), "stochastic")
    assert zeros[0] == 0 and zeros[1] in (0.25, 0.5)
    with pytest.raises(ValueError, match="unknown rounding 'up'"):
        round_values(x, "up")


@pytest.mark.parametrize("kind", [LinearShift, LinearShiftQ])
def test_stochastic_layers_are_deterministic_in_evaluation(kind):
    torch.manual_seed(0)
    layer, x = kind(50, 20, rounding="stochastic"), torch.randn(3, 50)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", ["PS", "Q"])
@pytest.mark.parametrize("geometry", [
    {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}, {"padding": (2, 0), "bias": False},
])  # fmt: skip
def test_convolutions_are_those_of_the_rounded_weights(kind, geometry):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **geometry)
    wrapped, _ = convert_to_shift(nn.Sequential(conv), 1, kind, convert_weights=True, activation_bits=(4, 4))
    layer, x = wrapped[0], torch.randn(2, 4, 9, 8)
    assert type(layer) is (Conv2dShift if kind == "PS" else Conv2dShiftQ)
    weight = round_power_of_2(conv.weight.detach())  # magnitudes of a new nn.Conv2d are within the range of 5 bits
    bias = None if conv.bias is None else definition(conv.bias.detach(), 4, 4)
    g = layer.geometry
    expected = F.conv2d(definition(x, 4, 4), weight, bias, g.stride, g.padding, g.dilation, g.groups)
    assert torch.equal(layer(x).detach(), expected)


def test_what_a_converted_layer_shares_with_the_float_one():
    torch.manual_seed(0)
    linear, other = nn.Linear(4, 3), nn.Linear(4, 3)
    q = convert_to_shift(nn.Sequential(linear), 1, "Q", activation_bits=(3, 5))[0][0]
    assert q.weight is linear.weight and q.bias is not linear.bias
    assert torch.equal(q.bias.data, definition(linear.bias.data, 3, 5))
    ps = convert_to_shift(nn.Sequential(other), 1, "PS", convert_weights=True)[0][0]
    assert ps.bias is other.bias and list(dict(ps.named_parameters())) == ["shift", "sign", "bias"]
    assert torch.equal(ps.sign.data, other.weight.data.sign())
    fresh = convert_to_shift(nn.Sequential(nn.Conv2d(3, 4, 3)), 1, "PS", freeze_sign=True)[0][0]
    assert -10 <= fresh.shift.min() and fresh.shift.max() <= -1 and not fresh.sign.requires_grad


def test_zero_weights_stay_zero_and_do_not_spoil_the_rest():
    conv = nn.Conv2d(1, 1, 2, bias=False)
    conv.weight.data = torch.tensor([[[[0.0, 0.5], [-0.25, 0.0]]]])
    for kind in ("PS", "Q"):
        model = convert_to_shift(nn.Sequential(conv), 1, kind, convert_weights=True)[0]
        y = model(torch.ones(1, 1, 2, 2))
        y.backward()
        assert y.item() == 0.25 and all(p.grad.isfinite().all() for p in model.parameters())


def test_old_circular_padding():
    conv = nn.Conv2d(1, 1, 3, padding=2, padding_mode="circular", bias=False)
    model, _ = convert_to_shift(nn.Sequential(conv), 1, "Q")
    assert model(torch.randn(1, 1, 5, 5)).shape == (1, 1, 5, 5)  # half of the padding on each side


def test_rounding_twice_changes_nothing():
    torch.manual_seed(0)
    for kind in ("PS", "Q"):
        model, _ = convert_to_shift(build_model("mnist", "simple_conv"), 1000, kind)
        once = round_shift_weights(model, clone=True)
        twice = round_shift_weights(once, clone=True)
        x = torch.randn(2, 1, 28, 28)
        assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
        assert torch.equal(once.eval()(x), twice.eval()(x))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="shift type must be Q or PS"):
        convert_to_shift(nn.Sequential(nn.Linear(1, 1)), 1, "R")
    with pytest.raises(ValueError, match="at least 2 weight bits, not 1"):
        LinearShift(1, 1, weight_bits=1)
    with pytest.raises(ValueError, match="at least 1 integer bit, not 0"):
        round_to_fixed(torch.ones(1), 0, 5)
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        build_optimizer("lion", [{"params": [nn.Parameter(torch.ones(1))]}], 0.1)
    with pytest.raises(ValueError, match="Ranger needs lr > 0"):
        Ranger([nn.Parameter(torch.ones(1))], lr=0)


def test_groups_of_parameters():
    model, _ = convert_to_shift(build_model("cifar10", "lenet"), 1, "PS")
    groups = parameter_groups(model, 0.1, 0.5, 1e-4)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (6, 0.1, 1e-4), (4, 0.5, 0.0), (4, 0.1, 0.0),
    ]  # fmt: skip
    ids = {id(p) for group in groups for p in group["params"]}
    assert ids == {id(p) for p in model.parameters()}


def test_half_precision_is_rounded_in_float32():
    layer = Conv2dShiftQ(2, 2, 1, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(1, 2, 3, 3).bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize(("kind", "size"), [(None, "1.03"), ("PS", "0.17"), ("Q", "0.17")])
def test_summary_of_resnet20(kind, size):
    model = build_model("cifar10", "resnet20")
    if kind:
        convert_to_shift(model, 1000, kind)
    text = summarise(model, (3, 32, 32))
    assert "Total params: 271,098" in text and f"Params size (MB): {size}" in text
    assert len(shift_layers(model)) == (20 if kind else 0)


@pytest.mark.gpu
def test_rounding_on_a_gpu_is_one_kernel_with_the_same_bits():
    x = torch.randn(1000, device="cuda") * 100
    assert torch.equal(round_to_fixed(x, 3, 5).cpu(), definition(x.cpu(), 3, 5))
    assert round_to_fixed(torch.tensor([float("nan")], device="cuda"), 3, 5).isnan().all()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        round_to_fixed(x, 3, 5)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1
