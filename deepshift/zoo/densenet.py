"""CIFAR-10 DenseNets without bottlenecks or compression, growth 12 (not the ImageNet networks of these numbers)."""

import torch
import torch.nn.functional as F
from torch import nn

from deepshift.zoo.initial import initialise

GROWTH = 12


class DenseLayer(nn.Module):
    """bn, relu, 3x3 to 12 channels, appended to the input."""

    def __init__(self, inputs):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, GROWTH, 3, 1, 1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)


class Transition(nn.Module):
    """bn, relu, 1x1, halved resolution."""

    def __init__(self, channels):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """depth = 3 n + 4: three blocks of n layers. Raises ValueError for another depth."""

    def __init__(self, depth):
        super().__init__()
        if (depth - 4) % 3:
            raise ValueError(f"the depth of a DenseNet must be 3 n + 4, not {depth}")
        channels = 2 * GROWTH
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        for block in range(1, 4):
            layers = [DenseLayer(channels + GROWTH * index) for index in range((depth - 4) // 3)]
            channels += GROWTH * len(layers)
            self.add_module(f"dense{block}", nn.Sequential(*layers))
            if block < 3:
                self.add_module(f"trans{block}", Transition(channels))
        self.bn, self.fc = nn.BatchNorm2d(channels), nn.Linear(channels, 10)
        initialise(self)

    def forward(self, x):
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(F.avg_pool2d(F.relu(self.bn(x)), 8).flatten(1))


MODELS = {f"densenet{depth}": lambda depth=depth: DenseNet(depth) for depth in (40, 121, 169)}
