"""A run that was killed or stopped goes on, and ends with the same bits."""

import pytest

from common.data import digits
from shiftresnet import engine, main
from tests.kills import few_digits
from tests.resumes import check_killed_run, check_stopped_run, lines_of

FLAGS = ["--arch=shiftresnet20", "--embedded-data", "--train-size=32", "--batch_size=16", "--device=cpu"]
NAME = "shiftresnet20_1.0"
STATES = "last.pt", "last.previous.pt"


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(digits, "_read_digits", few_digits)


def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch):
    check_killed_run(main, [*FLAGS, "--seed=7"], tmp_path, NAME, monkeypatch, STATES)
    best = [(tmp_path / name / f"{NAME}.t7").read_bytes() for name in ("once", "killed")]
    assert best[0] == best[1]


def test_stopped_runs_end_with_the_same_state(tmp_path, monkeypatch):
    """Order and offsets of the images, the best network and the generator's state too; the seed is the file's."""
    options = {"later_flags": FLAGS, "names": STATES, "kept": None}
    check_stopped_run(main, engine, [*FLAGS, "--seed=7"], tmp_path, NAME, monkeypatch, **options)
    assert [line["lr"] for line in lines_of(tmp_path / "twice" / NAME, "epoch")] == [0.1, 0.1, 0.01, 0.001]


def test_the_first_of_equal_accuracies_is_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: (1.0, 50.0))
    main.main([*FLAGS, "--epochs=2", "--seed=7", f"--output-dir={tmp_path}"])
    (result,) = lines_of(tmp_path / NAME, "result")
    assert (result["best_epoch"], result["best_top1"]) == (0, 50.0)
