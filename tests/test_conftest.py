"""What conftest.py does with skipped tests when everything is to be run (REQUIRE_ALL=1), and with very long ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPING = """
import pytest

@pytest.mark.parametrize("reason", ["no CUDA device here", "root may write anywhere", "numba is not installed"])
def test_skipped(reason):
    pytest.skip(reason)

@pytest.mark.skipif(True, reason="g++ not found")
def test_marked():
    pass

def test_import():
    pytest.importorskip("no_such_module")

@pytest.mark.full_evaluation
def test_long():
    pass
"""


def counts(folder, **environment):
    """The last line of pytest about SKIPPING."""
    (folder / "test_skipping.py").write_text(SKIPPING)
    unset = {name: value for name, value in os.environ.items() if name not in ("REQUIRE_ALL", "FULL_EVALUATION")}
    words = ["-m", "pytest", "-q", "-p", "tests.conftest", "-c", str(folder / "pytest.ini"), "-n", "0"]
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  full_evaluation: long\n")
    done = subprocess.run([sys.executable, *words, str(folder)], cwd=ROOT, env={**unset, **environment},
                          capture_output=True, text=True)  # fmt: skip
    return done.stdout.strip().splitlines()[-1].split(" in ")[0], done


@pytest.mark.parametrize("value", (None, "0", ""))
def test_by_default_skips_are_skips(tmp_path, value):
    last, done = counts(tmp_path, **({} if value is None else {"REQUIRE_ALL": value}))
    assert (last, done.returncode) == ("5 skipped, 1 deselected", 0)


def test_with_require_all_only_what_this_machine_cannot_have_is_skipped(tmp_path):
    last, done = counts(tmp_path, REQUIRE_ALL="1")
    # an error is a mark that skips before the test begins
    assert (last, done.returncode) == ("2 failed, 2 skipped, 1 deselected, 1 error", 1)
    for reason in ("numba is not installed", "g++ not found", "no_such_module"):
        assert "REQUIRE_ALL is set, and this was skipped: " in done.stdout and reason in done.stdout


def test_long_ones_run_on_request(tmp_path):
    assert counts(tmp_path, FULL_EVALUATION="1")[0] == "1 passed, 5 skipped"
