"""--compile: one graph for each size of a batch, compiled once; none that fits any size, which is slower."""

import functools
from importlib import import_module

import pytest
import torch

from common.checkpoints import load_checkpoint

# Script, where it loads its images, flags. 24 images in batches of 16: every epoch ends with a shorter batch.
SMALL = ["--embedded-data", "--train-size=24", "--epochs=2", "--device=cpu", "--seed=7"]
TRAIN = {
    "shiftresnet": ("main", "engine", ["--arch=shiftresnet20", "--expansion=1", "--batch_size=16"]),
    "deepshift": ("mnist", "tasks", ["--type=linear", "--shift-type=PS", "--shift-depth=1", "--batch-size=16"]),
    "s3": ("main", "inputs", ["--dataset=digits", "--arch=resnet8", "--batch-size=16"]),
    "shared_bases": ("train_cifar10", "engine", ["--model=ResNet32", "--batch_size=16"]),
    "epsilon_resnet": ("cifarEpsilonResnet", "inputs", ["-n=2", "-e=8", "-o=t", "--cifar10", "--batch_size=16"]),
}


@pytest.fixture
def graphs(monkeypatch):
    """For each graph that a training compiles: whether it fits batches of any size. Nothing is generated, it runs."""
    found = []

    def backend(graph, inputs):
        found.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield found
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def saved_weights(folder):
    """The state dict of the run's last checkpoint."""
    paths = [path for name in ("last.pt", "checkpoint.pth.tar", "model-*.pth") for path in folder.rglob(name)]
    content = load_checkpoint(max(paths, key=lambda path: path.stat().st_mtime_ns))
    return next(content[name] for name in ("net", "net_state_dict", "model", "state_dict") if name in content)


@pytest.mark.parametrize("paper", TRAIN)
def test_compiled_runs_train_the_same_network(paper, graphs, monkeypatch, tmp_path):
    """As without --compile, by one graph for each size of a batch; --deterministic, given too, makes its settings."""
    script, place, flags = TRAIN[paper]
    inputs = import_module(f"{paper}.{place}")
    whole = inputs.load_digits_set
    monkeypatch.setattr(inputs, "load_digits_set", lambda split, **more: whole(split, **more).subset(24))
    main = import_module(f"{paper}.{script}").main
    assert not main([*flags, *SMALL, f"--output-dir={tmp_path / 'plain'}"])
    assert torch.backends.cudnn.benchmark == (paper != "s3")  # whose --seed is that of its original, and sets it
    assert not torch.are_deterministic_algorithms_enabled()
    assert not main([*flags, *SMALL, "--compile", "--deterministic", f"--output-dir={tmp_path / 'compiled'}"])
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    plain, compiled = (saved_weights(tmp_path / name) for name in ("plain", "compiled"))
    torch.testing.assert_close(compiled, plain, atol=1e-4, rtol=1e-4)
    drops_the_last = paper == "epsilon_resnet"  # as its original: a step is always a whole batch
    assert graphs == [False] * (1 if drops_the_last else 2)
