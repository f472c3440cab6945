"""Runs from end to end on the embedded digits: files, saved accuracies, distributed runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.checkpoints import load_checkpoint
from common.data import load_digits_set
from s3 import convert, count, engine, main, main_eval, plot
from s3.quantizers import dense_weight_penalty
from s3.resnet import build_resnet
from s3.runs import RunError, read_metrics
from s3.s3conv2dshift import latent_layers, sparse_latents
from s3.training import Training

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["--dataset=digits", "--arch=resnet8", "--device=cpu"]
FLAGS = [*NETWORK, "--train-size=64", "--batch-size=32", "--epochs=3", "--seed=7", "--print-freq=1"]
FOLDER = ["--embedded-data", "--image-size=32", "--train-size=16", "--batch-size=8", "--workers=0", "--device=cpu",
          "--seed=7", "--arch=resnet18", "--epochs=1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    assert main.main([*FLAGS, f"--output-dir={folder}"]) == 0
    return folder


def names(directory):
    return {path.name for path in directory.iterdir() if not path.name.startswith("events.")}


def state_of(directory):
    return load_checkpoint(directory / "checkpoint.pth.tar")["state_dict"]


def same_weights(one, other):
    return list(one) == list(other) != [] and all(torch.equal(one[name], other[name]) for name in one)


def test_files_of_a_run(run):
    best = {"checkpoint.pth.tar", "checkpoint.pth.previous.tar", "model_best.pth.tar", "metrics.jsonl"}
    assert names(run) == best
    content = load_checkpoint(run / "checkpoint.pth.tar")
    assert list(content)[:5] == ["epoch", "arch", "state_dict", "best_acc1", "optimizer"]
    assert (content["epoch"], content["arch"]) == (3, "resnet8")
    header, *epochs, result = read_metrics(run / "metrics.jsonl")
    assert (header["paper"], header["params"], header["macs"], header["seed"]) == ("s3", 306_906, 12_501_632, 7)
    assert header["data"] == "digits (embedded)" and header["reproduces"] is None
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert [line["lr"] for line in epochs] == pytest.approx([0.075, 0.025, 0.0])
    assert content["best_acc1"].item() == result["best_top1"] == max(line["test_top1"] for line in epochs)
    assert result["top1"] == epochs[-1]["test_top1"] and result["epochs_in_paper"] == 200
    first, *_, last = epochs
    assert first["sign_changes"] > 0 and first["weight_changes"] > first["sign_changes"] / 2
    assert last["sign_changes"] == last["weight_changes"] == 0, "the last epoch's rate is 0"
    zeros = [(layer.discrete_weight() == 0).sum().item() for layer in latent_layers(loaded(content)).values()]
    assert last["zeros"] == sum(zeros) / 76_288


def loaded(content):
    model = build_resnet("digits", "resnet8", 10)
    model.load_state_dict(content["state_dict"])
    return model


def test_latents_are_saved_once(run):
    size = os.path.getsize(run / "checkpoint.pth.tar")
    assert size < 1.15 * 2 * 4 * 306_906, "weights and momentum; the alias costs nothing"


def test_printed_lines(run, tmp_path, capsys):
    main.main([*FLAGS, f"--output-dir={tmp_path}", "--epochs=1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["=> creating model 'resnet8'", "using CPU, this will be slow"]
    train, test = lines[2].split("\t"), lines[4].split("\t")
    assert re.fullmatch(r"Epoch: \[0\]\[0/2\]", train[0]) and [field.split()[0] for field in train[1:]] == [
        "Time", "Data", "Loss", "Acc@1", "Acc@5"]  # fmt: skip
    assert test[0] == "Test: [ 0/12]" and [field.split()[0] for field in test[1:]] == ["Time", "Loss", "Acc@1", "Acc@5"]
    assert re.fullmatch(r" \* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3}", lines[16])


def accuracy(script, capsys, *flags):
    """What the last line of a test says."""
    capsys.readouterr()
    assert script.main([*NETWORK, "--evaluate", *flags]) == 0
    return re.search(r" \* Acc@1 (\S+) Acc@5 (\S+)", capsys.readouterr().out).groups()


@pytest.mark.parametrize("name", ["checkpoint.pth.tar", "model_best.pth.tar"])
def test_saved_files_give_the_printed_accuracy(run, name, capsys, tmp_path):
    *epochs, result = read_metrics(run / "metrics.jsonl")[1:]
    epoch = epochs[-1] if name == "checkpoint.pth.tar" else epochs[result["best_epoch"]]
    expected = f"{epoch['test_top1']:.3f}", f"{epoch['test_top5']:.3f}"
    assert accuracy(main, capsys, f"--resume={run / name}") == expected
    assert accuracy(main, capsys, f"--resume={run / name}", "--use-kernel") == expected
    plain, packed = tmp_path / "plain.pth.tar", tmp_path / "weights.packed"
    assert convert.main([str(run / name), str(plain), "--packed", str(packed)]) == 0
    for file in (plain, packed):
        assert accuracy(main_eval, capsys, f"--resume={file}") == expected
        assert accuracy(main_eval, capsys, f"--resume={file}", "--use-kernel") == expected


def test_packed_kernels_are_compared_with_the_float_path(run, capsys):
    main.main([*NETWORK, "-e", "--use-kernel", f"--resume={run / 'checkpoint.pth.tar'}", "--batch-size=1"])
    text = capsys.readouterr().out
    assert "packed kernels: 8 layers, 3 bits, 28,608 bytes of weights" in text
    error, largest, changed = re.search(r"at most (\S+) on logits up to (\S+); (\d+) predictions", text).groups()
    assert float(error) <= 1e-4 * float(largest) and int(changed) <= 1


def test_same_seed_same_bits_and_other_seed_other_bits(run, tmp_path):
    for seed, expected in ((7, True), (8, False)):
        main.main([*FLAGS, f"--seed={seed}", f"--output-dir={tmp_path / str(seed)}"])
        assert same_weights(state_of(tmp_path / str(seed)), state_of(run)) == expected


def test_resume_goes_on_with_the_schedule(run, tmp_path, capsys):
    """The original began its cosine anew."""
    state = load_checkpoint(run / "checkpoint.pth.previous.tar")
    assert state["epoch"] == 2
    main.main([*FLAGS, f"--output-dir={tmp_path}", f"--resume={run / 'checkpoint.pth.previous.tar'}"])
    text = capsys.readouterr().out
    assert "(epoch 2)" in text and "Epoch: [2][0/2]" in text and "Epoch: [0]" not in text
    epochs = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["type"] == "epoch"]
    assert [(line["epoch"], line["lr"]) for line in epochs] == [(2, 0.0)]
    assert same_weights(state_of(tmp_path), state_of(run))


def test_auto_resume_does_nothing_when_finished_and_refuses_other_flags(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    main.main([*FLAGS, f"--output-dir={run}", "--auto-resume"])
    assert "already finished" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RunError, match=r"finished run with --weight-bits 3 \(now 4\)"):
        main.main([*FLAGS, "--weight-bits=4", f"--output-dir={run}", "--auto-resume"])


def test_a_step_adds_the_regulariser_and_the_printed_loss_leaves_it_out():
    """The same step with and without it: sparse latents below 0 move up by lr * rs more, nothing else differs."""

    class Loader(list):
        device, batch_sizes = torch.device("cpu"), [4]

    loader, found = Loader([(torch.randn(4, 3, 32, 32), torch.arange(4))]), {}
    for strength in (0.5, 0.0):
        args = main.parse_args([*FLAGS, f"--rs={strength}", "--momentum=0"])
        training = Training(main.S3Task(), args, torch.device("cpu"), engine.World(), 7, 10)
        before = {name: tensor.clone() for name, tensor in training.net.state_dict().items()}
        training.optimizer.param_groups[0]["lr"] = 1e-3
        lines = engine.BatchLines("Epoch: [0]", 1, 1, False)
        result = engine.train_one_epoch(training.new_step(), loader, lines, epoch=0)
        found[strength] = result.loss, training.net.state_dict()
    assert found[0.5][0] == found[0.0][0]
    for name, start in before.items():
        difference = found[0.5][1][name] - found[0.0][1][name]
        expected = 0.5e-3 * (start < 0) if name.endswith("weight_val") else torch.zeros_like(difference)
        torch.testing.assert_close(difference, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("flags", [
    ["--method=denseshift"], ["--method=float"], ["--weight-bits=2", "--init=dense"], ["--weight-bits=4"],
    ["--amp=bf16", "--channels-last", "--schedule=fixed"],
], ids=" ".join)  # fmt: skip
def test_methods_bits_and_speed_flags(flags, tmp_path, capsys):
    flags = [*flags, "--epochs=1", "--train-size=32"]
    assert main.main([*FLAGS, *flags, f"--output-dir={tmp_path}"]) == 0
    header, epoch, result = read_metrics(tmp_path / "metrics.jsonl")
    assert ("zeros" in epoch) == ("--method=float" not in flags)
    if "--method=denseshift" in flags:
        assert epoch["zeros"] == 0
    kind = [flag for flag in flags if flag.startswith(("--method", "--weight-bits"))]
    shown = accuracy(main, capsys, *kind, f"--resume={tmp_path / 'checkpoint.pth.tar'}")
    assert shown[0] == f"{result['top1']:.3f}"
    if header["config"]["method"] == "float":
        assert accuracy(main_eval, capsys, f"--resume={tmp_path / 'checkpoint.pth.tar'}") == shown
        return
    convert.main([str(tmp_path / "checkpoint.pth.tar"), "--packed", str(tmp_path / "packed")])
    assert accuracy(main_eval, capsys, f"--resume={tmp_path / 'packed'}", "--use-kernel") == shown


def test_untrained_and_missing(capsys, tmp_path):
    assert main.main([*NETWORK, "-e"]) == 0
    assert "warning: an untrained network is evaluated" in capsys.readouterr().out
    for script in (main, main_eval):
        for mode in (["-e"], []):
            assert engine.run_script(script.main, [*NETWORK, *mode, "--resume=none.tar"]) == 1
            text = capsys.readouterr()
            assert "=> no checkpoint found at 'none.tar'" in text.out
            assert text.err.splitlines() == [
                "error: --resume none.tar: there is no such file; correct the path, or leave --resume out"]  # fmt: skip


def test_loss_that_is_not_finite_keeps_the_last_good_checkpoint(run, tmp_path, capsys):
    flags = [*NETWORK, "--train-size=64", "--batch-size=32", "--seed=7", f"--output-dir={tmp_path}", "--epochs=4"]
    assert main.main([*flags, "--epochs=1"]) == 0
    good = (tmp_path / "checkpoint.pth.tar").read_bytes()
    checkpoint = str(tmp_path / "checkpoint.pth.tar")
    assert engine.run_script(main.main, [*flags, "--lr=1e30", f"--resume={checkpoint}"]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and "try a smaller --lr; the last good checkpoint is" in error[0]
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == good


@pytest.mark.parametrize("victim", ["checkpoint", "events"])
def test_full_disk_leaves_the_last_good_checkpoint(victim, run, tmp_path, capsys, monkeypatch):
    flags = [*FLAGS, f"--output-dir={tmp_path}"]
    main.main([*flags, "--epochs=1"])
    good = (tmp_path / "checkpoint.pth.tar").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    if victim == "checkpoint":
        monkeypatch.setattr("tensorboardX.SummaryWriter.flush", lambda writer: None)
    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    resume = f"--resume={tmp_path / 'checkpoint.pth.tar'}"
    assert engine.run_script(main.main, [*flags, resume]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "No space left on device" in error[0] and "good" in error[0]
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == good


def test_overfits_one_batch():
    """Latents, regulariser and momentum together make 3-bit weights that fit 32 digits."""
    images = load_digits_set("train", channels=3, size=32).subset(32)
    x, targets = images.images.float() / 128 - 1, images.targets
    torch.manual_seed(0)
    model = build_resnet("digits", "resnet8", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(50):
        loss = F.cross_entropy(model(x), targets) + 1e-5 * dense_weight_penalty(sparse_latents(model))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert F.cross_entropy(model(x), targets) < 0.3


def torchrun(script, *flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    return subprocess.run([*launcher, f"s3/{script}.py", *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def test_two_processes_then_one(tmp_path, capsys):
    """DDP with the alias and the regulariser; afterwards one process goes on."""
    result = torchrun("main", *FLAGS, f"--output-dir={tmp_path}", "--epochs=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("=> creating model") == 1, "one rank prints"
    shown = re.findall(r" \* Acc@1 (\S+)", result.stdout)
    assert accuracy(main, capsys, f"--resume={tmp_path / 'checkpoint.pth.tar'}")[0] == shown[-1]
    flags = [*FLAGS, f"--output-dir={tmp_path}", f"--resume={tmp_path / 'checkpoint.pth.tar'}"]
    assert main.main(flags) == 0
    epochs = [line["epoch"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["type"] == "epoch"]
    assert epochs == [0, 1, 2]


def test_main_eval_trains_under_torchrun_with_the_examples_flags(tmp_path, capsys):
    flags = [*FOLDER, f"--data-dir={tmp_path}", f"--output-dir={tmp_path / 'out'}", "--multiprocessing-distributed",
             "--world-size=1", "--rank=0", "--dist-backend=gloo", "--dist-url=tcp://127.0.0.1:1234"]  # fmt: skip
    result = torchrun("main_eval", *flags)
    assert result.returncode == 0, result.stderr
    header, epoch, _ = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert epoch["lr"] == 0.1 and header["config"]["method"] == "float" and header["params"] == 11_181_642
    shown = re.search(r" \* Acc@1 (\S+)", result.stdout).group(1)
    resume = f"--resume={tmp_path / 'out' / 'checkpoint.pth.tar'}"
    capsys.readouterr()
    assert main_eval.main(["-e", *FOLDER, f"--data-dir={tmp_path}", resume]) == 0
    assert f" * Acc@1 {shown} " in capsys.readouterr().out


def test_count_of_a_checkpoint(run, capsys):
    assert count.main(["--checkpoint", str(run / "checkpoint.pth.tar"), "--layers"]) == 0
    text = capsys.readouterr().out
    zeros = read_metrics(run / "metrics.jsonl")[-2]["zeros"]
    assert "digits resnet8, s3, 3 bits, 10 classes" in text
    assert re.search(rf"zero weights +{round(zeros * 76_288):,} +{100 * zeros:.2f}%", text)
    assert re.search(r"layer1\.0\.conv1 .*-4:0\.\d+ -2:.* 4:0\.\d+\n", text)


def test_the_readmes_snippet_prints_the_published_values(run, tmp_path, capsys):
    convert.main([str(run / "checkpoint.pth.tar"), str(tmp_path / "plain.pth.tar")])
    checkpoint = torch.load(tmp_path / "plain.pth.tar", map_location="cpu")
    values = torch.unique(checkpoint["state_dict"]["module.layer1.0.conv1.weight"])
    assert values.tolist() == [-4, -2, -1, 0, 1, 2, 4]


def test_plot_of_two_methods(run, tmp_path, capsys):
    main.main([*FLAGS, "--method=float", f"--output-dir={tmp_path / 'float'}"])
    capsys.readouterr()
    output = tmp_path / "plots" / "digits.png"
    assert plot.main([str(run), str(tmp_path / "float" / "metrics.jsonl"), "--output", str(output)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("s3, 3 bits, resnet8, digits") and "% zeros" in text[0] and "zeros" not in text[1]
    assert output.stat().st_size > 10_000 and output.with_suffix(".svg").exists()
    assert plot.main([str(tmp_path)]) == 1
