"""Reading weights from files of this repository and of the original, of any year; nothing in a file is executed.

A file is a checkpoint (dict with state_dict), a plain state dict, a pickled network (whole, or under the key model), or
weights.packed. `module.` of DataParallel is taken off wherever it stands in a name.
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.checkpoints import CheckpointError, Record, previous_path, read_foreign, record_state_dict
from deepshift import packed
from deepshift.convert import convert_to_shift
from deepshift.runs import RunError
from deepshift.zoo import architectures, build_model

ORIGINAL_CLASSES = (
    "models.", "customized_models.", "deepshift.", "unoptimized.", "mnist.", "cifar10.", "imagenet.", "optim.",
    "torchvision.models.", "__main__.",
)  # fmt: skip
COUNTER = "num_batches_tracked"  # absent from files of PyTorch before 0.4.1


class Loaded(NamedTuple):
    """state: tensors by name. config: what a file of this repository says of its network, else None. content: all."""

    path: str
    state: dict[str, Tensor]
    config: dict | None
    content: object

    @property
    def is_converted(self) -> bool:
        """Whether it holds a DeepShift network, as far as the file tells (the original's Q networks do not)."""
        return bool(self.config and self.config["layers"]) or any(name.endswith(".shift") for name in self.state)


def read_weights(path: str) -> Loaded:
    """Read a file of any of the kinds above. Raises CheckpointError if it is missing, damaged, hostile or of none."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint, weights.pth or weights.packed")
    try:
        content = read_foreign(path, ORIGINAL_CLASSES)
    except CheckpointError as error:
        earlier = previous_path(path)
        raise CheckpointError(f"{error}; the file before it is {earlier}" if earlier.exists() else str(error)) from None
    config = content.get("config") if isinstance(content, dict) else None
    if packed.is_packed(content):
        state = packed.unpacked_state(path, content)
    else:
        state = _state_dict(path, content)
    state = {".".join(part for part in str(name).split(".") if part != "module"): t for name, t in state.items()}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not a checkpoint of a network; give another file")
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.isnan().any():
            raise CheckpointError(f"{path}: {name} contains NaN; use an earlier checkpoint")
    return Loaded(path, state, config if isinstance(config, dict) else None, content)


def _state_dict(path, content):
    if isinstance(content, dict):
        content = content.get("state_dict", content.get("model", content))
    if isinstance(content, Record):
        return record_state_dict(content, path)
    if not isinstance(content, dict):
        raise CheckpointError(f"Unable to load model from {path}: it holds no network; give another file")
    return content


def load_into(model: nn.Module, loaded: Loaded):
    """Strict load_state_dict, but for BatchNorm's counters. Raises RunError, saying how the networks differ."""
    own = model.state_dict()
    missing = [name for name in own if name not in loaded.state and not name.endswith(COUNTER)]
    unexpected = [name for name in loaded.state if name not in own and not name.endswith(COUNTER)]
    if missing or unexpected:
        raise RunError(f"{loaded.path} is of another network: {_difference(missing, unexpected, loaded)}")
    for name, tensor in loaded.state.items():
        if name in own and own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[name].shape)} here"
            raise RunError(f"{loaded.path} is of another network: {name} is {shapes}; give its --arch or --type")
    model.load_state_dict(loaded.state, strict=False)


def _difference(missing, unexpected, loaded):
    told = f"; it was written with {in_flags(loaded.config)}" if loaded.config else ""
    kinds = {name.rsplit(".", 1)[-1] for name in unexpected}, {name.rsplit(".", 1)[-1] for name in missing}
    if kinds[0] == {"shift", "sign"} and kinds[1] == {"weight"}:
        return f"it is DeepShift-PS in {len(missing)} more layers; add --shift-type PS and its --shift-depth{told}"
    if kinds[1] == {"shift", "sign"} and kinds[0] == {"weight"}:
        return f"it is not DeepShift-PS in {len(unexpected)} layers; give its --shift-type and --shift-depth{told}"
    absent, extra = (f"{names[0]} and {len(names) - 1} more" if names else "none" for names in (missing, unexpected))
    return f"it lacks {absent}, and has besides {extra}; give its --arch or --type{told}"


def in_flags(config: dict) -> str:
    """The flags that make the network of a file of this repository."""
    arch = f"--type {config['arch'].removeprefix('simple_')}" if config["dataset"] == "mnist" else (
        f"--arch {config['arch']}")  # fmt: skip
    if not config["layers"]:
        return f"{arch} --shift-depth 0"
    depth = "" if config["shift_depth"] == "all" else f" --shift-depth {config['shift_depth']}"
    return f"{arch} --shift-type {config['shift_type']}{depth} --weight-bits {config['weight_bits']}"


def require_same(loaded: Loaded, config: dict) -> list[str]:
    """Raises RunError if the file says that it is of another network than `config`; returns what else differs."""
    theirs = loaded.config
    if theirs is None:
        return []
    for name, text in (("dataset", "data set"), ("arch", "architecture"), ("shift_type", "type"), ("layers", "depth")):
        if theirs[name] != config[name]:
            raise RunError(
                f"{loaded.path} is of another {text}, it was written with {in_flags(theirs)}; "
                f"the flags ask for {in_flags(config)}"
            )
    return differences(loaded, config, ["normalize"] + ["weight_bits", "activation_bits"] * bool(config["layers"]))


def differences(loaded: Loaded, config: dict, names: list[str]) -> list[str]:
    """In words, for those of `names` that the file tells and that are not as in `config`."""
    theirs = loaded.config or {}
    return [
        f"{loaded.path} was written with {name.replace('_', ' ')} {theirs[name]}, not {config[name]}"
        for name in names
        if theirs.get(name, config[name]) != config[name]
    ]


def read_model(path: str, dataset: str, arch: str) -> tuple[nn.Module, str, Loaded]:
    """The network of a file (--model), and its architecture: what the file says, else what its tensors fit.

    dataset: mnist, cifar10 or imagenet. arch: tried first. Raises RunError if no network of the data set fits.
    """
    loaded = read_weights(path)
    if loaded.config:
        if loaded.config["dataset"] != dataset:
            raise RunError(f"{path} is of a network for {loaded.config['dataset']}; use {loaded.config['dataset']}.py")
        model = from_config(loaded.config)
        load_into(model, loaded)
        return model, loaded.config["arch"], loaded
    for name in (arch, *(name for name in architectures(dataset) if name != arch)):
        with torch.device("meta"):
            try:
                shapes = {key: value.shape for key, value in build_model(dataset, name).state_dict().items()}
            except (ValueError, TypeError, RuntimeError, NotImplementedError):
                continue
        if _fits(shapes, loaded.state):
            model = build_model(dataset, name)
            if loaded.is_converted:
                raise RunError(f"{path} holds a DeepShift-PS {name}; load it with --resume and its --shift-type")
            load_into(model, loaded)
            return model, name, loaded
    raise RunError(f"Unable to load model from {path}: it is no network of this script; use --weights and its --arch")


def _fits(shapes, state):
    names = {name.removesuffix(".shift") + ".weight" if name.endswith(".shift") else name: tensor.shape
             for name, tensor in state.items() if not name.endswith((".sign", COUNTER))}  # fmt: skip
    return names == {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}


def from_config(config: dict) -> nn.Module:
    """The network, converted, that a file of this repository was written from; weights are still initial ones."""
    model = build_model(config["dataset"], config["arch"])
    if config["layers"]:
        depth = config["count"]
        convert_to_shift(model, depth, config["shift_type"], config["convert_all_linear"], True,
                         weight_bits=config["weight_bits"],
                         activation_bits=tuple(config["activation_bits"]))  # fmt: skip
    return model
