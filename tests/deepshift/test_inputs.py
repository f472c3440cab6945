"""The loaders that each script builds, against the original's constants, and what its tests measure."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepshift import cifar10, engine, imagenet, mnist, tasks
from deepshift.modules_ps import Conv2dShift, LinearShift
from deepshift.modules_q import Conv2dShiftQ, LinearShiftQ
from deepshift.zoo import build_model
from tests.loader_checks import (
    check_folder_loaders,
    check_test_loader,
    check_training_loader,
    dotted_images,
    random_set,
    write_folder,
)

CPU = torch.device("cpu")
MNIST = (0.1307,), (0.3081,)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def loaders_of(script, flags, monkeypatch, channels, size):
    """Training and test loader, and the test images."""
    test = random_set(channels, size)
    sets = {"train": dotted_images(channels, size), "test": test}
    monkeypatch.setattr(tasks, "load_dataset", lambda name, folder, *, split: sets[split])
    args = script.parse_args(flags)
    task = (mnist.Mnist if script is mnist else cifar10.Cifar10)(script.parse_args)
    return *task.loaders(args, 5, CPU, engine.World()), test


def test_loaders_of_mnist(monkeypatch):
    """No augmentation; 64 images in training, 1000 in testing."""
    train, test, images = loaders_of(mnist, [], monkeypatch, 1, 28)
    check_training_loader(train, 64, *MNIST, pad=0, flip=False)
    check_test_loader(test, images.images, 20, *MNIST)
    *_, test, _ = loaders_of(mnist, ["--test-batch-size=7"], monkeypatch, 1, 28)
    assert test.batch_sizes == [7, 7, 6]


@pytest.mark.parametrize(("flags", "moments"), [([], CIFAR10), (["--normalize=imagenet"], IMAGENET)])
def test_loaders_of_cifar10(flags, moments, monkeypatch):
    train, test, images = loaders_of(cifar10, ["--batch-size=12", *flags], monkeypatch, 3, 32)
    check_training_loader(train, 12, *moments, pad=4, flip=True)
    check_test_loader(test, images.images, 12, *moments)


def test_loaders_of_imagenet(tmp_path):
    args = imagenet.parse_args([str(write_folder(tmp_path)), "--workers=0", "--batch-size=3"])
    train, test = imagenet.ImageNet(imagenet.parse_args).loaders(args, 5, CPU, engine.World())
    check_folder_loaders(tmp_path, train, test, 3, *IMAGENET, 5)


def test_training_images_are_left_alone_with_evaluate(monkeypatch):
    args = cifar10.parse_args(["-e"])
    monkeypatch.setattr(tasks, "load_dataset", lambda name, folder, *, split: {"test": random_set(3, 32)}[split])
    train, test = cifar10.Cifar10(cifar10.parse_args).loaders(args, 5, CPU, engine.World())
    assert train is None and test.num_images == 20


def test_train_size_takes_the_first_images(monkeypatch):
    train, *_ = loaders_of(cifar10, ["--train-size=9", "--batch-size=4"], monkeypatch, 3, 32)
    assert train.batch_sizes == [4, 4, 1] and sorted(torch.cat([t for _, t in train]).tolist()) == list(range(9))


class Fixed(nn.Module):
    """Logits of a table, by the first pixel of an image; notes in what mode and type it was asked."""

    def __init__(self, table):
        super().__init__()
        self.table, self.asked = table, []
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        product = self.unused(x[:, 0, :1, :2])
        self.asked.append((self.training, torch.is_grad_enabled(), product.dtype))
        return self.table[x[:, 0, 0, 0].long()]


class Images(list):
    device = CPU
    batch_sizes = property(lambda self: [len(targets) for _, targets in self])


def test_accuracies_are_those_counted_by_hand():
    """Seven classes, whose logits fall from class 0 to class 6: target t is at place t."""
    table, targets = -torch.arange(7.0).repeat(5, 1), torch.tensor([0, 4, 5, 2, 0])
    images = torch.arange(5.0)[:, None, None, None].expand(5, 1, 2, 2)
    net = Fixed(table).train()
    found = engine.evaluate(net, Images([(images[:3], targets[:3]), (images[3:], targets[3:])]))
    assert (found.top1, found.top5, found.correct, found.seen, found.batches) == (40.0, 80.0, 2, 5, 2)
    losses = F.cross_entropy(table.double(), targets, reduction="none")
    assert found.loss == pytest.approx(losses.mean().item())
    assert found.last_loss == pytest.approx(losses[3:].mean().item())
    assert net.asked == [(False, False, torch.float32)] * 2


def distance(values, low, high):
    """Kolmogorov and Smirnov's, times the root of the count, from uniform: above 1.95 once in a thousand times."""
    values = values.detach().double().flatten().sort().values
    assert low <= values[0] and values[-1] <= high
    ranks = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    below = (values - low) / (high - low)
    return max((below - ranks[:-1]).abs().max(), (below - ranks[1:]).abs().max()).item() * len(values) ** 0.5


@pytest.mark.parametrize("kind", [LinearShift, Conv2dShift, LinearShiftQ, Conv2dShiftQ])
@pytest.mark.parametrize("bits", [5, 3])
def test_initial_distributions(kind, bits):
    """PS: signs in (-1, 1), shifts of linear layers over the range of their bits, of convolutions in (-10, -1).

    Q: weights, as biases of both, in +-1/sqrt(fan in).
    """
    torch.manual_seed(1)
    is_linear = kind in (LinearShift, LinearShiftQ)
    layer = kind(400, 1000, weight_bits=bits) if is_linear else kind(16, 1000, 5, weight_bits=bits)
    bound = 400**-0.5
    assert distance(layer.bias, -bound, bound) < 1.95
    if kind in (LinearShiftQ, Conv2dShiftQ):
        assert distance(layer.weight, -bound, bound) < 1.95
        return
    low, high = (-(2 ** (bits - 1) - 2), 0) if is_linear else (-10, -1)
    assert distance(layer.shift, low, high) < 1.95 and distance(layer.sign, -1, 1) < 1.95


def test_networks_that_initialise_themselves():
    """Pre-activated ResNets, DenseNets and VGGs: N(0, 2 / (k^2 outputs)), and linear layers of VGG N(0, 0.01^2)."""
    torch.manual_seed(1)
    for arch, scale in (("preresnet20", 0.5), ("densenet40", 0.5), ("vgg11", 0.5)):
        net = build_model("cifar10", arch)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000]
        assert convolutions
        for conv in convolutions:
            expected = (2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) ** 0.5
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.06), arch  # 6 standard errors
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all((m.weight == scale).all() and not m.bias.any() for m in norms), arch
    assert net.classifier.weight.std().item() == pytest.approx(0.01, rel=0.06) and not net.classifier.bias.any()


FAMILIES = ("resnet18", "resnet50", "preresnet20", "densenet40", "vgg11", "mobilenetv1", "mobilenetv2", "googlenet",
            "senet18", "resnext29_2x64d", "dpn26", "pnasneta", "pnasnetb", "efficientnetB0")  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_batch_norm_has_the_defaults_of_pytorch(arch):
    with torch.device("meta"):
        net = build_model("cifar10", arch)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 7
    assert all((m.momentum, m.eps, m.affine, m.track_running_stats) == (0.1, 1e-5, True, True) for m in norms)


def test_running_statistics_after_one_batch():
    torch.manual_seed(1)
    net = build_model("cifar10", "resnet20").train()
    x = torch.randn(4, 3, 32, 32)
    net(x)
    maps = net.conv1(x).detach()
    torch.testing.assert_close(net.bn1.running_mean, 0.1 * maps.mean((0, 2, 3)))
    torch.testing.assert_close(net.bn1.running_var, 0.9 + 0.1 * maps.var((0, 2, 3)))
    small = 1e-3 * torch.randn(4, 16, 8, 8)  # so that eps is much of the variance
    deviation = (small.var((0, 2, 3), correction=0) + 1e-5).sqrt()[:, None, None]
    torch.testing.assert_close(net.bn1(small), (small - small.mean((0, 2, 3))[:, None, None]) / deviation)
