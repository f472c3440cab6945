"""TF32 switched off where numbers are claimed to be exact.

On NVIDIA's GPUs since Ampere PyTorch lets cuDNN round the factors of a float32 convolution to TF32, to 10 of their 23
bits. The papers' numbers are older than that.
"""

import contextlib

import torch


@contextlib.contextmanager
def without_tf32():
    """Within it, or in a function that it decorates, float32 convolutions and products are float32 on a GPU too."""
    # PyTorch has two sets of names for these settings and raises where they are mixed: its own compiler reads these.
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in settings]
    try:
        for each in settings:
            each.allow_tf32 = False
        yield
    finally:
        for each, allowed in zip(settings, before, strict=True):
            each.allow_tf32 = allowed
