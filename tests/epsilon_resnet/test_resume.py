"""A run that was killed or stopped goes on, and ends with the same bits."""

from epsilon_resnet import cifarEpsilonResnet, engine
from epsilon_resnet.runs import load_state
from tests.resumes import check_killed_run, check_stopped_run, lines_of

FLAGS = ["-n", "2", "-e", "8", "-o", "t", "--cifar10", "--embedded-data", "--train-size=32", "--batch_size=16",
         "--device=cpu"]  # fmt: skip
NAME = "train_log.t"


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    states = "model-12.pth", "model-10.pth"
    check_killed_run(cifarEpsilonResnet, [*FLAGS, "--seed=7"], tmp_path, NAME, monkeypatch, states)


def test_stopped_runs_end_with_the_same_state(tmp_path, monkeypatch):
    """Momentum, averages, the rule of the learning rate and its last rate too; gates may close from the third epoch on.

    The momentum of a block that was closed from the first step on would be zero.
    """
    flags = [*FLAGS, "--lr_schedule=0:0.1,1:0.05,3:0.01", "--epsilon_start_epoch=2"]
    options = {"later_flags": flags, "names": ("model-8.pth", "model-6.pth"), "first": 1}
    check_stopped_run(cifarEpsilonResnet, engine, [*flags, "--seed=7"], tmp_path, NAME, monkeypatch, **options)
    run = tmp_path / "twice" / NAME
    assert [line["lr"] for line in lines_of(run, "epoch")][:3] == [0.1, 0.05, 0.05]
    state = load_state(run / "model-8.pth")
    assert len(state["lr_state"]["history"]) == 4 and any(state["ema"].values())
