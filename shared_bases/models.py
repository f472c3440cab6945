"""The networks of each data set by the names that --model takes, with their ranks and their similarity term.

build_model(Config("cifar10", "ResNet32_SingleShared", shared_rank=8, unique_rank=1))
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from torch import nn

from shared_bases.densenet import BOTTLENECK, DenseNet
from shared_bases.mobilenetv2 import MobileNetV2
from shared_bases.resnet import LAYOUTS, basic_resnet, basis_resnet, bottleneck_resnet
from shared_bases.resnext import ResNext, check_ranks

NUM_CLASSES = {name: options["num_classes"] for name, (_, _, options) in LAYOUTS.items()}
IMAGE_SIZES = {"cifar10": 32, "cifar100": 32, "ilsvrc": 224}
CIFAR10_DEPTHS = {"20": 3, "32": 5, "44": 7, "56": 9, "110": 18, "1202": 200}
DEPTHS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3)}


@dataclass(frozen=True)
class Entry:
    """One --model. build: called with the ranks it takes, as keywords. similarity: a key of regulariser.TERMS, or None.

    basis_inputs: channels that the basis filters of the first group see; 0 without ranks.
    """

    build: Callable
    ranks: tuple[str, ...] = ()
    similarity: str | None = None
    basis_inputs: int = 0


BOTH = ("shared_rank", "unique_rank")


def _cifar10_models() -> dict[str, Entry]:
    models = {f"ResNet{d}": Entry(partial(basic_resnet, "cifar10", (n,) * 3)) for d, n in CIFAR10_DEPTHS.items()}
    for depth in ("32", "56"):
        build = partial(basis_resnet, "cifar10", (CIFAR10_DEPTHS[depth],) * 3)
        models[f"ResNet{depth}_DoubleShared"] = Entry(partial(build, 2), BOTH, "double_with_unique", 16)
        models[f"ResNet{depth}_SingleShared"] = Entry(partial(build, 1), BOTH, "single_with_unique", 16)
        models[f"ResNet{depth}_SharedOnly"] = Entry(partial(build, 2), ("shared_rank",), "double", 16)
        models[f"ResNet{depth}_NonShared"] = Entry(partial(build, 0), ("unique_rank",), None, 16)
    return models


def _cifar100_models() -> dict[str, Entry]:
    models = {f"ResNet{d}": Entry(partial(basic_resnet, "cifar100", DEPTHS[d])) for d in ("18", "34")}
    build = partial(basis_resnet, "cifar100", DEPTHS["34"])
    return {
        **models,
        "DenseNet121": Entry(DenseNet),
        "ResNext50": Entry(ResNext),
        "MobileNetV2": Entry(partial(MobileNetV2, 100, imagenet=False)),
        "ResNet34_SingleShared": Entry(partial(build, 1), BOTH, "single", 64),
        "ResNet34_SharedOnly": Entry(partial(build, 1), ("shared_rank",), "single", 64),
        "ResNet34_NonShared": Entry(partial(build, 0), ("unique_rank",), None, 64),
        "DenseNet121_SingleShared": Entry(DenseNet, BOTH, "single", BOTTLENECK),
        "ResNext50_SingleShared": Entry(ResNext, BOTH, "single", 128),
        "MobileNetV2_Shared": Entry(partial(MobileNetV2, 100, imagenet=False, num_bases=1), (), "single"),
        "MobileNetV2_SharedDouble": Entry(partial(MobileNetV2, 100, imagenet=False, num_bases=2), (), "separate"),
    }


def _ilsvrc_models() -> dict[str, Entry]:
    models = {f"ResNet{d}": Entry(partial(basic_resnet, "ilsvrc", DEPTHS[d])) for d in ("18", "34")}
    build, mobile = partial(basis_resnet, "ilsvrc", DEPTHS["34"]), partial(MobileNetV2, 1000, imagenet=True)
    models["ResNet34_DoubleShared"] = Entry(partial(build, 2), BOTH, "double", 64)
    models["ResNet34_SingleShared"] = Entry(partial(build, 1), BOTH, "single", 64)
    for depth in ("50", "101"):
        models[f"ResNet{depth}"] = Entry(partial(bottleneck_resnet, DEPTHS[depth]))
        models[f"ResNet{depth}_Shared"] = Entry(partial(bottleneck_resnet, DEPTHS[depth], 2), (), "separate")
        models[f"ResNet{depth}_SharedSingle"] = Entry(partial(bottleneck_resnet, DEPTHS[depth], 1), (), "single")
    return {
        **models,
        "MobileNetV2": Entry(mobile),
        "MobileNetV2_Shared": Entry(partial(mobile, num_bases=1), (), "single"),
        "MobileNetV2_SharedDouble": Entry(partial(mobile, num_bases=2), (), "separate"),
    }


MODELS = {"cifar10": _cifar10_models(), "cifar100": _cifar100_models(), "ilsvrc": _ilsvrc_models()}
# Names in the README's tables that are not a key with hyphens for underscores.
TABLE_NAMES = {
    "ResNet50-Shared": "ResNet50_SharedSingle",
    "ResNet50-Shared++": "ResNet50_Shared",
    "ResNet101-Shared": "ResNet101_SharedSingle",
    "ResNet101-Shared++": "ResNet101_Shared",
    "MobileNetV2-Shared++": "MobileNetV2_SharedDouble",
}


def model_key(dataset: str, name: str) -> str:
    """The key of MODELS[dataset] that `name` means: the key itself, with hyphens, or as in the README's tables.

    Raises ValueError for an unknown name.
    """
    key = TABLE_NAMES.get(name, name).replace("-", "_").replace("ResNeXt", "ResNext")
    if key not in MODELS[dataset]:
        raise ValueError(
            f"The model is currently not supported: {name!r} for {dataset}; choose from {', '.join(MODELS[dataset])}"
        )
    return key


@dataclass(frozen=True)
class Config:
    """All that decides a network's shape; `as_dict` of it is stored in every checkpoint.

    dataset: cifar10, cifar100 or ilsvrc. model: a key of MODELS[dataset]. shared_rank, unique_rank: basis filters
    of the first group; None where the model has no such rank. attention: ECA in ILSVRC2012's MobileNetV2_SharedDouble,
    as in the original since March 2021; False for all others.
    Raises ValueError for an unknown model and for ranks that it cannot have.
    """

    dataset: str
    model: str
    shared_rank: int | None = None
    unique_rank: int | None = None
    attention: bool = True

    def __post_init__(self):
        entry = MODELS[self.dataset].get(self.model)
        if entry is None:
            model_key(self.dataset, self.model)
            raise ValueError(f"{self.model!r} is not a key of {self.dataset}")
        for name in BOTH:
            value = getattr(self, name)
            if name not in entry.ranks:
                object.__setattr__(self, name, None)
            elif value is None or value < 1:
                raise ValueError(f"{self.model}: {name} must be at least 1, not {value}{self._advice(name, value)}")
            elif value > 9 * entry.basis_inputs:
                raise ValueError(
                    f"{self.model}: {name} {value} is larger than the channels allow: filters on {entry.basis_inputs} "
                    f"channels have {9 * entry.basis_inputs} weights, and no more of them can be orthogonal"
                )
        if (self.dataset, self.model) != ("ilsvrc", "MobileNetV2_SharedDouble"):
            object.__setattr__(self, "attention", False)
        if self.model == "ResNext50_SingleShared":
            check_ranks(self.shared_rank, self.unique_rank)

    def _advice(self, name, value):
        other = {"unique_rank": "SharedOnly", "shared_rank": "NonShared"}[name]
        key = f"{self.model.partition('_')[0]}_{other}"
        return f"; use --model={key} for none" if value == 0 and key in MODELS[self.dataset] else ""

    @property
    def entry(self) -> Entry:
        return MODELS[self.dataset][self.model]

    def ranks(self) -> dict[str, int]:
        """The ranks that this model takes."""
        return {name: getattr(self, name) for name in self.entry.ranks}

    def text(self) -> str:
        """The model and its ranks as they are typed."""
        return " ".join([self.model, *(f"--{name}={value}" for name, value in self.ranks().items())])

    def warning(self) -> str | None:
        """What to tell the user about ranks larger than the channels, which are allowed but save nothing."""
        large = {name: value for name, value in self.ranks().items() if value > self.entry.basis_inputs}
        if not large or self.model.startswith("ResNext"):
            return None
        words = " and ".join(f"{name} {value}" for name, value in large.items())
        return (
            f"note: {words} is larger than the {self.entry.basis_inputs} channels of the first group: its basis costs "
            "more multiply-adds than the convolution that it replaces"
        )

    def as_dict(self) -> dict:
        return asdict(self)


def build_model(config: Config) -> nn.Module:
    """The network of `config`, initialised as the original's; draws from torch's global generator."""
    options = dict(config.ranks())
    if config.dataset == "ilsvrc" and config.model == "MobileNetV2_SharedDouble":
        options["attention"] = config.attention
    return config.entry.build(**options)
