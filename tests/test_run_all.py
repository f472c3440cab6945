"""run_all.sh: what it would run, what it repeats, how it reports a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_all

ROOT = Path(__file__).resolve().parents[1]


def test_the_shell_command_uses_the_given_python_and_lists_jobs(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", ROOT / "run_all.sh", "--list", "--only", "shiftresnet", f"--output-dir={tmp_path}"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "to do  shiftresnet: train shiftresnet20_3.0"


def test_a_python_that_does_not_exist_is_one_line():
    environment = {**os.environ, "PYTHON": "/does/not/exist"}
    result = subprocess.run(["bash", ROOT / "run_all.sh"], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("setup: PYTHON=/does/not/exist is not an executable")


def commands(capsys, *flags):
    assert run_all.main(["--dry-run", *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_data_decides_the_schedule(tmp_path, capsys):
    training = commands(capsys, f"--data-dir={tmp_path}")[0]
    assert "--embedded-data" in training and "--epochs=" in training
    (tmp_path / "cifar-10-batches-py").mkdir()
    training = commands(capsys, f"--data-dir={tmp_path}")[0]
    assert f"--data-dir {tmp_path}" in training and "--epochs=" in training
    training = commands(capsys, "--full")[0]
    assert "--recipe=published" in training and "--epochs=" not in training and "--data-dir" in training


@pytest.mark.parametrize("paper", run_all.PAPERS)
def test_flags_after_the_dashes_go_to_training_only(paper):
    args = run_all.build_parser().parse_args(["--", "--amp", "bf16"])
    jobs = run_all.PAPERS[paper](args, Path("runs"))
    trains = [job.metrics is not None for job in jobs]
    assert [job.command[-2:] == ("--amp", "bf16") for job in jobs] == trains
    assert any(trains) and not all(trains)


@pytest.fixture
def two_jobs(tmp_path, monkeypatch):
    """One job that succeeds and leaves a trace each time, and one that fails."""
    trace = tmp_path / "trace"
    good = run_all.Job("shiftresnet", "good", ("-c", f"open({str(trace)!r}, 'a').write('x')"))
    bad = run_all.Job("shiftresnet", "bad", ("-c", "print('about to fail'); raise SystemExit(3)"))
    monkeypatch.setattr(run_all, "PAPERS", {"shiftresnet": lambda args, output: [bad, good]})
    return trace


def test_a_failure_is_shown_and_the_rest_goes_on(two_jobs, tmp_path, capsys):
    assert run_all.main([f"--output-dir={tmp_path}/runs"]) == 1
    output = capsys.readouterr().out
    assert "FAILED (exit status 3)" in output and "| about to fail" in output and "1 of 2 jobs failed" in output
    assert two_jobs.read_text() == "x"
    assert run_all.main([f"--output-dir={tmp_path}/runs"]) == 1
    assert two_jobs.read_text() == "x", "a finished job is not repeated"
    assert "good  done before" in capsys.readouterr().out
