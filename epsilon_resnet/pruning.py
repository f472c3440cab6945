"""Removing blocks that are identities: which ones, the smaller network, its files, and the proof (Sec. 3.5).

compressed_model_<step>.cfg    text: N, model, step, discarded_block, …  (the original's fields, one per line)
compressed_model_<step>.pth    {model: renumbered state dict without side branch, cfg: the same fields, …}
"""

import ast
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoints import CheckpointError, save_checkpoint
from common.kernels import without_tf32
from epsilon_resnet.averages import CLOSED
from epsilon_resnet.checkpoints import Network, read_network
from epsilon_resnet.logfile import network_order
from epsilon_resnet.models import Config, ResNet, build_model
from epsilon_resnet.modules import is_closed
from epsilon_resnet.runs import RunError

CFG_KEYS = ("N", "model", "step", "discarded_block", "is_cifar_model", "discard_first_block", "structure", "val_error")


def by_average(averages: dict[str, float], config: Config) -> list[str]:
    """Blocks whose moving average of is_discarded is 1 as printed (the original's rule), in network order.

    averages: is_discarded by block name. Raises KeyError if a block is missing.
    """
    return [name for name in config.block_names if averages[name] >= CLOSED]


def last_weight_norms(model: ResNet) -> dict[str, float]:
    """Frobenius norm of each block's last convolution, to which max|F| is proportional (batch norm is before it)."""
    norms = {}
    for name in model.config.block_names:
        block = model.block(name)
        norms[name] = getattr(block, block.last_convolution).weight.detach().double().norm().item()
    return norms


def by_weights(model: ResNet, averages: dict[str, float], tolerance: float = 1e-2) -> list[str]:
    """Closed blocks whose last convolution has decayed: norm <= tolerance * median norm of the group's live blocks.

    averages: is_discarded by block name; below 0.5 a block is live, and stays whatever its weights are. A group without
    live blocks is compared with the norm of initial weights instead.
    """
    norms, discarded = last_weight_norms(model), []
    for name in model.config.block_names:
        group = [other for other in norms if network_order(other)[0] == network_order(name)[0]]
        live = sorted(norms[other] for other in group if averages.get(other, 0.0) < 0.5)
        middle = len(live) // 2
        scale = (live[middle] + live[~middle]) / 2 if live else _initial_norm(model.block(name))
        if averages.get(name, 0.0) >= 0.5 and norms[name] <= tolerance * scale:
            discarded.append(name)
    return discarded


def _initial_norm(block):
    weight = getattr(block, block.last_convolution).weight
    return math.sqrt(weight.numel() * 2 / weight[0].numel())  # He et al.'s


@without_tf32()
@torch.no_grad()
def responses(model: ResNet, batches) -> Tensor:
    """max|F| of each block on each batch of images, float32 (batches, blocks), in evaluation mode on their device."""
    model.eval()
    return torch.stack([model(images).peaks for images, _ in batches])


def by_gates(model: ResNet, batches) -> list[str]:
    """Blocks whose gate is closed in every batch of images given."""
    closed = is_closed(responses(model, batches).amax(0), model.epsilon).tolist()
    return [name for name, is_discarded in zip(model.config.block_names, closed, strict=True) if is_discarded]


def compressed_config(config: Config, discarded: list[str]) -> Config:
    """Configuration without the blocks `discarded`. Raises ValueError if one of them is not in the network."""
    unknown = sorted(set(discarded) - set(config.block_names))
    if unknown:
        raise ValueError(f"no blocks {', '.join(unknown)} in this network")
    kept, first, base = [], [], 1 if config.arch == "cifar" else 0
    for group, blocks in enumerate(config.full_structure):
        numbers = {network_order(name)[1] for name in discarded if network_order(name)[0] == group + base}
        kept.append(blocks - len(numbers))
        first.append(int(0 in numbers))
    return Config(config.arch, config.size, config.num_classes, structure=tuple(kept), discard_first_block=tuple(first))


def name_mapping(config: Config, discarded: list[str]) -> dict[str, str]:
    """Old name -> new name of the blocks that are kept: from 0, or from 1 where block 0 is only its shortcut now."""
    compressed = compressed_config(config, discarded)
    base = 1 if config.arch == "cifar" else 0
    next_number = {group + base: first for group, first in enumerate(compressed.discard_first_block)}
    mapping = {}
    for name in config.block_names:
        if name not in discarded:
            group, old = network_order(name)
            mapping[name] = re.sub(rf"{old}$", str(next_number[group]), name)
            next_number[group] += 1
    return mapping


def compress_state(state: dict[str, Tensor], config: Config, discarded: list[str]) -> dict[str, Tensor]:
    """State dict of the compressed network, in its order: kept blocks renumbered, side branch left out.

    A discarded first block of ImageNet's groups leaves the shortcut and the activation that feeds it.
    """
    renamed = {}
    for old, new in name_mapping(config, discarded).items():
        prefix = old.replace("/", ".") + "."
        renamed |= {new.replace("/", ".") + "." + name.removeprefix(prefix): value
                    for name, value in state.items() if name.startswith(prefix)}  # fmt: skip
    with torch.device("meta"):
        wanted = build_model(compressed_config(config, discarded)).state_dict()
    # What is not in a kept block has its old name; kept blocks come first because new names may be others' old ones.
    return {name: renamed.get(name, state.get(name)) for name in wanted}


def compress_network(network: Network, discarded: list[str]) -> Network:
    """The network without the discarded blocks."""
    config = compressed_config(network.config, discarded)
    return Network(compress_state(network.state, network.config, discarded), config, 0.0, network.content)


def cfg_fields(network: Network, discarded: list[str], path: Path, step: int, val_error: list[float]) -> dict:
    """The fields of a .cfg file, in its order. network: the compressed one; path: of its weights."""
    config = network.config
    values = (config.size, str(path), step, discarded, config.arch == "cifar", list(config.discard_first_block),
              list(config.structure), val_error)  # fmt: skip
    return dict(zip(CFG_KEYS, values, strict=True))


def write_compressed(network: Network, fields: dict, extra: dict) -> Path:
    """Write weights and .cfg of a compressed network; returns the path of the .cfg. extra: more entries of the .pth."""
    path = Path(fields["model"])
    save_checkpoint(path, {"model": network.state, "cfg": fields, "config": network.config.as_dict(), **extra})
    cfg_path = path.with_suffix(".cfg")
    temporary = cfg_path.with_name(cfg_path.name + ".part")
    try:
        temporary.write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
        os.replace(temporary, cfg_path)
    except OSError as error:
        raise RunError(f"cannot write {cfg_path}: {error.strerror}; free space there") from None
    return cfg_path


def read_cfg(path) -> dict:
    """Fields of a .cfg file. Raises RunError if it cannot be read or fields are missing or malformed."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RunError(f"cannot read {path} ({reason}); give the .cfg that compressModel.py wrote") from None
    texts = dict(line.split(": ", 1) for line in lines if ": " in line)
    missing = [key for key in CFG_KEYS if key not in texts]
    if missing:
        raise RunError(f"{path} has no {', '.join(missing)}; give the .cfg that compressModel.py wrote")
    try:
        return {key: texts[key] if key == "model" else ast.literal_eval(texts[key]) for key in CFG_KEYS}
    except (ValueError, SyntaxError):
        raise RunError(f"{path} is damaged; write it again with compressModel.py") from None


def model_path(cfg_path, fields: dict) -> Path:
    """Where the weights of a .cfg are: as it says, or beside it if the folder was moved. Raises RunError if nowhere."""
    named = Path(fields["model"])
    beside = Path(cfg_path).resolve().parent / named.name
    for path in (named, beside):
        if path.exists():
            return path
    raise RunError(f"{cfg_path} names {named}, which is neither there nor beside it; put it there")


@dataclass
class Compressed:
    """A compressed network as its .cfg and weights hold it."""

    fields: dict
    path: Path
    network: Network

    @property
    def config(self) -> Config:
        return self.network.config


def read_compressed(cfg_path) -> Compressed:
    """Read a .cfg and its weights. Raises RunError or CheckpointError if they are damaged or do not belong together."""
    fields = read_cfg(cfg_path)
    path = model_path(cfg_path, fields)
    arch = "cifar" if fields["is_cifar_model"] else "imagenet"
    network = read_network(path)
    try:
        lists = (tuple(fields["structure"]), tuple(fields["discard_first_block"]))
        config = Config(arch, fields["N"], network.config.num_classes, False, *lists)
    except (ValueError, TypeError) as error:
        raise RunError(f"{cfg_path} describes no network: {error}; write it again with compressModel.py") from None
    if config != network.config:
        held, wanted = network.config.structure, config.structure
        raise RunError(
            f"{cfg_path} and {path} do not belong together: the .cfg has N {config.size} and structure {wanted}, the "
            f"weights N {network.config.size} and {held}; write both with compressModel.py"
        )
    recorded = network.content.get("cfg")
    if isinstance(recorded, dict) and recorded.get("step") != fields["step"]:
        raise RunError(
            f"{cfg_path} and {path} do not belong together: step {fields['step']} and step {recorded.get('step')}"
        )
    return Compressed(fields, path, network)


@without_tf32()
@torch.no_grad()
def logit_differences(full: ResNet, compressed: ResNet, batches) -> tuple[float, float]:
    """(largest |difference| of the logits of both networks over batches of images, largest |logit|)."""
    difference = scale = 0.0
    for images, _ in batches:
        before, after = full.eval()(images).logits, compressed.eval()(images).logits
        difference = max(difference, (before - after).abs().max().item())
        scale = max(scale, before.abs().max().item())
    return difference, scale


@torch.no_grad()
def inference_times(models: list[ResNet], images: Tensor, repeats: int = 7) -> list[float]:
    """Median seconds of a forward pass of each network on one batch, in turns so that a busy machine hits all alike."""
    times = [[] for _ in models]
    for repeat in range(repeats + 1):
        for model, measured in zip(models, times, strict=True):
            if images.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if repeat:  # the first pass warms up
                measured.append(time.perf_counter() - start)
    return [sorted(measured)[len(measured) // 2] for measured in times]


def check_step(path: Path, network: Network, step: int):
    """Raises CheckpointError if a checkpoint is of another step than its name says."""
    held = network.content.get("step")
    if held is not None and held != step:
        raise CheckpointError(f"{path} holds step {held}, not {step}; it was renamed")
