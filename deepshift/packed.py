"""weights.packed: a DeepShift network with 2 to 6 bits per weight, everything else as float tensors."""

import torch
from torch import Tensor, nn

from common.checkpoints import CheckpointError
from deepshift.convert import PS_LAYERS, pack_layers, shift_layers

FORMAT, VERSION = "deepshift packed weights", 1


def packed_payload(model: nn.Module, config: dict) -> dict:
    """What weights.packed holds, tensors and plain values only: the codes of every shift layer, and all other tensors.

    model: rounded (round_shift_weights). Raises ValueError if a layer cannot be packed.
    """
    with torch.no_grad():
        codes = {name: weights.to("cpu").state() for name, weights in pack_layers(model).items()}
    replaced = set()
    for name, layer in shift_layers(model).items():
        kinds = ("shift", "sign") if isinstance(layer, PS_LAYERS) else ("weight",)
        replaced.update(f"{name}.{kind}" for kind in kinds)
    tensors = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name not in replaced}
    return {"format": FORMAT, "version": VERSION, "config": config, "layers": codes, "tensors": tensors}


def is_packed(content) -> bool:
    """Whether what a file holds is a weights.packed."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def unpacked_state(path: str, content: dict) -> dict[str, Tensor]:
    """State dict of the rounded network, its weights bit for bit. Raises CheckpointError if the content is damaged."""
    from common.kernels import PackedShiftWeights

    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')} of the packed format, this is {VERSION}")
    try:
        state = dict(content["tensors"])
        for name, codes in content["layers"].items():
            weight = PackedShiftWeights.from_state(codes).unpack()
            if codes["scheme"] == "PS":
                state[f"{name}.shift"] = torch.where(weight == 0, 0, torch.frexp(weight).exponent - 1).float()
                state[f"{name}.sign"] = weight.sign()
            else:
                state[f"{name}.weight"] = weight
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: packed weights cannot be read ({str(error).splitlines()[0]})") from None
    return state
