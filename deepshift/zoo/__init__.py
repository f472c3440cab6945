"""All networks of the three scripts, by data set and name: topology only, no loss, optimizer or data."""

from torch import nn

DATASETS = ("mnist", "cifar10", "imagenet")
INPUT_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}


def architectures(dataset: str) -> tuple[str, ...]:
    """Names that `build_model` knows for mnist, cifar10 or imagenet, sorted. Raises ValueError for another data set."""
    return tuple(sorted(_table(dataset)))


def build_model(dataset: str, arch: str) -> nn.Module:
    """A float network with its initial weights, drawn from torch's global generator. Raises ValueError for others."""
    table = _table(dataset)
    if arch not in table:
        raise ValueError(f"no network {arch!r} for {dataset}; choose from {', '.join(sorted(table))}")
    return table[arch]()


def _table(dataset):
    if dataset == "mnist":
        from deepshift.zoo.mnist import MODELS
    elif dataset == "cifar10":
        from deepshift.zoo.cifar10 import MODELS
    elif dataset == "imagenet":
        from deepshift.zoo.imagenet import models

        return models()
    else:
        raise ValueError(f"unknown data set {dataset!r}; choose from {', '.join(DATASETS)}")
    return MODELS
