"""A run that was killed or stopped goes on, and ends with the same bits."""

from s3 import engine, main
from tests.resumes import check_killed_run, check_stopped_run

FLAGS = ["--dataset=digits", "--arch=resnet8", "--device=cpu", "--train-size=64", "--batch-size=32", "--print-freq=100"]


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    check_killed_run(main, [*FLAGS, "--seed=3"], tmp_path, "", monkeypatch)


def test_stopped_runs_end_with_the_same_state(tmp_path, monkeypatch):
    """At rates that move weights to the end; the seed is the file's if none is given."""
    flags = [*FLAGS, "--schedule=fixed"]
    check_stopped_run(main, engine, [*flags, "--seed=7"], tmp_path, "", monkeypatch, later_flags=flags)
