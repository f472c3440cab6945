"""A run that was killed or stopped goes on, and ends with the same bits."""

import pytest

from deepshift import cifar10, engine, mnist
from tests.resumes import check_killed_run, check_stopped_run

QUICK = ["--embedded-data", "--train-size=64", "--device=cpu", "--print-weights=no"]
LENET = ["--arch=lenet", *QUICK, "--batch-size=32", "--lr-step-size=3", "--lr=0.02"]


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    """Dropout draws random numbers, Ranger has slow weights."""
    flags = [*QUICK, "--shift-type=Q", "--opt=ranger", "--save-model=no"]
    check_killed_run(mnist, flags, tmp_path, "mnist/simple_linear/shift_q_all_wb_5", monkeypatch)


@pytest.mark.parametrize("flags", [
    ["--shift-type=PS", "--opt=radam", "--rounding=stochastic"], ["--shift-type=Q", "--alternate-update=yes"],
], ids=" ".join)  # fmt: skip
def test_stopped_runs_end_with_the_same_state(flags, tmp_path, monkeypatch):
    """Weights, momentum, best epoch, random numbers; the seed is the file's if none is given."""
    kind = "ps" if "--shift-type=PS" in flags else "q"
    folder = f"cifar10/lenet/shift_{kind}_all_wb_5"
    flags = [*LENET, *flags]
    check_stopped_run(cifar10, engine, [*flags, "--seed=7"], tmp_path, folder, monkeypatch, later_flags=flags)
