"""Runs from end to end on the embedded digits: files, saved accuracies, distributed runs."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.checkpoints import load_checkpoint
from deepshift import cifar10, engine, imagenet, mnist
from deepshift.runs import RunError, read_metrics
from deepshift.zoo import build_model

ROOT = Path(__file__).resolve().parents[2]
MNIST = ["--type=conv", "--embedded-data", "--train-size=96", "--epochs=2", "--device=cpu", "--shift-type=PS",
         "--opt=radam", "--lr=0.003", "--log-interval=1"]  # fmt: skip
CIFAR = ["--arch=lenet", "--embedded-data", "--train-size=64", "--batch-size=32", "--epochs=3", "--device=cpu",
         "--shift-type=Q", "--lr=0.02", "--seed=7", "--print-freq=1"]  # fmt: skip
SAVED = ("weights.pth", "model.pth", "weights.packed", "checkpoint.pth.tar")


def test_rows(directory, name):
    with open(directory / name, newline="") as file:
        return list(csv.reader(file))


test_rows.__test__ = False


@pytest.fixture(scope="module")
def mnist_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    assert mnist.main([*MNIST, f"--output-dir={folder}"]) == 0
    return folder, folder / "mnist" / "simple_conv" / "shift_ps_all_wb_5"


@pytest.fixture(scope="module")
def cifar_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    assert cifar10.main([*CIFAR, f"--output-dir={folder}"]) == 0
    return folder, folder / "cifar10" / "lenet" / "shift_q_all_wb_5"


def names(directory):
    return {path.name for path in directory.iterdir() if not path.name.startswith("events.")}


def test_files_of_an_mnist_run(mnist_run):
    _, directory = mnist_run
    assert names(directory) == {
        *SAVED, "checkpoint.pth.previous.tar", "command_args.txt", "metrics.jsonl", "model_summary.txt",
        "train_log.csv", "weights_log.txt", "weights_log_1.txt", "weights_log_2.txt",
    }  # fmt: skip
    header, *rows = test_rows(directory, "train_log.csv")
    assert header == ["epoch", "train_loss", "test_loss", "test_accuracy"]
    assert [row[0] for row in rows] == ["1", "2"]
    run, *epochs, result = read_metrics(directory / "metrics.jsonl")
    assert (run["paper"], run["seed"], run["args"]["dataset"], run["params"]) == ("deepshift", 1, "mnist", 861_580)
    assert [line["epoch"] for line in epochs] == [0, 1]
    assert float(rows[-1][3]) * 100 == pytest.approx(epochs[-1]["test_top1"]) == pytest.approx(result["top1"])
    text = (directory / "command_args.txt").read_text()
    assert "activation_fraction_bits: 16\n" in text and text.splitlines() == sorted(text.splitlines())
    assert (directory / "weights_log.txt").read_text().startswith("Model's state_dict:\nconv1.shift \t torch.Size([20,")


def test_files_of_a_cifar10_run(cifar_run):
    _, directory = cifar_run
    assert {*SAVED, "model_best.pth.tar", "train_log.csv", "weights_log_2.txt"} <= names(directory)
    header, *rows = test_rows(directory, "train_log.csv")
    assert header == cifar10.Cifar10.columns and [row[0] for row in rows] == ["0", "1", "2"]
    state = load_checkpoint(directory / "checkpoint.pth.tar")
    original = ["epoch", "arch", "state_dict", "best_acc1", "optimizer", "lr_scheduler"]
    assert list(state)[:6] == original and (state["epoch"], state["arch"]) == (3, "lenet")
    assert torch.load(directory / "weights.pth", weights_only=True)["top1"] == max(float(row[5]) for row in rows)


def accuracy(script, directory, *flags):
    """Top-1 that -e writes to test_log.csv."""
    assert script.main([*flags, "-e"]) == 0
    row = test_rows(directory, "test_log.csv")[1]
    return 100 * float(row[1]) if script is mnist else float(row[1])


@pytest.mark.parametrize("name", SAVED)
def test_saved_mnist_files_give_the_printed_accuracy(mnist_run, name):
    folder, directory = mnist_run
    expected = read_metrics(directory / "metrics.jsonl")[-1]["top1"]
    source = "--model" if name == "model.pth" else "--resume"
    kind = [] if name == "model.pth" else ["--shift-type=PS"]
    place = directory if kind else directory.with_name("shift_all")
    flags = ["--type=conv", "--embedded-data", "--device=cpu", f"--output-dir={folder}", *kind]
    assert accuracy(mnist, place, *flags, f"{source}={directory / name}") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [*SAVED, "model_best.pth.tar"])
def test_saved_cifar10_files_give_the_printed_accuracy(cifar_run, name):
    folder, directory = cifar_run
    *_, last, result = read_metrics(directory / "metrics.jsonl")
    expected = last["test_top1"] if name == "checkpoint.pth.tar" else result["best_top1"]
    flags = ["--arch=lenet", "--embedded-data", "--device=cpu", "--shift-type=Q", f"--output-dir={folder}"]
    source = "--weights" if name in ("weights.pth", "weights.packed") else "--resume"
    assert accuracy(cifar10, directory, *flags, f"{source}={directory / name}") == expected


@pytest.mark.parametrize("kind", ["mnist", "cifar10"])
def test_integer_kernels_give_the_float_accuracy(mnist_run, cifar_run, kind, capsys):
    script, (folder, directory) = (mnist, mnist_run) if kind == "mnist" else (cifar10, cifar_run)
    network = ["--type=conv", "--shift-type=PS"] if kind == "mnist" else ["--arch=lenet", "--shift-type=Q"]
    flags = [*network, "--embedded-data", "--device=cpu", f"--output-dir={folder}"]
    plain = accuracy(script, directory, *flags, f"--resume={directory / 'weights.packed'}")
    capsys.readouterr()
    exact = accuracy(script, directory, *flags, f"--resume={directory / 'weights.packed'}", "--use-kernel=True")
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("fixed-point error: at most"))
    error, changed = float(line.split()[4]), int(line.split("; ")[1].split()[0])
    assert 0 < error < 0.01 and abs(exact - plain) <= 100 * changed / 355
    assert "; 0 values did not fit 32 bits" in line


def test_overflow_of_the_integer_kernels_is_counted(mnist_run, capsys):
    folder, directory = mnist_run
    flags = ["--type=conv", "--shift-type=PS", "--embedded-data", "--device=cpu", f"--output-dir={folder}"]
    # PS linear layers do not round their inputs, so nothing keeps them below 2^31 with 31 fraction bits.
    accuracy(mnist, directory, *flags, f"--resume={directory / 'weights.pth'}", "--use-kernel=True", "-ab", "1", "31")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fixed-point error"))
    assert int(line.split("; ")[2].split()[0]) > 0 and line.endswith("use fewer --activation-bits")


def test_unoptimized_kernels_multiply(mnist_run, tmp_path, capsys):
    weights = build_model("mnist", "simple_conv")
    torch.save(weights.state_dict(), tmp_path / "float.pth")
    flags = ["--type=conv", "--embedded-data", "--device=cpu", f"--output-dir={tmp_path}",
             f"--weights={tmp_path / 'float.pth'}"]  # fmt: skip
    directory = tmp_path / "mnist" / "simple_conv"
    plain = accuracy(mnist, directory / "shift_0", *flags)
    naive = accuracy(mnist, directory / "shift_all", *flags, "--use-kernel=True")
    assert naive == plain


def same_weights(one, other):
    return list(one) == list(other) != [] and all(torch.equal(one[name], other[name]) for name in one)


def test_same_seed_same_bits_and_other_seed_other_bits(cifar_run, tmp_path):
    _, directory = cifar_run
    reference = load_checkpoint(directory / "checkpoint.pth.tar")["state_dict"]
    for seed, expected in ((7, True), (8, False)):
        cifar10.main([*CIFAR, f"--seed={seed}", f"--output-dir={tmp_path / str(seed)}", "--save-model=no"])
        directory = tmp_path / str(seed) / "cifar10" / "lenet" / "shift_q_all_wb_5"
        assert same_weights(load_checkpoint(directory / "checkpoint.pth.tar")["state_dict"], reference) == expected
        assert "weights.pth" not in names(directory)


def test_auto_resume_does_nothing_when_finished_and_refuses_other_flags(cifar_run, capsys):
    folder, directory = cifar_run
    before = (directory / "metrics.jsonl").read_bytes()
    cifar10.main([*CIFAR, f"--output-dir={folder}", "--auto-resume"])
    assert "already finished" in capsys.readouterr().out
    assert (directory / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RunError, match=r"finished run with --epochs 3 \(now 4\)"):
        cifar10.main([*CIFAR, "--epochs=4", f"--output-dir={folder}", "--auto-resume"])


def test_resume_goes_on_with_more_epochs(cifar_run, tmp_path, capsys):
    _, directory = cifar_run
    flags = [*CIFAR, "--epochs=4", f"--output-dir={tmp_path}", f"--resume={directory / 'checkpoint.pth.tar'}"]
    cifar10.main(flags)
    text = capsys.readouterr().out
    assert f"=> loaded checkpoint '{directory / 'checkpoint.pth.tar'}' (epoch 3)" in text
    assert "was trained with --epochs 3 (now 4)" in text and "Epoch: [3][0/2]" in text and "Epoch: [0]" not in text


def test_gradients_add_up_over_batches(tmp_path):
    """Two batches of 16 with --batch-multiplier 2 make the same update as one of 32: also the first of an epoch."""
    images, targets = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))

    class Loader:
        device, num_images = torch.device("cpu"), 64

        def __init__(self, size):
            self.batch_sizes = [size] * (64 // size)

        def __len__(self):
            return len(self.batch_sizes)

        def __iter__(self):
            return iter(zip(images.split(self.batch_sizes[0]), targets.split(self.batch_sizes[0]), strict=True))

    trained = []
    for size, many in ((32, 1), (16, 2)):
        torch.manual_seed(0)
        model = build_model("cifar10", "lenet")
        lines = engine.BatchLines("Epoch: [0]", 4, 1, top5=True, shown=False)
        options = engine.StepOptions(batch_multiplier=many)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        step = engine.TrainingStep(model, optimizer, "cpu", options, world=engine.World())
        engine.train_one_epoch(step, Loader(size), lines, epoch=0)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_regulariser_reaches_shifts_only(tmp_path):
    """With weight decay and zero loss gradients, shifts fall and signs stay."""
    flags = [*CIFAR, "--shift-type=PS", f"--output-dir={tmp_path}"]
    args = cifar10.parse_args([*flags, "--weight-decay=1", "--lr=1e-9"])
    from deepshift.training import Training

    training = Training(cifar10.Cifar10(cifar10.parse_args), args, torch.device("cpu"), engine.World())
    assert [len(group["params"]) for group in training.optimizer.param_groups] == [5, 5, 5]
    assert [group["weight_decay"] for group in training.optimizer.param_groups] == [1, 0, 0]
    training.options.regulariser().backward()
    for name, parameter in training.net.named_parameters():
        if name.endswith(".shift"):
            expected = torch.log(torch.tensor(2.0)) * 4 ** parameter.detach()
            torch.testing.assert_close(parameter.grad, expected)
        else:
            assert parameter.grad is None


def test_schedules_of_both_large_scripts():
    task = cifar10.Cifar10(cifar10.parse_args)
    args = cifar10.parse_args(["--alternate-update=yes", "--lr-sign=0.5"])
    assert task.learning_rates(args, [0.1, 0.5, 0.1], 0) == [0.1, 0.1, 0.0]
    assert task.learning_rates(args, [0.1, 0.5, 0.1], 81) == pytest.approx([0.01, 0.0, 0.01])
    args = cifar10.parse_args(["--lr-schedule=no"])
    assert task.learning_rates(args, [0.1, 0.5, 0.1], 150) == [0.1, 0.5, 0.1]
    task = imagenet.ImageNet(imagenet.parse_args)
    args = imagenet.parse_args(["DIR", "--lr-sign=0.5"])
    assert task.learning_rates(args, [0.1, 0.5, 0.1], 31) == pytest.approx([0.01] * 3)
    args = imagenet.parse_args(["DIR", "--lr-sign=0.5", "--lr-schedule=no"])
    assert task.learning_rates(args, [0.1, 0.5, 0.1], 31) == [0.1, 0.5, 0.1]


def test_stochastic_rounding_trains_and_is_tested_deterministically(tmp_path):
    flags = ["--type=conv", "--embedded-data", "--train-size=32", "--epochs=1", "--device=cpu", "--shift-type=Q"]
    mnist.main([*flags, "--rounding=stochastic", f"--output-dir={tmp_path}"])
    directory = tmp_path / "mnist" / "simple_conv" / "shift_q_all_wb_5"
    expected = read_metrics(directory / "metrics.jsonl")[-1]["top1"]
    evaluate = ["--type=conv", "--embedded-data", "--device=cpu", "--shift-type=Q", f"--output-dir={tmp_path}"]
    found = accuracy(mnist, directory, *evaluate, f"--resume={directory / 'weights.pth'}", "-r", "stochastic")
    assert found == pytest.approx(expected, abs=1e-12)


def test_imagenet_under_torchrun_then_resumed(tmp_path):
    """Two processes on the digits as image folder, gradients over two batches; then one process goes on."""
    flags = ["--arch=squeezenet1_1", "--embedded-data", f"--data-dir={tmp_path}", "--image-size=32", "--train-size=24",
             "--batch-size=8", "--batch-multiplier=2", "--workers=0", "--device=cpu", "--shift-type=Q", "--lr=0.001",
             "--seed=7", "--multiprocessing-distributed", "--print-freq=100", f"--output-dir={tmp_path}"]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launcher, "deepshift/imagenet.py", *flags, "--epochs=1"], cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("current lr") == 1, "one rank prints"
    directory = tmp_path / "imagenet" / "squeezenet1_1" / "shift_q_all_wb_5"
    assert {"checkpoint_0.pth.tar", "model_best.pth.tar", "weights.packed"} <= names(directory)
    header, row = test_rows(directory, "train_log.csv")
    assert header == imagenet.ImageNet.columns and len(row) == len(header)
    assert imagenet.main([*flags, "--epochs=2", f"--resume={directory / 'checkpoint.pth.tar'}"]) == 0
    assert [row[0] for row in test_rows(directory, "train_log.csv")] == ["epoch", "0", "1"]
    best = max(float(row[6]) for row in test_rows(directory, "train_log.csv")[1:])
    evaluate = ["--arch=squeezenet1_1", "--embedded-data", f"--data-dir={tmp_path}", "--image-size=32", "--workers=0",
                "--shift-type=Q", f"--output-dir={tmp_path}"]  # fmt: skip
    assert accuracy(imagenet, directory, *evaluate, f"--resume={directory / 'model_best.pth.tar'}") == best
    rows = test_rows(directory, "test_log.csv")
    assert [len(row) for row in rows] == [5, 4, 1]


def test_loss_of_one_batch_falls():
    """PS and Q overfit 32 digits."""
    from common.data import load_digits_set
    from deepshift.convert import convert_to_shift
    from deepshift.optim import build_optimizer

    images = load_digits_set("train", size=28).subset(32)
    x, targets = images.images.float() / 255, images.targets
    for kind, optimizer, rate in (("Q", "sgd", 0.1), ("PS", "adam", 0.01)):
        torch.manual_seed(0)
        model, _ = convert_to_shift(build_model("mnist", "simple_conv"), 1000, kind, convert_weights=True)
        optimizer = build_optimizer(optimizer, [{"params": list(model.parameters())}], rate)
        for _ in range(80):
            loss = F.nll_loss(model(x), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.3, kind
