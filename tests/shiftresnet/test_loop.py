"""The recipe, line by line: what the script builds and its own loop, against the original's numbers written out."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoints import load_checkpoint
from shiftresnet import engine, training
from shiftresnet import main as training_script
from shiftresnet.models import Config, build_model
from shiftresnet.run import World
from shiftresnet.runs import read_metrics
from tests import loop_checks
from tests.ranks import run_in_ranks
from tests.step_cases import random_images

FLAGS = ["--arch=shiftresnet20", "--embedded-data", "--device=cpu", "--seed=7"]
NAME = "shiftresnet20_1.0"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(engine, "load_digits_set", random_images(31))


def built(*flags, rank=0, size=1):
    args, config = training_script.parse_args([*FLAGS, *flags])
    return training.Training(args, config, CPU, World(rank, size, rank, size))


def counted(net, batches, optimise=None):
    """Mean loss and accuracy in percent, image by image."""
    loss_sum, right, seen = 0.0, 0, 0
    for images, targets in batches:
        logits = net(images)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        if optimise is not None:
            optimise(total / len(targets))
        loss_sum += total.item()
        right += sum(int(row.argmax()) == target for row, target in zip(logits, targets.tolist(), strict=True))
        seen += len(targets)
    return loss_sum / seen, 100 * right / seen


def train_by_hand(run, rates):
    """The original's loop: SGD with momentum 0.9 and weight decay 5e-4 on everything, a new one in every epoch."""
    (loader, tests), net, rows = run.loaders(), run.net.double(), []
    parameters = list(net.parameters())
    for epoch, rate in enumerate(rates):
        velocities = [None] * len(parameters)

        def optimise(loss, rate=rate):
            nonlocal velocities
            velocities = loop_checks.sgd_step(parameters, velocities, loss, rate=rate, momentum=0.9, decay=5e-4)

        loader.set_epoch(epoch)
        trained = counted(net.train(), loader, optimise)
        with torch.no_grad():
            rows.append([*trained, *counted(net.eval(), tests)])
    return rows


def test_the_script_trains_by_the_originals_recipe(tmp_path):
    """From the flags to the saved network and the lines of metrics.jsonl; the last batch is shorter."""
    flags = ["--train-size=19", "--batch_size=11", "--epochs=2"]
    with loop_checks.in_double(training.Training, "wrapped", engine, training):
        training_script.main([*FLAGS, *flags, f"--output-dir={tmp_path}"])
        run = built(*flags)
        rows = train_by_hand(run, [0.1, 0.01])  # 164 epochs, made 2: the first drop, of epoch 82, comes after one
    state = load_checkpoint(tmp_path / NAME / "last.pt")
    for name, tensor in run.net.state_dict().items():
        torch.testing.assert_close(state["net"][name], tensor, atol=2e-6, rtol=1e-6)
    lines = [line for line in read_metrics(tmp_path / NAME / "metrics.jsonl") if line["type"] == "epoch"]
    for line, (train_loss, train_top1, test_loss, test_top1) in zip(lines, rows, strict=True):
        assert (line["train_loss"], line["test_loss"]) == pytest.approx((train_loss, test_loss), rel=1e-4)
        assert (line["train_top1"], line["test_top1"]) == pytest.approx((train_top1, test_top1))


def test_bf16_is_for_training_only():
    """Measured where the classifier answers; the losses are float32."""
    run, seen = built("--amp=bf16", "--batch_size=8", "--train-size=8"), []
    run.net.linear.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    step, (loader, tests) = run.new_step(), run.loaders()
    engine.train_one_epoch(step, loader, epoch=0)
    engine.evaluate(run.net, tests)
    assert seen == [torch.bfloat16] + [torch.float32] * len(tests)
    assert all(parameter.dtype == torch.float32 for parameter in run.net.parameters())


def two_steps(rank, size):
    """Two batches, of 7 and 6 images, in the paper's own loop: by each image alone, then with batch norms."""
    with mock.patch.object(engine, "load_digits_set", random_images(31)):
        runs = [built("--train-size=13", "--batch_size=7", rank=rank, size=size) for _ in range(2)]
        loop_checks.norm_each_image(runs[0].net)
        results = []
        for run in runs:
            step, (loader, tests) = run.new_step(), run.loaders()
            training.begin_epoch(step.optimizer, 0.1)
            results.append(list(engine.train_one_epoch(step, loader, epoch=0)))
            results.append({name: tensor.clone() for name, tensor in run.net.state_dict().items()})
        results.append(list(engine.evaluate(run.net, tests, world=run.world)))
        return [*results, run.net.state_dict()]


def test_two_processes_train_and_test_the_same_network_as_one():
    ranks, (alone, net, *_) = run_in_ranks("tests.shiftresnet.test_loop:two_steps"), two_steps(0, 1)
    for result, state, *_ in ranks:
        assert result == pytest.approx(alone, rel=1e-5)
        for name, tensor in net.items():
            torch.testing.assert_close(state[name], tensor, atol=2e-6, rtol=1e-5)
    (*_, trained, measured, tested), (*_, other, measured_too, tested_too) = ranks
    mean = "bn1.running_mean"
    assert not torch.equal(trained[mean], other[mean]), "each saw its own images"
    assert torch.equal(tested[mean], trained[mean]), "those of the first process count"
    assert not loop_checks.differences(tested, tested_too) and measured == measured_too
    run = built()
    run.net.load_state_dict(trained)
    loss, top1 = engine.evaluate(run.net, run.loaders()[1])
    assert measured == pytest.approx([loss, top1], rel=1e-6)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_loaders_feed_the_originals_pixels(dataset, monkeypatch):
    """Padding 4 with black, 9 x 9 crops, flips; the same constants for both data sets; test images as they are."""
    sets = {"train": loop_checks.coded_set(300), "test": loop_checks.coded_set(60)}
    monkeypatch.setattr(engine, "load_dataset", lambda name, folder, split: sets[split] if name == dataset else None)
    args, config = training_script.parse_args([f"--dataset={dataset}", "--device=cpu", "--seed=1"])
    train, test = training.Training(args, config, CPU, World()).loaders()
    constants = loop_checks.by_channel((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert train.batch_sizes == [128, 128, 44]
    epochs = []
    for epoch in (0, 1):
        train.set_epoch(epoch)
        batches = list(train)
        epochs.append(torch.cat([targets for _, targets in batches]))
        pixels = loop_checks.pixels_of(torch.cat([images for images, _ in batches]), *constants)
        loop_checks.check_crops(pixels, 4, 9)
    assert not torch.equal(*epochs) and epochs[0].sort().values.tolist() == list(range(300))
    images, targets = (torch.cat(parts) for parts in zip(*test, strict=True))
    assert torch.equal(loop_checks.pixels_of(images, *constants), sets["test"].images.double())
    assert targets.tolist() == list(range(60))


def rates(recipe, epochs=None):
    flags = [f"--recipe={recipe}"] + ([] if epochs is None else [f"--epochs={epochs}"])
    args, _ = training_script.parse_args(flags)
    return [training.learning_rate(args, epoch) for epoch in range(args.epochs)]


def test_learning_rates_of_both_recipes():
    assert rates("final") == pytest.approx([0.1] * 82 + [0.01] * 41 + [0.001] * 41)
    assert rates("published") == pytest.approx([0.1] * 82 + [0.01] * 42 + [0.001] * 36)
    assert rates("published", 20) == pytest.approx([0.1] * 11 + [0.01] * 5 + [0.001] * 4)


NETWORKS = [
    Config("shiftresnet20", expansion=2),
    Config("resnet20", reduction=2, reduction_mode="block", num_classes=100),
    Config("depthwiseresnet20"),
    *(Config("resnet20", reduction_mode=mode) for mode in ("depthwise", "shuffle", "mobile")),
]


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: config.arch + config.suffix())
def test_batch_norms_and_initial_weights(config):
    """PyTorch's defaults everywhere: eps 1e-5, momentum 0.1, weights uniform within 1/sqrt(fan_in)."""
    torch.manual_seed(0)
    net = build_model(config)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            loop_checks.check_uniform(module.weight, bound)
            if module.bias is not None:
                assert 0.3 * bound < module.bias.abs().max() <= bound
    loop_checks.check_batch_norms(net, torch.randn(4, 3, 32, 32))
