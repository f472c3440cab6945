"""The CIFAR networks of the ShiftResNet paper (arXiv 1711.08141, Sec. 4.1): one ResNet skeleton, several blocks.

    build_model(Config("shiftresnet20", expansion=3))

resnet*: He et al.'s CIFAR ResNet, optionally made smaller; shiftresnet*: 3x3 convolutions replaced by shifts between
1x1 convolutions; depthwiseresnet*: by depthwise convolutions.
"""

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from shiftresnet import modules

DEPTHS = {20: 3, 32: 5, 44: 7, 56: 9, 110: 18}  # blocks per stage; 32 and 44 occur in old checkpoints only
ARCHITECTURES = tuple(
    f"{family}{depth}" for depth in (20, 56, 110) for family in ("resnet", "shiftresnet", "depthwiseresnet")
)
REDUCTION_MODES = ("block", "net", "depthwise", "shuffle", "mobile")
HISTORICAL_BLOCKS = {
    "depthwise": modules.DepthWiseBlock,
    "shuffle": modules.ShuffleBlock,
    "mobile": modules.MobileNetLikeBlock,
}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class Config:
    """All that decides a network's shape; `asdict` of it is stored in every checkpoint.

    expansion: middle width of a shift block over its output width. reduction, reduction_mode: see `build_model`.
    project_on_mid, first_stride: layouts of 2017, found in old checkpoints only.
    Raises ValueError for a combination that the paper does not have.
    """

    arch: str
    expansion: float = 1.0
    reduction: float = 1.0
    reduction_mode: str = "net"
    num_classes: int = 10
    project_on_mid: bool = False
    first_stride: int = 1

    def __post_init__(self):
        if self.family not in ("resnet", "shiftresnet", "depthwiseresnet") or self.depth not in DEPTHS:
            raise ValueError(f"unknown architecture {self.arch!r}; choose from {', '.join(ARCHITECTURES)}")
        if self.reduction_mode not in REDUCTION_MODES:
            raise ValueError(
                f"unknown reduction mode {self.reduction_mode!r}; choose from {', '.join(REDUCTION_MODES)}"
            )
        for name in ("expansion", "reduction"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, not {value:g}")
        if self.family == "shiftresnet" and self.reduction != 1:
            raise ValueError(
                f"{self.arch} has no reduction: only resnet* and depthwiseresnet* do; use expansion instead"
            )
        if self.family != "shiftresnet" and self.expansion != 1:
            raise ValueError(f"{self.arch} has no expansion: only shiftresnet* does; use reduction instead")

    @property
    def family(self) -> str:
        return self.arch.rstrip("0123456789")

    @property
    def depth(self) -> int:
        digits = self.arch[len(self.family) :]
        return int(digits) if digits else 0

    def suffix(self) -> str:
        """What the original adds to the architecture in a checkpoint's name; numbers always with their point."""
        text = ""
        if self.family == "shiftresnet":
            text = f"_{float(self.expansion)}"
        elif self.reduction != 1 or (self.family == "resnet" and self.reduction_mode in HISTORICAL_BLOCKS):
            text = f"_{float(self.reduction)}_{self.reduction_mode}"
        return text + ("_cifar100" if self.num_classes == 100 else "")

    def as_dict(self) -> dict:
        return asdict(self)


class ResNet(nn.Module):
    """CIFAR ResNet: 3x3 stem, three stages of `num_blocks` blocks, average pooling, linear.

    block: callable (in_planes, out_planes, stride) -> module. widths: channels of the three stages.
    """

    def __init__(self, block, num_blocks, widths=(16, 32, 64), num_classes=10, first_stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = self._stage(block, num_blocks, widths[0], widths[0], first_stride)
        self.layer2 = self._stage(block, num_blocks, widths[0], widths[1], 2)
        self.layer3 = self._stage(block, num_blocks, widths[1], widths[2], 2)
        self.linear = nn.Linear(widths[2], num_classes)
        self.pool_size = 8 // first_stride

    @staticmethod
    def _stage(block, num_blocks, in_planes, planes, stride):
        first = block(in_planes, planes, stride)
        return nn.Sequential(first, *(block(planes, planes, 1) for _ in range(num_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, 32, 32) floating, normalised. Returns logits (N, num_classes)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        y = F.avg_pool2d(y, self.pool_size).flatten(1)
        return self.linear(y)


def _net_widths(reduction: float) -> tuple[int, ...]:
    """Stage widths of a net-reduced network: over sqrt(reduction), so that parameters fall by about `reduction`."""
    root = math.sqrt(reduction)
    widths = tuple(int(width / root) for width in (16, 32, 64))
    if widths[0] < 1:
        raise ValueError(f"reduction {reduction:g} leaves 0 of 16 channels; choose at most 256 in net mode")
    return widths


def build_model(config: Config) -> ResNet:
    """The network of `config`, freshly initialised by PyTorch's defaults.

    resnet* with reduction r: mode `block` divides the middle width of every block by r; `net` divides all widths by
    sqrt(r); `depthwise`, `shuffle`, `mobile` use the historical block of that name, middle width divided by r.
    depthwiseresnet*: middle width divided by r, whatever the mode. Raises ValueError if a width would become 0.
    """
    widths = (16, 32, 64)
    if config.family == "shiftresnet":
        block = partial(modules.ShiftConv, expansion=config.expansion)
    elif config.family == "depthwiseresnet":
        block = partial(modules.DepthWiseWithSkipBlock, reduction=config.reduction)
    elif config.reduction_mode in HISTORICAL_BLOCKS:
        block = partial(HISTORICAL_BLOCKS[config.reduction_mode], reduction=config.reduction)
    elif config.reduction_mode == "block":
        block = partial(modules.BasicBlock, reduction=config.reduction, project_on_mid=config.project_on_mid)
    else:
        block = modules.BasicBlock
        widths = _net_widths(config.reduction)
    return ResNet(block, DEPTHS[config.depth], widths, config.num_classes, config.first_stride)
