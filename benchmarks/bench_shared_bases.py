"""Cost of the orthogonality term in a training step, and of joining basis filters instead of feature maps.

    python benchmarks/bench_shared_bases.py --batch-size=32 --repeats=5 --csv=shared_bases.csv

ResNet34_SingleShared (s = 32, u = 1) on CIFAR-100-sized random images. Each
repeat times all variants one after the other; ratios are within a repeat, the
table shows their median.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from shared_bases.models import Config, build_model
from shared_bases.modules import BasisConv
from shared_bases.regulariser import similarity_terms
from shared_bases.runs import hardware

CONFIG = Config("cifar100", "ResNet34_SingleShared", 32, 1)


def joined_maps(self, x, *weights):
    """What the original does: one convolution for own and one for shared filters, then their maps are joined."""
    return torch.cat([F.conv2d(x, weight, padding=1) for weight in weights], 1)


def timed(function, device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def variants(device, batch_size):
    """{name: function} of what is timed."""
    torch.manual_seed(0)
    model = build_model(CONFIG).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    targets = torch.randint(100, (batch_size,), device=device)

    def step(weight):
        loss = F.cross_entropy(model(images), targets)
        if weight:
            loss = loss + weight * sum(similarity_terms(model, CONFIG.entry.similarity))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def term_alone():
        optimizer.zero_grad(set_to_none=True)
        sum(similarity_terms(model, CONFIG.entry.similarity)).backward()

    def with_joined_maps():
        original, BasisConv.forward = BasisConv.forward, joined_maps
        try:
            step(10)
        finally:
            BasisConv.forward = original

    return {"step": lambda: step(10), "step, no term": lambda: step(0), "term": term_alone,
            "step, joined maps": with_joined_maps}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--csv", metavar="FILE", help="file for the measured seconds (default: none)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    device = torch.device(args.device)
    functions = variants(device, args.batch_size)
    for function in functions.values():
        function()  # warm up
    rounds = [{name: timed(function, device) for name, function in functions.items()} for _ in range(args.repeats)]
    print(f"{CONFIG.text()}, batch {args.batch_size}, {hardware(device)}, {args.repeats} rounds")
    for name in functions:
        print(f"{name:20} {statistics.median(row[name] for row in rounds) * 1e3:10.2f} ms")
    for label, first, second in (
        ("orthogonality term of a training step", "term", "step"),
        ("joined maps of joined filters, training step", "step, joined maps", "step"),
    ):
        print(f"{label}: ratio {statistics.median(row[first] / row[second] for row in rounds):.2f}x")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, list(functions), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rounds)
    return rounds


if __name__ == "__main__":
    main()
