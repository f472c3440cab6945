"""The loaders that the scripts build, against constants written here, and what a test measures."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.data import ImageSet
from s3 import engine, inputs, main, main_eval
from s3.resnet import build_resnet
from tests.loader_checks import (
    check_folder_loaders,
    check_test_loader,
    check_training_loader,
    dotted_images,
    normalised,
    random_set,
    write_folder,
)

CPU = torch.device("cpu")
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
GREY = (0.1307,) * 3, (0.3081,) * 3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_loaders(monkeypatch, sets, *flags):
    monkeypatch.setattr(inputs, "load_dataset", lambda name, folder, *, split: sets[split])
    monkeypatch.setattr(inputs, "load_digits_set", lambda split, *, channels, size: sets[split])
    return inputs.make_loaders(main.parse_args(["--arch=resnet8", *flags]), 5, CPU, engine.World())


@pytest.mark.parametrize(("dataset", "moments", "pad", "flip"), [
    ("cifar10", CIFAR10, 4, True), ("cifar100", CIFAR100, 4, True), ("digits", GREY, 2, False),
])  # fmt: skip
def test_loaders_of_images_in_memory(dataset, moments, pad, flip, monkeypatch):
    sets = {"train": dotted_images(3, 32), "test": random_set(3, 32)}
    train, test, classes = make_loaders(monkeypatch, sets, f"--dataset={dataset}", "--batch-size=12")
    check_training_loader(train, 12, *moments, pad=pad, flip=flip)
    check_test_loader(test, sets["test"].images, 12, *moments)
    assert classes == 20


def test_loaders_of_mnist(monkeypatch):
    """28 pixels become 32 by a black border, one channel three."""
    border = dotted_images(1, 32)
    grey = ImageSet(border.images[:, :, 2:-2, 2:-2].contiguous(), border.targets, border.classes, "dots")
    sets = {"train": grey, "test": random_set(1, 28)}
    train, test, _ = make_loaders(monkeypatch, sets, "--dataset=mnist")
    check_training_loader(train, 256, *GREY, pad=2, flip=False)
    images = F.pad(sets["test"].images, (2, 2, 2, 2)).repeat(1, 3, 1, 1)
    check_test_loader(test, images, 20, *GREY)
    assert normalised(images[:1, :, :1, :1], *GREY).flatten().tolist() == pytest.approx([-0.1307 / 0.3081] * 3)


@pytest.mark.parametrize("script", [main, main_eval])
def test_loaders_of_folders(script, tmp_path):
    args = script.parse_args([str(write_folder(tmp_path)), "--workers=0", "--batch-size=3"])
    train, test, classes = inputs.make_loaders(args, 5, CPU, engine.World())
    check_folder_loaders(tmp_path, train, test, 3, *IMAGENET, 5)
    assert classes == 2


def test_training_images_are_left_alone_with_evaluate(monkeypatch):
    loaders = make_loaders(monkeypatch, {"test": random_set(3, 32)}, "--dataset=cifar10", "-e")
    assert loaders.train is None and loaders.test.num_images == 20


def test_train_size_takes_the_first_images(monkeypatch):
    sets = {"train": dotted_images(3, 32), "test": random_set(3, 32)}
    train, *_ = make_loaders(monkeypatch, sets, "--dataset=cifar10", "--train-size=9", "--batch-size=4")
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
    assert (found.top1, found.top5, found.seen) == (40.0, 80.0, 5)
    assert found.loss == pytest.approx(F.cross_entropy(table.double(), targets).item())
    assert net.asked == [(False, False, torch.float32)] * 2


@pytest.mark.parametrize(("dataset", "arch"), [("cifar10", "resnet20"), ("imagenet", "resnet18"),
                                               ("imagenet", "resnet50")])  # fmt: skip
def test_every_batch_norm_has_the_defaults_of_pytorch(dataset, arch):
    with torch.device("meta"):
        net = build_resnet(dataset, arch, 10)
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == {"resnet20": 21, "resnet18": 20, "resnet50": 53}[arch]
    assert all((m.momentum, m.eps, m.affine, m.track_running_stats) == (0.1, 1e-5, True, True) for m in norms)


def test_running_statistics_after_one_batch():
    torch.manual_seed(1)
    net = build_resnet("cifar10", "resnet8", 10).train()
    x = torch.randn(4, 3, 32, 32)
    net(x)
    maps = net.conv1(x).detach()
    torch.testing.assert_close(net.bn1.running_mean, 0.1 * maps.mean((0, 2, 3)))
    torch.testing.assert_close(net.bn1.running_var, 0.9 + 0.1 * maps.var((0, 2, 3)))
    assert all((m.weight == 1).all() and not m.bias.any() for m in net.modules() if isinstance(m, nn.BatchNorm2d))
