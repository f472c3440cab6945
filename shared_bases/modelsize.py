"""Size and speed of one network: layers, multiply-adds, parameters, seconds.

    python shared_bases/modelsize.py

lists the layers of ResNet56_DoubleShared (s = 24, u = 1) for a 32x32 image,
then prints

    Computational complexity:       0.21 GMac
    Number of parameters:           412.41 k
    time: ... seconds per inference

The complexity is the count of count.py (ptflops 0.6), not doubled. The time is
the mean of --repeats passes over one 256x256 image.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from shared_bases import engine
from shared_bases.count import count_parameters, layer_calls
from shared_bases.models import IMAGE_SIZES, MODELS, Config, build_model, model_key
from shared_bases.run import gpu_errors_explained
from shared_bases.runs import hardware

TIMED_SIZE = 256


def in_units(number: int, suffix: str = "") -> str:
    """A number as ptflops prints it: two decimals and G, M or k (with a suffix, as in GMac)."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("K" if suffix else "k", 10**3)):
        if number >= size / (100 if unit == "G" and suffix else 1):
            return f"{number / size:.2f} {unit}{suffix}"
    return f"{number} {suffix}".rstrip()


def print_layers(model, image_size: int):
    """Every layer that has parameters or is counted: parameters, count and share of the whole count."""
    calls = layer_calls(model, image_size)
    total, counts = sum(call.count for call in calls), {}
    for call in calls:
        counts[call.name] = counts.get(call.name, 0) + call.count
    print(f"{'layer':44} {'parameters':>10} {'count':>11} {'share':>7}")
    seen = set()
    for name, layer in model.named_modules():
        own = [parameter for parameter in layer.parameters(recurse=False) if id(parameter) not in seen]
        seen.update(map(id, own))
        count = counts.get(name, 0)
        if own or count:
            size = sum(parameter.numel() for parameter in own)
            print(f"{name:44} {size:>10} {count:>11} {count / total:>7.2%}")
    return total


@torch.no_grad()
def seconds_per_pass(model, device: torch.device, repeats: int) -> float:
    """Mean seconds of a forward pass over one 256x256 image, after one pass to warm up."""
    model.to(device).eval()
    x = torch.randn(1, 3, TIMED_SIZE, TIMED_SIZE, device=device)
    model(x)
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        model(x)
    _wait(device)
    return (time.perf_counter() - start) / repeats


def _wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    extra = parser.add_argument_group("added in this repository")
    extra.add_argument("--dataset", default="cifar10", choices=tuple(MODELS), help="default: %(default)s")
    extra.add_argument("--model", default="ResNet56_DoubleShared", help="network (default: %(default)s)")
    extra.add_argument("--shared_rank", type=int, default=24, help="default: %(default)s")
    extra.add_argument("--unique_rank", type=int, default=1, help="default: %(default)s")
    extra.add_argument("--repeats", type=int, default=100, help="timed passes (default: %(default)s)")
    extra.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    extra.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


@gpu_errors_explained(batch_size=1)
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {args.repeats}")
    try:
        config = Config(args.dataset, model_key(args.dataset, args.model), args.shared_rank, args.unique_rank)
    except ValueError as error:
        parser.error(str(error))
    _, device = engine.join_world(args.device)
    model = build_model(config)
    total = print_layers(model, IMAGE_SIZES[args.dataset])
    print(f"{'Computational complexity: ':<30}  {in_units(total, 'Mac'):<8}")
    print(f"{'Number of parameters: ':<30}  {in_units(count_parameters(model)):<8}")
    print(f"time: {seconds_per_pass(model, device, args.repeats):.4f} seconds per inference")
    print(f"({TIMED_SIZE}x{TIMED_SIZE}, {args.repeats} passes, {hardware(device)})")


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
