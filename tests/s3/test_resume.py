"""A run that was killed or stopped goes on, and ends with the same bits."""

import pytest

from s3 import engine, main
from tests.resumes import check_killed_run, check_stopped_run

FLAGS = ["--dataset=digits", "--arch=resnet8", "--device=cpu", "--train-size=64", "--batch-size=32", "--print-freq=100"]


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    check_killed_run(main, [*FLAGS, "--seed=3"], tmp_path, "", monkeypatch)


@pytest.mark.parametrize("flags", [[], ["--method=float", "--schedule=fixed"]], ids=["s3", "float"])
def test_stopped_runs_end_with_the_same_state(flags, tmp_path, monkeypatch):
    """The rate of the third epoch is a quarter, so it moves weights; the seed is the file's if none is given."""
    flags = [*FLAGS, *flags]
    check_stopped_run(main, engine, [*flags, "--seed=7"], tmp_path, "", monkeypatch, later_flags=flags)
