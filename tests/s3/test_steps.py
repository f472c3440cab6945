"""Training steps as main.py builds them, against the original's formulas written out here with its constants."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from common.checkpoints import load_checkpoint
from s3 import engine, inputs, main, main_eval
from s3.runs import read_metrics
from s3.s3conv2dshift import S3Conv2d
from s3.schedule import cosine_rate, step_rate
from s3.training import Training
from tests.step_cases import random_images

CPU = torch.device("cpu")
FLAGS = ["--dataset=digits", "--arch=resnet8", "--device=cpu", "--seed=3"]
BATCHES = (6, 6, 3)


class Batches(list):
    """A loader of ready batches."""

    device = CPU
    batch_sizes = property(lambda self: [len(targets) for _, targets in self])


class Lines:
    """Keeps what a pass would print: the mean loss of every batch."""

    def __init__(self):
        self.losses = []

    def loaded(self):
        pass

    def advance(self, step, loss_sum, logits, targets, meter):
        self.losses.append(loss_sum.item() / len(targets))


def batches():
    generator = torch.Generator().manual_seed(4)
    return Batches((torch.randn(size, 3, 32, 32, generator=generator).double(),
                    torch.randint(10, (size,), generator=generator)) for size in BATCHES)  # fmt: skip


def by_hand(net, loader, *, lr, rs, decay=1e-4, momentum=0.9):
    """SGD with momentum, decay on every parameter, and rs for each sparse entry below 0 (half of it at 0)."""
    net.train()
    velocity, losses = {}, []
    for images, targets in loader:
        net.zero_grad()
        loss = F.cross_entropy(net(images).float(), targets)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in net.named_parameters():
                gradient = p.grad + decay * p
                if name.endswith("weight_val"):
                    gradient = gradient - rs * ((p < 0).float() + 0.5 * (p == 0))
                velocity[name] = gradient = gradient + momentum * velocity.get(name, 0)
                p -= lr * gradient
    return losses


@pytest.mark.parametrize("flags", [
    ["--rs=0.02", "--wd=0.01"], ["--method=denseshift"], ["--method=float"],
], ids=" ".join)  # fmt: skip
def test_steps_of_main(flags):
    """In float64, but for the cross entropy: these networks enlarge every rounding."""
    args = main.parse_args([*FLAGS, *flags, "--epochs=200"])
    training, loader = Training(main.S3Task(), args, CPU, engine.World(), 3, 10), batches()
    training.net.double()
    expected, lines, step = copy.deepcopy(training.net), Lines(), training.new_step()
    training.set_rate(99)  # the middle of the cosine
    result = engine.train_one_epoch(step, loader, lines, epoch=99)
    rs, decay = (0.02, 0.01) if "--rs=0.02" in flags else (0.0, 1e-4)
    losses = by_hand(expected, loader, lr=0.05, rs=rs, decay=decay)
    assert lines.losses == pytest.approx(losses, rel=1e-5), "what is printed leaves the regulariser out"
    weighted = [loss * size for loss, size in zip(losses, BATCHES, strict=True)]
    assert result.loss == pytest.approx(sum(weighted) / 15, rel=1e-5) and result.seen == 15
    for (name, one), other in zip(training.net.named_parameters(), expected.parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name
    for (name, one), other in zip(training.net.named_buffers(), expected.buffers(), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name


def test_the_default_regulariser_is_a_sum_times_1e_5():
    args = main.parse_args(FLAGS)
    training = Training(main.S3Task(), args, CPU, engine.World(), 3, 10)
    vals = [layer.weight_val for layer in training.net.modules() if isinstance(layer, S3Conv2d)]
    expected = 1e-5 * sum(-value.detach()[value < 0].double().sum().item() for value in vals)
    assert len(vals) == 8 and training.options.regulariser().item() == pytest.approx(expected, rel=1e-5)
    (group,) = training.optimizer.param_groups
    numbers = [group[name] for name in ("lr", "momentum", "weight_decay", "dampening", "nesterov")]
    assert numbers == [0.1, 0.9, 1e-4, 0, False]
    assert len(group["params"]) == len(list(training.net.parameters())) == 53


@pytest.mark.parametrize(("schedule", "rates"), [
    ("original", [0.75, 0.25, 0.0]), ("fixed", [1.0, 0.75, 0.25]),
])  # fmt: skip
def test_rates_of_a_run_by_epoch(schedule, rates, tmp_path, monkeypatch):
    """What metrics.jsonl tells, and what the optimizer had."""
    monkeypatch.setattr(inputs, "load_digits_set", random_images(8))
    had, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: had.append(self.param_groups[0]["lr"]) or step(self))
    flags = ["--batch-size=8", "--epochs=3", "--lr=0.2", f"--schedule={schedule}", f"--output-dir={tmp_path}"]
    assert main.main([*FLAGS, *flags]) == 0
    lines = [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["type"] == "epoch"]
    assert lines == had == pytest.approx([0.2 * rate for rate in rates])


def test_the_best_epoch_is_the_first_of_the_highest(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_digits_set", random_images(8))
    results = (engine.Result(1.0, accuracy, 99.0, 8, 0.1) for accuracy in (50.0, 60.0, 60.0, 55.0))
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: next(results))
    assert main.main([*FLAGS, "--batch-size=8", "--epochs=4", f"--output-dir={tmp_path}"]) == 0
    result = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (result["top1"], result["best_top1"], result["best_epoch"]) == (55.0, 60.0, 1)
    assert load_checkpoint(tmp_path / "model_best.pth.tar")["epoch"] == 2


def test_rates_by_literal_epochs():
    for epoch, rate in ((0, 0.099993832), (49, 0.085355339), (99, 0.05), (149, 0.014644661), (199, 0.0)):
        assert cosine_rate(0.1, epoch, 200) == pytest.approx(rate, abs=1e-9)
    assert cosine_rate(0.1, 0, 200, "fixed") == 0.1
    task, args = main_eval.PlainTask(), main_eval.parse_args(["DIR"])
    for epoch, rate in ((0, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 1e-3), (89, 1e-3)):
        assert task.learning_rate(args, epoch) == step_rate(0.1, epoch) == pytest.approx(rate)
    assert args.epochs == task.epochs_in_paper == 90 and main.S3Task().epochs_in_paper == 200


def test_main_eval_trains_plain_networks_as_its_example():
    """No regulariser, decay on every parameter."""
    args = main_eval.parse_args(["--dataset=digits", "--arch=resnet8", "--device=cpu"])
    training, loader = Training(main_eval.PlainTask(), args, CPU, engine.World(), 3, 10), batches()
    training.net.double()
    expected = copy.deepcopy(training.net)
    training.set_rate(30)
    engine.train_one_epoch(training.new_step(), loader, Lines(), epoch=30)
    by_hand(expected, loader, lr=0.01, rs=0)
    for (name, one), other in zip(training.net.named_parameters(), expected.parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name


def ks(values, cumulative):
    """Kolmogorov and Smirnov's distance times the root of the count: above 1.95 once in a thousand times."""
    values = values.detach().double().flatten().sort().values
    ranks = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    below = cumulative(values)
    return max((below - ranks[:-1]).abs().max(), (below - ranks[1:]).abs().max()).item() * math.sqrt(len(values))


def normal(deviation):
    return lambda x: 0.5 * (1 + torch.erf(x / (deviation * math.sqrt(2))))


@pytest.mark.parametrize("method", ["s3", "denseshift"])
def test_distribution_of_initial_latents(method):
    """He's by fan-out for each of the four, or 0.001, as in the network that main.py builds."""
    args = main.parse_args(["--dataset=cifar10", "--arch=resnet20", f"--method={method}"])
    net = Training(main.S3Task(), args, CPU, engine.World(), 3, 10).net
    layer = net.layer3[2].conv1
    deviation = math.sqrt(2 / (9 * 64)) if method == "s3" else 1e-3
    names = [name for name, _ in layer.named_parameters()]
    assert len(names) == 4 and layer.weight is layer.weight_sign
    for name in names:
        assert ks(getattr(layer, name), normal(deviation)) < 1.95, name
    assert ks(net.conv1.weight, normal(math.sqrt(2 / (9 * 16)))) < 1.95
    shortcut = math.sqrt(2 / 32) if method == "s3" else 1e-3
    assert ks(net.layer2[0].downsample[0].weight, normal(shortcut)) < 1.95
    pairs = [(a, b) for a in names for b in names if a < b]
    for a, b in pairs:
        together = torch.stack([getattr(layer, a).flatten(), getattr(layer, b).flatten()])
        assert torch.corrcoef(together)[0, 1].abs() < 0.03, "drawn apart: 5 standard errors of 36,864 pairs are 0.026"
