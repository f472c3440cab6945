"""Every script on GPUs that are not there: that it runs, where its tensors are, and what its steps wait for."""

import os
from collections import Counter

import pytest

from tests.fake import kernels
from tests.fake.cases import CASES
from tests.fake.child import run
from tests.fake.log import ROOT, steady, steady_steps

STEPS = 2  # of the middle of a pass, at least, for a statement about its steps
BENCHMARKS = [
    "bench_shift_cuda.py --repeats=3 --warmup=1 --no-csv --mebibytes=1 --batches 2 --dtypes bf16 --parts bandwidth host",
    "bench_bitshift_cuda.py --repeats=3 --warmup=1 --no-csv --bits 4 --sizes 64x64 --batches 1 --int8-batches 32 "
    "--image-batches 1 --image=32 --parts linear int8",
    "bench_deepshift_training.py --arch=resnet20 --batch-size=8 --repeats=1",
    "bench_s3_training.py --batch-size=2 --repeats=1 --image-size=32 --parts",
    "bench_epsilon_resnet.py -n=2 --batch-size=4 --repeats=3 --no-csv",
    "bench_shared_bases.py --batch-size=2 --repeats=1",
]
by_script = pytest.mark.parametrize("case", CASES, ids=lambda case: case.script)


@pytest.fixture
def folder(tmp_path, tmp_path_factory):
    """Where a script runs. Its ./data is shared by all tests of a session, whose embedded images take a second."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "fake-cuda-data"
    shared.mkdir(exist_ok=True)
    (tmp_path / "data").symlink_to(shared)
    return tmp_path


def require_device(outcome, name, device):
    """The script ended well; everything was computed on `device`, by the fastest way, with launches that CUDA takes."""
    assert outcome["status"] == 0, f"{name}: {outcome.text}"
    assert not outcome["notes"], f"{name} fell back to something slower: {outcome['notes']}"
    others = Counter({f"{where} on {at}": n for at, where, n in outcome["products"] if at not in (device, "meta")})
    assert not others, f"{name}: convolutions or matrix products were not on {device}: {dict(others)}"
    assert set(outcome["parameters"]) <= {device}, f"{name}: an optimizer has parameters on {outcome['parameters']}"
    faults = [fault for call in outcome["launches"] if call["stem"] != "jiterator" for fault in kernels.faults(call)]
    assert not faults, f"{name}: {faults}"


def require_no_waiting(outcome, name, training, allowed=()):
    """In the middle of every pass no step reads from the device or waits for a copy to it."""
    assert not training or steady_steps(outcome, training) >= STEPS, f"{name}: too few steps: {outcome['passes']}"
    found = {where: often for where, often in steady(outcome, training).items()
             if not any(name in where for name in allowed)}  # fmt: skip
    listed = "\n".join(f"  {where}: {often:.2f} per step" for where, often in found.items())
    assert not found, f"{name}: the host waits for the device in a step of {'training' if training else 'testing'}:\n{listed}"


def print_places(outcome, name):
    """Everything that waited, for whoever asks with `pytest -rP`: outside of steps that is allowed."""
    places = Counter()
    for kind, operation, where, *_, count in outcome["events"]:
        places[f"{kind} at {where} by {operation}"] += count
    print(f"{name}: in all", *(f"  {count:5d}  {what}" for what, count in sorted(places.items())), sep="\n")


def train(case, folder, device, *flags, gpus, allowed=()):
    outcome = run(case.path, *case.flags, "--seed=1", *flags, gpus=gpus, folder=folder)
    print_places(outcome, case.script)
    require_device(outcome, case.script, device)
    assert outcome["parameters"], f"{case.script}: no optimizer made a step"
    require_no_waiting(outcome, case.script, True, allowed)
    require_no_waiting(outcome, case.script, False)
    return outcome


def evaluate(case, folder, device, *flags, gpus):
    for command in case.evaluations:
        script, *own = command
        name = " ".join(command)
        takes_device = "convert" not in script
        outcome = run(str(ROOT / script), *own, *(flags if takes_device else ()), gpus=gpus, folder=folder)
        if command in case.ends:
            assert outcome["status"] == 1 and case.ends[command] in outcome["output"], f"{name}: {outcome.text}"
            continue
        require_device(outcome, name, device)
        assert outcome["products"] or not takes_device, f"{name} computed nothing"
        if "--use-kernel" not in name:  # which compares each batch on the host
            require_no_waiting(outcome, name, False)


@by_script
def test_default_device(case, folder):
    """Trained with one GPU, tested with two: `auto` takes the first."""
    train(case, folder, "cuda:0", "--epochs=2", gpus=1)
    evaluate(case, folder, "cuda:0", gpus=2)


@by_script
def test_second_gpu(case, folder):
    """cuda:1 of two, in bfloat16 and channels-last."""
    train(case, folder, "cuda:1", "--epochs=1", "--device=cuda:1", "--amp=bf16", "--channels-last", gpus=2)
    evaluate(case, folder, "cuda:1", "--device=cuda:1", gpus=2)


@by_script
def test_recorded_steps(case, folder):
    """--cuda-graph: nothing in a recording waits, no memory that it reads is freed before a replay."""
    outcome = train(case, folder, "cuda:0", "--epochs=2", "--cuda-graph", gpus=1, allowed=("capture.py",))
    assert outcome["replays"] > 0, f"{case.script}: no step was replayed"


@pytest.mark.parametrize("command", BENCHMARKS, ids=lambda command: command.split()[0])
def test_benchmarks(command, folder):
    script, *flags = command.split()
    outcome = run(str(ROOT / "benchmarks" / script), *flags, "--device=cuda", folder=folder)
    require_device(outcome, command, "cuda:0")
