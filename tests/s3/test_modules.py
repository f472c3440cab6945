"""Weights, gradients and layers beyond the recorded cases: every backend, layout and rule once."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s3 import passes_cpu
from s3.quantizers import dense_weight_penalty, denseshift_weight, s3_shift_count, s3_weight
from s3.s3conv2dshift import DenseShiftConv2d, S3Conv2d

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "strided": lambda x: x[:, :, ::2, 1:],
    "empty": lambda x: x[:0],
}


def definition(sign, val, *shifts):
    """One weight, and its derivatives with respect to s, z and every h, from the specification's words."""
    s, z = (1 if sign >= 0 else -1), int(val > 0)
    h = [int(shift > 0) for shift in shifts]
    exponent = len(list(itertools.takewhile(bool, h)))
    slopes = []
    for t in range(len(h)):
        inner = len(list(itertools.takewhile(bool, h[t + 1 :])))
        slopes.append((inner + 1) * math.prod(h[:t]))
    power = 2**exponent
    rest = [s * z * power * math.log(2) * slope for slope in slopes]
    return s * z * power, [z * power, s * power, *rest]


def with_gradients(latents, upstream, function=s3_weight):
    latents = [latent.detach().requires_grad_() for latent in latents]
    weight = function(*latents)
    weight.backward(upstream)
    return [weight.detach(), *(latent.grad for latent in latents)]


def random_latents(count, layout="contiguous"):
    generator = torch.Generator().manual_seed(3)
    latents = [torch.randn(5, 4, 6, 3, generator=generator) for _ in range(count + 1)]
    for latent in latents[:-1]:
        latent.view(-1)[:: 7 + len(latents)] = 0  # h(0) = 0, but s(0) = +1
    return [LAYOUTS[layout](latent) for latent in latents]


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_layout(bits, layout, backend, monkeypatch):
    if backend == "torch":
        monkeypatch.setattr(passes_cpu, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
    *latents, upstream = random_latents(2 + s3_shift_count(bits), layout)
    check_definition(latents, upstream)


def special_latents(count, layout):
    """Latents and the gradient of the weight, a fifth of them zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(4)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    tensors = torch.randn(count + 1, 5, 4, 6, 3, generator=generator)
    chosen = special[torch.randint(len(special), tensors.shape, generator=generator)]
    tensors = torch.where(torch.rand(tensors.shape, generator=generator) < 0.2, chosen, tensors)
    return [LAYOUTS[layout](tensor.clone()) for tensor in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("function", [s3_weight, denseshift_weight])
def test_one_pass_gives_the_bits_of_pytorch(function, count, layout, monkeypatch):
    pytest.importorskip("numba")
    *latents, upstream = special_latents(count, layout)
    passes, run = [], passes_cpu._run
    monkeypatch.setattr(passes_cpu, "_run", lambda *args: passes.append(args) or run(*args))
    found = with_gradients(latents, upstream, function)
    assert len(passes) == (0 if layout == "strided" else 2), "one forward, one backward"
    monkeypatch.setattr(passes_cpu, "_compiled", lambda: None)
    expected = with_gradients(latents, upstream, function)
    for one, other in zip(found, expected, strict=True):
        assert one.stride() == other.stride()
        numbers = ~torch.isnan(other)  # which NaN it is, the processor decides
        assert torch.equal(torch.isnan(one), ~numbers)
        assert torch.equal(one[numbers].view(torch.int32), other[numbers].view(torch.int32))


def check_definition(latents, upstream):
    found = with_gradients(latents, upstream)
    assert all(x.shape == upstream.shape and x.dtype == torch.float32 for x in found)
    flat = zip(upstream.flatten().tolist(), *(latent.flatten().tolist() for latent in latents), strict=True)
    for i, (g, *values) in enumerate(flat):
        weight, slopes = definition(*values)
        assert found[0].flatten()[i] == weight
        expected = [g * slope for slope in slopes]
        assert [x.flatten()[i].item() for x in found[1:]] == pytest.approx(expected, rel=1e-5)


def test_numba_is_used_where_it_fits_and_agrees_with_other_types(monkeypatch):
    pytest.importorskip("numba")
    *latents, upstream = random_latents(4)
    called = []
    run = passes_cpu._run
    monkeypatch.setattr(passes_cpu, "_run", lambda *args: called.append(args) or run(*args))
    single = with_gradients(latents, upstream)
    assert len(called) == 2, "one pass forward, one backward"
    double = with_gradients([latent.double() for latent in latents], upstream.double())
    mixed = with_gradients(latents, upstream.to(memory_format=torch.channels_last))
    assert len(called) == 4
    for a, b, c in zip(single, double, mixed, strict=True):
        torch.testing.assert_close(a, b.float())
        assert torch.equal(a, c)


def test_several_threads_give_the_same_bits():
    latents = [torch.randn(2**18 + 3) for _ in range(5)]
    one, threads = with_gradients(latents[:4], latents[4]), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        several = with_gradients(latents[:4], latents[4])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


def test_zeros_keep_their_sign_as_in_the_published_listing():
    weight = s3_weight(torch.tensor([-1.0, 1.0]), *(torch.full((2,), -1.0) for _ in range(3)))
    assert torch.equal(weight, torch.zeros(2)) and torch.signbit(weight).tolist() == [True, False]


def test_denseshift_of_four_bits():
    """exponent 0 to 7, and the gradient of sqrt(e + 1) from finite differences over e."""
    *latents, upstream = random_latents(8)
    weight, grad_sign, *_ = with_gradients(latents, upstream, denseshift_weight)
    exponent = weight.abs().log2()
    assert exponent.max() >= 3 and (exponent == exponent.round()).all() and weight.abs().min() == 1
    torch.testing.assert_close(grad_sign, upstream * (exponent + 1).sqrt())


def test_penalty_counts_negative_values_once():
    values = [torch.tensor([-2.0, 0.0, 3.0], requires_grad=True), torch.tensor([-0.5], requires_grad=True)]
    total = dense_weight_penalty(values)
    (3 * total).backward()
    assert total.item() == 2.5
    assert values[0].grad.tolist() == [-3.0, -1.5, 0.0] and values[1].grad.tolist() == [-3.0]
    assert dense_weight_penalty([]) == 0


@pytest.mark.parametrize("kind", [S3Conv2d, DenseShiftConv2d])
@pytest.mark.parametrize("bits", [1, 5, 2.5, True])
def test_bits_outside_of_the_range(kind, bits):
    with pytest.raises(ValueError, match="2, 3 or 4 bits"):
        kind(3, 4, 3, bits=bits)


def layer(**options):
    torch.manual_seed(1)
    return S3Conv2d(4, 6, 3, **options)


def test_names_and_their_order():
    assert list(layer().state_dict()) == [
        "weight",
        "bias",
        "weight_sign",
        "weight_val",
        "weight_shift",
        "weight_shift2",
    ]
    assert list(layer(bits=2, bias=False).state_dict()) == ["weight", "weight_sign", "weight_val"]
    assert [name for name, _ in layer(bits=4, bias=False).named_parameters()] == [
        "weight", "weight_val", "weight_shift", *(f"weight_shift{i}" for i in range(2, 7))
    ]  # fmt: skip
    dense = list(DenseShiftConv2d(4, 6, 3, bias=False).state_dict())
    assert dense == ["weight", "weight_sign", "weight_t1", "weight_t2", "weight_t3"]


@pytest.mark.parametrize("change", [
    copy.deepcopy, lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.to(memory_format=torch.channels_last),
    lambda m: m.to("meta").to_empty(device="cpu"), lambda m: m.requires_grad_(False),
])  # fmt: skip
def test_weight_and_weight_sign_stay_one_tensor(change):
    changed = change(layer())
    assert changed.weight is changed.weight_sign
    assert len(list(changed.parameters())) == 5


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("given", [("weight",), ("weight_sign",), ("weight", "weight_sign")])
def test_loading_either_name_and_weight_sign_wins(given, assign):
    state = layer().state_dict()
    values = {"weight": torch.full((6, 4, 3, 3), 1.0), "weight_sign": torch.full((6, 4, 3, 3), -1.0)}
    for name in ("weight", "weight_sign"):
        del state[name]
    state.update({name: values[name] for name in given})
    holder = nn.Sequential(layer())
    holder.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=assign)
    assert holder[0].weight is holder[0].weight_sign
    assert torch.equal(holder[0].weight, values[given[-1]])


def test_weight_is_built_once_in_evaluation_and_in_every_training_step(monkeypatch):
    conv, x, built = layer(padding=1), torch.randn(2, 4, 5, 5), []
    build = S3Conv2d.discrete_weight
    monkeypatch.setattr(S3Conv2d, "discrete_weight", lambda self: built.append(1) or build(self))

    def builds(action):
        built.clear()
        action()
        return len(built)

    def evaluate():
        with torch.no_grad():
            torch.testing.assert_close(conv(x), F.conv2d(x, build(conv), conv.bias, padding=1))

    assert builds(lambda: (conv(x), conv(x))) == 2
    conv.eval()
    assert builds(lambda: (evaluate(), evaluate())) == 1
    state = {name: -tensor for name, tensor in conv.state_dict().items()}
    optimizer = torch.optim.SGD(conv.parameters(), 100.0)
    for change in (lambda: conv.load_state_dict(state), lambda: nn.init.ones_(conv.weight_val),
                   lambda: (conv.weight_shift.data.neg_(), conv.eval()), optimizer.step,
                   lambda: setattr(conv, "weight_val", nn.Parameter(-torch.ones_like(conv.weight_val)))):  # fmt: skip
        conv(x).sum().backward()
        change()
        assert builds(lambda: (evaluate(), evaluate())) == 1
    assert conv(x).requires_grad, "a gradient is wanted: nothing is kept"


def test_inference_mode():
    with torch.inference_mode():
        conv = layer().eval()
        assert torch.equal(conv(torch.ones(1, 4, 3, 3)), conv(torch.ones(1, 4, 3, 3)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_geometry_is_that_of_conv2d(mode):
    options = {"stride": (1, 2), "padding": (1, 2), "dilation": (1, 2), "groups": 2, "padding_mode": mode}
    ours, plain = S3Conv2d(4, 6, (1, 3), **options), nn.Conv2d(4, 6, (1, 3), **options)
    plain.load_state_dict({"weight": ours.discrete_weight().detach(), "bias": ours.bias.detach()})
    x = torch.randn(2, 4, 7, 9)
    assert torch.equal(ours(x), plain(x))


def test_a_new_layer_has_usable_latents_and_draws_what_a_plain_one_draws():
    torch.manual_seed(0)
    plain = [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
    torch.manual_seed(0)
    ours = [S3Conv2d(8, 8, 3), S3Conv2d(8, 8, 3)]
    for one, other in zip(plain, ours, strict=True):
        assert torch.equal(one.weight, other.weight)
    assert 0.35 < (ours[1].discrete_weight() == 0).float().mean() < 0.65
    assert not torch.equal(ours[0].weight_val, ours[1].weight_val)


@pytest.mark.parametrize(("bits", "start"), [(2, "default"), (3, "default"), (4, "default"), (3, "dense")])
def test_distribution_of_initial_weights(bits, start):
    """Sec. 2.5 and 2.10 of the specification: half zeros, then 2^-(e+1); or all +-1."""
    torch.manual_seed(0)
    conv = S3Conv2d(64, 128, 3, bits=bits, bias=False)
    conv.reset_latents(start)
    weight = conv.discrete_weight()
    if start == "dense":
        assert (weight.abs() == 1).all() and 0.45 < (weight > 0).float().mean() < 0.55
        return
    top = s3_shift_count(bits)
    assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    for exponent in range(top + 1):
        share = (weight.abs() == 2**exponent).float().mean().item()
        assert share == pytest.approx(0.5 * 2.0 ** -min(exponent + 1, top), abs=0.01)


@pytest.mark.parametrize("kind", [S3Conv2d, DenseShiftConv2d])
def test_compiles_to_one_graph_with_the_same_gradients(kind):
    torch.manual_seed(0)
    conv, x = kind(4, 6, 3), torch.randn(2, 4, 5, 5)
    conv(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in conv.parameters()]
    conv.zero_grad()
    torch.compile(conv, fullgraph=True, backend="aot_eager")(x).sum().backward()
    for parameter, gradient in zip(conv.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_autocast_keeps_latents_and_their_gradients_in_float32():
    conv = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(torch.randn(2, 4, 5, 5))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in conv.parameters())
