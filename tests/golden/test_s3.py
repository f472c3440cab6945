"""Every golden case of S3 and DenseShift: outputs recorded from the original code ($GOLDEN_DIR/s3.json)."""

import json
import math
import os
import re
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

from s3 import engine, main
from s3.count import count_macs, describe_counts
from s3.discrete import plain_state_dict
from s3.engine import progress_line, summary_line
from s3.quantizers import dense_weight_penalty
from s3.resnet import cifar_resnet, imagenet_resnet, init_model
from s3.s3conv2dshift import DenseShiftConv2d, LatentConv2d, S3Conv2d, sparse_latents
from s3.schedule import cosine_rate
from s3.training import Training
from tests.golden.fill import fill_state_dict, golden_input

GOLDEN = json.loads((Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent)) / "s3.json").read_text())
COMMON = {"case", "kind", "arch", "kwargs", "input_shape", "params", "flops", "note", "extrapolated"}


def golden(kind):
    cases = [case for case in GOLDEN["cases"] if case["kind"] == kind]
    return pytest.mark.parametrize("case", cases, ids=[case["case"] for case in cases])


def only(case, *keys):
    """Every field of a case is one that its test looks at."""
    assert set(case) <= COMMON | set(keys), set(case) - COMMON - set(keys)


def crc_of(state):
    return zlib.crc32("\n".join(f"{name} {list(value.shape)}" for name, value in state.items()).encode())


def distinct(model):
    return sum(parameter.numel() for parameter in model.parameters())


def filled_model(case):
    """The network of a case with golden weights, running variances rescaled as the file's note says."""
    kwargs = dict(case["kwargs"])
    classes, depth, dataset, rescale = (kwargs.pop(key) for key in ("num_classes", "depth", "dataset", "bn_rescale"))
    assert not kwargs
    method = case["arch"].split("_")[0]
    model = (imagenet_resnet if dataset == "imagenet" else cifar_resnet)(depth, classes, method)
    assert re.fullmatch(rf"{method}_(cifar_resnet|resnet{depth})", case["arch"])
    model.load_state_dict(fill_state_dict(model.state_dict()))
    for block in model.modules():
        for name, norm in block.named_children():
            before = {"bn": name.replace("bn", "conv"), "1": "0"}.get(name.rstrip("0123456789") or name)
            if rescale is not None and isinstance(norm, nn.BatchNorm2d):
                convolution = getattr(block, before)
                if isinstance(convolution, LatentConv2d):
                    norm.running_var *= rescale * convolution.weight[0].numel()
    return model.eval()


COUNTS = ("params_effective", "params_quantised", "params_fp32", "quantised_layers", "bn_buffers", "size_bits",
          "size_bits_no_buffers", "size_bits_fp32", "macs_quantised", "macs_fp32")  # fmt: skip


@golden("model")
def test_model(case):
    only(case, *COUNTS, "n_keys", "keys", "keys_crc32", "optimizer_params", "logits", "size_bits_note")
    model = filled_model(case)
    assert distinct(model) == case["params"]
    state = model.state_dict()
    assert (len(state), crc_of(state)) == (case["n_keys"], case["keys_crc32"])
    if "keys" in case:
        assert [[name, list(value.shape)] for name, value in state.items()] == case["keys"]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert len(optimizer.param_groups[0]["params"]) == case["optimizer_params"]
    counts = describe_counts(model, tuple(case["input_shape"][1:]))
    assert sum(count_macs(model, tuple(case["input_shape"][1:])).values()) == case["flops"]
    assert {name: counts[name] for name in COUNTS} == {name: case[name] for name in COUNTS}
    with torch.no_grad():
        logits = model(golden_input(case["input_shape"]))
    expected = torch.tensor(case["logits"])
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()


def close(result, expected):
    expected = torch.tensor(expected).view_as(result)
    assert (result.detach() - expected).abs().max() <= 1e-4 * expected.abs().max().clamp(min=1)


@golden("conv")
def test_convolution(case):
    only(case, "keys", "keys_crc32", "output_shape", "output", "discrete_weight", "reg_alpha", "reg", "loss", "grad",
         "grad_input")  # fmt: skip
    kwargs = dict(case["kwargs"])
    kind = DenseShiftConv2d if case["arch"].startswith("DenseShift") else S3Conv2d
    layer = kind(kwargs.pop("in_channels"), kwargs.pop("out_channels"), **kwargs)
    state = layer.state_dict()
    assert [[name, list(value.shape)] for name, value in state.items()] == case["keys"]
    assert crc_of(state) == case["keys_crc32"] and distinct(layer) == case["params"]
    layer.load_state_dict(fill_state_dict(state))
    x = golden_input(case["input_shape"]).requires_grad_()
    y = layer(x)
    assert list(y.shape) == case["output_shape"]
    close(y.flatten(), case["output"])
    assert layer.discrete_weight().flatten().tolist() == case["discrete_weight"]
    penalty = dense_weight_penalty(sparse_latents(layer))
    assert penalty.item() == pytest.approx(case["reg"], rel=1e-5)
    loss = (y * golden_input(case["output_shape"], seed=1)).sum() + case["reg_alpha"] * penalty
    assert loss.item() == pytest.approx(case["loss"], rel=1e-4)
    loss.backward()
    found = dict(layer.named_parameters())
    assert set(found) == set(case["grad"])
    for name, expected in case["grad"].items():
        close(found[name].grad.flatten(), expected)
    close(x.grad.flatten(), case["grad_input"])


@golden("truth_table")
def test_truth_table(case):
    only(case, "order", "latent", "upstream_grad", "discrete_weight", "grad", "reg", "reg_grad_weight_val")
    layer = {"S3Conv2dShift3bit": S3Conv2d, "DenseShiftConv2d3bit": DenseShiftConv2d}[case["arch"]](
        81, 1, 1, bias=False
    )
    names = case["order"].split("(")[1].split(")")[0].split(", ")
    latent = torch.tensor(case["latent"])
    with torch.no_grad():
        for column, name in enumerate(names):
            getattr(layer, name).copy_(latent[:, column].view(1, 81, 1, 1))
    weight = layer.discrete_weight()
    assert weight.flatten().tolist() == case["discrete_weight"]
    weight.backward(torch.tensor(case["upstream_grad"]).view_as(weight))
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.flatten(), torch.tensor(case["grad"][name]), rtol=1e-5, atol=1e-6)
    if "reg" in case:
        layer.zero_grad()
        penalty = dense_weight_penalty(sparse_latents(layer))
        penalty.backward()
        assert penalty.item() == case["reg"]
        assert layer.weight_val.grad.flatten().tolist() == case["reg_grad_weight_val"]


class Lines:
    """Keeps the mean loss of every batch, which the script would print."""

    def __init__(self):
        self.losses = []

    def loaded(self):
        pass

    def advance(self, step, loss_sum, logits, targets, meter):
        self.losses.append(loss_sum.item() / len(targets))


class Batches(list):
    device = torch.device("cpu")
    batch_sizes = property(lambda self: [len(targets) for _, targets in self])


def run_steps(step, batch, count):
    """[cross entropy, loss with the regulariser] of so many steps on one batch, in the script's loop."""
    lines = Lines()
    engine.train_one_epoch(step, Batches([batch] * count), lines, epoch=0)
    return [list(pair) for pair in zip(lines.losses, step.losses.losses.tolist(), strict=True)]


@golden("train_steps")
def test_training_steps(case):
    """Through the loop, with the optimizer and the regulariser that main.py makes of the case's numbers."""
    only(case, "targets", "sgd", "rs", "loss_ce_and_total", "grad_norms_step0", "after")
    sgd = case["sgd"]
    assert set(sgd) == {"lr", "momentum", "weight_decay"}
    flags = [f"--lr={sgd['lr']}", f"--momentum={sgd['momentum']}", f"--wd={sgd['weight_decay']}", f"--rs={case['rs']}"]
    args = main.parse_args(["--dataset=cifar10", f"--arch=resnet{case['kwargs']['depth']}", *flags])
    training = Training(main.S3Task(), args, torch.device("cpu"), engine.World(), 0, case["kwargs"]["num_classes"])
    training.net.load_state_dict(filled_model(case).state_dict())
    step, batch = training.new_step(), (golden_input(case["input_shape"]), torch.tensor(case["targets"]))
    found = run_steps(step, batch, 1)
    norms = {name: parameter.grad.norm().item() for name, parameter in training.net.named_parameters()}
    assert set(norms) == set(case["grad_norms_step0"])
    assert norms == pytest.approx(case["grad_norms_step0"], rel=1e-3)
    found += run_steps(step, batch, len(case["loss_ce_and_total"]) - 1)
    for number, (losses, expected) in enumerate(zip(found, case["loss_ce_and_total"], strict=True)):
        assert losses == pytest.approx(expected, rel=1e-2 if number else 1e-4)
    vals = torch.cat([val.detach().flatten() for val in sparse_latents(training.net)])
    found = {"bn1_running_mean": training.net.bn1.running_mean.tolist(), "fc_bias": training.net.fc.bias.tolist(),
             "weight_val_negative_fraction": (vals < 0).double().mean().item()}  # fmt: skip
    assert set(found) == set(case["after"])
    for name, expected in case["after"].items():
        assert found[name] == pytest.approx(expected, rel=1e-2, abs=1e-3), name


@golden("lr")
def test_learning_rates(case):
    only(case, "lr_per_epoch")
    kwargs = dict(case["kwargs"])
    epochs, lr, first = kwargs.pop("epochs"), kwargs.pop("lr"), kwargs.pop("resume_epoch", 0)
    assert not kwargs
    rates = [cosine_rate(lr, epoch, epochs) for epoch in range(epochs)]
    if first == 0:
        assert rates == pytest.approx(case["lr_per_epoch"], rel=1e-6, abs=1e-9)
        return
    # The original began the cosine anew from the loaded rate; here the schedule goes on.
    anew = [rates[first - 1] * rate / lr for rate in rates[: epochs - first]]
    assert anew == pytest.approx(case["lr_per_epoch"], rel=1e-6, abs=1e-9)
    fresh = next(c for c in GOLDEN["cases"] if c["kind"] == "lr" and c["kwargs"] == {"epochs": epochs, "lr": lr})
    assert rates[first:] == pytest.approx(fresh["lr_per_epoch"][first:], rel=1e-6, abs=1e-9)


@golden("convert")
def test_conversion(case):
    only(case, "keys", "n_keys", "keys_crc32", "plain_optimizer_params", "histogram_values", "histogram")
    state = plain_state_dict(filled_model(case))
    assert (len(state), crc_of(state)) == (case["n_keys"], case["keys_crc32"])
    assert [[name, list(value.shape)] for name, value in state.items()] == case["keys"]
    assert case["histogram"]
    for name, counts in case["histogram"].items():
        assert [int((state[name] == value).sum()) for value in case["histogram_values"]] == counts, name
    norms = ("running_mean", "running_var", "num_batches_tracked")
    trained = [name for name in state if not name.endswith(norms)]
    assert len(trained) == case["plain_optimizer_params"]
    assert sum(state[name].numel() for name in trained) == case["params"]


def draws_the_recorded_numbers():
    """Whether PyTorch's generator gives the numbers here that it gave where the case was recorded."""
    torch.manual_seed(0)
    uniform = torch.rand(3).tolist()
    torch.manual_seed(0)
    normal = torch.randn(2304)[[0, 1, 2, -1]].tolist()  # of a long row, which processors may fill in different orders
    recorded = [0.496257, 0.768222, 0.088477, -1.125840, -1.152360, -0.250579, -1.037527]
    return [*uniform, *normal] == pytest.approx(recorded, abs=1e-5)


@golden("init")
def test_initialisation(case):
    """The original's numbers where the generator draws them, else their deviations."""
    only(case, "tensors")
    kwargs, same = case["kwargs"], draws_the_recorded_numbers()
    torch.manual_seed(kwargs["seed"])
    model = cifar_resnet(kwargs["depth"], kwargs["num_classes"])
    init_model(model)
    found = {name: tensor.detach().flatten() for name, tensor in model.named_parameters()}
    assert set(found) == set(case["tensors"])
    for name, expected in case["tensors"].items():
        values = found[name]
        if same or not expected["std"]:
            assert values.mean().item() == pytest.approx(expected["mean"], abs=1e-6), name
            assert values[:3].tolist() == pytest.approx(expected["first"], abs=1e-5), name
            assert values.std().item() == pytest.approx(expected["std"], abs=1e-4), name
        else:  # both deviations are of samples: 5 standard errors of their difference
            error = 5 * math.sqrt(2) / math.sqrt(2 * len(values))
            assert values.std().item() == pytest.approx(expected["std"], rel=error), name


@golden("format")
def test_printed_lines(case):
    only(case, "lines", "summary")
    for line in case["lines"]:
        meters = {"Time": line["time"], "Loss": line["loss"], "Acc@1": line["acc1"], "Acc@5": line["acc5"]}
        if "data" in line:
            meters = {"Time": line["time"], "Data": line["data"], **meters}
        assert progress_line(line["prefix"], line["batch"], line["num_batches"], meters) == line["line"]
    summary = case["summary"]
    assert summary_line(summary["acc1"], summary["acc5"]) == summary["line"]


def test_every_kind_of_case_is_checked():
    kinds = {"model", "conv", "truth_table", "train_steps", "lr", "convert", "init", "format"}
    assert {case["kind"] for case in GOLDEN["cases"]} <= kinds and set(GOLDEN) == {"paper", "note", "cases"}
