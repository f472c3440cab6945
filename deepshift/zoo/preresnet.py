"""CIFAR-10 pre-activated ResNets with bottlenecks (preresnet20 to 164)."""

import torch.nn.functional as F
from torch import nn

from deepshift.zoo.initial import initialise


class PreBottleneck(nn.Module):
    """bn, relu, 1x1; bn, relu, 3x3; bn, relu, 1x1; `downsample` works on the input before its activation."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.downsample = None
        if stride != 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False))

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        return y + (x if self.downsample is None else self.downsample(x))


class PreResNet(nn.Module):
    """depth = 9 n + 2: three stages of n blocks, widths 16, 32, 64."""

    def __init__(self, depth):
        super().__init__()
        self.conv1, inputs = nn.Conv2d(3, 16, 3, 1, 1, bias=False), 16
        for stage in range(3):
            planes, layers = 16 * 2**stage, []
            for index in range((depth - 2) // 9):
                layers.append(PreBottleneck(inputs, planes, 2 if stage and not index else 1))
                inputs = 4 * planes
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.bn, self.fc = nn.BatchNorm2d(256), nn.Linear(256, 10)
        initialise(self)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.avg_pool2d(F.relu(self.bn(x)), 8)
        return self.fc(x.flatten(1))


MODELS = {f"preresnet{depth}": lambda depth=depth: PreResNet(depth) for depth in (20, 56, 110, 164)}
