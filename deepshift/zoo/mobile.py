"""MobileNets and EfficientNet-B0 for CIFAR-10."""

import torch.nn.functional as F
from torch import nn


def _conv(inputs, outputs, kernel=1, stride=1, groups=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Separable(nn.Module):
    """Depthwise 3x3, pointwise 1x1, batch norm and ReLU after each."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, inputs, 3, stride, inputs), nn.BatchNorm2d(inputs)
        self.conv2, self.bn2 = _conv(inputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class MobileNetV1(nn.Module):
    """13 separable convolutions."""

    CONFIG = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 32, 3), nn.BatchNorm2d(32)
        widths = [32, *(width for width, _ in self.CONFIG)]
        self.layers = nn.Sequential(
            *(Separable(widths[i], width, stride) for i, (width, stride) in enumerate(self.CONFIG))
        )
        self.linear = nn.Linear(1024, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(x, 2).flatten(1))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1; a shortcut (1x1 where the width changes) if the stride is 1."""

    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        self.stride, planes = stride, expansion * inputs
        self.conv1, self.bn1 = _conv(inputs, planes), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv(planes, planes, 3, stride, planes), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs), nn.BatchNorm2d(outputs))

    def transform(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))

    def forward(self, x):
        y = self.transform(x)
        return y + self.shortcut(x) if self.stride == 1 else y


class SqueezedResidual(InvertedResidual):
    """The same with squeeze-and-excitation; with stride 2 its own unscaled output takes the shortcut's place."""

    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__(inputs, outputs, expansion, stride)
        self.fc1, self.fc2 = nn.Conv2d(outputs, outputs // 16, 1), nn.Conv2d(outputs // 16, outputs, 1)

    def forward(self, x):
        y = self.transform(x)
        scale = self.fc2(F.relu(self.fc1(y.mean((2, 3), keepdim=True)))).sigmoid()
        # As in the original: where the stride is 2 the shortcut is y itself.
        return y * scale + (self.shortcut(x) if self.stride == 1 else y)


def _stages(block, config):
    """Blocks of (expansion, width, count, stride of the first) rows, and the width of the last."""
    blocks, inputs = [], 32
    for expansion, width, count, stride in config:
        for index in range(count):
            blocks.append(block(inputs, width, expansion, 1 if index else stride))
            inputs = width
    return nn.Sequential(*blocks), inputs


class MobileNetV2(nn.Module):
    """Inverted residuals, ReLU instead of ReLU6."""

    CONFIG = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 32, 3), nn.BatchNorm2d(32)
        self.layers, width = _stages(InvertedResidual, self.CONFIG)
        self.conv2, self.bn2 = _conv(width, 1280), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(F.avg_pool2d(x, 4).flatten(1))


class EfficientNetB0(nn.Module):
    """Inverted residuals with squeeze-and-excitation. The original's script cannot select it."""

    CONFIG = ((1, 16, 1, 2), (6, 24, 2, 1), (6, 40, 2, 2), (6, 80, 3, 2), (6, 112, 3, 1), (6, 192, 4, 2),
              (6, 320, 1, 2))  # fmt: skip

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 32, 3), nn.BatchNorm2d(32)
        self.layers, width = _stages(SqueezedResidual, self.CONFIG)
        self.linear = nn.Linear(width, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.flatten(1))


MODELS = {"mobilenetv1": MobileNetV1, "mobilenetv2": MobileNetV2, "efficientnetB0": EfficientNetB0}
