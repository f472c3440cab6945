"""The recipe, line by line: what the scripts build and their own loop, against the original's numbers written out."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from epsilon_resnet import (
    cifarEpsilonResnet,
    engine,
    imagenetEpsilonResnet,
    inputs,
    launch,
    modules,
    svhnEpsilonResnet,
    training,
)
from epsilon_resnet.averages import Statistics
from epsilon_resnet.models import Config, build_model
from epsilon_resnet.run import World
from epsilon_resnet.runs import load_state, read_metrics
from tests import loop_checks
from tests.ranks import run_in_ranks
from tests.step_cases import random_images

FLAGS = ["-n", "2", "-e", "8", "-o", "t", "--cifar10", "--embedded-data", "--device=cpu", "--seed=7"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(inputs, "load_digits_set", random_images(50))


def built(*flags, script=cifarEpsilonResnet, rank=0, size=1):
    """A run as the script builds it, ready to train."""
    args, world = script.parse_args([*flags]), World(rank, size, rank, size)
    data = training.Data(args, 7, CPU, world)
    return training.Training(args, None, CPU, world, 7, data)


def decays(net):
    """2e-4 for the weights of convolutions and classifiers, nothing for batch norms and biases."""
    decayed = {id(module.weight) for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    return [2e-4 * (id(parameter) in decayed) for parameter in net.parameters()]


class Averages(dict):
    """v <- v - (v - x) (1 - d), from 0, with d = min(0.95, (1 + t) / (10 + t)) at step t."""

    step = 0

    def add(self, measured):
        d = min(0.95, (1 + self.step) / (10 + self.step))
        self.update({name: self.get(name, 0.0) * d + x * (1 - d) for name, x in measured.items()})
        self.step += 1


def measured(output, loss, targets):
    """What the original averages over the steps, and top-1 of this batch. CIFAR's ratio is of 3n + 2."""
    wrong, side = ((logits.argmax(1) != targets).sum().item() for logits in (output.logits, output.side_logits))
    closed = [peak <= 8 for peak in output.peaks.tolist()]
    values = {"cross_entropy_loss": loss, "train_error": wrong / len(targets), "discarded_cnt": sum(closed),
              "discarded_ratio": sum(closed) / 8, "side_output/res2.1/train_error": side / len(targets),
              "res1.0/is_discarded": closed[0], "res3.1/response_abs_max": output.peaks[5].item()}  # fmt: skip
    return values, wrong


def train_by_hand(run, rates):
    """The original's loop: cross entropy + 0.1 of the side branch's, SGD with momentum 0.9, decay on weights only."""
    net, averages, rows = run.net.double(), Averages(), []
    parameters, velocities = list(net.parameters()), [None] * len(list(net.parameters()))
    for epoch, rate in enumerate(rates):
        run.data.train.set_epoch(epoch)
        loss_sum, wrong, seen = 0.0, 0, 0
        for images, targets in run.data.train:
            output = net.train()(images)
            loss, side = (F.cross_entropy(y.float(), targets) for y in (output.logits, output.side_logits))
            values, wrong_here = measured(output, loss.item(), targets)
            velocities = loop_checks.sgd_step(
                parameters, velocities, loss + 0.1 * side, rate=rate, momentum=0.9, decay=decays(net)
            )
            averages.add(values)
            loss_sum, wrong, seen = loss_sum + loss.item() * len(targets), wrong + wrong_here, seen + len(targets)
        rows.append((loss_sum / seen, 100 * (1 - wrong / seen)))
    return rows, averages, dict(zip((name for name, _ in net.named_parameters()), velocities, strict=True))


def test_the_script_trains_by_the_originals_recipe(tmp_path, monkeypatch):
    """From the flags to the saved network, its momentum, the averages and the lines of metrics.jsonl."""
    flags = [*FLAGS, "--train-size=34", "--batch_size=11", "--epochs=2"]  # one image is left out of an epoch
    monkeypatch.setattr(launch, "count_macs", lambda *_: 0)  # counts with float32 images
    with loop_checks.in_double(training.Training, "prepare", inputs):
        cifarEpsilonResnet.main([*flags, f"--output-dir={tmp_path}"])
        run = built(*flags)
        rows, averages, velocities = train_by_hand(run, [0.1, 0.01])  # 1000 epochs, made 2
    state = load_state(tmp_path / "train_log.t" / "model-6.pth")
    for name, tensor in run.net.state_dict().items():
        torch.testing.assert_close(state["model"][name], tensor, atol=2e-6, rtol=1e-6)
    saved = [state["optimizer"]["state"][number]["momentum_buffer"] for number in range(len(velocities))]
    weights = [name for name, parameter in run.net.named_parameters() if parameter.dim() > 1]
    order = weights + [name for name in velocities if name not in weights]
    torch.testing.assert_close(saved, [velocities[name] for name in order], atol=2e-5, rtol=1e-5)
    assert {name: state["ema"][name] for name in averages} == pytest.approx(dict(averages), rel=1e-4)
    lines = [line for line in read_metrics(tmp_path / "train_log.t" / "metrics.jsonl") if line["type"] == "epoch"]
    for line, row in zip(lines, rows, strict=True):
        assert (line["train_loss"], line["train_top1"]) == pytest.approx(row, rel=1e-4)


def test_errors_of_the_test_set_are_counted_in_batches_of_128():
    """Gates act on whole test batches, with running statistics, which testing does not change."""
    with mock.patch.object(inputs, "load_digits_set", random_images(150)):
        run = built(*FLAGS, "--batch_size=50")
    run.prepare()
    engine.train_one_epoch(run.steps, run.data.train, epoch=1, epsilon=8)
    before = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    result = engine.evaluate(run.net, run.data.test)
    assert not loop_checks.differences(run.net.state_dict(), before)
    batches = list(run.data.test)
    assert [len(targets) for _, targets in batches] == [128, 22] and result["seen"] == 150
    loss_sum, wrong = 0.0, [0, 0]
    for images, targets in batches:
        with torch.no_grad():
            output = run.net(images)
        loss_sum += F.cross_entropy(output.logits, targets, reduction="sum").item()
        for place, logits in enumerate((output.logits, output.side_logits)):
            pairs = zip(logits, targets.tolist(), strict=True)
            wrong[place] += sum(int(row.argmax()) != target for row, target in pairs)
    assert result["loss"] == pytest.approx(loss_sum / 150, rel=1e-5)
    assert (result["errors"][0], result["side_error"]) == pytest.approx((wrong[0] / 150, wrong[1] / 150))


def test_bf16_is_for_training_only():
    """Measured where the classifier answers; the losses are float32."""
    run, seen = built(*FLAGS, "--amp=bf16", "--batch_size=8", "--train-size=8"), []
    run.net.linear.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    run.prepare()
    engine.train_one_epoch(run.steps, run.data.train, epoch=1, epsilon=8)
    engine.evaluate(run.net, run.data.test)
    assert seen == [torch.bfloat16, torch.float32]
    assert all(parameter.dtype == torch.float32 for parameter in run.net.parameters())


def test_top_5_of_imagenet_by_hand():
    """Means over images, though the last batch is smaller."""
    run = Statistics(Config("imagenet", 18, 20), CPU)
    meter, wrong = engine.Meter(run.config, CPU), [0, 0]
    for count in (30, 7):
        logits, targets = torch.randn(count, 20), torch.randint(20, (count,))
        meter.add(torch.tensor(float(count)), mock.Mock(logits=logits, side_logits=None), targets)
        for row, target in zip(logits, targets, strict=True):
            better = int((row > row[target]).sum())
            wrong = [wrong[0] + (better >= 1), wrong[1] + (better >= 5)]
    result = meter.result()
    assert result["errors"] == pytest.approx([wrong[0] / 37, wrong[1] / 37])
    assert result["loss"] == pytest.approx((30 * 30 + 7 * 7) / 37)


def steps_of(rank, size):
    """Two steps of 16 images for each of two processes, or of 32 for one: open gates, then with batch norms."""
    images = mock.patch.object(inputs, "load_digits_set", random_images(150))
    counts = mock.patch.object(inputs, "TEST_BATCH_SIZE", 40)
    with images, counts:
        flags = ["--steps_per_epoch=2", f"--batch_size={32 // size}", "-e", "0"]
        runs = [built(*FLAGS, *flags, rank=rank, size=size) for _ in range(2)]
        loop_checks.norm_each_image(runs[0].net)
        results = []
        for run in runs:
            run.prepare()
            assert [len(targets) for _, targets in run.data.train] == [32 // size] * 2
            result = engine.train_one_epoch(run.steps, run.data.train, epoch=1, epsilon=0.0)
            results.append([result["loss"], *result["errors"], result["seen"], result["side_error"]])
            results.append({name: tensor.clone() for name, tensor in run.net.state_dict().items()})
            results.append(run.statistics.as_dict())
        result = engine.evaluate(run.net, run.data.test, world=run.world)
        return [*results, [result["loss"], *result["errors"], result["seen"], result["side_error"]],
                run.net.state_dict()]  # fmt: skip


def test_two_processes_train_and_test_the_same_network_as_one():
    """Each has a batch of its own, its loss is the mean over that, DDP's mean is over both. Averages: the first's."""
    ranks, (alone, net, *_) = run_in_ranks("tests.epsilon_resnet.test_loop:steps_of"), steps_of(0, 1)
    for result, state, *_ in ranks:
        assert result == pytest.approx(alone, rel=1e-5)
        for name, tensor in net.items():
            torch.testing.assert_close(state[name], tensor, atol=5e-6, rtol=1e-5)
    names = "result trained averages measured tested".split()
    first, second = (dict(zip(names, rank[3:], strict=True)) for rank in ranks)
    mean = "bn0.running_mean"
    assert not torch.equal(first["trained"][mean], second["trained"][mean]), "each saw its own images"
    assert torch.equal(first["tested"][mean], first["trained"][mean]), "those of the first process count"
    for name in ("averages", "measured", "tested"):
        assert not loop_checks.differences(first[name], second[name]), name
    images = mock.patch.object(inputs, "load_digits_set", random_images(150))
    with images, mock.patch.object(inputs, "TEST_BATCH_SIZE", 40):  # whole batches each, so every gate sees the same
        run = built(*FLAGS, "-e", "0")
    run.net.load_state_dict(first["trained"])
    result = engine.evaluate(run.net, run.data.test)
    expected = [result["loss"], *result["errors"], result["seen"], result["side_error"]]
    assert first["measured"] == pytest.approx(expected, rel=1e-6) and result["seen"] == 150


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_loaders_feed_cifars_pixels(dataset, monkeypatch):
    """Padding 4 with black, offsets 0 to 7, flips, the mean image subtracted, divided by 128; full batches only."""
    sets = {"train": loop_checks.coded_set(300), "test": loop_checks.coded_set(150)}
    monkeypatch.setattr(inputs, "load_dataset", lambda name, folder, split: sets[split] if name == dataset else None)
    data = built(f"--{dataset}", "-n", "2", "--device=cpu").data
    constants = 128, sets["test"].images[0].double()  # all images are the same, and so their mean
    assert data.train.batch_sizes == [128] * 2
    epochs = []
    for epoch in (0, 1):
        data.train.set_epoch(epoch)
        batches = list(data.train)
        epochs.append(torch.cat([targets for _, targets in batches]))
        pixels = loop_checks.pixels_of(torch.cat([images for images, _ in batches]), *constants)
        loop_checks.check_crops(pixels, 4, 8)
    assert not torch.equal(*epochs) and len(set(epochs[0].tolist())) == 256
    images, targets = (torch.cat(parts) for parts in zip(*data.test, strict=True))
    assert not images.any() and targets.tolist() == list(range(150))


def test_loaders_feed_svhns_pixels(monkeypatch):
    """Distorted, not flipped; from train and extra, with the mean image over the test images too, divided by 128."""
    sets = {"train+extra": loop_checks.coded_set(256), "test": loop_checks.coded_set(150)}
    monkeypatch.setattr(inputs, "load_dataset", lambda name, folder, split: sets[split] if name == "svhn" else None)
    data = built("-n", "2", "--device=cpu", script=svhnEpsilonResnet).data
    images, targets = (torch.cat(parts) for parts in zip(*data.train, strict=True))
    pixels = images.double() * 128 + sets["test"].images[0].double()
    assert data.train.batch_sizes == [128] * 2 and pixels.min() > -0.01 and sorted(targets.tolist()) == list(range(256))
    assert (pixels[:, 1, 16, 20] > pixels[:, 1, 16, 12]).all(), "none is flipped"
    brightness = pixels[:, 2, 16, 16]  # of 200: up to 10 more or less, then 0.8 to 1.2 times as far from the mean
    assert 190 - 17 < brightness.min() < 195 and 205 < brightness.max() < 210 + 17
    assert not torch.cat([images for images, _ in data.test]).any()


def test_loaders_feed_imagenets_pixels(tmp_path):
    """RGB as 0..1, ImageNet's constants, 224 pixels; training images up to 30 brighter or darker, test images not."""
    from PIL import Image

    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (30, 30), (128, 128, 128)).save(tmp_path / split / name / f"{number}.png")
    flags = ["--gpu=0", f"--data={tmp_path}", "--device=cpu", "--workers=0", "--batch_size=12"]
    args = imagenetEpsilonResnet.parse_args(flags)
    data = training.Data(args, 7, CPU, World())
    constants = loop_checks.by_channel((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    batches = list(data.train)
    assert data.train.batch_sizes == [12, 12] and data.classes == 2 and batches[0][1].tolist() != [0] * 12
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (24, 3, 224, 224)
    brightness = loop_checks.pixels_of(images, *constants).mean((1, 2, 3)) - 128
    assert 15 < brightness.abs().max() <= 32
    ((images, targets),) = data.test
    assert (loop_checks.pixels_of(images, *constants) == 128).all() and targets.tolist() == [0] * 12 + [1] * 12


RECIPES = {  # default flags: epochs, batch, first rate, weight decay at steps 0 and 480,000, nesterov, epsilon
    cifarEpsilonResnet: (1000, 128, 0.1, (2e-4, 4e-5), False, 2.5),
    svhnEpsilonResnet: (200, 128, 0.1, (2e-4, 4e-5), False, 1.5),
    imagenetEpsilonResnet: (110, 256, 0.1, (1e-4, 1e-4), True, 2.0),
}


@pytest.mark.parametrize("script", RECIPES, ids=lambda script: script.__name__.partition(".")[2])
def test_recipes(script):
    """As the flags are by default, for a set of 1,300 images."""
    epochs, batch, rate, (first, later), nesterov, epsilon = RECIPES[script]
    name = {cifarEpsilonResnet: ["--cifar10"], svhnEpsilonResnet: []}.get(script)
    flags = ["--gpu=0", "--fake", "--image-size=32"] if name is None else [*name, "-n", "2", "--embedded-data"]
    if name is None:  # what --fake shows has a batch of its own
        flags += [f"--batch_size={batch}", "--steps_per_epoch=1"]
    with mock.patch.object(inputs, "load_digits_set", random_images(1300)):
        run = built(*flags, "--device=cpu", script=script)
    assert (run.args.epochs, run.args.epsilon, run.net.epsilon) == (epochs, epsilon, epsilon)
    run.prepare()
    assert set(run.data.train.batch_sizes) == {batch} and len(run.data.train) == (1 if name is None else 1300 // batch)
    decayed, others = run.optimizer.param_groups
    assert [group["lr"] for group in (decayed, others)] == [rate] * 2
    assert [group["momentum"] for group in (decayed, others)] == [0.9] * 2
    assert (decayed["nesterov"], others["nesterov"], others["weight_decay"]) == (nesterov, nesterov, 0)
    steps = (0, 479_999, 480_000)
    assert [run.steps.decay(step) for step in steps] == pytest.approx([first, first, later])


def test_batches_of_several_processes(monkeypatch):
    """CIFAR and SVHN: 128 for each, as many steps as of one. ImageNet: 256 shared out, as 42 for each of six."""
    with mock.patch.object(inputs, "load_digits_set", random_images(1300)):
        args = cifarEpsilonResnet.parse_args(FLAGS)
        data = [training.Data(args, 7, CPU, World(rank, 2, rank, 2)) for rank in (0, 1)]
    assert [each.batch_size for each in data] == [256] * 2 and [len(each.train) for each in data] == [10] * 2
    first, second = (next(iter(each.train))[0] for each in data)
    assert len(first) == len(second) == 128 and not torch.equal(first, second)
    folder = mock.Mock(num_images=1_281_167)
    monkeypatch.setattr(training.Data, "_imagenet", lambda *_: (folder, None, 1000, 1.0))
    monkeypatch.setattr(inputs, "epoch_batches", lambda loader, batch_size, steps, divisor: (batch_size, steps))
    args = imagenetEpsilonResnet.parse_args(["--gpu=0"])
    found = [training.Data(args, 7, CPU, World(0, size, 0, size)).train for size in (1, 4, 6)]
    assert found == [(256, 5000), (256, 5000), (252, 5000)], "as the original, which ends an epoch four batches early"


def test_weight_decay_falls_at_its_step_in_the_middle_of_an_epoch(monkeypatch):
    """A fifth after every two steps here; three steps an epoch, and only the first group has any."""
    recipe = dataclasses.replace(training.RECIPES["cifar"], decay_every=2)
    monkeypatch.setitem(training.RECIPES, "cifar", recipe)
    run, seen = built(*FLAGS, "--batch_size=4", "--train-size=12"), []
    run.prepare()

    def look(optimizer, *_):
        seen.append([group["weight_decay"] for group in optimizer.param_groups])

    run.optimizer.register_step_pre_hook(look)
    for epoch in (1, 2):
        engine.train_one_epoch(run.steps, run.data.train, epoch=epoch, epsilon=8)
    assert seen == [[pytest.approx(value), 0] for value in (2e-4, 2e-4, 4e-5, 4e-5, 8e-6, 8e-6)]


def test_averages_take_the_weight_of_the_global_step():
    """Of steps 0, 8 and 171 and later: d = 1/10, 9/18, 0.95."""
    config = Config("cifar", 2)
    statistics = Statistics(config, CPU)
    output = mock.Mock(peaks=torch.zeros(6), logits=torch.zeros(2, 10), side_logits=torch.zeros(2, 10))
    for step, kept in ((0, 0.1), (8, 0.5), (170, 0.95), (10_000, 0.95)):
        statistics.values.zero_()
        statistics.start(step)
        statistics.update(output, 8.0, torch.tensor(1.0), torch.zeros(2, dtype=torch.long))
        assert statistics.as_dict()["cross_entropy_loss"] == pytest.approx(1 - kept, rel=1e-5)


@pytest.mark.parametrize("config", [Config("cifar", 2), Config("imagenet", 18, 7), Config("imagenet", 50, 7)])
def test_batch_norms_and_initial_weights(config):
    """Truncated normals of variance 2.6 / fan: fan-out of convolutions, fan-in of classifiers, whose biases are 0."""
    torch.manual_seed(0)
    net = build_model(config, 0.0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach()
            fan = weight.shape[0] * weight[0, 0].numel() if weight.dim() == 4 else weight.shape[1]
            sigma = (2.6 / fan) ** 0.5
            assert weight.abs().max() <= 2 * sigma * 1.00001
            assert abs(weight.std().item() / (0.8796 * sigma) - 1) < 4 / weight.numel() ** 0.5
            assert module.bias is None or not module.bias.any()
    size = 32 if config.arch == "cifar" else 64
    loop_checks.check_batch_norms(net, torch.randn(4, 3, size, size))
    assert net.side_output.linear.weight.shape[0] == config.num_classes


def test_heads_are_activated_before_they_average():
    x, norm, linear = torch.randn(2, 3, 4, 4), nn.BatchNorm2d(3).eval(), nn.Linear(3, 5)
    expected = linear(F.relu(norm(x)).flatten(2).mean(2))
    torch.testing.assert_close(modules.head(x, norm, linear), expected)
