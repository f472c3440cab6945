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


# What may be missing even where every skip is to be a failure: a GPU, another user, an instruction set, and the real
# data sets, which are not part of the project.
MAY_SKIP = (
    "CUDA device", "compute capability", "root may write anywhere", "instruction set", "this processor has no",
    "real data not found",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Tests marked `gpu` need a device: elsewhere they are listed as skipped. `full_evaluation` is run on request."""
    wants_all = "FULL_EVALUATION" in os.environ
    config.hook.pytest_deselected(items=[i for i in items if "full_evaluation" in i.keywords and not wants_all])
    items[:] = [item for item in items if "full_evaluation" not in item.keywords or wants_all]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With REQUIRE_ALL=1 a skip for a missing numba, g++ or NVRTC fails: else kernels go untested and all is green."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("REQUIRE_ALL", "0") not in ("", "0"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(words in reason for words in MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"REQUIRE_ALL is set, and this was skipped: {reason}"
    return report
