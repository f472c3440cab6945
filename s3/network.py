"""Which network: from flags, or from the names and shapes of a file's tensors."""

import re
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from s3.resnet import build_resnet

_BLOCKS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


@dataclass(frozen=True)
class Config:
    """Everything that decides a network's tensors. dataset: as in resnet.DATASETS. method, bits: see resnet.py."""

    dataset: str
    arch: str
    classes: int
    method: str
    bits: int

    def build(self, start: str = "default") -> nn.Module:
        """The network, newly initialised. Raises ValueError if there is none of this description."""
        return build_resnet(self.dataset, self.arch, self.classes, self.method, self.bits, start)

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def family(self) -> str:
        return "imagenet" if self.dataset == "imagenet" else "cifar"

    @property
    def blocks(self) -> int | str:
        """What tells networks of a family apart: resnet14 and resnet18 are one for CIFAR."""
        return self.arch if self.family == "imagenet" else max(1, (int(self.arch.removeprefix("resnet")) - 2) // 6)

    @property
    def kind(self) -> tuple:
        """Method, and bits where it has some."""
        return (self.method,) if self.method == "float" else (self.method, self.bits)

    def in_flags(self) -> str:
        """The flags of main.py that make this network."""
        bits = "" if self.method == "float" else f" --weight-bits {self.bits}"
        return f"--dataset {self.dataset} --arch {self.arch} --method {self.method}{bits}"


def infer_config(state: dict[str, Tensor]) -> Config | None:
    """The ResNet whose tensors these are, None if they are no ResNet's. CIFAR-like data sets count as cifar10.

    Tensors without latents make a network of method "float", whatever their values.
    """
    stages = {}
    for name in state:
        if match := re.match(r"layer(\d)\.(\d+)\.conv1\.", name):
            stages.setdefault(int(match[1]), set()).add(int(match[2]))
    counts = tuple(len(stages[stage]) for stage in sorted(stages))
    if "fc.weight" not in state or len(counts) not in (3, 4):
        return None
    classes, latents = state["fc.weight"].shape[0], _latents_of_first_block(state)
    if "weight_val" in latents:
        method, values = "s3", len(latents) + 1
    elif "weight_t1" in latents:
        method, values = "denseshift", len(latents) + 1
    else:
        method, values = "float", 4
    bits = values.bit_length()  # 2**(bits - 1) - 1 latents besides the sign
    if len(counts) == 3:
        return Config("cifar10", f"resnet{6 * counts[0] + 2}", classes, method, bits)
    depth = _BLOCKS.get(counts)
    if depth is None:
        return None
    has_bottlenecks = any(name.startswith("layer1.0.conv3.") for name in state)
    depth = 50 if depth == 34 and has_bottlenecks else depth
    return Config("imagenet", f"resnet{depth}", classes, method, bits)


def _latents_of_first_block(state):
    names = [name.removeprefix("layer1.0.conv1.") for name in state if name.startswith("layer1.0.conv1.")]
    return [name for name in names if name.startswith("weight_") and name != "weight_sign"]
