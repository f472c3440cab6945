"""CIFAR-10 ResNets: three stages (resnet20 to 1202) and four stages (resnet18 to 152), as in the original's zoo."""

import torch.nn.functional as F
from torch import nn


def conv3x3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters: every second pixel, zero channels on both sides."""

    expansion = 1

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.reshapes = stride != 1 or inputs != planes
        self.margin = planes // 4  # of channels, on each side; every widening here is a doubling

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.reshapes:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.margin, self.margin))
        return F.relu(y + x)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the shortcut is a 1x1 convolution where the shape changes."""

    expansion = 4

    def __init__(self, inputs, planes, stride):
        super().__init__()
        outputs = self.expansion * planes
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of blocks (widths double, the first with stride 1), global average, classifier of 10."""

    def __init__(self, block, width, blocks):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, width), nn.BatchNorm2d(width)
        self.stages, inputs = [], width
        for stage, count in enumerate(blocks):
            planes, layers = width * 2**stage, []
            for index in range(count):
                layers.append(block(inputs, planes, 2 if stage and not index else 1))
                inputs = planes * block.expansion
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.linear(x.mean((2, 3)))


_CIFAR = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18, 1202: 200}  # depth: blocks per stage
_IMAGENET_STYLE = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
MODELS = {
    **{f"resnet{depth}": lambda n=n: ResNet(BasicBlock, 16, (n, n, n)) for depth, n in _CIFAR.items()},
    **{f"resnet{depth}": lambda b=b, n=n: ResNet(b, 64, n) for depth, (b, n) in _IMAGENET_STYLE.items()},
}
