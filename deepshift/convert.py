"""Convert a float network to DeepShift, round it, and give its layers packed weights for the integer kernels."""

import copy

import torch
from torch import nn

from deepshift.geometry import ConvGeometry, PackedLayer
from deepshift.modules_ps import Conv2dShift, LinearShift
from deepshift.modules_q import Conv2dShiftQ, LinearShiftQ
from deepshift.modules_unoptimized import UnoptimizedConv2d, UnoptimizedLinear
from deepshift.quantizers import clamp_magnitude_, round_power_of_2, round_to_fixed, shift_and_sign

PS_LAYERS, Q_LAYERS = (LinearShift, Conv2dShift), (LinearShiftQ, Conv2dShiftQ)
SHIFT_TYPES = ("Q", "PS")


def convert_to_shift(
    model: nn.Module,
    shift_depth: int,
    shift_type: str,
    convert_all_linear: bool = True,
    convert_weights: bool = False,
    freeze_sign: bool = False,
    rounding: str = "deterministic",
    weight_bits: int = 5,
    activation_bits: tuple[int, int] = (16, 16),
) -> tuple[nn.Module, int]:
    """Replace the last `shift_depth` convolutions of a network, in place; returns it and the number counted.

    "Last" is in the order of registration, not of execution. Every nn.Linear is replaced too, whatever the depth, and
    not counted, unless convert_all_linear is False: then they count like convolutions. shift_type: "Q" or "PS".
    convert_weights: PS starts from the given weights, not from random shifts and signs (Q always keeps them).
    Raises ValueError for another type, or bits that the type does not have.
    """
    if shift_type not in SHIFT_TYPES:
        raise ValueError(f"shift type must be Q or PS, not {shift_type!r}")
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits, "rounding": rounding}
    if shift_type == "PS":
        options["freeze_sign"] = freeze_sign
    make = _q_layer if shift_type == "Q" else _ps_layer
    return model, _replace(model, shift_depth, make, convert_all_linear, convert_weights, options)


def _replace(model, depth, make, convert_all_linear, convert_weights, options):
    count = 0
    for name, child in reversed(list(model._modules.items())):
        if child is None:
            continue
        if len(child._modules):
            count += _replace(child, depth - count, make, convert_all_linear, convert_weights, options)
        if type(child) is nn.Linear and (convert_all_linear or count < depth):
            model._modules[name] = make(child, convert_weights, options)
            count += not convert_all_linear
        elif type(child) is nn.Conv2d and count < depth:
            model._modules[name] = make(child, convert_weights, options)
            count += 1
    return count


def _empty_layer(layer, classes, options):
    """The shift layer for an nn.Linear or nn.Conv2d, on its device and in its mode."""
    has_bias, device = layer.bias is not None, layer.weight.device
    if isinstance(layer, nn.Linear):
        new = classes[0](layer.in_features, layer.out_features, has_bias, **options)
    else:
        g = ConvGeometry.of(layer)
        new = classes[1](g.in_channels, g.out_channels, g.kernel_size, g.stride, g.padding, g.dilation, g.groups,
                         has_bias, g.padding_mode, **options)  # fmt: skip
    return new.to(device).train(layer.training)


def _q_layer(layer, convert_weights, options):
    new = _empty_layer(layer, Q_LAYERS, options)
    new.weight = layer.weight
    if layer.bias is not None:
        new.bias = nn.Parameter(round_to_fixed(layer.bias.detach(), *new.activation_bits))
    return new


def _ps_layer(layer, convert_weights, options):
    new = _empty_layer(layer, PS_LAYERS, options)
    if convert_weights:
        shift, sign = shift_and_sign(layer.weight.detach(), new.rounding)
        new.shift.data.copy_(shift)
        new.sign.data.copy_(sign)
        new.bias = layer.bias
    return new


def shift_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All PS and Q layers by name, in the order of registration."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (*PS_LAYERS, *Q_LAYERS))}


@torch.no_grad()
def round_shift_weights(model: nn.Module, clone: bool = False) -> nn.Module:
    """Replace trained by rounded values, in place or in a copy: shifts and signs, Q weights, biases of both.

    As in the original: biases are rounded to 16 integer and 16 fraction bits whatever the layer has, and PS shifts are
    not clamped (the forward pass does that). Rounding twice changes nothing.
    """
    model = copy.deepcopy(model) if clone else model
    for layer in shift_layers(model).values():
        if isinstance(layer, PS_LAYERS):
            layer.shift.data.round_()
            layer.sign.data.round_().sign_()
        else:
            clamp_magnitude_(layer.weight.data, *(2.0**end for end in layer.shift_range))
            layer.weight.data.copy_(round_power_of_2(layer.weight.data))
        if layer.bias is not None:
            layer.bias.data.copy_(round_to_fixed(layer.bias.data, 16, 16))
    return model


@torch.no_grad()
def pack_layers(model: nn.Module) -> dict[str, object]:
    """PackedShiftWeights of every shift layer's rounded weights, by name. Raises ValueError if a layer has NaN."""
    from common.kernels import pack_shift_weights

    packed = {}
    for name, layer in shift_layers(model).items():
        try:
            packed[name] = pack_shift_weights(layer.rounded_weight(), layer.weight_bits, layer.shift_type)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    return packed


def use_kernels(model: nn.Module, packed: dict | None) -> None:
    """Let every shift layer compute with integer shifts and additions on these packed weights; None: in float again."""
    for name, layer in shift_layers(model).items():
        layer.kernel = None if packed is None else PackedLayer(packed[name], layer.activation_bits)


def convert_to_unoptimized(model: nn.Module) -> nn.Module:
    """Replace every nn.Linear and nn.Conv2d, in place, by the naive multiplying kernels (the baseline in latency)."""
    for name, child in list(model._modules.items()):
        if type(child) is nn.Linear:
            model._modules[name] = UnoptimizedLinear(child)
        elif type(child) is nn.Conv2d:
            model._modules[name] = UnoptimizedConv2d(child)
        elif child is not None:
            convert_to_unoptimized(child)
    return model
