"""Initialisation that several of the original's networks share."""

import math

from torch import nn


def initialise(model: nn.Module, batchnorm_weight: float | None = 0.5):
    """Convolutions N(0, sqrt(2 / (k^2 * outputs))) with zero bias, batch-norm scales `batchnorm_weight`, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and batchnorm_weight is not None:
            nn.init.constant_(module.weight, batchnorm_weight)
            nn.init.zeros_(module.bias)


def initialise_linear(model: nn.Module):
    """Linear layers N(0, 0.01), bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
