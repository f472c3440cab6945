"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def _shared_dir():
    return Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared_dir():
    """Folder with the real data sets and reference checkpoints; skips, loudly, where it is absent."""
    folder = _shared_dir()
    if not (folder / "data").is_dir():
        pytest.skip(f"real data not found at {folder} (set SHARED_DIR to the folder that holds data/)")
    return folder


@pytest.fixture(scope="session")
def real_data_dir(shared_dir, tmp_path_factory):
    """Real CIFAR-10 and MNIST in torchvision's layout, unpacked once per test session."""
    import subprocess
    import sys

    target = tmp_path_factory.mktemp("real-data")
    subprocess.run(
        [sys.executable, str(shared_dir / "data" / "unpack.py"), str(target)], check=True, capture_output=True
    )
    return target


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` need a device; elsewhere they are listed as skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
