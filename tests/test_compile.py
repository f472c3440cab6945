"""--compile: one graph for each size of a batch, compiled once; none that fits any size, which is slower."""

import functools
from importlib import import_module

import pytest
import torch

# Script, where it loads its images, flags. 24 images in batches of 16: every epoch ends with a shorter batch.
SMALL = ["--embedded-data", "--train-size=24", "--epochs=2", "--device=cpu", "--seed=7", "--compile"]
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
    yield found
    torch._dynamo.reset()


@pytest.mark.parametrize("paper", TRAIN)
def test_a_shorter_last_batch_makes_no_graph_of_any_size(paper, graphs, monkeypatch, tmp_path):
    script, place, flags = TRAIN[paper]
    inputs = import_module(f"{paper}.{place}")
    whole = inputs.load_digits_set
    monkeypatch.setattr(inputs, "load_digits_set", lambda split, **more: whole(split, **more).subset(24))
    assert not import_module(f"{paper}.{script}").main([*flags, *SMALL, f"--output-dir={tmp_path}"])
    drops_the_last = paper == "epsilon_resnet"  # as its original: a step is always a whole batch
    assert graphs == [False] * (1 if drops_the_last else 2)
