"""LeNet, VGG and GoogLeNet for CIFAR-10."""

import torch
import torch.nn.functional as F
from torch import nn

from deepshift.zoo.initial import initialise, initialise_linear


class LeNet(nn.Module):
    """Two 5x5 convolutions, three linear layers; all with bias."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


_VGG = {  # convolutions per stage; widths 64, 128, 256, 512, 512
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """3x3 convolutions with batch norm, max pooling after all stages but the last, one linear layer."""

    def __init__(self, depth):
        super().__init__()
        layers, inputs = [], 3
        for stage, count in enumerate(_VGG[depth]):
            width = min(512, 64 * 2**stage)
            for _ in range(count):
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            if stage < 4:
                layers.append(nn.MaxPool2d(2))
        self.feature, self.classifier = nn.Sequential(*layers), nn.Linear(512, 10)
        initialise(self)
        initialise_linear(self)

    def forward(self, x):
        return self.classifier(F.avg_pool2d(self.feature(x), 2).flatten(1))


def _unit(inputs, outputs, kernel):
    return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()]


class Inception(nn.Module):
    """Four branches: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; max pooling, 1x1."""

    def __init__(self, inputs, n1, reduce3, n3, reduce5, n5, pool):
        super().__init__()
        self.b1 = nn.Sequential(*_unit(inputs, n1, 1))
        self.b2 = nn.Sequential(*_unit(inputs, reduce3, 1), *_unit(reduce3, n3, 3))
        self.b3 = nn.Sequential(*_unit(inputs, reduce5, 1), *_unit(reduce5, n5, 3), *_unit(n5, n5, 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), *_unit(inputs, pool, 1))

    def forward(self, x):
        return torch.cat([self.b1(x), self.b2(x), self.b3(x), self.b4(x)], 1)


_INCEPTIONS = {
    "a3": (192, 64, 96, 128, 16, 32, 32), "b3": (256, 128, 128, 192, 32, 96, 64),
    "a4": (480, 192, 96, 208, 16, 48, 64), "b4": (512, 160, 112, 224, 24, 64, 64),
    "c4": (512, 128, 128, 256, 24, 64, 64), "d4": (512, 112, 144, 288, 32, 64, 64),
    "e4": (528, 256, 160, 320, 32, 128, 128), "a5": (832, 256, 160, 320, 32, 128, 128),
    "b5": (832, 384, 192, 384, 48, 128, 128),
}  # fmt: skip


class GoogLeNet(nn.Module):
    """Nine inception blocks; every convolution has a bias."""

    def __init__(self):
        super().__init__()
        self.pre_layers = nn.Sequential(*_unit(3, 192, 3))
        for name, sizes in _INCEPTIONS.items():
            self.add_module(name, Inception(*sizes))
        self.linear = nn.Linear(1024, 10)

    def forward(self, x):
        x = self.pre_layers(x)
        for name in _INCEPTIONS:
            if name in ("a4", "a5"):
                x = F.max_pool2d(x, 3, 2, 1)
            x = getattr(self, name)(x)
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


MODELS = {"lenet": LeNet, "googlenet": GoogLeNet, **{f"vgg{d}": lambda d=d: VGG(d) for d in _VGG}}
