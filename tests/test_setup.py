"""setup.sh: which packages it takes for which NVIDIA driver, and when it makes .venv anew. Nothing is installed."""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("setup.sh", "requirements.txt", "requirements-dev.txt", "requirements-cuda12.txt")
# A Python that makes an environment in which it is the interpreter, and notes what pip is to install.
PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
  "--version "*) echo "Python 3.12.1" ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv" >> "$NOTES" ;;
  "-m pip") while [ $# -gt 0 ]; do [ "$1" = -r ] && cat "$2" >> "$NOTES"; shift; done ;;
esac
"""
on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="PyTorch for CUDA 12 is for x86-64 only")
without_driver = pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="this machine's driver counts")


@pytest.fixture
def setup(tmp_path):
    """call(driver or None, requirements file) -> (lines that were noted, what went to stderr)."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    folder, notes = tmp_path / "programs", tmp_path / "notes"
    folder.mkdir()
    _write_program(folder / "python3", PYTHON)

    def call(driver, requirements="requirements.txt"):
        (folder / "nvidia-smi").unlink(missing_ok=True)
        if driver:
            _write_program(folder / "nvidia-smi", f"#!/bin/sh\necho {driver}\n")
        notes.write_text("")
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "BASE_PYTHON")}
        environment.update(PATH=f"{folder}:/usr/bin:/bin", NOTES=str(notes))
        script = f'set -euo pipefail; . "{tmp_path}/setup.sh" {requirements}; echo "$PYTHON"'
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / ".venv/bin/python")
        return notes.read_text().splitlines(), done.stderr

    return call


def _write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def cupy_of(lines):
    return [re.match(r"cupy-cuda(\d+)x", line)[1] for line in lines if line.startswith("cupy")]


@without_driver
@on_x86_64
@pytest.mark.parametrize(
    ("driver", "cuda"), [(None, "13"), ("580.65.06", "13"), ("595.10", "13"), ("535.104.05", "12"), ("470.57.02", "12")]
)
def test_the_driver_decides(setup, driver, cuda):
    for requirements in ("requirements.txt", "requirements-dev.txt"):
        lines, told = setup(driver, requirements)
        assert cupy_of(lines) == [cuda]  # and no other CuPy beside it
        assert ("requirements-cuda12.txt" in told) == (cuda == "12" and requirements == "requirements.txt")
    assert any(line.startswith("pytest") for line in lines) and lines[0] != "venv"  # the second call adds to the first
    assert setup(driver, "requirements-dev.txt") == ([], "") == setup(driver)


@without_driver
@on_x86_64
def test_a_new_driver_makes_the_environment_anew(setup):
    setup("535.104.05", "requirements-dev.txt")
    lines, told = setup("580.65.06", "requirements-dev.txt")
    assert lines[0] == "venv" and cupy_of(lines) == ["13"] and "making .venv" in told
    lines, told = setup("535.104.05")
    assert lines[0] == "venv" and cupy_of(lines) == ["12"]
    assert told.count("\n") == 2 and "driver 535 is older than 580" in told
    assert setup(None) == ([], "")  # a front end without a GPU, on the same file system


def test_both_files_ask_for_the_same_but_for_cuda():
    def others(name):
        lines = (ROOT / name).read_text().splitlines()
        return [line for line in lines if line and not re.match(r"#|torch|cupy", line)]

    assert others("requirements.txt") == others("requirements-cuda12.txt")
