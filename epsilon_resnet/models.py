"""The networks: pre-activation ResNets for CIFAR/SVHN and ImageNet, with gates, without, and compressed.

build_model(Config("cifar", 18), epsilon=2.5)        # 110 layers, gates and side supervision
build_model(Config("imagenet", 101, 1000, gated=False))          # the baseline
build_model(Config("cifar", 18, structure=(17, 17, 18), discard_first_block=(0, 1, 0)))   # after compression
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from epsilon_resnet import modules

IMAGENET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn": 10, "imagenet": 1000}


class Output(NamedTuple):
    """What a network gives for a batch. side_logits and peaks are None in networks without gates.

    logits, side_logits: (N, classes). peaks: (blocks,) float32, max|F| of each block over the batch.
    """

    logits: Tensor
    side_logits: Tensor | None
    peaks: Tensor | None


@dataclass(frozen=True)
class Config:
    """All that decides a network's shape; `asdict` of it is stored in every checkpoint.

    arch: cifar (also for SVHN; size = blocks per group n, 6n + 2 layers) or imagenet (size = depth).
    gated: with gates and side branch. structure, discard_first_block: kept blocks of each group of a compressed
    network, and 1 for each group whose block 0 is only its shortcut; such a network has no gates.
    Raises ValueError for a network that does not exist.
    """

    arch: str
    size: int
    num_classes: int = 10
    gated: bool = True
    structure: tuple[int, ...] | None = None
    discard_first_block: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.arch not in ("cifar", "imagenet"):
            raise ValueError(f"unknown architecture {self.arch!r}; choose cifar or imagenet")
        if self.arch == "imagenet" and self.size not in IMAGENET_BLOCKS:
            raise ValueError(f"no depth {self.size}; choose from {', '.join(map(str, IMAGENET_BLOCKS))}")
        if self.arch == "cifar" and self.size < 2:
            raise ValueError(f"{self.size} blocks per group are too few: the side branch needs at least 2")
        if self.num_classes < 2:
            raise ValueError(f"{self.num_classes} classes are too few; at least 2")
        if (self.structure is None) != (self.discard_first_block is None):
            raise ValueError("structure and discard_first_block belong together")
        if self.structure is not None:
            object.__setattr__(self, "gated", False)
            self._check_structure()

    def _check_structure(self):
        full, lists = self.full_structure, (self.structure, self.discard_first_block)
        if any(len(numbers) != len(full) for numbers in lists) or not set(self.discard_first_block) <= {0, 1}:
            raise ValueError(f"structure {lists[0]} and discard_first_block {lists[1]} do not fit {len(full)} groups")
        for kept, first, all_blocks in zip(*lists, full, strict=True):
            if not 0 <= kept <= all_blocks - first or kept + first < 1:
                raise ValueError(f"structure {lists[0]} does not fit groups of {full} blocks")

    @property
    def full_structure(self) -> tuple[int, ...]:
        """Blocks per group before pruning."""
        return (self.size,) * 3 if self.arch == "cifar" else IMAGENET_BLOCKS[self.size]

    @property
    def block_names(self) -> list[str]:
        """Names of the blocks of the uncompressed network in network order, as logs and .cfg files write them."""
        pattern, first = ("res{}.{}", 1) if self.arch == "cifar" else ("group{}/block{}", 0)
        return [pattern.format(g + first, i) for g, blocks in enumerate(self.full_structure) for i in range(blocks)]

    @property
    def side_block(self) -> str:
        """The block behind which the side branch is."""
        index = self.size + self.size // 2 if self.arch == "cifar" else sum(self.full_structure) // 2 - 1
        return self.block_names[index]

    @property
    def convolutions_per_block(self) -> int:
        return 2 if self.arch == "cifar" or self.size < 50 else 3

    @property
    def layers(self) -> int:
        """Convolutions of the blocks that are kept, the stem and the classifier; shortcuts are not counted."""
        return self.convolutions_per_block * sum(self.structure or self.full_structure) + 2

    @property
    def image_size(self) -> int:
        return 32 if self.arch == "cifar" else 224

    def as_dict(self) -> dict:
        return asdict(self)


def config_from_dict(values: dict) -> Config:
    """Inverse of `as_dict`; raises ValueError or TypeError if the values are not those of a network."""
    lists = {name: values.get(name) for name in ("structure", "discard_first_block")}
    return Config(**{**values, **{name: value and tuple(value) for name, value in lists.items()}})


class ResNet(nn.Module):
    """Stem, groups of blocks, classifier; what both networks share. `epsilon` may be set between steps.

    It is no buffer: the state dict holds weights and batch-norm statistics only.
    """

    def __init__(self, config: Config, epsilon: float):
        super().__init__()
        self.config, self.epsilon = config, epsilon

    def _add_group(self, name: str, blocks: list[tuple[str, nn.Module]]):
        self.add_module(name, nn.ModuleDict(dict(blocks)))
        self.group_names = [*getattr(self, "group_names", []), name]

    def _add_heads(self, channels: int, side_channels: int):
        self.bnlast = nn.BatchNorm2d(channels)
        self.linear = modules.classifier(channels, self.config.num_classes)
        if self.config.gated:
            self.side_output = modules.SideOutput(side_channels, self.config.num_classes)

    def block(self, name: str) -> nn.Module:
        """The module of a block by its name in logs, such as res2.7 or group2/block8."""
        return self.get_submodule(name.replace("/", "."))

    def blocks(self) -> list[nn.Module]:
        return [block for name in self.group_names for block in getattr(self, name).values()]

    def forward(self, x: Tensor) -> Output:
        """x: (N, 3, H, W) floating, normalised."""
        x, peaks, side_logits = self.stem(x), [], None
        for index, block in enumerate(self.blocks()):
            residual, shortcut = block(x)
            if residual is None:
                x = shortcut
            elif self.config.gated:
                x, peak = modules.strict_identity(residual, shortcut, self.epsilon)
                peaks.append(peak)
                if index == self.side_index:
                    side_logits = self.side_output(x)
            else:
                x = residual + shortcut
        logits = modules.head(x, self.bnlast, self.linear)
        return Output(logits, side_logits, torch.stack(peaks) if peaks else None)

    @property
    def side_index(self) -> int:
        return self.config.block_names.index(self.config.side_block)


class CifarResNet(ResNet):
    """The network for 32x32 images: three groups of 16, 32 and 64 channels (Sec. 4)."""

    WIDTHS = (16, 32, 64)

    def __init__(self, config: Config, epsilon: float):
        super().__init__(config, epsilon)
        self.conv0 = modules.SameConv2d(3, 16, 3)
        self.bn0 = nn.BatchNorm2d(16)
        structure = config.structure or config.full_structure
        for group, kept in enumerate(structure):
            drops_first = bool(config.discard_first_block and config.discard_first_block[group])
            channels = self.WIDTHS[group]
            blocks = []
            for index in range(kept + drops_first):
                kind = modules.CifarShortcut if drops_first and index == 0 else modules.CifarBlock
                in_channels = self.WIDTHS[max(group - 1, 0)] if index == 0 else channels
                blocks.append((str(index), kind(in_channels, channels, first=group == index == 0)))
            self._add_group(f"res{group + 1}", blocks)
        self._add_heads(64, 32)

    def stem(self, x):
        return F.relu(self.bn0(self.conv0(x)))


class ImagenetResNet(ResNet):
    """The network for 224x224 images, He et al.'s depths with pre-activation blocks (Sec. 4)."""

    WIDTHS = (64, 128, 256, 512)

    def __init__(self, config: Config, epsilon: float):
        super().__init__(config, epsilon)
        self.conv0 = modules.SameConv2d(3, 64, 7, stride=2)
        self.bn0 = nn.BatchNorm2d(64)
        kind = modules.ImagenetBlock if config.convolutions_per_block == 2 else modules.BottleneckBlock
        structure = config.structure or config.full_structure
        channels = 64
        for group, kept in enumerate(structure):
            drops_first = bool(config.discard_first_block and config.discard_first_block[group])
            width, blocks = self.WIDTHS[group], []
            for index in range(kept + drops_first):
                opens_group = index == 0 and group > 0
                stride = 2 if opens_group else 1
                if drops_first and index == 0:
                    block = modules.ImagenetShortcut(channels, width * kind.expansion, stride, opens_group)
                else:
                    block = kind(channels, width, stride, first=group == index == 0, opens_group=opens_group)
                blocks.append((f"block{index}", block))
                channels = width * kind.expansion
            self._add_group(f"group{group}", blocks)
        side_group = int(config.side_block[len("group")])
        self._add_heads(channels, self.WIDTHS[side_group] * kind.expansion)

    def stem(self, x):
        x = F.relu(self.bn0(self.conv0(x)))
        return F.max_pool2d(modules.pad_same(x, 3, 2, value=float("-inf")), 3, 2)


def build_model(config: Config, epsilon: float = 0.0) -> ResNet:
    """The network of a configuration with initial weights, drawn from torch's global generator.

    epsilon: threshold of the gates, >= 0; networks without gates ignore it. Raises ValueError if it is negative.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be 0 or more, not {epsilon:g}")
    return (CifarResNet if config.arch == "cifar" else ImagenetResNet)(config, epsilon)
