"""A run that was killed or stopped goes on, and ends with the same bits."""

import pytest
import torch

from common.checkpoints import load_checkpoint
from common.data import digits
from shared_bases import engine, train_cifar10, training
from tests.kills import few_digits
from tests.resumes import check_killed_run, check_stopped_run, lines_of

FLAGS = ["--model=ResNet32_SingleShared", "--shared_rank=1", "--embedded-data", "--device=cpu", "--train-size=16",
         "--batch_size=8", "--lr=0.02"]  # fmt: skip
NAME = "CIFAR10-ResNet32_SingleShared-S1-U1-L10-0"
STATES = "last.pt", "last.previous.pt"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(digits, "_read_digits", few_digits)


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    check_killed_run(train_cifar10, [*FLAGS, "--seed=7"], tmp_path, NAME, monkeypatch, STATES)
    best = [(tmp_path / name / f"{NAME}.pth").read_bytes() for name in ("once", "killed")]
    assert best[0] == best[1]


def test_stopped_runs_end_with_the_same_state(tmp_path, monkeypatch):
    """Momentum and the best network too, at the rates 0.02 and, from the third epoch on, a tenth and a hundredth."""
    options = {"later_flags": FLAGS, "names": STATES, "first": 1, "kept": "optimizer_state_dict"}
    check_stopped_run(train_cifar10, engine, [*FLAGS, "--seed=7"], tmp_path, NAME, monkeypatch, **options)
    rates = [line["lr"] for line in lines_of(tmp_path / "twice" / NAME, "epoch")]
    assert rates == pytest.approx([0.02, 0.02, 0.002, 0.0002])


def test_pretrained_momentum_goes_on_with_the_flags_momentum_and_decay(tmp_path):
    """The file's velocities, this run's factors: as in the original, which makes the optimizer from its flags first."""
    train_cifar10.main([*FLAGS, "--epochs=1", "--seed=7", f"--output-dir={tmp_path}"])
    path = tmp_path / f"{NAME}.pth"
    flags = [*FLAGS, "--epochs=2", "--momentum=0.5", "--weight_decay=0.01"]
    args, config = train_cifar10.parse_args(flags)
    run = training.Training(args, config, torch.device("cpu"), engine.World())
    run.start_from(str(path))
    step = run.first_step()
    (group,) = step.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.01)
    saved = load_checkpoint(path)["optimizer_state_dict"]["state"]
    ours = step.optimizer.state_dict()["state"]
    assert saved.keys() == ours.keys() and len(saved) > 100
    assert all(torch.equal(saved[number]["momentum_buffer"], ours[number]["momentum_buffer"]) for number in saved)
