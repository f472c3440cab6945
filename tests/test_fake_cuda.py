"""Every script on GPUs that are not there: that it runs, where its tensors are, and what its steps wait for."""

import os
from collections import Counter

import pytest

from tests.fake import kernels
from tests.fake.cases import CASES, NAMES_OF_DEVICES, SCRIPTS, VARIANTS
from tests.fake.child import run
from tests.fake.log import ROOT, steady, steady_steps

# Functions that may read around the steps of an epoch, and how often: the check for a finite loss (every 100 steps and
# at the end), the epoch's numbers, and what is printed after its first step.
READS_AN_EPOCH = {"first_bad": 1, "result": 3, "train_one_epoch": 1, "advance": 1, "_show_first_losses": 3}
STEPS = 1  # of the middle of a pass, at least, for a statement about its steps
BENCHMARKS = [
    "bench_shift_cuda.py --repeats=3 --warmup=1 --no-csv --mebibytes=1 --dtypes bf16 --parts bandwidth host",
    "bench_bitshift_cuda.py --repeats=3 --warmup=1 --no-csv --bits 4 --sizes 64x64 --batches 1 --int8-batches 32 "
    "--image-batches 1 --image=32 --parts linear int8",
    "bench_deepshift_training.py --arch=resnet20 --batch-size=8 --repeats=1",
    "bench_s3_training.py --batch-size=2 --repeats=1 --image-size=32 --parts",
    "bench_epsilon_resnet.py -n=2 --batch-size=4 --repeats=3 --no-csv",
    "bench_shared_bases.py --batch-size=2 --repeats=1",
]
PAPERS = ("shiftresnet", "deepshift", "s3", "shared_bases", "epsilon_resnet")
ON_THE_HOST = {"convert", "count", "checkpoints", "plot", "plot_orthogonality", "plot_tradeoff", "similarity"}
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
    kind = "training" if training else "testing"
    assert not found, f"{name}: the host waits for the device in a step of {kind}:\n{listed}"


def require_known_places(outcome, name):
    """What reads in an epoch of training, outside of the middle too, and how often."""
    epochs = {index for index, each in enumerate(outcome["passes"]) if each["training"] and each["steps"]}
    reads = Counter()
    for kind, _, where, index, _, count in outcome["events"]:
        if kind != "upload" and index in epochs:
            reads[where.rpartition(" ")[2], where] += count
    for (function, where), count in reads.items():
        often, most = count / len(epochs), READS_AN_EPOCH.get(function, 0)
        assert often <= most, f"{name}: reads from the device {often:g} times an epoch, not {most}, at {where}"


def print_places(outcome, name):
    """Everything that waited, for whoever asks with `pytest -rP`: outside of steps that is allowed."""
    places = Counter()
    for kind, operation, where, *_, count in outcome["events"]:
        places[f"{kind} at {where} by {operation}"] += count
    print(f"{name}: in all", *(f"  {count:5d}  {what}" for what, count in sorted(places.items())), sep="\n")


def train(case, folder, device, *flags, gpus, allowed=(), environment=None):
    every = [*case.flags, "--seed=1", "--epochs=2", *flags]
    outcome = run(case.path, *every, gpus=gpus, folder=folder, environment=environment)
    print_places(outcome, case.script)
    require_device(outcome, case.script, device)
    assert outcome["parameters"], f"{case.script}: no optimizer made a step"
    require_no_waiting(outcome, case.script, True, allowed)
    require_no_waiting(outcome, case.script, False)
    if not allowed:
        require_known_places(outcome, case.script)
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


def test_every_script_is_here():
    """Every script is run below, or computes on the host only."""
    texts = {path: path.read_text() for paper in PAPERS for path in (ROOT / paper).glob("*.py")}
    scripts = {str(path.relative_to(ROOT)) for path, text in texts.items()
               if '__name__ == "__main__"' in text and path.stem not in ON_THE_HOST}  # fmt: skip
    assert scripts == {script for script in SCRIPTS if script != "s3/convert.py"}


@by_script
def test_default_device(case, folder):
    """Trained with one GPU, tested with two: `auto` takes the first."""
    train(case, folder, "cuda:0", gpus=1)
    evaluate(case, folder, "cuda:0", gpus=2)


@by_script
def test_second_gpu(case, folder):
    """cuda:1 of two, in bfloat16 and channels-last."""
    train(case, folder, "cuda:1", "--device=cuda:1", "--amp=bf16", "--channels-last", gpus=2)
    evaluate(case, folder, "cuda:1", "--device=cuda:1", gpus=2)


@by_script
def test_recorded_steps(case, folder):
    """--cuda-graph: nothing in a recording waits, no memory that it reads is freed before a replay."""
    outcome = train(case, folder, "cuda:0", "--cuda-graph", gpus=1, allowed=("capture.py",))
    assert outcome["replays"] > 0, f"{case.script}: no step was replayed"


@pytest.mark.parametrize(("case", "flags", "gpus", "environment", "device"), [*VARIANTS, *NAMES_OF_DEVICES])
def test_variants(case, flags, gpus, environment, device, folder):
    """Other methods, optimizers and precisions; every other way to name a GPU."""
    allowed = ("_local_scalar_dense",) if "--amp=fp16" in flags else ()
    train(case, folder, device, "--epochs=1", *flags, gpus=gpus, allowed=allowed, environment=environment)


def ilsvrc_on_all_gpus(script):
    """What the script starts, instead of starting it."""
    import os
    import runpy
    import sys

    os.execv = lambda program, words: sys.exit("started: " + " ".join(map(str, words)))
    sys.argv = [script, "--embedded-data", "--visible_device=0,1"]
    runpy.run_path(script, run_name="__main__")


def test_ilsvrc_takes_all_gpus(folder):
    script = str(ROOT / "shared_bases" / "train_ilsvrc.py")
    outcome = run(ilsvrc_on_all_gpus, script, gpus=2, folder=folder)
    words = f"torch.distributed.run --standalone --nproc-per-node=2 {script} --embedded-data --visible_device=0,1"
    assert words in str(outcome["status"]), outcome.text


def one_case_of_capture_gpu():
    """tests/capture_gpu.py, with few steps: bits are equal here whatever it does, but it must come to its end."""
    import sys

    from tests import capture_gpu

    capture_gpu.STEPS, capture_gpu.TIMED_STEPS, capture_gpu.BATCH = 8, 3, 16
    capture_gpu.CASES = capture_gpu.CASES[:1]
    sys.exit(capture_gpu.main(["--out=runs"]))


def test_capture_gpu(folder):
    outcome = run(one_case_of_capture_gpu, folder=folder)
    require_device(outcome, "tests/capture_gpu.py", "cuda:0")
    assert outcome["replays"] > 0 and len((folder / "runs" / "capture.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("command", BENCHMARKS, ids=lambda command: command.split()[0])
def test_benchmarks(command, folder):
    script, *flags = command.split()
    outcome = run(str(ROOT / "benchmarks" / script), *flags, "--device=cuda", folder=folder)
    require_device(outcome, command, "cuda:0")
