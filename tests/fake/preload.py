"""What every process with fake GPUs imports: once, in the process that the others are forked from."""

import contextlib

import torch

torch.set_num_threads(1)  # no threads before the forks

import tests.fake_cuda  # noqa: F401

for name in ("torchvision.models", "torch._dynamo.config", "sklearn.datasets", "tensorboardX", "torch._refs"):
    with contextlib.suppress(ImportError):
        __import__(name)
with torch._subclasses.fake_tensor.FakeTensorMode():  # what its first operations import
    torch.nn.functional.conv2d(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 1, 1)).sum()
