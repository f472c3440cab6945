"""Every golden case of DeepShift: outputs recorded from the original code ($GOLDEN_DIR/deepshift.json)."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from common.kernels import bitshift_conv2d, bitshift_linear, pack_shift_weights
from deepshift import cifar10, engine, imagenet
from deepshift.convert import convert_to_shift, pack_layers, round_shift_weights, use_kernels
from deepshift.count import count_parameters
from deepshift.modules_ps import Conv2dShift, LinearShift
from deepshift.modules_q import Conv2dShiftQ, LinearShiftQ
from deepshift.network import Network
from deepshift.quantizers import (
    clamp_magnitude_,
    ps_shift_range,
    ps_weight,
    q_shift_range,
    q_weight,
    round_power_of_2,
    round_to_fixed,
    shift_and_sign,
    shift_l2_norm,
)
from deepshift.training import Training
from deepshift.zoo import build_model
from tests.golden.fill import fill_state_dict, golden_input

GOLDEN = json.loads((Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent)) / "deepshift.json").read_text())
ZOOS = {"mnist": "mnist", "cifar10": "cifar10", "customized": "imagenet", "torchvision": "imagenet"}
CONVERSION = {"shift_depth", "shift_type", "weight_bits", "activation_bits", "convert_all_linear", "convert_weights",
              "freeze_sign", "rounding"}  # fmt: skip


INFORMATIVE = {"flops", "noise_fp64"}  # of a case: null, and not of float32


def only(case, *fields):
    """Every field of a case is one that its test looks at."""
    assert set(case) <= set(fields), set(case) - set(fields)


def built(case):
    name = f"simple_{case['arch']}" if case["zoo"] == "mnist" else case["arch"]
    return build_model(ZOOS[case["zoo"]], name)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=[case["case"] for case in GOLDEN["cases"]])
def test_model(case):
    only(case, "case", "zoo", "arch", "kwargs", "input_shape", "converted", "params", "keys", "keys_crc32", "logits",
         "noise_fp32", *INFORMATIVE)  # fmt: skip
    assert case["flops"] is None
    kwargs = dict(case["kwargs"])
    fill, rounds = kwargs.pop("fill"), kwargs.pop("round_shift_weights", False)
    assert set(kwargs) <= CONVERSION and fill in ("before", "after")
    torch.manual_seed(0)
    model, converted = built(case), None
    if fill == "before":
        model.load_state_dict(fill_state_dict(model.state_dict()))
    if "shift_type" in kwargs:
        model, converted = convert_to_shift(model, **kwargs)
    if fill == "after":
        model.load_state_dict(fill_state_dict(model.state_dict()))
    if rounds:
        round_shift_weights(model)
    assert converted == case["converted"]
    assert count_parameters(model) == case["params"]
    names = [f"{name} {list(value.shape)}" for name, value in model.state_dict().items()]
    assert zlib.crc32("\n".join(names).encode()) == case["keys_crc32"]
    if "keys" in case:
        assert [[name, list(value.shape)] for name, value in model.state_dict().items()] == case["keys"]
    with torch.no_grad():
        logits = model.eval()(golden_input(case["input_shape"])).double()
    expected = torch.tensor(case["logits"], dtype=torch.float64)
    assert logits.shape == expected.shape
    tolerance = max(1e-4, 20 * case["noise_fp32"])
    assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


FUNCTIONS = GOLDEN["functions"]
CHECKED = {
    "round_to_fixed", "get_shift_and_sign", "clampabs", "ps_weight", "q_weight", "linear_gradients", "conv_gradients",
    "round_shift_weights", "integer_kernels", "packed_kernels", "compress_bits", "kernel_forward_cpu", "shift_l2_norm",
    "lr_schedule", "optimizer_trajectories",
}  # fmt: skip


def tensor(values):
    """float32 tensor of nested lists, in which strings stand for infinities and NaN."""
    if isinstance(values, list):
        return torch.stack([tensor(value) for value in values]) if values else torch.empty(0)
    return torch.tensor(float(values))


def cases(name):
    found = FUNCTIONS[name]
    found = found if isinstance(found, list) else [found]
    return pytest.mark.parametrize("case", found, ids=[str(number) for number in range(len(found))])


def same(result, expected):
    expected = tensor(expected)
    assert result.dtype == expected.dtype == torch.float32
    assert torch.equal(result.detach(), expected)


def close(result, expected):
    """Within 1e-6 of the largest magnitude."""
    expected = tensor(expected)
    assert result.shape == expected.shape
    assert (result.detach() - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1e-30)


def test_every_section_is_checked():
    assert set(GOLDEN) == {"paper", "notes", "cases", "functions"}
    assert set(FUNCTIONS) == CHECKED


@cases("round_to_fixed")
def test_round_to_fixed(case):
    only(case, "input", "integer_bits", "fraction_bits", "output")
    same(round_to_fixed(tensor(case["input"]), case["integer_bits"], case["fraction_bits"]), case["output"])


@cases("get_shift_and_sign")
def test_shift_and_sign(case):
    only(case, "input", "shift", "sign", "round_power_of_2")
    shift, sign = shift_and_sign(tensor(case["input"]))
    same(shift, case["shift"])
    same(sign, case["sign"])
    same(round_power_of_2(tensor(case["input"])), case["round_power_of_2"])


@cases("clampabs")
def test_clamp_magnitude(case):
    only(case, "input", "min", "max", "output")
    same(clamp_magnitude_(tensor(case["input"]), case["min"], case["max"]), case["output"])


@cases("ps_weight")
def test_ps_weight(case):
    only(case, "weight_bits", "shift_range", "shift", "sign", "weight", "shift_after_forward", "sign_after_forward")
    shift, sign = tensor(case["shift"]), tensor(case["sign"])
    shift_range = ps_shift_range(case["weight_bits"])
    assert list(shift_range) == case["shift_range"]
    same(ps_weight(shift, sign, shift_range), case["weight"])
    same(shift, case["shift_after_forward"])
    same(sign, case["sign_after_forward"])


@cases("q_weight")
def test_q_weight(case):
    only(case, "weight_bits", "shift_range", "weight_in", "weight_q", "weight_after_forward")
    weight, shift_range = tensor(case["weight_in"]), q_shift_range(case["weight_bits"])
    assert list(shift_range) == case["shift_range"]
    same(q_weight(weight, shift_range), case["weight_q"])
    same(weight, case["weight_after_forward"])


def layer_of(case, is_conv):
    """The layer of a gradient or kernel case with its tensors as they are given."""
    options = {"weight_bits": case.get("weight_bits", 5), "activation_bits": tuple(case["activation_bits"])}
    kind = case.get("kind", "ps")
    shape = tensor(case["shift" if kind == "ps" else "weight"]).shape
    if kind == "ps":
        options["freeze_sign"] = case.get("freeze_sign", False)
    if is_conv:
        groups = case.get("groups", 1)
        args = (shape[1] * groups, shape[0], tuple(shape[2:]), case.get("stride", 1), case.get("padding", 0), 1, groups)
        layer = (Conv2dShift if kind == "ps" else Conv2dShiftQ)(*args, **options)
    else:
        layer = (LinearShift if kind == "ps" else LinearShiftQ)(shape[1], shape[0], **options)
    for name in ("shift", "sign", "bias") if kind == "ps" else ("weight", "bias"):
        getattr(layer, name).data.copy_(tensor(case[name]))
    return layer


GRADIENT_FIELDS = ("kind", "weight_bits", "activation_bits", "freeze_sign", "shift", "sign", "weight", "bias", "x", "y",
                   "grad_output", "grad_x", "grad_shift", "grad_sign", "grad_weight", "grad_bias")  # fmt: skip


def check_gradients(case, is_conv):
    only(case, *GRADIENT_FIELDS, *(("stride", "padding", "groups") if is_conv else ()))
    layer, x = layer_of(case, is_conv), tensor(case["x"]).requires_grad_()
    y = layer(x)
    y.backward(tensor(case["grad_output"]))
    close(y, case["y"])
    close(x.grad, case["grad_x"])
    parameters = dict(layer.named_parameters())
    gradients = {name.removeprefix("grad_") for name in case if name.startswith("grad_")} - {"x", "output"}
    assert gradients == set(parameters)
    for name in gradients:
        if case[f"grad_{name}"] is None:
            assert parameters[name].grad is None
        else:
            close(parameters[name].grad, case[f"grad_{name}"])


@cases("linear_gradients")
def test_linear_gradients(case):
    check_gradients(case, False)


@cases("conv_gradients")
def test_conv_gradients(case):
    check_gradients(case, True)


@cases("round_shift_weights")
def test_round_shift_weights(case):
    assert set(case) == {"weight_bits", "ps", "q"}
    ps = LinearShift(4, 1, weight_bits=case["weight_bits"])
    q = LinearShiftQ(4, 1, weight_bits=case["weight_bits"])
    for layer, kind in ((ps, "ps"), (q, "q")):
        names = [name for name in case[kind] if not name.endswith("_rounded")]
        for name in names:
            parameter = getattr(layer, name)
            parameter.data.copy_(tensor(case[kind][name]).view_as(parameter))
        clone = round_shift_weights(layer, clone=True)
        for name in names:
            expected = tensor(case[kind][f"{name}_rounded"])
            assert torch.equal(getattr(clone, name).data.flatten(), expected)
            assert torch.equal(getattr(layer, name).data.flatten(), tensor(case[kind][name])), "the clone is rounded"
        round_shift_weights(layer)
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), clone.parameters(), strict=True))


def integers(values):
    return torch.tensor(values, dtype=torch.int32)


def run_integers(x, packed, bias, case):
    if len(packed.shape) == 2:
        return bitshift_linear(x, packed, bias, arithmetic="fixed")
    padding = case["padding"]
    return bitshift_conv2d(x, packed, bias, tuple(case["stride"]), padding, arithmetic="fixed")


@cases("integer_kernels")
def test_integer_kernels(case):
    only(case, "op", "shift", "sign", "x", "bias", "padding", "stride", "y", "y_original_cpu_kernel")
    shift, sign = tensor(case["shift"]), tensor(case["sign"])
    packed = pack_shift_weights((shift, sign), 6, "PS")
    y = run_integers(integers(case["x"]), packed, integers(case["bias"]), case)
    assert y.dtype == torch.int32
    assert y.tolist() == case["y"]
    if "y_original_cpu_kernel" in case:  # the original's convolution takes a sign of 0 for +1
        assert case["y_original_cpu_kernel"] != case["y"]
        wrong = pack_shift_weights((shift, torch.where(sign == 0, 1.0, sign)), 6, "PS")
        y = run_integers(integers(case["x"]), wrong, integers(case["bias"]), case)
        assert y.tolist() == case["y_original_cpu_kernel"]


@cases("packed_kernels")
def test_packed_kernels(case):
    """Weights that the original packed: their values, the products with them, and its own words.

    With a base below 0 the original shifts right by the field first and left by -base at the end, which loses low bits;
    the same is asked of the kernels here by shifting by the fields.
    """
    only(case, "right_shift", "sign", "bits", "base", "x", "bias", "y", "words", "row_words", "weights_per_word")
    assert case["weights_per_word"] == 32 // (case["bits"] + 1)
    assert {len(row) for row in case["words"]} == {case["row_words"]}
    shift, sign = -tensor(case["right_shift"]), tensor(case["sign"])
    packed = pack_shift_weights((shift, sign), min(6, case["bits"] + 1), "Q")
    assert torch.equal(packed.unpack(), sign * torch.exp2(shift))
    by_fields = pack_shift_weights((shift + case["base"], sign), min(6, case["bits"] + 1), "Q")
    y = bitshift_linear(integers(case["x"]), by_fields, None, arithmetic="fixed")
    assert ((y << -case["base"]) + integers(case["bias"])).tolist() == case["y"]
    if case["base"] == 0:
        y = bitshift_linear(integers(case["x"]), packed, integers(case["bias"]), arithmetic="fixed")
        assert y.tolist() == case["y"]
    assert fields(case["words"], case["bits"], shift.shape[1]) == [
        [(int(-s) - case["base"], int(g > 0)) for s, g in zip(*row, strict=True)]
        for row in zip(shift.tolist(), sign.tolist(), strict=True)
    ]


def fields(words, bits, columns):
    """(shift, sign bit) of every weight in rows of the original's 32-bit words."""
    per_word, rows = 32 // (bits + 1), []
    for row in words:
        found = [(word >> (d * (bits + 1))) & (2 ** (bits + 1) - 1) for word in row for d in range(per_word)]
        rows.append([(field & (2**bits - 1), field >> bits) for field in found[:columns]])
    return rows


@cases("compress_bits")
def test_packing_of_float_weights(case):
    """Float weights are rounded as the original's packer does; its second subtraction of a base is not repeated."""
    only(case, "weight", "bits", "base", "packer_right_shift", "packer_sign", "words", "words_total",
         "weights_per_word")  # fmt: skip
    assert case["weights_per_word"] == 32 // (case["bits"] + 1)
    assert sum(map(len, case["words"])) == case["words_total"]
    weight = tensor(case["weight"])
    shift, sign = shift_and_sign(weight)
    assert [int(-value) for value in shift.flatten()] == [right + case["base"] for right in case["packer_right_shift"]]
    assert [int(value) for value in sign.flatten()] == case["packer_sign"]
    packed = pack_shift_weights(round_power_of_2(weight), 5, "Q")
    assert torch.equal(packed.unpack(), round_power_of_2(weight))
    if case["base"] == 0:
        found = fields(case["words"], case["bits"], weight.shape[1])
        flat = [field for row in found for field in row]
        assert flat == [(int(-s), int(g > 0)) for s, g in zip(shift.flatten(), sign.flatten(), strict=True)]


@cases("kernel_forward_cpu")
def test_layer_on_integer_kernels(case):
    only(case, "op", "activation_bits", "shift", "sign", "bias", "x", "y_float_path", "y_kernel")
    layer = layer_of(case, case["op"] == "conv2d").eval()
    with torch.no_grad():
        x = tensor(case["x"])
        close(layer(x), case["y_float_path"])
        use_kernels(layer, pack_layers(layer))
        same(layer(x), case["y_kernel"])
        use_kernels(layer, None)
        close(layer(x), case["y_float_path"])


class Parameters(nn.Module):
    """Named parameters, and logits that do not depend on them: cross entropy gives them a gradient of zero."""

    def __init__(self, **tensors):
        super().__init__()
        for name, value in tensors.items():
            module = nn.Module()
            module.register_parameter(name.rpartition("_")[2], nn.Parameter(value.clone()))
            self.add_module(name, module)

    def forward(self, x):
        return torch.zeros(len(x), 10) * sum(p.sum() for p in self.parameters())


class OneImage(list):
    """A loader of batches of one image."""

    device, num_images = torch.device("cpu"), 1
    batch_sizes = property(lambda self: [1] * len(self))

    def __init__(self, steps=1):
        super().__init__([(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))] * steps)


def training_of(monkeypatch, net, *flags):
    """What cifar10.py makes of the flags, but for the network."""
    monkeypatch.setattr("deepshift.training.build_network", lambda *_: Network(net, {}, "recorded"))
    args = cifar10.parse_args(["--embedded-data", "--device=cpu", *flags])
    return Training(cifar10.Cifar10(cifar10.parse_args), args, torch.device("cpu"), engine.World())


def run_step(training):
    lines = engine.BatchLines("Epoch: [0]", 1, 1, top5=False, shown=False)
    return engine.train_one_epoch(training.new_step(), OneImage(), lines, epoch=0)


@cases("shift_l2_norm")
def test_shift_l2_norm(case, monkeypatch):
    """The value, and the gradient that a step of the loop takes, by what SGD makes of it."""
    only(case, "shift", "weight_decay", "value", "grad")
    shift = tensor(case["shift"])
    close(shift_l2_norm([shift], case["weight_decay"]), case["value"])
    training = training_of(monkeypatch, Parameters(shift=shift), f"--wd={case['weight_decay']}", "--lr=0.125")
    run_step(training)
    (parameter,) = training.net.parameters()
    close(training.optimizer.state[parameter]["momentum_buffer"], case["grad"])
    expected = shift - 0.125 * tensor(case["grad"])
    assert (parameter.detach() - expected).abs().max() <= 1e-6 * expected.abs().max()


@cases("lr_schedule")
def test_lr_schedule(case):
    only(case, "script", "arch", "lr", "lr_step_size", "changes", "note")
    flags = [f"--arch={case['arch']}", f"--lr={case['lr']}"]
    if case["lr_step_size"] is not None:
        flags.append(f"--lr-step-size={case['lr_step_size']}")
    assert case["script"] in ("cifar10", "imagenet")
    script = {"cifar10": cifar10, "imagenet": imagenet}[case["script"]]
    args = script.parse_args([*flags, *(["DIR"] if script is imagenet else [])])
    task = {"cifar10": cifar10.Cifar10, "imagenet": imagenet.ImageNet}[case["script"]](script.parse_args)
    # The original's warm-up of resnet110 and resnet1202 never ends, here it does after epoch 0.
    warms_up = case["script"] == "cifar10" and case["arch"] in ("resnet110", "resnet1202")
    ends = [epoch for epoch, _ in case["changes"][1:]] + [case["changes"][-1][0] + 5]
    for (start, rate), end in zip(case["changes"], ends, strict=True):
        for epoch in range(start, end):
            expected = rate * 10 if warms_up and epoch else rate
            assert task.learning_rates(args, [case["lr"]] * 3, epoch) == pytest.approx([expected] * 3, rel=1e-9)


DEFAULTS = {"radam": {"lr": 1e-3}, "ranger": {"lr": 1e-3}}  # of the original's constructors


@cases("optimizer_trajectories")
def test_optimizer_trajectory(case, monkeypatch):
    """Through the script's groups, optimizer and loop: the recorded loss takes the place of the regulariser."""
    only(case, "optimizer", "args", "groups", "lrs", "schedule", "loss", "a", "c", "p0", "p_after_step")
    assert case["loss"] == "0.5*sum(a*(p-c)^2)"
    a, centre, start = tensor(case["a"]), tensor(case["c"]), tensor(case["p0"])
    net, decay, rates = parameters_of(case, start)
    training = training_of(monkeypatch, net, f"--opt={case['optimizer']}", f"--lr={rates[0]}", f"--wd={decay}",
                           f"--lr-sign={rates[1]}")  # fmt: skip
    groups, parts = training.optimizer.param_groups, list(net.parameters())
    assert [part for group in groups for part in group["params"]] == parts or len(parts) == 1
    for group in groups:
        group |= {name: value for name, value in case.get("args", {}).items() if name in ("betas", "eps", "alpha", "k")}
    training.options.regulariser = lambda: 0.5 * (a * (torch.cat(parts) - centre) ** 2).sum()
    for number, expected in enumerate(case["p_after_step"]):
        for index, group in enumerate(groups):
            off = "groups" in case and ((index == 1 and number % 2) or (index == 2 and not number % 2))
            group["lr"] = 0.0 if off else rates[index]
        run_step(training)
        assert (torch.cat(parts).detach() - tensor(expected)).abs().max() < 2e-6, number


def parameters_of(case, start):
    """Network with the case's parameters under names that make its groups, weight decay of the first, rates of all."""
    if "groups" not in case:
        args = DEFAULTS[case["optimizer"].lower()] | case["args"]
        assert set(args) <= {"lr", "weight_decay", "betas", "eps", "alpha", "k"}
        return Parameters(bias=start), args.get("weight_decay", 0.0), [args["lr"]] * 3
    assert case["schedule"].startswith("group 1 lr is 0 on odd steps (0-based), group 2 lr is 0 on even steps")
    parts = {}
    for name, text in zip(("bias", "sign", "shift"), case["groups"], strict=True):
        place, word, decay = text.split()
        assert word == "weight_decay" and (float(decay) == 0 or name == "bias")
        first, _, last = place.removeprefix("p[").removesuffix("]").partition(":")
        parts[name] = start[int(first) : int(last or int(first) + 1)]
    return Parameters(**parts), float(case["groups"][0].split()[2]), case["lrs"]
