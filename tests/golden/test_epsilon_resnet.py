"""Every golden case of epsilon-ResNet ($GOLDEN_DIR/epsilon_resnet.json), by kind; an unknown kind or field fails."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from epsilon_resnet import (
    cifarEpsilonResnet,
    engine,
    imagenetEpsilonResnet,
    logfile,
    modules,
    pruning,
    schedules,
    svhnEpsilonResnet,
    training,
)
from epsilon_resnet.averages import block_averages
from epsilon_resnet.checkpoints import Network
from epsilon_resnet.count import count_macs, count_parameters
from epsilon_resnet.models import Config, build_model
from tests.golden.fill import fill_state_dict, golden_input

GOLDEN = json.loads((Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent)) / "epsilon_resnet.json").read_text())
TOLERANCE = 1e-4  # of a row's maximum; float32 and float64 differ from the file by at most 5e-6
PRINTED = 2e-5  # numbers are stored with 6 digits

FIELDS = {
    "model": "arch kwargs params params_without_side_branch flops macs_without_side_branch macs_input n_keys "
    "keys_crc32 keys side_at n_blocks input_shape logits logits_note logits_abs_sum side_logits_first5 discarded "
    "max_abs_F",
    "gate": "epsilon shape F w is_discarded output_with_shortcut_0.5 upstream_grad grad_F",
    "gate_of_s": "s_w",
    "lr_schedule": "dataset epochs trigger_epochs lr_runs count_increments discarded_cnt_at_end_of_epoch",
    "epsilon_schedule": "dataset target epochs runs",
    "ema": "n0 bits ema values first_k_printed_as_1_with_.5g",
    "closed_block_decay": "lr wd momentum nesterov w0 w_after_steps",
    "wd_schedule": "step_wd",
    "train_step": "arch kwargs scale_conv2_by_1e-3 input_seed input_shape labels weight_decay cross_entropy_loss "
    "side_cross_entropy_loss wd_cost cost discarded max_abs_F grad_norm_including_wd "
    "param_norm_after_one_step_lr0.1_mom0.9 bn0_running_mean_first3_after",
    "compress": "arch kwargs discarded_block zeroed structure discard_first_block name_mapping input_shape logits "
    "logits_note params_compressed params_before_without_side_branch discarded_layer_ratio_percent n_keys keys_crc32 "
    "keys logits_abs_sum",
    "log_parse": "lines step N is_cifar_model discarded_block_correct discarded_block_original val_error note",
}


def cases(kind):
    found = [case for case in GOLDEN["cases"] if case["kind"] == kind]
    return pytest.mark.parametrize("case", found, ids=[case["case"] for case in found])


def test_every_case_and_field_is_understood():
    assert set(GOLDEN) == {"paper", "conventions", "cases"}
    assert {case["kind"] for case in GOLDEN["cases"]} == set(FIELDS), "no kind without a case"
    for case in GOLDEN["cases"]:
        assert case["kind"] in FIELDS, case["case"]
        assert set(case) - {"kind", "case"} <= set(FIELDS[case["kind"]].split()), case["case"]


def network(case):
    kwargs = case["kwargs"]
    assert set(kwargs) <= {"n", "depth", "num_classes", "epsilon"}
    config = Config(case["arch"], kwargs.get("n", kwargs.get("depth")), kwargs["num_classes"])
    return build_model(config, kwargs.get("epsilon", 0.0)).eval()


def filled(model):
    model.load_state_dict(fill_state_dict(model.state_dict()))
    return model


def assert_keys(case, state):
    assert len(state) == case["n_keys"]
    shapes = [[name, list(value.shape)] for name, value in state.items()]
    lines = sorted(f"{name} {json.dumps(shape)}" for name, shape in shapes)
    assert zlib.crc32("\n".join(lines).encode()) == case["keys_crc32"]
    if "keys" in case:
        assert shapes == case["keys"]


def assert_rows(ours, expected, tolerance=TOLERANCE):
    expected = torch.tensor(expected, dtype=torch.float64)
    ours = ours.double()[:, : expected.shape[1]]
    assert ours.shape == expected.shape
    assert ((ours - expected).abs() / expected.abs().amax(1, keepdim=True)).max() < tolerance


def assert_peaks(config, peaks, expected):
    peaks = dict(zip(config.block_names, peaks.tolist(), strict=True))
    assert peaks.keys() == expected.keys()
    assert peaks == pytest.approx(expected, rel=TOLERANCE)


def closed(model, peaks):
    flags = modules.is_closed(peaks, model.epsilon).tolist()
    return [name for name, flag in zip(model.config.block_names, flags, strict=True) if flag]


@cases("model")
def test_model(case):
    model = network(case)
    assert_keys(case, model.state_dict())
    assert count_parameters(model) == case["params"]
    assert count_parameters(model, side_branch=False) == case["params_without_side_branch"]
    assert (model.config.side_block, len(model.config.block_names)) == (case["side_at"], case["n_blocks"])
    if "macs_without_side_branch" in case:
        assert count_macs(model, case["macs_input"][-1]) == case["macs_without_side_branch"]
    if "logits" not in case:
        return
    with torch.no_grad():
        output = filled(model)(golden_input(case["input_shape"]))
    assert_rows(output.logits, case["logits"])
    assert_rows(output.side_logits, case["side_logits_first5"])
    sums = output.logits.double().abs().sum(1).tolist()
    assert sums == pytest.approx(case["logits_abs_sum"], rel=TOLERANCE)
    assert closed(model, output.peaks) == case["discarded"]
    if "max_abs_F" in case:
        assert_peaks(model.config, output.peaks, case["max_abs_F"])


@cases("gate")
def test_gate(case):
    shape = case["shape"]
    residual = torch.tensor(case["F"]).view(shape).requires_grad_()
    output, peak = modules.strict_identity(residual, torch.full(shape, 0.5), case["epsilon"])
    assert output.flatten().tolist() == pytest.approx(case["output_with_shortcut_0.5"], abs=1e-6)
    (output * torch.tensor(case["upstream_grad"]).view(shape)).sum().backward()
    assert residual.grad.flatten().tolist() == pytest.approx(case["grad_F"], abs=1e-6)
    assert float(modules.is_closed(peak, case["epsilon"])) == case["is_discarded"]
    excess = (residual.detach().abs() - case["epsilon"]).relu().amax()
    assert float(modules.gate_weight(excess)) == case["w"]


@cases("gate_of_s")
def test_gate_as_a_function_of_the_excess(case):
    excess, weights = torch.tensor(case["s_w"], dtype=torch.float64).T
    assert modules.gate_weight(excess).tolist() == pytest.approx(weights.tolist(), abs=1e-6)
    on_ramp = (weights > 0) & (weights < 1)
    assert torch.equal((~modules.is_closed(excess, 0.0)).double()[~on_ramp], weights[~on_ramp])


def runs(values):
    """[first, last, value] of each stretch of equal values, counted from 1."""
    stretches = []
    for number, value in enumerate(values, 1):
        if stretches and stretches[-1][2] == value:
            stretches[-1][1] = number
        else:
            stretches.append([number, number, value])
    return stretches


@cases("lr_schedule")
def test_learning_rate(case):
    scripts = {"svhn": (svhnEpsilonResnet, []), "imagenet": (imagenetEpsilonResnet, ["--gpu=0"])}
    script, flags = scripts.get(case["dataset"], (cifarEpsilonResnet, ["--cifar10"]))
    rule = training.learning_rate_of(script.parse_args(flags))
    counts = case.get("discarded_cnt_at_end_of_epoch")
    if counts is None:
        increments = {int(epoch): count for epoch, count in case["count_increments"].items()}
        counts = [sum(n for at, n in increments.items() if at <= epoch) for epoch in range(1, case["epochs"] + 1)]
    rate, triggers, rates = schedules.INITIAL_LEARNING_RATE, [], []
    for epoch in range(case["epochs"] + 1):
        new, which = rule.after_epoch(epoch, counts[epoch - 1] if epoch else None)
        rate = rate if new is None else new
        rates.append(rate)
        triggers += [epoch] if which == 3 else []
    assert triggers == case["trigger_epochs"]
    assert runs(rates[:-1]) == case["lr_runs"]


@cases("epsilon_schedule")
def test_epsilon(case):
    values = [schedules.epsilon_in_epoch(epoch, case["target"], 150) for epoch in range(1, case["epochs"] + 1)]
    assert runs(values) == case["runs"]


def averages(first_step, bits):
    """The moving average after each bit, in float32 like the original's and ours."""
    value, values = torch.zeros(()), []
    for step, bit in enumerate(bits, first_step):
        value = value - (value - bit) * (1 - schedules.average_decay(step))
        values.append(value.item())
    return values


@cases("ema")
def test_moving_average(case):
    if "bits" in case:
        assert averages(case["n0"], case["bits"]) == pytest.approx(case["ema"], rel=1e-5)
        return
    values = averages(case["n0"], [1] * max(map(int, case["values"])))
    for count, expected in case["values"].items():
        assert float(f"{values[int(count) - 1]:.5g}") == expected
    printed = [f"{value:.5g}" for value in values]
    assert printed.index("1") + 1 == case["first_k_printed_as_1_with_.5g"]


@cases("closed_block_decay")
def test_decay_of_a_closed_block(case):
    layer = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, case["w0"])
    recipe = training.Recipe(0, 0, case["wd"], None, nesterov=case["nesterov"])
    optimizer = training.build_optimizer(layer, case["lr"], recipe)
    assert optimizer.param_groups[0]["momentum"] == case["momentum"]
    layer.weight.grad = torch.zeros_like(layer.weight)  # what the gate sends back; None would stop the decay
    expected = {int(step): value for step, value in case["w_after_steps"].items()}
    weight, velocity = case["w0"], 0.0
    for step in range(1, max(expected) + 1):
        if step <= 400:
            optimizer.step()
        velocity = case["momentum"] * velocity + case["wd"] * weight  # the same, without the optimizer's overhead
        weight -= case["lr"] * (case["momentum"] * velocity + case["wd"] * weight if case["nesterov"] else velocity)
        if step in expected:
            assert weight == pytest.approx(expected[step], rel=PRINTED)
            if step <= 400:
                assert layer.weight.item() == pytest.approx(expected[step], rel=PRINTED)


@cases("wd_schedule")
def test_weight_decay(case):
    recipe = training.RECIPES["cifar"]
    for step, expected in case["step_wd"]:
        value = schedules.weight_decay(step, recipe.weight_decay, recipe.decay_every)
        assert value == pytest.approx(expected, rel=1e-9)


@cases("train_step")
def test_training_step(case):
    model = filled(network(case)).train()
    with torch.no_grad():
        for name in case["scale_conv2_by_1e-3"]:
            model.block(name).conv2.weight *= 1e-3
    recipe = training.Recipe(0, 0, case["weight_decay"], None, nesterov=False)
    optimizer = training.build_optimizer(model, 0.1, recipe)
    weights = optimizer.param_groups[0]["params"]
    targets = torch.tensor(case["labels"])
    output = model(golden_input(case["input_shape"], case["input_seed"]))
    loss, side = (F.cross_entropy(logits, targets) for logits in (output.logits, output.side_logits))
    cost = loss + 0.1 * side
    wd_cost = case["weight_decay"] / 2 * sum(weight.detach().square().sum() for weight in weights)
    for value, name in ((loss, "cross_entropy_loss"), (side, "side_cross_entropy_loss"), (wd_cost, "wd_cost")):
        assert value.item() == pytest.approx(case[name], rel=PRINTED)
    assert (cost + wd_cost).item() == pytest.approx(case["cost"], rel=PRINTED)
    assert closed(model, output.peaks) == case["discarded"]
    assert_peaks(model.config, output.peaks, case["max_abs_F"])
    cost.backward()
    parameters = dict(model.named_parameters())
    for name, expected in case["grad_norm_including_wd"].items():
        decay = case["weight_decay"] if any(parameters[name] is weight for weight in weights) else 0.0
        gradient = parameters[name].grad + decay * parameters[name].detach()
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-12), name


class OneBatch(list):
    """Stands for a loader of one batch."""

    batch_sizes = [4]


@cases("train_step")
def test_training_step_of_the_script(case):
    """The same step, in the loop and with the optimizer that the script builds from its flags."""
    kwargs, cpu = case["kwargs"], torch.device("cpu")
    assert case["arch"] == "cifar" and kwargs["num_classes"] == 10
    flags = ["-n", str(kwargs["n"]), "-e", str(kwargs["epsilon"]), "--cifar10", "--embedded-data", "--device=cpu"]
    args, world = cifarEpsilonResnet.parse_args(flags), engine.World()
    run = training.Training(args, None, cpu, world, 1, training.Data(args, 1, cpu, world))
    run.net.load_state_dict(fill_state_dict(run.net.state_dict()))
    with torch.no_grad():
        for name in case["scale_conv2_by_1e-3"]:
            run.net.block(name).conv2.weight *= 1e-3
    run.prepare()
    assert run.weight_cost() == pytest.approx(case["wd_cost"], rel=PRINTED)
    batch = golden_input(case["input_shape"], case["input_seed"]), torch.tensor(case["labels"])
    result = engine.train_one_epoch(run.steps, OneBatch([batch]), epoch=1, epsilon=run.net.epsilon)
    assert result["loss"] == pytest.approx(case["cross_entropy_loss"], rel=PRINTED) and result["seen"] == 4
    assert run.steps.losses.losses.item() == pytest.approx(case["cost"] - case["wd_cost"], rel=PRINTED)
    parameters = dict(run.net.named_parameters())
    for name, expected in case["param_norm_after_one_step_lr0.1_mom0.9"].items():
        assert parameters[name].detach().norm().item() == pytest.approx(expected, rel=PRINTED), name
    mean = run.net.bn0.running_mean[: len(case["bn0_running_mean_first3_after"])].tolist()
    assert mean == pytest.approx(case["bn0_running_mean_first3_after"], rel=1e-4)
    averages = run.statistics.as_dict()  # of the first step: nine tenths of it
    closed = {name: value / 0.9 for name, value in block_averages(averages, run.config).items()}
    assert closed == pytest.approx({name: float(name in case["discarded"]) for name in closed})
    peaks = {name: averages[f"{name}/response_abs_max"] / 0.9 for name in closed}
    assert peaks == pytest.approx(case["max_abs_F"], rel=TOLERANCE)


@cases("compress")
def test_compression(case):
    model = filled(network(case))
    with torch.no_grad():
        for name in case["discarded_block"]:
            block = model.block(name)
            getattr(block, block.last_convolution).weight.zero_()
    full = Network(model.state_dict(), model.config, 0.0, {})
    compressed = pruning.compress_network(full, case["discarded_block"])
    config = compressed.config
    assert [list(config.structure), list(config.discard_first_block)] == [
        case["structure"],
        case["discard_first_block"],
    ]
    assert pruning.name_mapping(model.config, case["discarded_block"]) == case["name_mapping"]
    assert_keys(case, compressed.state)
    small = compressed.build()
    assert count_parameters(small) == case["params_compressed"]
    assert count_parameters(model, side_branch=False) == case["params_before_without_side_branch"]
    ratio = 100 * len(case["discarded_block"]) / len(model.config.block_names)
    assert round(ratio, 2) == case["discarded_layer_ratio_percent"]
    images = golden_input(case["input_shape"])
    with torch.no_grad():
        before, after = model(images).logits, small(images).logits
    assert_rows(before, case["logits"])
    assert_rows(after, case["logits"])
    assert torch.equal(before, after), "a closed gate adds exactly nothing"


@cases("log_parse")
def test_log(case):
    coloured = [line.replace("[", "\x1b[32m[", 1).replace("] ", "]\x1b[0m ", 1) for line in case["lines"]]
    for lines in (case["lines"], coloured):
        lines = logfile.messages("\n".join(lines))
        arch, size, _ = logfile.network_in_log(lines)
        assert (arch == "cifar", size) == (case["is_cifar_model"], case["N"])
        blocks, val_error, _ = logfile.discarded_in_log(lines, case["step"])
        assert (blocks, val_error) == (case["discarded_block_correct"], case["val_error"])
