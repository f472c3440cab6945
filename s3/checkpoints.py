"""Reading networks from files of this repository and of others, of any year; nothing in a file is executed.

A file is a checkpoint of main.py or of the original (latent tensors), a plain one (convert.py, main_eval.py, the
published files, torchvision's), a state dict, or a packed file. `module.` of DataParallel is taken off.
"""

import os
from typing import NamedTuple

from torch import Tensor, nn

from common.checkpoints import CheckpointError, Record, previous_path, read_foreign, record_state_dict
from s3 import packed
from s3.discrete import discrete_bits, restore_latents
from s3.network import Config, infer_config
from s3.runs import RunError

CLASSES = ("torchvision.models.", "resnet.", "s3conv2dshift.", "__main__.")  # of whole networks in files of others
COUNTER = "num_batches_tracked"  # absent from files of PyTorch before 0.4.1


class Loaded(NamedTuple):
    """state: tensors by name. config: the ResNet that they make, None if another network. content: all of the file.

    source: for a converted or packed file the network that it was made from.
    """

    path: str
    state: dict[str, Tensor]
    config: Config | None
    source: Config | None
    content: object


def read_weights(path: str) -> Loaded:
    """Read a file of any of the kinds above. Raises CheckpointError if it is missing, damaged, hostile or of none."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint or a packed file")
    try:
        content = read_foreign(path, CLASSES)
    except CheckpointError as error:
        earlier = previous_path(path)
        raise CheckpointError(f"{error}; the file before it is {earlier}" if earlier.exists() else str(error)) from None
    state = packed.unpacked_state(path, content) if packed.is_packed(content) else _state_dict(path, content)
    state = {".".join(part for part in str(name).split(".") if part != "module"): t for name, t in state.items()}
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not a checkpoint of a network; give another file")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} contains NaN or infinity; use an earlier checkpoint")
    return Loaded(path, state, *_configs(content, state), content)


def _state_dict(path, content):
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if isinstance(content, Record):
        return record_state_dict(content, path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: it holds no network; give another file")
    return content


def _configs(content, state):
    """What the tensors are, under the names that the file gives, and what they were converted from."""
    found = infer_config(state)
    stored = content.get("config") if isinstance(content, dict) else None
    if found is None or not isinstance(stored, dict):
        return found, None
    try:
        told = Config(**stored)
        same = (told.family, told.blocks, told.classes) == (found.family, found.blocks, found.classes)
    except (TypeError, ValueError, AttributeError):
        return found, None
    if not same:  # renamed or edited: the tensors decide
        return found, None
    if told.kind == found.kind:
        return told, None
    return Config(told.dataset, told.arch, told.classes, found.method, found.bits), told


def require_same(loaded: Loaded, config: Config):
    """Raises RunError, with what to do, if the tensors of a file are not those of `config`."""
    theirs = loaded.config
    if theirs is None:
        raise RunError(f"{loaded.path} holds no ResNet of these scripts; evaluate it with main_eval.py and its --arch")
    if theirs.kind != config.kind:
        if theirs.method == "float":
            raise RunError(f"{loaded.path} has no latent tensors (it is a float or converted network); evaluate it "
                           f"with main_eval.py --dataset {theirs.dataset} --arch {theirs.arch}")  # fmt: skip
        raise RunError(f"{loaded.path} holds a network of {theirs.in_flags()}, the flags ask for {config.in_flags()}; "
                       "change the flags, or convert it with convert.py for main_eval.py")  # fmt: skip
    if (theirs.family, theirs.blocks) != (config.family, config.blocks):
        raise RunError(f"{loaded.path} is of another architecture, {theirs.in_flags()}; the flags ask for "
                       f"{config.in_flags()}")  # fmt: skip
    if theirs.classes != config.classes:
        raise RunError(f"{loaded.path} is for {theirs.classes} classes, the data has {config.classes}; give the data "
                       f"that it was trained on, or --num-classes {theirs.classes} to keep its outputs")  # fmt: skip


def load_into(model: nn.Module, loaded: Loaded):
    """load_state_dict, strict but for BatchNorm's counters. Raises RunError, saying how the networks differ."""
    own = model.state_dict()
    for name, tensor in loaded.state.items():
        if name in own and own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[name].shape)} here"
            raise RunError(
                f"{loaded.path} is of another network: {name} is {shapes}; give its --arch and --num-classes"
            )
    result = model.load_state_dict(loaded.state, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith(COUNTER)]
    if missing or result.unexpected_keys:
        absent, extra = (f"{names[0]} and {len(names) - 1} more" if names else "nothing"
                         for names in (missing, result.unexpected_keys))  # fmt: skip
        raise RunError(f"{loaded.path} is of another network: it lacks {absent}, and has besides {extra}; "
                       "give its --arch and --dataset")  # fmt: skip


def load_network(path: str) -> tuple[nn.Module, Config]:
    """The ResNet of a file with its weights; of a converted or packed one a network with the same discrete weights.

    Raises CheckpointError if the file cannot be read, or is of no ResNet.
    """
    loaded = read_weights(path)
    config, state = loaded.config, loaded.state
    if config is None:
        raise CheckpointError(f"{path} holds no ResNet of these scripts; give another file")
    source = loaded.source
    if config.method == "float" and source is None and (bits := discrete_bits(state)):
        source = Config(config.dataset, config.arch, config.classes, "s3", bits)
    if source is not None:
        config, state = source, restore_latents(state, source)
    model = config.build()
    try:
        load_into(model, loaded._replace(state=state))
    except RunError as error:
        raise CheckpointError(str(error)) from None
    return model.eval(), config
