"""Reading networks from checkpoints, this repository's and the original's, and saying what they hold.

A checkpoint is {net_state_dict, optimizer_state_dict, acc, epoch}; ours add config and more. Nothing in a file is
executed. ILSVRC2012's of the original have names with `module.`, which is taken off.
"""

import os
from dataclasses import replace

import torch
from torch import nn

from common.checkpoints import CheckpointError, read_foreign
from shared_bases.models import MODELS, NUM_CLASSES, Config, build_model

SHARED_NAMES = ("shared_basis_1.weight", "shared_basis_1_1.weight")
OWN_NAMES = (
    "layer1.1.basis_conv1.weight",
    "layer1.1.basis_conv2.weight",
    "features.dense_block_layer_0.bottle_neck_layer_0.basis_conv2.weight",
)
HEADS = ("fc.weight", "linear.weight", "classifier.1.weight", "conv2.weight")


def _shapes(state: dict) -> dict:
    return {name: tuple(value.shape) for name, value in state.items()}


def _fits(shapes: dict, config: Config) -> bool:
    """Whether the network of `config` has exactly these names and shapes."""
    with torch.device("meta"):
        return _shapes(build_model(config).state_dict()) == shapes


def _rank(shapes: dict, names: tuple[str, ...]) -> int | None:
    return next((shapes[name][0] for name in names if name in shapes), None)


def infer_config(state: dict) -> Config:
    """The network that has a state dict's names and shapes. Raises ValueError if no network of this paper has."""
    shapes = _shapes(state)
    classes = _rank(shapes, HEADS)
    dataset = next((name for name, count in NUM_CLASSES.items() if count == classes), None)
    if dataset is None:
        raise ValueError("its layers are not those of a network of this paper")
    ranks = {"shared_rank": _rank(shapes, SHARED_NAMES), "unique_rank": _rank(shapes, OWN_NAMES)}
    attention = any(".chan_attention." in name for name in shapes)
    for key, entry in MODELS[dataset].items():
        if any(ranks[name] is None for name in entry.ranks):
            continue
        if (key == "ResNet1202") != ("layer1.199.conv1.weight" in shapes):  # slow to build
            continue
        try:
            config = Config(dataset, key, **{name: ranks[name] for name in entry.ranks}, attention=attention)
        except ValueError:
            continue
        if _fits(shapes, config):
            return config
    raise ValueError("its layers have names or shapes that no network of this paper has")


def existing_path(path: str) -> str:
    """`path`, or the file that differs in L10 for L10.0 only: the original wrote the default of --lambdaR as 10.

    Raises CheckpointError if there is neither.
    """
    folder, name = os.path.split(path)
    other = name.replace("-L10.0-", "-L10-") if "-L10.0-" in name else name.replace("-L10-", "-L10.0-")
    for candidate in (path, os.path.join(folder, other)):
        if os.path.exists(candidate):
            return candidate
    raise CheckpointError(f"{path} does not exist; give the .pth file of a training run with --pretrained")


def read_checkpoint(path: str) -> dict:
    """What a checkpoint holds: {net, config, acc, acc5, epoch, optimizer, channels_last}.

    net: state dict without `module.`. config: found from names and shapes. acc, acc5: percent or None. epoch: from 1,
    or None. optimizer: state dict or None. Raises CheckpointError if the file is missing, damaged, hostile, or of
    another kind of network.
    """
    content = read_foreign(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a checkpoint of shared filter bases: it holds no dictionary")
    net = content.get("net_state_dict", content.get("state_dict", content))
    try:
        net = {str(name).removeprefix("module."): value for name, value in net.items()}
        config = infer_config(net)
        acc, acc5, epoch = (content.get(name) for name in ("acc", "acc5", "epoch"))
        return {
            "net": net,
            "config": config,
            "acc": None if acc is None else float(acc),
            "acc5": None if acc5 is None else float(acc5),
            "epoch": None if epoch is None else int(epoch),
            "optimizer": content.get("optimizer_state_dict"),
            "channels_last": bool(content.get("channels_last", False)),
        }
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint of shared filter bases: {reason}") from None


def require_config(path: str, held: Config, asked: Config):
    """Raises CheckpointError, saying which model and ranks the file has, unless they are those of the flags."""
    if replace(held, attention=asked.attention) == asked:
        return
    if held.dataset != asked.dataset:
        where = f"use the scripts for {held.dataset} with --model={held.text()}"
    else:
        where = f"use --model={held.text()}"
    has = ", ".join([held.model, *(f"{name} {value}" for name, value in held.ranks().items())])
    wants = ", ".join([asked.model, *(f"{name} {value}" for name, value in asked.ranks().items())])
    raise CheckpointError(f"{path} has {has}; the flags ask for {wants}; {where}")


def load_network(path: str, asked: Config) -> tuple[nn.Module, dict]:
    """The network in a checkpoint, which must be the one that is asked for, and the rest of the checkpoint.

    Raises CheckpointError as `read_checkpoint` and `require_config`.
    """
    found = read_checkpoint(path)
    require_config(path, found["config"], asked)
    return network_of(found), found


def network_of(found: dict) -> nn.Module:
    """The network of what `read_checkpoint` returned, with its weights."""
    with torch.device("meta"):
        model = build_model(found["config"])
    model.to_empty(device="cpu").load_state_dict(found["net"])
    return model
