"""Between latent tensors and discrete weights: the plain form of a trained network, and back."""

import torch
from torch import Tensor, nn

from s3.network import Config
from s3.quantizers import S3_BITS
from s3.s3conv2dshift import LatentConv2d, latent_layers

PREFIX = "module."  # the published files were written under DataParallel


@torch.no_grad()
def plain_state_dict(model: nn.Module, prefix: str = PREFIX) -> dict[str, Tensor]:
    """State dict of the plain PyTorch network with the same outputs: one discrete `weight` per convolution.

    Names, order and shapes are those of torchvision's ResNets (and of method "float" for CIFAR), after `prefix`.
    """
    latents = {f"{name}.{latent}": (layer, latent) for name, layer in latent_layers(model).items()
               for latent in ("weight", *layer.latent_names)}  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        layer, latent = latents.get(name, (None, ""))
        if layer is None:
            state[prefix + name] = tensor.detach().clone()
        elif latent == "weight":
            state[prefix + name] = layer.discrete_weight().detach().clone()
    return state


def power_of_two_bits(weight: Tensor) -> tuple[int, str] | None:
    """Fewest bits (2 to 4) of a code that has all the weights, and its scheme for the kernels; None without one.

    Scheme "S3" is 0 and +-1 to +-2**(2**(bits - 1) - 2); "Q", DenseShift's, has one power more and no zero.
    """
    size = weight.abs()
    fraction, exponent = torch.frexp(size)
    used = size != 0
    if not ((fraction == 0.5) | ~used).all() or (size[used] < 1).any():
        return None
    top, has_zero = (int(exponent[used].max()) - 1 if used.any() else 0), not used.all()
    for bits in S3_BITS:
        if top <= 2 ** (bits - 1) - 2:
            return bits, "S3"
        if not has_zero and top <= 2 ** (bits - 1) - 1:
            return bits, "Q"
    return None


def discrete_bits(state: dict[str, Tensor]) -> int | None:
    """Bits of S3 whose values all convolutions inside of the blocks have, None if some have others."""
    found = [
        power_of_two_bits(tensor) for name, tensor in state.items() if name.startswith("layer") and tensor.dim() == 4
    ]
    if not found or None in found:
        return None
    bits = max(bits + (scheme == "Q") for bits, scheme in found)
    return bits if bits in S3_BITS else None


@torch.no_grad()
def restore_latents(state: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of the network `config` whose discrete weights are those of a plain one.

    Every latent becomes +-c, c being the deviation of its initial value: the original does not define this direction.
    """
    with torch.device("meta"):
        model = config.build()
    restored = dict(state)
    for name, layer in latent_layers(model).items():
        weight = restored.pop(f"{name}.weight")
        values = _latents_of(weight, layer)
        restored.update({f"{name}.{latent}": value for latent, value in values.items()})
        restored[f"{name}.weight"] = values["weight_sign"]
    return restored


def _latents_of(weight: Tensor, layer: LatentConv2d) -> dict[str, Tensor]:
    exponent = torch.where(weight == 0, 0, torch.frexp(weight).exponent - 1)
    values, shifts = {"weight_sign": ~torch.signbit(weight)}, list(layer.latent_names[1:])
    if shifts and shifts[0] == "weight_val":
        values[shifts.pop(0)] = weight != 0
    values.update({name: exponent > position for position, name in enumerate(shifts)})
    return {name: torch.where(on, layer.he_deviation, -layer.he_deviation).float() for name, on in values.items()}
