"""Training runs end to end on the embedded digits: printed lines, files, resume, mistakes."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoints import CheckpointError, load_checkpoint
from common.data import load_digits_set
from shared_bases import (
    engine,
    eval_cifar10,
    eval_cifar100,
    eval_ilsvrc,
    train_cifar10,
    train_cifar100,
    train_ilsvrc,
    training,
)
from shared_bases.runs import Run, RunError, read_metrics
from tests.shared_bases import small

ROOT = Path(__file__).resolve().parents[2]
NETWORK = ["--model=ResNet32_SingleShared", "--shared_rank=1"]
DIGITS = ["--embedded-data", "--device=cpu"]
TINY = [*NETWORK, *DIGITS, "--train-size=64", "--batch_size=32", "--seed=7", "--lr=0.02"]
NAME = "CIFAR10-ResNet32_SingleShared-S1-U1-L10-0"


def train(folder, *flags):
    train_cifar10.main([*TINY, f"--output-dir={folder}", *flags])
    return load_checkpoint(folder / NAME / "last.pt")


def same(first, second):
    """Whether two state dicts hold the same bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def same_state(first, second):
    buffers = [[entry["momentum_buffer"] for entry in state["optimizer_state_dict"]["state"].values()]
               for state in (first, second)]  # fmt: skip
    assert len(buffers[0]) == len(buffers[1]) > 0
    return same(first["net_state_dict"], second["net_state_dict"]) and all(map(torch.equal, *buffers))


@pytest.fixture(scope="module", autouse=True)
def few_images():
    threads = torch.get_num_threads()
    small.use_few_images()
    yield
    engine.load_digits_set = load_digits_set
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(few_images, tmp_path_factory):
    """A finished run of three epochs: (folder, what it printed, its last state)."""
    folder = tmp_path_factory.mktemp("finished")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        state = train(folder, "--epochs=3")
    return folder, output.getvalue(), state


def test_printed_lines(finished):
    _, output, _ = finished
    lines = output.splitlines()
    starts = [lines.index(f"Cuda 0 Basis Epoch: {epoch}") for epoch in (1, 2, 3)]
    assert all(lines[start - 1] == "" for start in starts)
    heads = [line.partition(" = ")[0].partition(":")[0] for line in lines[starts[0] + 1 : starts[1] - 1]]
    assert heads == ["accuracy_loss", "similarity loss", "Training_Acc_Top1", "Training_Acc_Top5", "Test",
                     "Best_Acc_top1", "Best_Acc_top5", "Time"]  # fmt: skip
    assert sum(line.startswith("Time:  ") for line in lines) == 3
    assert [line.partition(" = ")[0] for line in lines[-3:-1]] == ["Best_Acc_top1", "Best_Acc_top5"]
    assert "\r" not in output, "no bar when the output is a pipe"


def test_metrics_and_events(finished):
    folder, _, state = finished
    header, *epochs, result = read_metrics(folder / NAME / "metrics.jsonl")
    assert header["type"] == "run" and header["config"]["model"] == "ResNet32_SingleShared"
    assert " --model=ResNet32_SingleShared --shared_rank=1 " in header["command"]
    assert (header["params"], header["args"]["dataset"], header["data"]) == (109898, "cifar10", "digits (embedded)")
    assert header["reproduces"] is None, "digits reproduce no published number"
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    assert [line["lr"] for line in epochs] == pytest.approx([0.02, 0.02, 0.002])
    assert epochs[-1]["similarity"] < epochs[0]["similarity"], "the term pulls the filters to unit length"
    assert all(0 <= line["mean_abs_cosine"] < 1 for line in epochs)
    assert result["type"] == "result" and result["top1"] == epochs[-1]["test_top1"] == state["acc"]
    assert result["best_top1"] == max(line["test_top1"] for line in epochs)
    assert result["epochs_in_paper"] == 300
    assert list((folder / NAME).glob("events.out.tfevents.*"))


def test_saved_file_evaluates_to_the_printed_accuracy(finished, capsys):
    folder, _, _ = finished
    path = folder / f"{NAME}.pth"
    top1, top5 = eval_cifar10.main([*NETWORK, *DIGITS, f"--pretrained={path}", "--batch_size=32"])
    result = read_metrics(folder / NAME / "metrics.jsonl")[-1]
    assert (top1, top5) == (result["best_top1"], result["best_top5"])
    assert capsys.readouterr().out.startswith(f"Eval_Acc_top1 = {top1:.3f}\nEval_Acc_top5 = {top5:.3f}\n")


def test_checkpoint_is_the_originals_with_plain_torch(finished):
    folder, _, _ = finished
    content = torch.load(folder / f"{NAME}.pth", weights_only=True)
    assert {"net_state_dict", "optimizer_state_dict", "acc", "epoch"} <= set(content)
    assert 1 <= content["epoch"] <= 3 and content["optimizer_state_dict"]["param_groups"][0]["weight_decay"] == 5e-4
    assert "layer3.4.shared_basis.weight" in content["net_state_dict"], "shared tensors stay under every name"


def test_same_seed_same_bits_and_other_seed_other_bits(finished, tmp_path):
    _, _, reference = finished
    assert same_state(train(tmp_path / "same", "--epochs=3"), reference)
    first = train(tmp_path / "other", "--epochs=1", "--seed=8")
    assert not same(first["net_state_dict"], train(tmp_path / "7", "--epochs=1")["net_state_dict"])


class Killed(Exception):
    pass


def test_restart_from_the_best_network_survives_a_kill(tmp_path, monkeypatch, capsys):
    """September 2020's schedule: each later stage starts from the best network so far, with a new optimizer."""
    staged = training.Schedule(4, ((2, 0.1), (3, 0.01)), restart=True)
    monkeypatch.setitem(training.SCHEDULES["cifar10"], "head", staged)
    whole = train(tmp_path / "whole")
    restarts = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Restarting from ")]
    best = [line["test_top1"] for line in read_metrics(tmp_path / "whole" / NAME / "metrics.jsonl")[1:-1]]
    first_best = [best.index(max(best[:done])) + 1 for done in (2, 3)]
    assert restarts == [f"Restarting from {tmp_path}/whole/{NAME}.pth, epoch {epoch}" for epoch in first_best]
    for killed_at in (2, 3):  # after the best network may have been replaced, before the state is saved
        folder, save = tmp_path / f"killed{killed_at}", Run.save_last

        def save_or_die(run, payload, save=save, killed_at=killed_at):
            if payload["epoch"] == killed_at:
                raise Killed
            save(run, payload)

        monkeypatch.setattr(Run, "save_last", save_or_die)
        with pytest.raises(Killed):
            train(folder)
        monkeypatch.setattr(Run, "save_last", save)
        assert same_state(train(folder, "--resume"), whole)


def test_stage_starts_from_the_best_network_with_new_momentum(tmp_path, monkeypatch):
    monkeypatch.setitem(training.SCHEDULES["cifar10"], "head", training.Schedule(2, ((1, 0.1),), restart=True))

    def after_first_epoch(run, payload):
        if payload["epoch"] == 1:
            state, best = payload, load_checkpoint(run.best_path)
            assert same(state["net_state_dict"], best["net_state_dict"])
            assert not state["optimizer_state_dict"]["state"] and best["optimizer_state_dict"]["state"]
            raise Killed

    monkeypatch.setattr(Run, "save_last", after_first_epoch)
    with pytest.raises(Killed):
        train(tmp_path)


def test_auto_resume_does_nothing_when_finished_and_refuses_other_flags(finished, capsys):
    folder, _, _ = finished
    before = (folder / NAME / "metrics.jsonl").read_bytes()
    train_cifar10.main([*TINY, "--epochs=3", f"--output-dir={folder}", "--auto-resume"])
    assert "already finished" in capsys.readouterr().out
    assert (folder / NAME / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RunError, match=r"finished run with --epochs 3 \(now 4\)"):
        train_cifar10.main([*TINY, "--epochs=4", f"--output-dir={folder}", "--auto-resume"])


def test_pretrained_starts_from_weights_momentum_and_accuracy(finished, tmp_path, capsys):
    folder, _, _ = finished
    path = folder / f"{NAME}.pth"
    start = load_checkpoint(path)
    flags = [*TINY, "--epochs=4", f"--pretrained={path}", "--lr=1e-12", "--weight_decay=0", "--momentum=0"]
    train_cifar10.main([*flags, "--starting_epoch=3", f"--output-dir={tmp_path}"])
    state = load_checkpoint(tmp_path / NAME / "last.pt")
    output = capsys.readouterr().out
    assert "Cuda 0 Basis Epoch: 4" in output and "Epoch: 1\n" not in output
    assert state["best"]["acc"] >= start["acc"] and state["epoch"] == 4
    weights = [name for name in start["net_state_dict"] if name.endswith("weight")]
    assert all(torch.allclose(state["net_state_dict"][n], start["net_state_dict"][n], atol=1e-6) for n in weights)
    with pytest.raises(CheckpointError, match="shared_rank 1, unique_rank 1; the flags ask for .*shared_rank 2"):
        train_cifar10.main([*TINY, "--shared_rank=2", f"--pretrained={path}", f"--output-dir={tmp_path}/other"])


def test_ddp_trains_and_tests_every_image_once(tmp_path, monkeypatch):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    flags = [*TINY, "--train-size=65", "--epochs=2", f"--output-dir={tmp_path}"]
    result = subprocess.run([*command, "shared_bases/train_cifar10.py", *flags], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("Cuda")] == [f"Cuda 0 Basis Epoch: {e}" for e in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.pth"]
    header, *epochs, result = read_metrics(tmp_path / NAME / "metrics.jsonl")
    assert all(round(line["train_top1"] * 65 / 100, 6).is_integer() for line in epochs)
    assert all(round(line["test_top1"] * 355 / 100, 6).is_integer() for line in epochs)
    pretrained = f"--pretrained={tmp_path}/{NAME}.pth"
    monkeypatch.setattr(engine, "load_digits_set", load_digits_set)
    assert eval_cifar10.main([*NETWORK, *DIGITS, pretrained])[0] == result["best_top1"]


def test_a_small_set_is_learned(tmp_path):
    state = train(tmp_path, "--epochs=4", "--train-size=256", "--batch_size=16")
    assert state["best"]["acc"] > 15
    losses = [line["train_loss"] for line in read_metrics(tmp_path / NAME / "metrics.jsonl") if line["type"] == "epoch"]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("flags", (["--amp=bf16"], ["--channels-last"]))
def test_speed_flags_train_and_evaluate_exactly(tmp_path, flags):
    state = train(tmp_path, "--epochs=1", *flags)
    path = tmp_path / f"{NAME}.pth"
    assert eval_cifar10.main([*NETWORK, *DIGITS, f"--pretrained={path}", "--batch_size=32"])[0] == state["acc"]


def test_ilsvrc_lines_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = ["--model=ResNet34_SingleShared", "--shared_rank=1", "--image-size=32", "--workers=0", "--lambdaR=10"]
    flags = [*network, *DIGITS, "--train-size=32", "--batch_size=32", "--seed=1", "--lr=0.01"]
    train_ilsvrc.main([*flags, "--epochs=5", "--visible_device=0,1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Test_Acc_Top1/5 = ") and "\t" in line for line in lines) == 5
    assert lines.count("Saving..") == 1 and lines[lines.index("Saving Best..") + 1].startswith("Best_Acc_top1/5 = ")
    name = "ILSVRC-ResNet34_SingleShared-S1-U1-L10.0-0,1"
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {name, f"{name}.pth", f"{name}epoch5.pth"}
    evaluation = [*network, *DIGITS, "--batch_size=32", f"--pretrained=checkpoint/{name}epoch5.pth", "--lr=0.1"]
    assert eval_ilsvrc.main(evaluation)[0] == read_metrics(f"checkpoint/{name}/metrics.jsonl")[-1]["top1"]


def test_cifar100_trains_from_the_readme_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = "--lr=0.1 --momentum=0.9 --weight_decay=5e-4 --lambdaR=10 --batch_size=256 --model=MobileNetV2_Shared"
    train_cifar100.main([*readme.split(), *DIGITS, "--train-size=16", "--epochs=1", "--seed=1"])
    path = "./checkpoint/CIFAR100-MobileNetV2_Shared-S16-U1-L10.0-0.pth"
    top1, _ = eval_cifar100.main([f"--pretrained={path}", "--model=MobileNetV2_Shared", *DIGITS])
    assert f"Eval_Acc_top1 = {top1:.3f}" in capsys.readouterr().out and os.path.exists(path)


# --- mistakes and accidents ---


def test_nan_loss_names_epoch_and_batch_and_keeps_the_last_good_checkpoint(tmp_path):
    train(tmp_path, "--epochs=1")
    before = (tmp_path / NAME / "last.pt").read_bytes()
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at epoch 2, batch \d; .* last good checkpoint is .*pt"):
        train(tmp_path, "--epochs=2", "--resume", "--lr=1e30")
    assert (tmp_path / NAME / "last.pt").read_bytes() == before


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(RunError, match="no checkpoint to go on with: .*last.pt does not exist; leave --resume out"):
        train(tmp_path, "--resume")


def test_resume_from_a_damaged_checkpoint_offers_the_previous_one(finished, tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    for name in ("last.pt", "last.previous.pt"):
        (folder / name).write_bytes((finished[0] / NAME / name).read_bytes())
    content = bytearray((folder / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt.*last\.previous\.pt"):
        train(tmp_path, "--epochs=4", "--resume")


def test_unwritable_output_directory_is_one_line_and_status_1(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "train_cifar10.py", *TINY, f"--output-dir={tmp_path}/file/runs"]
    result = subprocess.run(command, cwd=ROOT / "shared_bases", capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: cannot write to ") and "choose another --output-dir" in result.stderr


def test_missing_data_is_one_line_and_status_1(tmp_path):
    command = [sys.executable, "shared_bases/eval_ilsvrc.py", f"--dataset_path={tmp_path}", "--model=ResNet18"]
    result = subprocess.run([*command, "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "train/ and val/" in result.stderr
