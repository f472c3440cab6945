"""ResNets whose block and shortcut convolutions are S3, DenseShift or float; topology and names of the original.

Stem convolution, batch norms and classifier are float. ImageNet: depths 18 to 152; CIFAR: 6n + 2, three stages.
"""

import math

import torch.nn.functional as F
from torch import nn

from s3.s3conv2dshift import STARTS, DenseShiftConv2d, LatentConv2d, S3Conv2d

METHODS = ("s3", "denseshift", "float")
IMAGENET_DEPTHS = (18, 34, 50, 101, 152)
CIFAR_DEPTHS = (8, 14, 18, 20, 26, 32, 38, 44, 50, 56, 110)
CLASSES = {"imagenet": 1000, "cifar10": 10, "cifar100": 100, "mnist": 10, "digits": 10}
DATASETS = tuple(CLASSES)


def architectures(dataset: str) -> list[str]:
    """Names for build_resnet, such as resnet18."""
    return [f"resnet{depth}" for depth in (IMAGENET_DEPTHS if dataset == "imagenet" else CIFAR_DEPTHS)]


class _Convolutions:
    """Makes the convolutions inside of blocks."""

    def __init__(self, method, bits):
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        self.method, self.bits = method, bits

    def __call__(self, inputs, outputs, size, stride=1):
        kinds = {"s3": S3Conv2d, "denseshift": DenseShiftConv2d, "float": nn.Conv2d}
        bits = {} if self.method == "float" else {"bits": self.bits}
        return kinds[self.method](inputs, outputs, size, stride, size // 2, bias=False, **bits)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut."""

    expansion = 1

    def __init__(self, convolution, inputs, planes, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = convolution(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 with four times the planes, and the shortcut."""

    expansion = 4

    def __init__(self, convolution, inputs, planes, stride, downsample):
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = convolution(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = convolution(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = downsample

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Logits (N, classes) of images (N, 3, H, W).

    As in the original the last average is over the upper left `pool` x `pool` of the final map: all of it at 224 pixels
    (ImageNet) or 32 (CIFAR). A smaller map is averaged whole. Raises ValueError where it is twice as large or more.
    """

    def __init__(self, convolution, block, stem, planes, blocks, pool, classes):
        super().__init__()
        size, stride, padding = stem
        self.conv1, self.bn1 = nn.Conv2d(3, planes[0], size, stride, padding, bias=False), nn.BatchNorm2d(planes[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.stages, self.pool, inputs = [], pool, planes[0]
        for index, (width, count) in enumerate(zip(planes, blocks, strict=True), 1):
            self.stages.append(f"layer{index}")
            strides = [1 if index == 1 else 2] + [1] * (count - 1)
            self.add_module(self.stages[-1], _stage(convolution, block, inputs, width, strides))
            inputs = width * block.expansion
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        height, width = x.shape[2:]
        if max(height, width) >= 2 * self.pool:
            raise ValueError(
                f"the images are too large: the last map is {height}x{width}, less than {2 * self.pool} fit"
            )
        return self.fc(F.avg_pool2d(x, (min(height, self.pool), min(width, self.pool))).flatten(1))


def _stage(convolution, block, inputs, planes, strides):
    blocks, outputs = [], planes * block.expansion
    for stride in strides:
        downsample = None
        if stride != 1 or inputs != outputs:
            downsample = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        blocks.append(block(convolution, inputs, planes, stride, downsample))
        inputs = outputs
    return nn.Sequential(*blocks)


def imagenet_resnet(depth: int, classes: int = 1000, method: str = "s3", bits: int = 3) -> ResNet:
    """ResNet of depth 18, 34, 50, 101 or 152. Raises ValueError for other depths, methods and bits."""
    counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    if depth not in counts:
        raise ValueError(f"depth must be one of {', '.join(map(str, counts))}, not {depth}")
    block = BasicBlock if depth < 50 else Bottleneck
    return ResNet(_Convolutions(method, bits), block, (7, 2, 3), (64, 128, 256, 512), counts[depth], 7, classes)


def cifar_resnet(depth: int, classes: int = 10, method: str = "s3", bits: int = 3) -> ResNet:
    """ResNet of (depth - 2) // 6 blocks per stage, at least one: 18 is the same as 14. Raises ValueError below 2."""
    if depth < 2:
        raise ValueError(f"depth must be at least 2, not {depth}")
    blocks = (max(1, (depth - 2) // 6),) * 3
    return ResNet(_Convolutions(method, bits), BasicBlock, (3, 1, 1), (16, 32, 64), blocks, 8, classes)


def build_resnet(dataset: str, arch: str, classes: int, method: str = "s3", bits: int = 3, start="default") -> ResNet:
    """The network of a data set with initialised weights; arch as in architectures(dataset). ValueError otherwise."""
    if arch not in architectures(dataset):
        raise ValueError(f"no {arch} for {dataset}; choose from {', '.join(architectures(dataset))}")
    make = imagenet_resnet if dataset == "imagenet" else cifar_resnet
    model = make(int(arch.removeprefix("resnet")), classes, method, bits)
    init_model(model, start)
    return model


def init_model(model: nn.Module, start: str = "default"):
    """The original's initialisation: He's by fan-out for every convolution's weight and latents, batch norms 1 and 0.

    start: "default", or "dense" (every S3 weight starts as +-1). Raises ValueError for another.
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, not {start!r}")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / fan_out))
        if isinstance(layer, LatentConv2d):
            layer.reset_latents(start)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
