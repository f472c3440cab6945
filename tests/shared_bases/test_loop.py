"""The recipe, line by line: what the scripts build and their own loop, against the original's numbers written out."""

import os
import tempfile
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.checkpoints import load_checkpoint
from shared_bases import engine, train_cifar10, train_cifar100, train_ilsvrc, training
from shared_bases.models import Config, build_model
from shared_bases.regulariser import similarity_terms
from shared_bases.run import World
from shared_bases.runs import read_metrics
from tests import loop_checks
from tests.ranks import run_in_ranks
from tests.step_cases import random_images

NETWORK = ["--model=ResNet32_SingleShared", "--shared_rank=8"]
FLAGS = [*NETWORK, "--embedded-data", "--device=cpu", "--seed=7"]
NAME = "CIFAR10-ResNet32_SingleShared-S8-U1-L10-0"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(engine, "load_digits_set", random_images(16))


def built(*flags, script=train_cifar10, rank=0, size=1):
    args, config = script.parse_args([*flags])
    return training.Training(args, config, CPU, World(rank, size, rank, size))


def counted(net, batches, optimise=None):
    """Mean cross entropy, top-1 and top-5 in percent, image by image."""
    loss_sum, right, seen = 0.0, [0, 0], 0
    for images, targets in batches:
        logits = net(images)
        total = F.cross_entropy(logits.float(), targets, reduction="sum")
        if optimise is not None:
            optimise(total / len(targets))
        loss_sum += total.item()
        seen += len(targets)
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
            better = sum(value > row[target] for value in row)
            right[0] += better < 1
            right[1] += better < 5
    return loss_sum / seen, 100 * right[0] / seen, 100 * right[1] / seen


def train_by_hand(run, rates):
    """The original's loop: cross entropy + 10 R, one SGD with momentum 0.9 and weight decay 5e-4 on everything."""
    (loader, tests), net, rows = run.loaders(), run.net.double(), []
    parameters = list(net.parameters())
    velocities = [None] * len(parameters)
    for epoch, rate in enumerate(rates):

        def optimise(loss, rate=rate):
            nonlocal velocities
            (term,) = similarity_terms(net, "single_with_unique")
            loss = loss + 10 * term
            velocities = loop_checks.sgd_step(parameters, velocities, loss, rate=rate, momentum=0.9, decay=5e-4)

        loader.set_epoch(epoch)
        trained = counted(net.train(), loader, optimise)
        with torch.no_grad():
            rows.append([*trained, *counted(net.eval(), tests)])
    return rows, velocities


def test_the_script_trains_by_the_originals_recipe(tmp_path):
    """From the flags to the saved network, its momentum and the lines of metrics.jsonl; the last batch is shorter."""
    flags = [*FLAGS, "--train-size=13", "--batch_size=7", "--epochs=2"]
    with loop_checks.in_double(training.Training, "wrapped", engine):
        train_cifar10.main([*flags, f"--output-dir={tmp_path}"])
        run = built(*flags)
        rows, velocities = train_by_hand(run, [0.1, 0.01])  # 300 epochs, made 2: the drop of epoch 150 comes after one
    state = load_checkpoint(tmp_path / NAME / "last.pt")
    for name, tensor in run.net.state_dict().items():
        torch.testing.assert_close(state["net_state_dict"][name], tensor, atol=2e-6, rtol=1e-6)
    saved = [entry["momentum_buffer"] for entry in state["optimizer_state_dict"]["state"].values()]
    torch.testing.assert_close(saved, velocities, atol=2e-5, rtol=1e-5)
    lines = [line for line in read_metrics(tmp_path / NAME / "metrics.jsonl") if line["type"] == "epoch"]
    names = [f"{kind}_{value}" for kind in ("train", "test") for value in ("loss", "top1", "top5")]
    for line, row in zip(lines, rows, strict=True):
        assert [line[name] for name in names] == pytest.approx(row, rel=1e-4)


def test_bf16_is_for_training_only():
    """Measured where the classifier answers; the losses are float32."""
    run, seen = built(*FLAGS, "--amp=bf16", "--batch_size=8", "--train-size=8"), []
    run.net.fc.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    step, (loader, tests) = run.first_step(), run.loaders()
    engine.train_one_epoch(step, loader, epoch=1)
    engine.evaluate(run.net, tests)
    assert seen == [torch.bfloat16] + [torch.float32] * len(tests)
    assert all(parameter.dtype == torch.float32 for parameter in run.net.parameters())


def two_steps(rank, size):
    """Two batches, of 7 and 6 images, in the paper's own loop: by each image alone, then with batch norms."""
    with mock.patch.object(engine, "load_digits_set", random_images(16)), tempfile.TemporaryDirectory() as folder:
        flags = [*FLAGS, "--train-size=13", "--batch_size=7"]
        runs = [built(*flags, rank=rank, size=size) for _ in range(2)]
        loop_checks.norm_each_image(runs[0].net)
        results = []
        for run in runs:
            step, (loader, tests) = run.first_step(), run.loaders()
            results.append(list(training._train_epoch(run, loader, step, 0.1)))
            results.append({name: tensor.clone() for name, tensor in run.net.state_dict().items()})
        results.append(list(engine.evaluate(run.net, tests, world=run.world)))
        results.append({name: tensor.clone() for name, tensor in run.net.state_dict().items()})
        if rank == 0:
            torch.save(run.payload(step.optimizer, 0.0, 0.0), os.path.join(folder, "best.pth"))
        run.best["path"] = os.path.join(folder, "best.pth")  # on the first process only is there such a file
        with torch.no_grad():
            run.net.fc.bias.add_(1)
        run.restart_from_best()
        return [*results, run.net.state_dict()]


def test_two_processes_train_and_test_the_same_network_as_one():
    """The orthogonality term must not be counted twice, nor halved."""
    ranks, (alone, net, *_) = run_in_ranks("tests.shared_bases.test_loop:two_steps"), two_steps(0, 1)
    for result, state, *_ in ranks:
        assert result == pytest.approx(alone, rel=1e-5)
        for name, tensor in net.items():
            torch.testing.assert_close(state[name], tensor, atol=5e-6, rtol=1e-5)
    first, second = (dict(zip(("trained", "measured", "tested", "best"), rank[3:], strict=True)) for rank in ranks)
    mean = "bn1.running_mean"
    assert not torch.equal(first["trained"][mean], second["trained"][mean]), "each saw its own images"
    assert torch.equal(first["tested"][mean], first["trained"][mean]), "those of the first process count"
    for name in ("measured", "tested", "best"):
        assert not loop_checks.differences(first[name], second[name]), name
    assert not loop_checks.differences(first["best"], first["tested"]), "a stage starts from the file's network"
    run = built(*FLAGS)
    run.net.load_state_dict(first["trained"])
    assert first["measured"] == pytest.approx(engine.evaluate(run.net, run.loaders()[1]), rel=1e-6)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CONSTANTS = {"cifar10": IMAGENET, "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))}


@pytest.mark.parametrize("script", [train_cifar10, train_cifar100])
def test_loaders_feed_the_originals_pixels(script, monkeypatch):
    """Padding 4 with black, 9 x 9 crops, flips; CIFAR-10 with ImageNet's constants; test images as they are."""
    sets = {"train": loop_checks.coded_set(300), "test": loop_checks.coded_set(60)}
    monkeypatch.setattr(engine, "load_dataset", lambda name, folder, split: sets[split] if name == dataset else None)
    dataset = script.DATASET
    train, test = built("--device=cpu", "--seed=1", script=script).loaders()
    constants = loop_checks.by_channel(*CONSTANTS[dataset])
    assert train.batch_sizes == [256, 44]
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


def test_loaders_of_ilsvrc_feed_the_originals_pixels(tmp_path):
    """Shuffled train/ with flips, val/ in order, 224 pixels, ImageNet's constants, RGB."""
    from PIL import Image

    for split, red in (("train", 10), ("val", 90)):
        for index, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(8):
                image = Image.new("RGB", (40, 40), (red + index, 128, 250))
                image.paste((red + index, 128, 0), (0, 0, 20, 40))  # blue on the right only
                image.save(tmp_path / split / name / f"{number}.png")
    flags = [f"--dataset_path={tmp_path}", "--workers=0", "--device=cpu", "--seed=1", "--model=ResNet18"]
    (train, test), constants = built(*flags, script=train_ilsvrc).loaders(), loop_checks.by_channel(*IMAGENET)
    ((images, targets),) = train
    pixels = loop_checks.pixels_of(images, *constants)
    assert pixels.shape == (16, 3, 224, 224) and train.batch_sizes == [16] and targets.tolist() != [0] * 8 + [1] * 8
    assert torch.equal(pixels[:, 0].amax((1, 2)), 10 + targets.double()) and (pixels[:, 1] == 128).all()
    rises = pixels[:, 2, :, -1].mean(1) - pixels[:, 2, :, 0].mean(1)
    assert (rises > 0).any() and (rises < 0).any(), "some are flipped"
    ((images, targets),) = test
    pixels = loop_checks.pixels_of(images, *constants)
    assert targets.tolist() == [0] * 8 + [1] * 8 and torch.equal(pixels[:, 0].amax((1, 2)), 90 + targets.double())
    assert pixels.shape == (16, 3, 224, 224) and (pixels[:, 2, :, 0] == 0).all() and (pixels[:, 2, :, -1] == 250).all()


def test_defaults_of_the_recipes():
    for script, decay in ((train_cifar10, 5e-4), (train_cifar100, 5e-4), (train_ilsvrc, 1e-4)):
        args, _ = script.parse_args([])
        assert (args.lr, args.momentum, args.weight_decay, args.lambdaR) == (0.1, 0.9, decay, 10)
        assert args.batch_size == 256 and args.epochs == (150 if script is train_ilsvrc else 300)


CIFAR = [1.0] * 150 + [0.1] * 75 + [0.01] * 75
FACTORS = [  # script, model, recipe, factor of the learning rate in each epoch, epochs that end a stage
    (train_cifar10, "ResNet56_DoubleShared", None, CIFAR, []),
    (train_cifar100, "ResNet34_SingleShared", "sep20", CIFAR, [150, 225]),
    (train_cifar100, "ResNet34_SingleShared", "steps", CIFAR, []),
    (train_cifar100, "ResNet34_SingleShared", "head", [1.0] * 300, []),
    *((train_ilsvrc, "ResNet34_DoubleShared", recipe, [1.0] * 60 + [0.1] * 40 + [0.01] * 40 + [0.001] * 10, [])
      for recipe in ("head", "sep20")),
    (train_ilsvrc, "MobileNetV2_Shared", "head", [1.0] * 150 + [0.1] * 75 + [0.01] * 60 + [0.005] * 15, []),
    (train_ilsvrc, "MobileNetV2_Shared", "sep20", [1.0] * 150 + [0.1] * 75 + [0.01] * 60 + [0.001] * 15, []),
]  # fmt: skip


@pytest.mark.parametrize(("script", "model", "recipe", "factors", "ends"), FACTORS)
def test_learning_rates_and_stages(script, model, recipe, factors, ends):
    flags = [f"--model={model}"] + ([] if recipe is None else [f"--recipe={recipe}"])
    args, _ = script.parse_args(flags)
    schedule = training.schedule_of(args.dataset, args.model, args.recipe)
    assert [schedule.factor(done, args.epochs) for done in range(args.epochs)] == factors
    assert [done for done in range(args.epochs + 1) if schedule.starts_stage(done, args.epochs)] == ends


def test_the_published_recipe_is_cifar100s_default():
    assert train_cifar100.parse_args([])[0].recipe == "sep20" and train_ilsvrc.parse_args([])[0].recipe == "head"


def test_random_numbers_of_an_epoch_depend_on_seed_epoch_and_rank(monkeypatch):
    """So that dropout draws the same in a run that goes on."""
    monkeypatch.setattr(engine, "train_one_epoch", lambda step, loader, **options: tuple(torch.rand(4).tolist()))
    run, step, drawn = built(*FLAGS), mock.Mock(optimizer=mock.Mock(param_groups=[])), []
    for run.seed, rank, run.done in ((7, 0, 0), (7, 0, 1), (7, 1, 1), (8, 0, 1), (7, 0, 1)):
        run.world = World(rank, 2, rank, 2)
        torch.rand(len(drawn))  # what was drawn before must not matter
        drawn.append(training._train_epoch(run, mock.Mock(), step, 0.1))
    assert drawn[1] == drawn[4] and len(set(drawn)) == 4


TRAINED = [("cifar10", "ResNet32_SingleShared"), ("cifar10", "ResNet32_NonShared"), ("cifar100", "MobileNetV2_Shared"),
           ("cifar100", "DenseNet121_SingleShared"), ("cifar100", "ResNext50_SingleShared"),
           ("ilsvrc", "ResNet50_Shared")]  # fmt: skip


@pytest.mark.parametrize(("dataset", "key"), TRAINED)
def test_batch_norms_and_initial_weights(dataset, key):
    """He's normal (fan-out) in the ResNets, PyTorch's uniform elsewhere, orthonormal shared bases where the original's
    are; batch norms and linear layers are PyTorch's."""
    torch.manual_seed(0)
    net = build_model(Config(dataset, key, 8, 4))
    shared = {id(module) for name, module in net.named_children() if name.startswith("shared_basis_")}
    for module in net.modules():
        fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0
        if isinstance(module, nn.Conv2d) and id(module) in shared and key.startswith("ResN"):
            rows = module.weight.detach().flatten(1).double()
            gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
            torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-4, rtol=0)
        elif isinstance(module, nn.Conv2d) and key.startswith("ResNet"):
            sigma = (2 / (module.out_channels * module.weight[0, 0].numel())) ** 0.5
            assert abs(module.weight.std().item() / sigma - 1) < 4 / module.weight.numel() ** 0.5
        elif fan_in:
            loop_checks.check_uniform(module.weight, fan_in**-0.5)
    loop_checks.check_batch_norms(net, torch.randn(4, 3, 32 if dataset != "ilsvrc" else 64, 32))
