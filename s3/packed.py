"""The packed file: a network with 2 to 4 bits per quantised weight, everything else as float tensors."""

import torch
from torch import Tensor, nn

from common.checkpoints import CheckpointError
from s3.discrete import power_of_two_bits
from s3.s3conv2dshift import S3Conv2d, latent_layers

FORMAT, VERSION = "s3 packed weights", 1


@torch.no_grad()
def pack_layers(model: nn.Module) -> dict[str, object]:
    """PackedShiftWeights of every quantised convolution, by name.

    Quantised are S3 and DenseShift layers, and plain convolutions whose weights are 0 or +-1 to +-128.
    """
    from common.kernels import pack_shift_weights

    packed, latent = {}, latent_layers(model)
    for name, layer in model.named_modules():
        if name in latent:
            code = layer.bits, "S3" if isinstance(layer, S3Conv2d) else "Q"
            packed[name] = pack_shift_weights(layer.discrete_weight().cpu(), *code)
        elif type(layer) is nn.Conv2d and (code := power_of_two_bits(layer.weight)):
            packed[name] = pack_shift_weights(layer.weight.cpu(), *code)
    return packed


def packed_payload(model: nn.Module, config: dict, others: dict) -> dict:
    """What a packed file holds, tensors and plain values only. others: epoch and accuracy, kept as they are."""
    codes = {name: weights.state() for name, weights in pack_layers(model).items()}
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()
               if name.rpartition(".")[0] not in codes or name.endswith(".bias")}  # fmt: skip
    return {"format": FORMAT, "version": VERSION, **others, "config": config, "layers": codes, "tensors": tensors}


def is_packed(content) -> bool:
    """Whether what a file holds is a packed network."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def unpacked_state(path: str, content: dict) -> dict[str, Tensor]:
    """State dict of the plain network, its weights bit for bit. Raises CheckpointError if the content is damaged."""
    from common.kernels import PackedShiftWeights

    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {content.get('version')} of the packed format, this is {VERSION}")
    try:
        state = dict(content["tensors"])
        for name, codes in content["layers"].items():
            state[f"{name}.weight"] = PackedShiftWeights.from_state(codes).unpack()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: packed weights cannot be read ({str(error).splitlines()[0]})") from None
    return state


class PackedConv2d(nn.Module):
    """A convolution on packed weights, for inference: every code becomes its power of two inside of the kernel.

    conv: the nn.Conv2d that it replaces, whose weights these are. x: (N, in_channels, H, W).
    """

    def __init__(self, conv: nn.Conv2d, weights):
        super().__init__()
        self.weights, self.bias = weights.to(conv.weight.device), conv.bias
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding, self.padding_first = conv.padding, None
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            self.padding, self.padding_first = 0, (conv._reversed_padding_repeated_twice, mode)

    def forward(self, x):
        from common.kernels import bitshift_conv2d

        if self.padding_first is not None:
            x = nn.functional.pad(x, self.padding_first[0], mode=self.padding_first[1])
        return bitshift_conv2d(x, self.weights, self.bias, self.stride, self.padding, self.dilation, self.groups)


def use_kernels(model: nn.Module, packed: dict[str, object]) -> dict[str, nn.Module]:
    """Replace convolutions, in place, by their packed form; returns what was there, by name, for `put_back`."""
    replaced = {name: model.get_submodule(name) for name in packed}
    put_back(model, {name: PackedConv2d(conv, packed[name]) for name, conv in replaced.items()})
    return replaced


def put_back(model: nn.Module, modules: dict[str, nn.Module]):
    """Set submodules by name."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
