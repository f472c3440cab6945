"""TensorBoard's events: written by whichever library is there, and no run needs one."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import sys
for name in ("tensorboardX", "tensorboard"):
    sys.modules[name] = None  # importing it raises ImportError
from importlib import import_module
paper, script = sys.argv[1:3]
sys.exit(import_module(f"{paper}.engine").run_script(import_module(f"{paper}.{script}").main, sys.argv[3:]))
"""
SMALL = ["--embedded-data", "--train-size=64", "--epochs=1", "--device=cpu", "--seed=7"]
TRAIN = {
    "shiftresnet": ["main", "--arch=shiftresnet20", "--expansion=1", "--batch_size=32"],
    "deepshift": ["mnist", "--type=linear", "--batch-size=32"],
    "s3": ["main", "--dataset=digits", "--arch=resnet8", "--batch-size=32"],
    "shared_bases": ["train_cifar10", "--model=ResNet32_SingleShared", "--shared_rank=1", "--batch_size=32"],
    "epsilon_resnet": ["cifarEpsilonResnet", "-n=2", "-e=8", "-o=t", "--cifar10", "--batch_size=16"],
}


def test_all_papers_have_the_same_text():
    assert len({(ROOT / paper / "events.py").read_bytes() for paper in TRAIN}) == 1


@pytest.mark.parametrize("paper", TRAIN)
def test_training_without_any_library_says_so_once_and_finishes(paper, tmp_path):
    command = [sys.executable, "-c", RUN, paper, *TRAIN[paper], *SMALL, f"--output-dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if "TensorBoard" in line]
    assert len(said) == 1 and said[0].startswith("no TensorBoard events, metrics.jsonl has the same numbers: ")
    (metrics,) = tmp_path.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["type"] for line in lines] == ["run", "epoch", "result"]
    assert not list(metrics.parent.glob("events.*"))


class Recorder:
    """A SummaryWriter that remembers what it was given."""

    def __init__(self, folder, purge_step=None):
        self.points, self.folder, self.purge_step = [], folder, purge_step

    def add_scalar(self, *point):
        self.points.append(point)


@pytest.fixture(params=TRAIN)
def events(request):
    """A paper's module, which remembers no library from before."""
    module = import_module(f"{request.param}.events")
    module._writer.cache_clear()
    yield module
    module._writer.cache_clear()


def test_the_second_library_takes_over(events, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Recorder))
    writer = events.open_events(Path("folder"), purge_step=3)
    writer.add_scalar("lr", 0.5, 3)
    assert (writer.folder, writer.purge_step, writer.points) == ("folder", 3, [("lr", 0.5, 3)])
    assert not caplog.records


def test_a_library_that_fails_in_another_way_stops_no_run(events, monkeypatch, caplog):
    def fail(name):
        raise TypeError(f"{name}: Descriptors cannot be created directly.\nmore")

    monkeypatch.setattr(events.importlib, "import_module", fail)
    for _ in range(2):
        writer = events.open_events("folder")
        writer.add_scalar("lr", 0.5, 3)
        writer.flush()
        writer.close()
    assert len(caplog.records) == 1 and "more" not in caplog.text and "Descriptors" in caplog.text
