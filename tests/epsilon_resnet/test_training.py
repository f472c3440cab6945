"""Training runs end to end on the embedded digits: files, resume, several processes, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.checkpoints import CheckpointError, load_checkpoint
from epsilon_resnet import cifarEpsilonResnet, imagenetEpsilonResnet, logfile, svhnEpsilonResnet, training
from epsilon_resnet.runs import Run, RunError, model_files, read_metrics
from tests.resumes import differences

ROOT = Path(__file__).resolve().parents[2]
TINY = ["-n", "2", "-e", "8", "-o", "t", "--cifar10", "--embedded-data", "--train-size=48", "--batch_size=16",
        "--device=cpu", "--seed=7", "--lr_schedule=0:0.1,2:0.01"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_test_set():
    """64 test digits instead of 355, in this process only: others see all of them, and another mean image."""
    from epsilon_resnet import inputs

    whole = inputs.load_digits_set
    patch = pytest.MonkeyPatch()
    patch.setattr(
        inputs, "load_digits_set", lambda split, **o: whole(split, **o).subset(64 if split == "test" else 2000)
    )
    yield
    patch.undo()


def train(folder, *flags, script=cifarEpsilonResnet, tiny=TINY):
    script.main([*tiny, f"--output-dir={folder}", *flags])
    return load_checkpoint(list(model_files(folder / "train_log.t").values())[-1])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_test_set):
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(folder, "--epochs=3")


def test_files_of_a_run(finished):
    folder, state = finished
    run = folder / "train_log.t"
    assert {path.name.split(".out.")[0] for path in run.iterdir()} == {
        "log.log", "stat.json", "metrics.jsonl", "checkpoint", "events", "model-3.pth", "model-6.pth", "model-9.pth",
    }  # fmt: skip
    assert (state["step"], state["epoch"], state["n"], state["dataset"], state["arch"]) == (9, 3, 2, "cifar10", "cifar")
    assert {"optimizer", "ema", "lr_state", "val_error", "epsilon", "num_classes", "args"} <= set(state)
    assert set(state["lr_state"]) == {"schedule", "history", "last_changed_epoch"}
    header, *epochs, result = read_metrics(run / "metrics.jsonl")
    assert header["type"] == "run" and header["params"] == 172_900 and header["macs"] == 26_395_264
    assert header["reproduces"] is None
    assert [(line["epoch"], line["lr"]) for line in epochs] == [(0, 0.1), (1, 0.1), (2, 0.01)]
    assert all(len(line["is_discarded"]) == 6 and line["epsilon"] == 8 for line in epochs)
    assert result["top1"] == epochs[-1]["test_top1"] == 100 * (1 - state["val_error"][0])
    statistics = json.loads((run / "stat.json").read_text())
    assert [(entry["epoch_num"], entry["global_step"]) for entry in statistics] == [(1, 3), (2, 6), (3, 9)]


def test_the_log_has_the_originals_lines(finished):
    folder, state = finished
    lines = logfile.messages((folder / "train_log.t" / "log.log").read_text())
    assert lines[0].startswith("Argv: epsilon_resnet/cifarEpsilonResnet.py -n 2 ")
    assert logfile.steps_in_log(lines) == [3, 6, 9]
    assert "learning_rate at epoch 3 will change to 0.01000000" in lines
    values = {name: value for name, value, _ in logfile.statistics_at(lines, 9)}
    assert list(values) == sorted(values)
    expected = "cross_entropy_loss discarded_cnt discarded_ratio epsilon learning_rate train_error wd_cost"
    expected += " validation_cost res3.1/response_abs_max side_output/res2.1/train_error"
    assert set(expected.split()) <= set(values)
    assert values["val_error"] == pytest.approx(state["val_error"][0], rel=1e-4)


def test_same_seed_same_bits_and_other_seed_other_bits(finished, tmp_path):
    _, reference = finished
    assert same(train(tmp_path / "same", "--epochs=3")["model"], reference["model"])
    assert not same(train(tmp_path / "other", "--epochs=3", "--seed=8")["model"], reference["model"])


def test_resume_restores_gate_statistics_and_the_adaptive_schedule(finished, tmp_path):
    _, reference = finished
    train(tmp_path, "--epochs=3")
    for name in ("model-6.pth", "model-9.pth"):
        assert (tmp_path / "train_log.t" / name).exists()
    state = train(tmp_path, "--epochs=3", f"--load={tmp_path}/train_log.t/model-3.pth")
    assert differences(state, reference) == []
    assert (tmp_path / "train_log.t" / "model-6.pth.old").exists(), "what was there is not lost"
    kinds = [(line["type"], line.get("epoch")) for line in read_metrics(tmp_path / "train_log.t" / "metrics.jsonl")]
    assert kinds == [("run", None), ("epoch", 0), ("resumed", 1), ("epoch", 1), ("epoch", 2), ("result", None)]
    log = (tmp_path / "train_log.t" / "log.log").read_text()
    assert logfile.steps_in_log(logfile.messages(log)) == [3, 6, 9]


def test_an_earlier_run_is_put_aside_not_overwritten(tmp_path):
    first = train(tmp_path, "--epochs=1")
    train(tmp_path, "--epochs=1", "--seed=8")
    (aside,) = [path for path in tmp_path.iterdir() if path.name.startswith("train_log.t.2")]
    assert same(load_checkpoint(aside / "model-3.pth")["model"], first["model"])


def test_auto_resume_does_nothing_when_finished_and_refuses_other_flags(finished, capsys):
    folder, _ = finished
    before = (folder / "train_log.t" / "metrics.jsonl").read_bytes()
    cifarEpsilonResnet.main([*TINY, f"--output-dir={folder}", "--epochs=3", "--auto-resume"])
    assert "already finished" in capsys.readouterr().out
    assert (folder / "train_log.t" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RunError, match=r"finished run with --epochs 3 \(now 4\)"):
        cifarEpsilonResnet.main([*TINY, f"--output-dir={folder}", "--epochs=4", "--auto-resume"])


def test_a_large_epsilon_closes_blocks_which_decay_and_start_the_schedule_again(tmp_path, capsys):
    flags = ["--epochs=3", "-e", "1e9", "--weight_decay=0.05", "--epsilon_start_epoch=1", "--lr_schedule=0:0.05,1:0.02"]
    before = train(tmp_path / "a", *flags[:-2], "--epochs=1", flags[-1])
    state = train(tmp_path, *flags, "--lr_reset_schedule=0:0.1,1:0.03")
    epochs = [line for line in read_metrics(tmp_path / "train_log.t" / "metrics.jsonl") if line["type"] == "epoch"]
    assert [line["epsilon"] for line in epochs] == [0, 1e9, 1e9]
    assert [line["closed_blocks"] for line in epochs] == [0, 6, 6]
    assert [line["lr"] for line in epochs] == [0.05, 0.02, 0.1], "six blocks were lost in the second epoch"
    assert state["learning_rate"] == 0.03 and state["lr_state"]["last_changed_epoch"] == 2
    norms = [values["model"]["res2.1.conv2.weight"].norm().item() for values in (before, state)]
    rate = 1.0
    assert norms[1] < 0.995 * norms[0] * rate, "weight decay acts on closed blocks"


def test_the_raw_average_misses_a_single_block():
    rule = training.schedules.LearningRate(((0, 0.1),), ((0, 0.1),))
    rule.after_epoch(0)
    assert [rule.after_epoch(epoch, count)[1] for epoch, count in enumerate((0.0, 0.9999995, 2.0), 1)] == [1, 2, 3]


def test_only_ten_checkpoints_and_the_wanted_one_stay(tmp_path):
    run = Run(tmp_path / "x", keep_steps=(2,))
    run.prepare(keep=False)
    for step in range(1, 14):
        run.save({"step": step})
    assert list(model_files(tmp_path / "x")) == [2, *range(4, 14)]
    assert (tmp_path / "x" / "checkpoint").read_text().startswith('model_checkpoint_path: "model-13.pth"\n')


def test_ddp_keeps_steps_and_feeds_every_process_its_own_batch(tmp_path):
    flags = ["--gpu", "0,1", *TINY, "--epochs=1", f"--output-dir={tmp_path}"]
    result = subprocess.run([sys.executable, "epsilon_resnet/cifarEpsilonResnet.py", *flags], cwd=ROOT, text=True,
                            capture_output=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert sum(line.startswith("Epoch") for line in result.stdout.splitlines()) == 1, "one rank prints"
    assert "train 3/3" in result.stdout and "(96 images)" in result.stdout and "(355 images)" in result.stdout
    assert list(model_files(tmp_path / "train_log.t")) == [3]


def test_svhn_script_trains(tmp_path):
    tiny = [flag for flag in TINY if flag != "--cifar10"]
    state = train(tmp_path, "--epochs=1", script=svhnEpsilonResnet, tiny=tiny)
    assert state["dataset"] == "svhn"


def test_imagenet_script_trains_and_tests_fake_images(tmp_path):
    flags = ["--gpu", "0", "--fake", "--device=cpu", "--steps_per_epoch=1", "--batch_size=2", "--image-size=32",
             "--epochs=1", "-d", "34", "-e", "3.5", f"--output-dir={tmp_path}"]  # fmt: skip
    imagenetEpsilonResnet.main(flags)
    state = load_checkpoint(tmp_path / "train_log" / "imagenetEpsilonResnet" / "model-1.pth")
    assert state["depth"] == 34 and state["epsilon"] == 3.5, "the original ignored -e"
    assert len(state["val_error"]) == 2 and state["optimizer"]["param_groups"][0]["nesterov"]


def test_hyper_txt_overrides_the_schedule(tmp_path):
    run = Run(tmp_path)
    (tmp_path / "hyper.txt").write_text("other:1\nlearning_rate:1e-4\n")
    assert training._hyper_parameter(run, "learning_rate") == 1e-4
    (tmp_path / "hyper.txt").write_text("learning_rate:fast\n")
    with pytest.raises(RunError, match="hyper.txt: 'learning_rate:fast' is no learning_rate:NUMBER"):
        training._hyper_parameter(run, "learning_rate")


@pytest.mark.parametrize("flags", (["--amp=bf16"], ["--channels-last"], ["--plain"]))
def test_variants_train(tmp_path, flags):
    state = train(tmp_path, "--epochs=1", *flags)
    assert 0 <= state["val_error"][0] <= 1
    assert any(name.startswith("side_output") for name in state["model"]) == (flags != ["--plain"])


# --- mistakes ---


def test_nan_loss_names_epoch_and_batch_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at epoch 2, batch \d; .* checkpoint is .*model-3\.pth"):
        train(tmp_path, "--epochs=2", "--lr_schedule=0:0.1,1:1e30")


def test_resume_from_a_damaged_checkpoint_offers_the_previous_one(tmp_path):
    train(tmp_path, "--epochs=2")
    last = tmp_path / "train_log.t" / "model-6.pth"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-6\.pth.*go on with --load .*model-3\.pth"):
        train(tmp_path, "--epochs=3", f"--load={last}")


def test_loading_another_network(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(RunError, match="holds another network"):
        train(tmp_path, "--epochs=1", "-n", "3", f"--load={folder}/train_log.t/model-9.pth")
    with pytest.raises(RunError, match=r"was trained with --epsilon 8.0 \(now 2.0\)"):
        train(folder, "--epochs=3", "-e", "2", "--seed=8", f"--load={folder}/train_log.t/model-9.pth")


def test_weights_of_another_run_start_a_new_one(finished, tmp_path):
    folder, reference = finished
    state = train(tmp_path, "--epochs=1", "--lr_schedule=0:1e-20", f"--load={folder}/train_log.t/model-9.pth")
    assert torch.allclose(state["model"]["conv0.weight"], reference["model"]["conv0.weight"]) and state["epoch"] == 1


def test_too_few_images_for_a_batch(tmp_path):
    flags = [*TINY, "--epochs=1", "--train-size=8", f"--output-dir={tmp_path}"]
    result = subprocess.run([sys.executable, "epsilon_resnet/cifarEpsilonResnet.py", *flags], cwd=ROOT, text=True,
                            capture_output=True)  # fmt: skip
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: 8 training images are fewer than a batch of 16; use a smaller --batch_size")


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to .*choose another -o or --output-dir"):
        train(tmp_path / "file", "--epochs=1")
