"""ResNeXt, DPN, PNASNet and SENet for CIFAR-10."""

import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def _projection(inputs, outputs, stride):
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3, 1x1 to twice the group width."""

    def __init__(self, inputs, cardinality, width, stride):
        super().__init__()
        planes = cardinality * width
        self.conv1, self.bn1 = _conv(inputs, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride, cardinality), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, 2 * planes), nn.BatchNorm2d(2 * planes)
        reshapes = stride != 1 or inputs != 2 * planes
        self.shortcut = _projection(inputs, 2 * planes, stride) if reshapes else nn.Sequential()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNeXt(nn.Module):
    """resnext29: three stages of three blocks; the stem is a 1x1 convolution."""

    def __init__(self, cardinality, width):
        super().__init__()
        self.conv1, self.bn1, inputs = _conv(3, 64), nn.BatchNorm2d(64), 64
        for stage in range(3):
            layers, group = [], width * 2**stage
            for index in range(3):
                layers.append(ResNeXtBlock(inputs, cardinality, group, 2 if stage and not index else 1))
                inputs = 2 * cardinality * group
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


class DPNBlock(nn.Module):
    """1x1, 3x3 in 32 groups, 1x1; `outputs` channels are added, `dense` more are appended."""

    def __init__(self, inputs, planes, outputs, dense, stride, is_first):
        super().__init__()
        self.outputs = outputs
        self.conv1, self.bn1 = _conv(inputs, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride, 32), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, outputs + dense), nn.BatchNorm2d(outputs + dense)
        self.shortcut = _projection(inputs, outputs + dense, stride) if is_first else nn.Sequential()

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        x, y, d = self.shortcut(x), self.bn3(self.conv3(y)), self.outputs
        return F.relu(torch.cat([x[:, :d] + y[:, :d], x[:, d:], y[:, d:]], 1))


class DPN(nn.Module):
    """Dual path network: four stages."""

    WIDTHS = ((96, 256, 16), (192, 512, 32), (384, 1024, 24), (768, 2048, 128))  # inner, added, appended

    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1, inputs = _conv(3, 64, 3), nn.BatchNorm2d(64), 64
        for stage, ((planes, outputs, dense), count) in enumerate(zip(self.WIDTHS, blocks, strict=True)):
            layers = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                layers.append(DPNBlock(inputs, planes, outputs, dense, stride, index == 0))
                inputs = outputs + (index + 2) * dense
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(inputs, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class SepConv(nn.Module):
    """One grouped convolution, groups = inputs, and batch norm; no pointwise part."""

    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, kernel, stride, inputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn1(self.conv1(x))


class CellA(nn.Module):
    """relu(7x7 + max pooling)."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.stride = stride
        self.sep_conv1 = SepConv(inputs, outputs, 7, stride)
        if stride == 2:
            self.conv1, self.bn1 = _conv(inputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, self.stride, 1)
        if self.stride == 2:
            pooled = self.bn1(self.conv1(pooled))
        return F.relu(self.sep_conv1(x) + pooled)


class CellB(nn.Module):
    """relu(7x7 + 3x3) beside relu(max pooling + 5x5), joined and mixed by a 1x1 convolution."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.stride = stride
        for number, kernel in enumerate((7, 3, 5), 1):
            self.add_module(f"sep_conv{number}", SepConv(inputs, outputs, kernel, stride))
        if stride == 2:
            self.conv1, self.bn1 = _conv(inputs, outputs), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(2 * outputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        pooled = F.max_pool2d(x, 3, self.stride, 1)
        if self.stride == 2:
            pooled = self.bn1(self.conv1(pooled))
        first = F.relu(self.sep_conv1(x) + self.sep_conv2(x))
        second = F.relu(pooled + self.sep_conv3(x))
        return F.relu(self.bn2(self.conv2(torch.cat([first, second], 1))))


class PNASNet(nn.Module):
    """Six cells, then twice a cell that halves the resolution and six cells of double width."""

    def __init__(self, cell, planes):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, planes, 3), nn.BatchNorm2d(planes)
        for stage in range(3):
            width = planes * 2**stage
            if stage:
                self.add_module(f"layer{2 * stage}", cell(width // 2, width, 2))
            self.add_module(f"layer{2 * stage + 1}", nn.Sequential(*(cell(width, width) for _ in range(6))))
        self.linear = nn.Linear(4 * planes, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5):
            x = layer(x)
        return self.linear(F.avg_pool2d(x, 8).flatten(1))


class SEBlock(nn.Module):
    """Pre-activated 3x3, 3x3 with squeeze-and-excitation; the shortcut convolution sees the activated input."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, planes, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), _conv(planes, planes, 3)
        self.shortcut = None
        if stride != 1 or inputs != planes:
            self.shortcut = nn.Sequential(_conv(inputs, planes, 1, stride))
        self.fc1, self.fc2 = nn.Conv2d(planes, planes // 16, 1), nn.Conv2d(planes // 16, planes, 1)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        scale = self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
        return y * scale + shortcut


class SENet18(nn.Module):
    """Four stages of two blocks; no batch norm before the pooling."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, inputs = _conv(3, 64, 3), nn.BatchNorm2d(64), 64
        for stage in range(4):
            planes = 64 * 2**stage
            blocks = [SEBlock(inputs, planes, 2 if stage else 1), SEBlock(planes, planes, 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            inputs = planes
        self.linear = nn.Linear(512, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


_RESNEXT = ((2, 64), (4, 64), (8, 64), (32, 4))
MODELS = {
    **{f"resnext29_{c}x{w}d": lambda c=c, w=w: ResNeXt(c, w) for c, w in _RESNEXT},
    "dpn26": lambda: DPN((2, 2, 2, 2)),
    "dpn92": lambda: DPN((3, 4, 20, 3)),
    "pnasneta": lambda: PNASNet(CellA, 44),
    "pnasnetb": lambda: PNASNet(CellB, 32),
    "senet18": SENet18,
}
