"""numba and CuPy are optional: without them slower paths take over, say so once, and give the same bits."""

import subprocess
import sys
from pathlib import Path

import torch

from common.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
NAME = "shiftresnet20_1.0"
RUN = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None  # importing it raises ImportError
from shiftresnet import engine, main
sys.exit(engine.run_script(main.main, sys.argv[1:]))
"""


def train(folder, without):
    data = ["--embedded-data", "--train-size=64", "--batch_size=32", "--epochs=1"]
    flags = ["--arch=shiftresnet20", *data, "--device=cpu", "--seed=7", f"--output-dir={folder}"]
    command = [sys.executable, "-c", RUN, without, *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr, load_checkpoint(folder / NAME / "last.pt")


def test_training_without_numba_and_cupy_gives_the_same_bits(tmp_path):
    quiet, reference = train(tmp_path / "with", without="no_such_library")
    assert quiet == ""
    warnings, state = train(tmp_path / "without", without="numba,cupy,cupyx,llvmlite")
    assert warnings.count("numba") >= 1 and len(warnings.splitlines()) <= 3  # shift, the fused one, loader
    assert all(torch.equal(state["net"][name], reference["net"][name]) for name in reference["net"])
