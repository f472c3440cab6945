"""Training runs end to end on the embedded digits: results, resume, saved files, mistakes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoints import CheckpointError, load_checkpoint
from shiftresnet import engine, training
from shiftresnet import eval as evaluation
from shiftresnet import main as training_script
from shiftresnet.runs import RunError, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--arch=shiftresnet20", "--embedded-data", "--train-size=96", "--batch_size=32", "--device=cpu", "--seed=7"]
NAME = "shiftresnet20_1.0"


def train(folder, *flags):
    training_script.main([*TINY, f"--output-dir={folder}", *flags])
    return load_checkpoint(folder / NAME / "last.pt")


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs: (folder, what it printed, its last state)."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "shiftresnet/main.py", *TINY, "--epochs=3", f"--output-dir={folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout, load_checkpoint(folder / NAME / "last.pt")


def test_printed_lines(finished):
    folder, output, _ = finished
    lines = output.splitlines()
    assert lines[0] == "==> Preparing data.."
    assert f"Using path: {folder}/{NAME}.t7" in lines
    assert "==> Building model.." in lines
    assert [line for line in lines if line.startswith("Epoch")] == ["Epoch: 0", "Epoch: 1", "Epoch: 2"]
    assert lines[lines.index("Saving..") + 1] == f"* Saved checkpoint to {folder}/{NAME}.t7"
    assert sum(line.startswith(" test ") and line.endswith("/355)") for line in lines) == 3
    assert "\r" not in output, "no bar when the output is a pipe"


def test_metrics_and_events(finished):
    folder, _, state = finished
    header, *epochs, result = read_metrics(folder / NAME / "metrics.jsonl")
    assert header["type"] == "run" and header["config"]["arch"] == "shiftresnet20"
    assert header["command"].startswith("python shiftresnet/main.py --arch=shiftresnet20 ")
    assert (header["params"], header["macs"]) == (34906, 7275136 - 32 * 32 * 27 * 48)
    assert header["reproduces"] is None, "digits reproduce no published number"
    assert [line["epoch"] for line in epochs] == [0, 1, 2] and [line["lr"] for line in epochs] == [0.1, 0.1, 0.01]
    assert result["type"] == "result" and result["top1"] == epochs[-1]["test_top1"] == state["acc"]
    assert result["best_top1"] == max(line["test_top1"] for line in epochs)
    assert list((folder / NAME).glob("events.out.tfevents.*"))


def test_saved_file_evaluates_to_the_printed_accuracy(finished, capsys):
    folder, _, _ = finished
    path = str(folder / f"{NAME}.t7")
    results = evaluation.main([f"--model={path}", "--embedded-data", "--device=cpu"])
    assert results[path] == read_metrics(folder / NAME / "metrics.jsonl")[-1]["best_top1"]
    assert f"Reading from model {path}\n" in capsys.readouterr().out


def test_checkpoint_loads_with_plain_torch(finished):
    folder, _, _ = finished
    content = torch.load(folder / f"{NAME}.t7", weights_only=True)
    assert set(content) == {"net", "acc", "epoch", "config", "channels_last"}


def test_same_seed_same_bits_and_other_seed_other_bits(finished, tmp_path):
    _, _, reference = finished
    assert same_weights(train(tmp_path / "same", "--epochs=3")["net"], reference["net"])
    assert not same_weights(train(tmp_path / "other", "--epochs=3", "--seed=8")["net"], reference["net"])


def test_auto_resume_does_nothing_when_finished_and_refuses_other_flags(finished, capsys):
    folder, _, _ = finished
    before = (folder / NAME / "metrics.jsonl").read_bytes()
    training_script.main([*TINY, "--epochs=3", f"--output-dir={folder}", "--auto-resume"])
    assert "already finished" in capsys.readouterr().out
    assert (folder / NAME / "metrics.jsonl").read_bytes() == before
    with pytest.raises(RunError, match=r"finished run with --epochs 3 \(now 4\)"):
        training_script.main([*TINY, "--epochs=4", f"--output-dir={folder}", "--auto-resume"])


def test_resume_goes_on_with_more_epochs_and_logs_it(tmp_path, capsys):
    train(tmp_path, "--epochs=1")
    state = train(tmp_path, "--epochs=2", "--resume")
    assert state["epoch"] == 1
    assert "note: this run was started with --epochs 1 (now 2)" in capsys.readouterr().out
    kinds = [line["type"] for line in read_metrics(tmp_path / NAME / "metrics.jsonl")]
    assert kinds == ["run", "epoch", "resumed", "epoch", "result"]


def test_ddp_trains_and_tests_every_image_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    flags = [
        "--arch=shiftresnet20",
        "--embedded-data",
        "--train-size=97",
        "--batch_size=32",
        "--device=cpu",
        "--seed=7",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "shiftresnet/main.py", *flags, "--epochs=2", f"--output-dir={tmp_path}"],
                            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("Epoch")] == ["Epoch: 0", "Epoch: 1"], "one rank prints"
    assert sum(line.startswith(" train") and line.endswith("/97)") for line in lines) == 2
    assert sum(line.startswith(" test") and line.endswith("/355)") for line in lines) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.t7"]
    written = {path.name.split(".out.")[0] for path in (tmp_path / NAME).iterdir()}
    assert written == {"events", "last.pt", "last.previous.pt", "metrics.jsonl"}
    best = read_metrics(tmp_path / NAME / "metrics.jsonl")[-1]["best_top1"]
    path = str(tmp_path / f"{NAME}.t7")
    assert evaluation.main([f"--model={path}", "--embedded-data", "--device=cpu"])[path] == best


def test_a_small_set_is_learned(tmp_path):
    state = train(tmp_path, "--epochs=5", "--train-size=512")
    assert state["acc"] > 30
    losses = [line["train_loss"] for line in read_metrics(tmp_path / NAME / "metrics.jsonl") if line["type"] == "epoch"]
    assert losses[-1] < 0.75 * losses[0]


def test_momentum_starts_from_zero_every_epoch(tmp_path, monkeypatch):
    """As with the original's new optimizer: at the first batch of an epoch nothing is left of the one before."""
    seen, original = [], engine.train_one_epoch

    def spy(step, loader, **options):
        (group,) = step.optimizer.param_groups
        buffers = [state["momentum_buffer"] for state in step.optimizer.state.values()]
        assert all(not buffer.any() for buffer in buffers) and bool(buffers) == bool(seen)
        seen.append((group["lr"], group["momentum"], group["weight_decay"]))
        return original(step, loader, **options)

    monkeypatch.setattr(engine, "train_one_epoch", spy)
    train(tmp_path, "--epochs=4")
    assert seen == [(rate, 0.9, 5e-4) for rate in (0.1, 0.1, 0.01, 0.001)]


def test_published_recipe_draws_batchnorm_scales():
    args, config = training_script.parse_args(["--arch=shiftresnet20", "--recipe=published"])
    scales = torch.cat(
        [m.weight for m in training.build_network(args, config).modules() if isinstance(m, nn.BatchNorm2d)]
    )
    assert 0 <= scales.min() < 0.05 and 0.95 < scales.max() <= 1 and abs(scales.mean() - 0.5) < 0.05
    args, config = training_script.parse_args(["--arch=shiftresnet20"])
    assert all(
        (m.weight == 1).all() for m in training.build_network(args, config).modules() if isinstance(m, nn.BatchNorm2d)
    )


@pytest.mark.parametrize("flags", (["--amp=bf16"], ["--channels-last"]))
def test_speed_flags_train_and_evaluate_exactly(tmp_path, flags):
    state = train(tmp_path, "--epochs=1", *flags)
    path = str(tmp_path / f"{NAME}.t7")
    assert evaluation.main([f"--model={path}", "--embedded-data", "--device=cpu"])[path] == state["acc"]


# --- mistakes and accidents ---


def test_nan_loss_names_epoch_and_batch_and_keeps_the_last_good_checkpoint(tmp_path):
    train(tmp_path, "--epochs=1")
    before = (tmp_path / NAME / "last.pt").read_bytes()
    with pytest.raises(
        RunError, match=r"the loss is (nan|inf) at epoch 1, batch \d; .* last good checkpoint is .*last\.pt"
    ):
        train(tmp_path, "--epochs=2", "--resume", "--lr=1e30")
    assert (tmp_path / NAME / "last.pt").read_bytes() == before


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(
        RunError, match="no checkpoint to go on with: neither .*last.pt nor .*t7 exists; leave --resume out"
    ):
        train(tmp_path, "--resume")


def test_resume_from_a_file_of_another_network(tmp_path):
    train(tmp_path, "--epochs=1")
    (tmp_path / "shiftresnet20_2.0.t7").write_bytes((tmp_path / f"{NAME}.t7").read_bytes())
    with pytest.raises(RunError, match=r"shiftresnet20_2\.0\.t7 holds shiftresnet20_1\.0, not shiftresnet20_2\.0"):
        train(tmp_path, "--expansion=2", "--resume")
    (tmp_path / NAME).rename(tmp_path / "shiftresnet20_2.0")
    with pytest.raises(RunError, match=r"holds shiftresnet20_1\.0, the flags ask for shiftresnet20_2\.0"):
        train(tmp_path, "--expansion=2", "--resume")


def test_resume_from_a_damaged_checkpoint_offers_the_previous_one(tmp_path):
    train(tmp_path, "--epochs=2")
    last = tmp_path / NAME / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.pt.*last\.previous\.pt"):
        train(tmp_path, "--epochs=3", "--resume")


def test_evaluating_with_the_wrong_number_of_classes(finished):
    folder, _, _ = finished
    with pytest.raises(RunError, match="the network has 10 classes, cifar100 has 100; use --dataset=cifar10"):
        evaluation.main([f"--model={folder}/{NAME}.t7", "--embedded-data", "--dataset=cifar100", "--device=cpu"])


def test_evaluating_files_that_are_not_there_or_not_networks(tmp_path, capsys):
    with pytest.raises(RunError, match="no checkpoint matches .*nothing"):
        evaluation.main([f"--model={tmp_path}/nothing*", "--embedded-data"])
    torch.save({"net": {"weight": torch.ones(2)}}, tmp_path / "other.t7")
    with pytest.raises(CheckpointError, match="not a checkpoint of a ShiftResNet network"):
        evaluation.main([f"--model={tmp_path}/other.t7", "--embedded-data"])
    with pytest.raises(RunError, match="none of the files could be tested"):
        evaluation.main([f"--model={tmp_path}/other.t7", "--embedded-data", "--suppress-errors"])
    assert "The model may be malformed." in capsys.readouterr().out


def run_script(*flags, **options):
    command = [sys.executable, "shiftresnet/main.py", *TINY, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_unwritable_output_directory_is_one_line_and_status_1(tmp_path):
    (tmp_path / "file").touch()
    result = run_script("--epochs=1", f"--output-dir={tmp_path}/file/runs")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: cannot write to ") and "choose another --output-dir" in result.stderr


def test_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(tmp_path):
    import resource

    train(tmp_path, "--epochs=1")
    before = (tmp_path / NAME / "last.pt").read_bytes()

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    result = run_script("--epochs=2", "--resume", f"--output-dir={tmp_path}", preexec_fn=small_files)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ") and "File too large" in result.stderr and "free space" in result.stderr
    assert (tmp_path / NAME / "last.pt").read_bytes() == before
    leftovers = {path.name.split(".out.")[0] for path in (tmp_path / NAME).iterdir()}
    assert leftovers == {"events", "last.pt", "metrics.jsonl"}, "no temporary file stays"
