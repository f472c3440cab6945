"""Training steps as the scripts build them, against the original's formulas written out here with its constants."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoints import load_checkpoint
from deepshift import cifar10, engine, imagenet, mnist, tasks
from deepshift.quantizers import shift_l2_norm
from deepshift.runs import read_metrics
from deepshift.training import Training
from tests.step_cases import random_images

CPU = torch.device("cpu")
LENET = ["--arch=lenet", "--embedded-data", "--device=cpu", "--seed=3"]
BATCHES = (5, 5, 2)  # images of each step


class Batches(list):
    """A loader of ready batches."""

    device = CPU

    @property
    def batch_sizes(self):
        return [len(targets) for _, targets in self]


class Lines:
    """Keeps what a pass would print: the mean loss of every batch."""

    def __init__(self):
        self.losses = []

    def loaded(self):
        pass

    def advance(self, step, loss_sum, logits, targets, meter):
        self.losses.append(loss_sum.item() / len(targets))


def batches(shape=(3, 32, 32)):
    generator = torch.Generator().manual_seed(4)
    return Batches((torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator))
                   for size in BATCHES)  # fmt: skip


def training_of(script, flags):
    task = {cifar10: cifar10.Cifar10, mnist: mnist.Mnist, imagenet: imagenet.ImageNet}[script](script.parse_args)
    return Training(task, script.parse_args(flags), CPU, engine.World())


def run(training, loader, epoch=0):
    """The losses that would be printed, and the result of the pass."""
    training.set_rates(epoch)
    lines = Lines()
    return lines.losses, engine.train_one_epoch(training.new_step(), loader, lines, epoch=epoch)


class Momentum:
    """v = 0.9 v + g, p -= lr v."""

    def __init__(self, momentum=0.9):
        self.momentum, self.velocity = momentum, {}

    def step(self, name, p, gradient, lr, decay):
        gradient = gradient + decay * p
        self.velocity[name] = gradient = self.momentum * self.velocity.get(name, 0) + gradient
        p -= lr * gradient


class RAdam:
    """Liu et al. 2019 as the original has it: decoupled decay, unrectified while N < 5, eps outside of the root."""

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    def __init__(self):
        self.state = {}

    def step(self, name, p, gradient, lr, decay):
        t, m, v = self.state.get(name, (0, 0, 0))
        t, m, v = t + 1, self.beta1 * m + (1 - self.beta1) * gradient, self.beta2 * v + (1 - self.beta2) * gradient**2
        self.state[name] = t, m, v
        p -= decay * lr * p
        last = 2 / (1 - self.beta2) - 1
        n = last - 2 * t * self.beta2**t / (1 - self.beta2**t)
        if n < 5:
            p -= lr * m / (1 - self.beta1**t)
            return
        rectified = (1 - self.beta2**t) * (n - 4) / (last - 4) * (n - 2) / n * last / (last - 2)
        p -= lr * math.sqrt(rectified) / (1 - self.beta1**t) * m / (v.sqrt() + self.eps)


class Ranger(RAdam):
    """RAdam, then every 6th step half of the way back to slow weights, which go there too."""

    beta1, beta2, eps = 0.95, 0.999, 1e-5

    def step(self, name, p, gradient, lr, decay):
        slow = self.state.get(f"slow {name}", p.clone())
        super().step(name, p, gradient, lr, decay)
        if self.state[name][0] % 6 == 0:
            slow = slow + 0.5 * (p - slow)
            p.copy_(slow)
        self.state[f"slow {name}"] = slow


def by_hand(net, loader, rule, *, lr, lr_sign, decay):
    """Train a network by the original's words: decay for all but signs and shifts, the shifts' own regulariser."""
    net.train()
    losses = []
    for images, targets in loader:
        net.zero_grad()
        loss = F.cross_entropy(net(images), targets)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, p in net.named_parameters():
                kind = name.rpartition(".")[2]
                gradient = p.grad
                if kind == "shift":
                    gradient = gradient + decay * math.log(2) * 4**p
                own_decay = 0.0 if kind in ("shift", "sign") else decay
                rule.step(name, p, gradient, lr_sign if kind == "sign" else lr, own_decay)
    return losses


@pytest.mark.parametrize(("flags", "rule"), [
    (["--shift-type=Q"], Momentum()),
    (["--shift-type=PS"], Momentum()),
    (["--shift-type=PS", "--optimizer=radam"], RAdam()),
    (["--shift-type=PS", "--optimizer=ranger"], Ranger()),
], ids=["Q", "PS", "PS radam", "PS ranger"])  # fmt: skip
def test_steps_of_cifar10(flags, rule):
    """Seven steps: the sixth is the first that RAdam rectifies, and Ranger's first look back."""
    training = training_of(cifar10, [*LENET, *flags, "--lr=0.02", "--lr-sign=0.05", "--wd=0.03"])
    expected, loader = copy.deepcopy(training.net), batches()
    loader = Batches([*loader, *loader, loader[0]])
    losses, result = run(training, loader)
    assert losses == pytest.approx(by_hand(expected, loader, rule, lr=0.02, lr_sign=0.05, decay=0.03), rel=1e-4)
    weighted = [loss * len(targets) for loss, (_, targets) in zip(losses, loader, strict=True)]
    assert result.loss == pytest.approx(sum(weighted) / sum(loader.batch_sizes)) and result.seen == 29
    assert result.last_loss == pytest.approx(losses[-1])
    same_parameters(training.net, expected)


def same_parameters(net, expected):
    for (name, one), other in zip(net.named_parameters(), expected.parameters(), strict=True):
        # float32: the same sums in another order, over a few steps
        assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-6, name


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_steps_of_mnist(momentum):
    """One group, no decay, no regulariser, a constant rate of 0.01."""
    training = training_of(mnist, ["--type=conv", "--embedded-data", "--device=cpu", "--shift-type=PS",
                                   f"--momentum={momentum}"])  # fmt: skip
    expected, loader = copy.deepcopy(training.net), batches((1, 28, 28))
    losses, _ = run(training, loader, epoch=9)
    rule = Momentum(momentum)
    assert losses == pytest.approx(by_hand(expected, loader, rule, lr=0.01, lr_sign=0.01, decay=0.0), rel=1e-4)
    same_parameters(training.net, expected)


class Tiny(nn.Module):
    """One shift layer's names, each of its parameters an element; logits that depend on nothing."""

    def __init__(self, shift, sign=(0.3,), others=(0.5,)):
        super().__init__()
        self.layer = nn.Module()
        for name, values in (("shift", shift), ("sign", sign), ("bias", others)):
            setattr(self.layer, name, nn.Parameter(torch.tensor(values)))

    def forward(self, x):
        return torch.zeros(len(x), 10) * sum(p.sum() for p in self.parameters())


def tiny_training(monkeypatch, script, flags, **values):
    """A run of the script's on Tiny: cross entropy gives no gradient, so that what is left is everything else."""
    from deepshift.network import Network

    monkeypatch.setattr("deepshift.training.build_network", lambda args, *_: Network(Tiny(**values), {}, "tiny"))
    return training_of(script, flags)


@pytest.mark.parametrize("script", [cifar10, imagenet])
def test_the_regulariser_in_a_step(script, monkeypatch):
    """0.5 wd sum((2^shift)^2) over all processes' images, in the loss that is shown on ImageNet only."""
    shifts, decay = [-3.0, -0.4], 0.2
    flags = ["--embedded-data", "--device=cpu", "--lr=0.1", f"--wd={decay}", "--momentum=0"]
    training = tiny_training(monkeypatch, script, flags, shift=shifts)
    loader = batches()
    losses, _ = run(training, loader)
    extra, expected = [], shifts
    for _ in loader:
        extra.append(0.5 * decay * sum(4**shift for shift in expected))
        expected = [shift - 0.1 * decay * math.log(2) * 4**shift for shift in expected]
    assert training.net.layer.shift.tolist() == pytest.approx(expected, rel=1e-5)
    assert training.net.layer.sign.tolist() == pytest.approx([0.3]), "no decay"
    assert training.net.layer.bias.item() == pytest.approx(0.5 * (1 - 0.1 * decay) ** 3, rel=1e-5)
    shown = [math.log(10) + (more if script is imagenet else 0) for more in extra]
    assert losses == pytest.approx(shown, rel=1e-5)
    without = tiny_training(monkeypatch, script, [*flags, "--wd=0"], shift=shifts)
    run(without, loader)
    assert torch.equal(without.net.layer.shift, torch.tensor(shifts))


def test_batches_add_up_to_an_update(monkeypatch):
    """--batch-multiplier 2, five batches: the loss of each, regulariser and all, by 2; updates after 2, 4 and 5."""
    flags = ["--embedded-data", "--device=cpu", "--lr=0.1", "--wd=0.2", "--momentum=0.9", "--batch-multiplier=2"]
    training = tiny_training(monkeypatch, imagenet, flags, shift=[-0.4])
    shift, velocity, shown = -0.4, 0.0, []
    for number in range(1, 6):
        shown.append((math.log(10) + 0.5 * 0.2 * 4**shift) / 2)
        if number in (2, 4, 5):
            velocity = 0.9 * velocity + (1 if number == 5 else 2) * 0.2 * math.log(2) * 4**shift / 2
            shift -= 0.1 * velocity
    losses, _ = run(training, Batches([batches()[0]] * 5))
    assert losses == pytest.approx(shown, rel=1e-5)
    assert training.net.layer.shift.item() == pytest.approx(shift, rel=1e-5)


def test_the_rates_of_the_groups_reach_the_parameters():
    """Epoch 1 of --alternate-update keeps the signs, epoch 0 the shifts; --freeze keeps float parameters."""
    training = training_of(cifar10, [*LENET, "--shift-type=PS", "--alternate-update=yes", "--freeze=yes", "--wd=0.1"])
    for epoch, moving in ((0, "sign"), (1, "shift"), (2, "sign")):
        run(training, batches())  # so that clamping, which is no step, has been done
        before = {name: p.detach().clone() for name, p in training.net.named_parameters()}
        training.optimizer.state.clear()
        run(training, batches(), epoch)
        moved = {name for name, p in training.net.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.endswith(moving)}, epoch


@pytest.mark.parametrize("kind", ["Q", "PS"])
def test_what_freeze_leaves_to_train(kind):
    training = training_of(cifar10, [*LENET, f"--shift-type={kind}", "--freeze=yes"])
    trained = {name.rpartition(".")[2] for name, p in training.net.named_parameters() if p.requires_grad}
    assert trained == ({"bias"} if kind == "Q" else {"shift", "sign"})


def test_lr_sign_of_0_freezes_signs_on_imagenet_only():
    flags = ["--arch=squeezenet1_1", "--embedded-data", "--device=cpu", "--shift-type=PS", "--lr-sign=0"]
    signs = [p for name, p in training_of(imagenet, flags).net.named_parameters() if name.endswith(".sign")]
    assert len(signs) == 26 and not any(p.requires_grad for p in signs)
    net = training_of(cifar10, [*LENET, "--shift-type=PS", "--lr-sign=0"]).net
    assert all(p.requires_grad for p in net.parameters())


def test_rates_of_a_run_by_epoch(tmp_path, monkeypatch):
    """What metrics.jsonl tells, and what the optimizer had: a tenth after every --lr-step-size epochs."""
    monkeypatch.setattr(tasks, "load_digits_set", random_images(8))
    had, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: had.append([g["lr"] for g in self.param_groups]) or step(self)
    )
    flags = ["--batch-size=8", "--epochs=5", "--lr=0.5", "--lr-sign=0.25", "--lr-step-size=2", "--print-weights=no"]
    assert cifar10.main([*LENET, *flags, "--shift-type=PS", f"--output-dir={tmp_path}"]) == 0
    lines = read_metrics(next(tmp_path.rglob("metrics.jsonl")))
    rates = [0.5, 0.5, 0.05, 0.05, 0.005]
    assert [line["lr"] for line in lines if line["type"] == "epoch"] == pytest.approx(rates)
    assert had == [pytest.approx([rate, rate / 2, rate]) for rate in rates]


TABLE = [(0, 1.0), (79, 1.0), (80, 0.1), (119, 0.1), (120, 0.01), (159, 0.01), (160, 1e-3), (179, 1e-3), (180, 1e-4),
         (199, 1e-4)]  # fmt: skip


def test_the_epochs_at_which_rates_drop():
    for epoch, factor in TABLE:
        for arch in ("resnet20", "resnet110", "resnet1202"):
            warming = 0.1 if epoch == 0 and arch != "resnet20" else 1.0
            args = cifar10.parse_args([f"--arch={arch}"])
            assert cifar10.lr_factor(args, epoch) == pytest.approx(warming * factor), (arch, epoch)
    task = imagenet.ImageNet(imagenet.parse_args)
    args = imagenet.parse_args(["DIR"])
    for epoch, rate in ((0, 0.1), (29, 0.1), (30, 0.01), (59, 0.01), (60, 1e-3), (89, 1e-3)):
        assert task.learning_rates(args, [0.1, 0.7, 0.1], epoch) == pytest.approx([rate] * 3), epoch
    args = imagenet.parse_args(["DIR", "--lr=1e-3", "--lr-step-size=5"])
    for epoch, rate in ((4, 1e-3), (5, 1e-4), (14, 1e-5)):
        assert task.learning_rates(args, [1e-3] * 3, epoch) == pytest.approx([rate] * 3), epoch


def test_the_best_epoch_is_the_first_of_the_highest(tmp_path, monkeypatch):
    """Its weights are the ones that are kept, and so is every tenth checkpoint of ImageNet."""
    monkeypatch.setattr(tasks, "load_digits_set", random_images(8))
    results = (engine.Result(1.0, accuracy, 99.0, 4, 8, 0.1, 1, 1.0) for accuracy in (50.0, 60.0, 60.0, 55.0))
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: next(results))
    flags = ["--batch-size=8", "--epochs=4", "--print-weights=no", "--shift-type=Q", f"--output-dir={tmp_path}"]
    assert cifar10.main([*LENET, *flags]) == 0
    folder = tmp_path / "cifar10" / "lenet" / "shift_q_all_wb_5"
    result = read_metrics(folder / "metrics.jsonl")[-1]
    assert (result["top1"], result["best_top1"], result["best_epoch"]) == (55.0, 60.0, 1)
    assert load_checkpoint(folder / "model_best.pth.tar")["epoch"] == 2
    assert load_checkpoint(folder / "weights.pth")["top1"] == 60.0
    kept = [epoch for epoch in range(25) if imagenet.ImageNet(imagenet.parse_args).keeps(epoch)]
    assert kept == [0, 10, 20] and not cifar10.Cifar10(cifar10.parse_args).keeps(0)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_regulariser_alone(decay):
    shifts = [torch.tensor([-1.0, 0.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)]
    shift_l2_norm(shifts, decay).backward()
    assert shift_l2_norm(shifts, decay).item() == pytest.approx(0.5 * decay * (0.25 + 1 + 16))
    assert shifts[0].grad.tolist() == pytest.approx([decay * math.log(2) / 4, decay * math.log(2)])
