"""--amp and --deterministic through the scripts, and two nodes: DeepShift and S3 (test_compile.py has --compile)."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from common.checkpoints import load_checkpoint
from deepshift import cifar10
from deepshift.modules_q import LinearShiftQ
from s3 import main as s3_main
from tests.kills import few_digits
from tests.resumes import lines_of

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--embedded-data", "--device=cpu", "--train-size=24", "--batch-size=16", "--epochs=2", "--lr=0.01"]
SCRIPTS = {
    "deepshift": (cifar10, ["--arch=lenet", "--shift-type=Q", "--print-weights=no", "--save-model=no"]),
    "s3": (s3_main, ["--dataset=digits", "--arch=resnet8"]),
}


@pytest.fixture
def calls(monkeypatch):
    """(is training, type of the output, deterministic algorithms, cuDNN's benchmark) of every linear layer that ran."""
    monkeypatch.setattr("common.data.digits._read_digits", few_digits)
    found, before = set(), (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)

    def note(module, _, output):
        if isinstance(module, (nn.Linear, LinearShiftQ)):
            state = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
            found.add((module.training, output.dtype, *state))

    handle = nn.modules.module.register_module_forward_hook(note)
    yield found
    handle.remove()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def run(paper, folder, *flags):
    """Weights, and the lines of metrics.jsonl."""
    script, own = SCRIPTS[paper]
    assert script.main([*COMMON, *own, *flags, f"--output-dir={folder}"]) == 0
    (path,) = folder.rglob("checkpoint.pth.tar")
    return load_checkpoint(path)["state_dict"], lines_of(path.parent, "epoch")


@pytest.mark.parametrize("paper", SCRIPTS)
def test_bf16_is_for_training_only(paper, calls, tmp_path):
    weights, lines = run(paper, tmp_path / "bf16", "--seed=7", "--amp=bf16")
    assert {dtype for training, dtype, *_ in calls if training} >= {torch.bfloat16}
    assert {dtype for training, dtype, *_ in calls if not training} == {torch.float32}
    calls.clear()
    other, expected = run(paper, tmp_path / "off", "--seed=7")
    assert {dtype for _, dtype, *_ in calls} == {torch.float32}
    assert not all(torch.equal(weights[name], other[name]) for name in weights)
    assert lines[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=0.05)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights.values())


@pytest.mark.parametrize("paper", SCRIPTS)
def test_deterministic(paper, calls, tmp_path):
    plain, _ = run(paper, tmp_path / "plain", "--seed=7")
    seeded_is_enough = paper == "s3"  # whose original makes cuDNN deterministic for any --seed
    assert {state[2:] for state in calls} == {(False, not seeded_is_enough)}
    calls.clear()
    weights, _ = run(paper, tmp_path / "deterministic", "--seed=7", "--deterministic")
    assert {state[2:] for state in calls} == {(True, False)}
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_two_nodes_train_what_one_process_does(tmp_path):
    """Two calls of torchrun, a process each, as on two machines."""
    flags = [*COMMON, *SCRIPTS["deepshift"][1], "--seed=7", "--print-freq=100", "--epochs=1"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    nodes = []
    for rank in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={rank}",
                    "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip
        command = [*launcher, "deepshift/cifar10.py", *flags, f"--output-dir={tmp_path / 'nodes'}"]
        nodes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True))  # fmt: skip
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "Finished" in said[0] and "Finished" not in said[1], "the first node prints and writes"
    weights = load_checkpoint(next((tmp_path / "nodes").rglob("checkpoint.pth.tar")))["state_dict"]
    alone, _ = run("deepshift", tmp_path / "alone", *flags)
    for name, value in alone.items():  # float32: sums over a batch in two parts
        assert (weights[name] - value).abs().max() <= 1e-4 * value.abs().max(), name
