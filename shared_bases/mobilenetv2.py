"""MobileNetV2 for CIFAR-100 and ILSVRC2012, ordinary and with shared 1x1 convolutions; PyTorch's initialisation.

As in the original: plain ReLU inside the blocks (ReLU6 only in `pre` and `conv1`), biases before batch norm in these
two, and on CIFAR-100 a 1x1 stem with padding 1, whose border of one pixel sees the bias only.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from shared_bases.modules import conv1x1, conv3x3

EXPANSION = 6
STAGES = {  # name: channels, blocks, stride of the first block on CIFAR-100, on ILSVRC2012
    "stage2": (24, 2, 2, 2),
    "stage3": (32, 3, 2, 2),
    "stage4": (64, 4, 2, 2),
    "stage5": (96, 3, 1, 1),
    "stage6": (160, 3, 1, 2),
}
SHARED_STAGES = ("stage3", "stage4", "stage5", "stage6")


class ChannelAttention(nn.Module):
    """ECA: scales each channel by the sigmoid of a convolution over the pooled channels; 1 or 3 weights."""

    def __init__(self, channels: int):
        super().__init__()
        size = 1 if channels < 96 else 3
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.avg_pool(x).flatten(2).transpose(1, 2)  # (N, 1, C)
        return x * self.conv(pooled).sigmoid().transpose(1, 2).unsqueeze(3)


class InvertedResidual(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1.

    project: add a projection where stride is 1 and the channels change (CIFAR-100); else nothing is added there.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, project: bool):
        super().__init__()
        wide = expansion * in_channels
        self.conv1 = conv1x1(in_channels, wide)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = conv3x3(wide, wide, stride, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = conv1x1(wide, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.adds = stride == 1 and (project or in_channels == out_channels)
        self.shortcut = nn.Sequential()
        if self.adds and in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y + self.shortcut(x) if self.adds else y


class SharedInvertedResidual(nn.Module):
    """InvertedResidual of stride 1 that shares its expansion, or expansion and projection, with its stage.

    shared: [expansion] or [expansion, projection]. attention: ChannelAttention before the addition.
    """

    def __init__(self, channels: int, shared: list[nn.Conv2d], attention: bool):
        super().__init__()
        wide = EXPANSION * channels
        self.shared_basis1 = shared[0]
        if len(shared) == 2:
            self.shared_basis2 = shared[1]
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = conv3x3(wide, wide, groups=wide)
        self.bn2 = nn.BatchNorm2d(wide)
        if len(shared) == 1:
            self.conv3 = conv1x1(wide, channels)
        self.bn3 = nn.BatchNorm2d(channels)
        self.project_name = "conv3" if len(shared) == 1 else "shared_basis2"
        self.chan_attention = ChannelAttention(channels) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.shared_basis1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(getattr(self, self.project_name)(y))
        return x + (y if self.chan_attention is None else self.chan_attention(y))


class MobileNetV2(nn.Module):
    """num_bases: 0, 1 (shared expansion) or 2 (also shared projection) in stages 3 to 6.

    attention: see the shared block. imagenet: the layout for ILSVRC2012 instead of CIFAR-100.
    """

    def __init__(self, num_classes: int, imagenet: bool, num_bases: int = 0, attention: bool = False):
        super().__init__()
        stem = nn.Conv2d(3, 32, 3, stride=2, padding=1) if imagenet else nn.Conv2d(3, 32, 1, padding=1)
        self.pre = nn.Sequential(stem, nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = InvertedResidual(32, 16, 1, expansion=1, project=not imagenet)
        in_channels = 16
        for name, (channels, depth, *strides) in STAGES.items():
            shared = []
            if name in SHARED_STAGES:
                wide = EXPANSION * channels
                shared = [conv1x1(channels, wide), conv1x1(wide, channels)][:num_bases]
            for number, basis in enumerate(shared, 1):
                group = SHARED_STAGES.index(name) + 1
                self.add_module(f"shared_basis_{group}" + (f"_{number}" if num_bases == 2 else ""), basis)
            blocks = [InvertedResidual(in_channels, channels, strides[imagenet], EXPANSION, not imagenet)]
            for _ in range(depth - 1):
                if shared:
                    blocks.append(SharedInvertedResidual(channels, shared, attention))
                else:
                    blocks.append(InvertedResidual(channels, channels, 1, EXPANSION, not imagenet))
            self.add_module(name, nn.Sequential(*blocks))
            in_channels = channels
        self.stage7 = InvertedResidual(160, 320, 1, EXPANSION, project=not imagenet)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        if imagenet:
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        else:
            self.conv2 = nn.Conv2d(1280, num_classes, 1)
        self.imagenet = imagenet

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) floating, normalised. Returns logits (N, num_classes)."""
        y = self.stage1(self.pre(x))
        for name in STAGES:
            y = getattr(self, name)(y)
        y = F.adaptive_avg_pool2d(self.conv1(self.stage7(y)), 1)
        return self.classifier(y.flatten(1)) if self.imagenet else self.conv2(y).flatten(1)
