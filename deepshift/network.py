"""From flags to the network: create, load, convert, in the original's order of events."""

import os
from dataclasses import dataclass

import torch
from torch import nn

from deepshift.checkpoints import Loaded, differences, load_into, read_model, read_weights, require_same
from deepshift.convert import convert_to_shift, convert_to_unoptimized, shift_layers
from deepshift.modules_unoptimized import UnoptimizedConv2d, UnoptimizedLinear
from deepshift.runs import RunError, label
from deepshift.zoo import build_model
from deepshift.zoo.pooling import order_pool_gradients

FLOAT_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass
class Network:
    """model: converted. config: plain values that describe it, for the files. label: of the run's directory."""

    model: nn.Module
    config: dict
    label: str


def build_network(args, dataset: str, say=print) -> Network:
    """The network that the flags name, with its weights. say: for the original's lines and for notes.

    Raises RunError or CheckpointError for files and conversions that do not fit.
    """
    if args.model:
        which = "type" if dataset == "mnist" else "arch"
        say(f'WARNING: Ignoring arguments "{which}" and "pretrained" when creating model...')
        model, arch, loaded = read_model(args.model, dataset, args.arch)
    else:
        model, arch, loaded = _new_model(args, dataset, say), args.arch, None
    if getattr(args, "freeze", False):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    after = None
    path = args.weights or _float_weights(args, dataset)
    if path and not args.model:
        weights = read_weights(path)
        if weights.is_converted:
            after = weights
        else:
            loaded = weights
            load_into(model, weights)
    count = convert(args, dataset, model, loaded is not None and loaded.is_converted)
    network = Network(model, describe(args, dataset, arch, model, count), _label(args, dataset, model))
    for note in differences(loaded, network.config, ["normalize"]) if loaded is not None else ():
        say(f"note: {note}")
    if loaded is not None and loaded.is_converted:
        network.config = {**loaded.config, "arch": arch, "normalize": network.config["normalize"]}
    if after is not None:
        load_converted(network, after, say)
    if args.deterministic:
        order_pool_gradients(model)
    _check_weights(model, say)
    return network


def _new_model(args, dataset, say):
    if dataset == "imagenet" and args.pretrained:
        from deepshift.zoo.imagenet import build_pretrained

        say(f"=> using pre-trained model '{args.arch}'")
        return build_pretrained(args.arch, args.output_dir)
    if dataset != "mnist":
        say(f"=> creating model '{args.arch}'")
    return build_model(dataset, args.arch)


def _float_weights(args, dataset):
    """Path of the float network that --pretrained True means for MNIST and CIFAR-10."""
    if not args.pretrained or dataset == "imagenet":
        return None
    path = os.path.join(args.output_dir, dataset, args.arch, "shift_0", "weights.pth")
    if not os.path.exists(path):
        raise RunError(f"--pretrained: {path} does not exist; train the float network first, or give --weights")
    return path


def convert(args, dataset: str, model: nn.Module, is_converted: bool = False) -> int:
    """Convert in place as the flags say; returns the number of layers counted."""
    if args.shift_depth == 0 or is_converted:
        if args.use_kernel and not is_converted:
            convert_to_unoptimized(model)
        return 0
    # As in the original: ImageNet from scratch starts from random shifts, the others from the converted float weights.
    keep = dataset != "imagenet" or bool(args.pretrained or args.weights or args.model)
    return convert_to_shift(
        model,
        args.shift_depth,
        args.shift_type,
        convert_all_linear=_all_linear(dataset, args.arch),
        convert_weights=keep,
        freeze_sign=dataset == "imagenet" and args.lr_sign == 0,
        rounding=args.rounding,
        weight_bits=args.weight_bits,
        activation_bits=(args.activation_integer_bits, args.activation_fraction_bits),
    )[1]


def _all_linear(dataset, arch):
    return (dataset, arch) != ("mnist", "simple_linear")


def depth_name(args, dataset: str, model: nn.Module) -> str:
    """`all` if no float convolution or linear layer is left (for MNIST: on PyTorch's own kernels), else the number."""
    kinds = FLOAT_LAYERS if dataset == "mnist" else (*FLOAT_LAYERS, UnoptimizedLinear, UnoptimizedConv2d)
    return str(args.shift_depth) if any(type(module) in kinds for module in model.modules()) else "all"


def describe(args, dataset: str, arch: str, model: nn.Module, count: int) -> dict:
    """Plain values from which the network can be built again (checkpoints.from_config)."""
    layers = list(shift_layers(model))
    return {
        "dataset": dataset,
        "arch": arch,
        "shift_type": args.shift_type if layers else None,
        "shift_depth": depth_name(args, dataset, model),
        "count": count,
        "convert_all_linear": _all_linear(dataset, arch),
        "weight_bits": args.weight_bits,
        "activation_bits": [args.activation_integer_bits, args.activation_fraction_bits],
        "normalize": getattr(args, "normalize", dataset),
        "layers": layers,
    }


def _label(args, dataset, model):
    prefix = f"shift_{args.shift_type.lower()}" if args.shift_depth else "shift"
    return label(prefix, depth_name(args, dataset, model), args.weight_bits if args.shift_depth else None, args.desc)


def load_converted(network: Network, loaded: Loaded, say=print):
    """Load weights after conversion. Raises RunError if the file is of another network."""
    for note in require_same(loaded, network.config):
        say(f"note: {note}")
    load_into(network.model, loaded)


def _check_weights(model, say):
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", getattr(layer, "sign", None))
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2 and not weight.any():
            say(f"warning: all weights of {name} are zero; powers of two cannot leave zero")
