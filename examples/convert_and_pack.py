"""Give a torchvision network power-of-two weights, pack them, run it on the kernels, compare logits and file size.

    python examples/convert_and_pack.py --arch resnet18 --method deepshift-ps
    python examples/convert_and_pack.py --arch resnet18 --method s3 --bits 3
    python examples/convert_and_pack.py --arch resnet18 --weights FILE       # or --pretrained, which downloads

deepshift-ps: convolutions and linear layers, computed with integer shifts and additions. s3: convolutions only, in
float. Weights are rounded, not trained: what that costs is what the comparison shows.
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from common.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from common.kernels import PackedShiftWeights, pack_shift_weights
from deepshift import convert as deepshift
from deepshift.checkpoints import load_into, read_weights
from deepshift.runs import RunError
from s3.packed import use_kernels as use_s3_kernels


def nearest_s3_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Each weight as 0 or +-2**p, with the 2**(bits-1) - 1 neighbouring p of least squared error for the layer."""
    best, top = None, int(torch.frexp(weight.abs().max()).exponent)
    for highest in range(top - 4, top + 1):
        lowest = highest - 2 ** (bits - 1) + 2
        exponent = weight.abs().log2().round().clamp(lowest, highest)
        rounded = torch.where(weight.abs() < 2.0 ** (lowest - 1), 0, weight.sign() * 2.0**exponent)
        if best is None or (rounded - weight).norm() < (best - weight).norm():
            best = rounded
    return best


def convert(model: nn.Module, method: str, bits: int) -> tuple[nn.Module, dict[str, PackedShiftWeights]]:
    """A copy of the network with power-of-two weights, and these packed, by layer."""
    model = copy.deepcopy(model)
    if method == "deepshift-ps":
        deepshift.convert_to_shift(model, 10**6, "PS", convert_weights=True, weight_bits=bits)
        return deepshift.round_shift_weights(model), deepshift.pack_layers(model)
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Conv2d}
    for layer in layers.values():
        layer.weight.data = nearest_s3_weight(layer.weight.data, bits)
    return model, {name: pack_shift_weights(layer.weight, bits, "S3") for name, layer in layers.items()}


def save_packed(path: str, model: nn.Module, packed: dict[str, PackedShiftWeights]):
    """Write the codes of the packed layers, and every other tensor as it is."""
    replaced = {f"{name}.{kind}" for name in packed for kind in ("weight", "shift", "sign")}
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in replaced}
    save_checkpoint(path, {"layers": {name: codes.state() for name, codes in packed.items()}, "tensors": others})


@torch.no_grad()
def timed(model, images):
    """Logits, and milliseconds per image of the second call: the first compiles the kernels."""
    model(images[:1])
    start = time.perf_counter()
    logits = model(images)
    return logits, (time.perf_counter() - start) / len(images) * 1e3


def difference(logits, expected) -> str:
    same = (logits.argmax(1) == expected.argmax(1)).sum()
    relative = (logits - expected).norm() / expected.norm()
    return f"relative difference of logits {relative:.2g}, same class for {same} of {len(logits)} images"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", default="resnet18", help="any classification network of torchvision (default: %(default)s)")
    add("--method", choices=("deepshift-ps", "s3"), default="deepshift-ps", help="default: %(default)s")
    add("--bits", type=int, choices=range(2, 7), help="per weight, 2 to 6 (default: 5; s3: 3)")
    add("--weights", metavar="FILE", help="state dict or checkpoint of the network (default: random weights)")
    add("--pretrained", action="store_true", help="torchvision's weights, downloaded")
    add("--images", type=int, default=8, metavar="N", help="random images to compare on (default: %(default)s)")
    add("--image-size", type=int, default=224, metavar="N", help="height and width (default: %(default)s)")
    add("--output", default="packed.pth", metavar="FILE", help="packed file to write (default: %(default)s)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    from torchvision.models import get_model

    torch.manual_seed(0)
    bits = args.bits or (5 if args.method == "deepshift-ps" else 3)
    model = get_model(args.arch, weights="DEFAULT" if args.pretrained else None).eval()
    if args.weights:
        load_into(model, read_weights(args.weights))
    images = torch.randn(max(1, args.images), 3, args.image_size, args.image_size)
    expected, float_ms = timed(model, images)
    rounded, packed = convert(model, args.method, bits)
    logits, _ = timed(rounded, images)
    save_packed(args.output, rounded, packed)
    codes = {name: PackedShiftWeights.from_state(s) for name, s in load_checkpoint(args.output)["layers"].items()}
    (deepshift.use_kernels if args.method == "deepshift-ps" else use_s3_kernels)(rounded, codes)
    size, float_bytes = os.path.getsize(args.output), sum(t.nbytes for t in model.state_dict().values())
    print(f"{args.arch}, {args.method}, {bits} bits: {len(packed)} layers packed")
    print(f"{args.output}: {size:,} bytes, {float_bytes / size:.2f}x smaller than {float_bytes:,} bytes in float")
    result, kernel_ms = timed(rounded, images)
    print(f"rounding: {difference(logits, expected)}")
    print(f"kernels:  {difference(result, logits)}")
    print(f"time per image: {float_ms:.1f} ms in float, {kernel_ms:.1f} ms on the kernels")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, RunError, ValueError, RuntimeError, OSError) as error:  # RuntimeError: images too small
        sys.exit(f"error: {error}")
