"""Training throughput of DeepShift networks against the float network they are converted from.

    python benchmarks/bench_deepshift_training.py --batch-size 128 --repeats 5

CIFAR-10 resnet20 and resnet18, random images, SGD for all: what is compared is
the quantisation of weights and activations. Each repeat times float, Q and PS
one after the other; ratios are of images/s, within a repeat, the median shown.
--profile tells where a step's time goes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import timing
from deepshift.convert import convert_to_shift
from deepshift.optim import build_optimizer, parameter_groups
from deepshift.runs import hardware
from deepshift.zoo import build_model

KINDS = ("float", "Q", "PS")


def training_step(arch, kind, images, targets, channels_last):
    """A function that makes one training step of the network."""
    torch.manual_seed(0)
    model = build_model("cifar10", arch)
    if kind != "float":
        convert_to_shift(model, 1000, kind, convert_weights=True)
    model.to(images.device, memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    optimizer = build_optimizer("sgd", parameter_groups(model, 0.001, None, 1e-4), 0.001, 0.9)

    def step():
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def timed(function, device, steps, clock=time.perf_counter) -> float:
    """Seconds per call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(steps):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / steps


def measure(arch, args, device, record) -> list[dict]:
    """Images per second of every kind, one dict per repeat; record(dict) is called at once."""
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    targets = torch.randint(10, (args.batch_size,), device=device)
    steps = {kind: training_step(arch, kind, images, targets, args.channels_last) for kind in KINDS}
    for step in steps.values():
        timed(step, device, args.warmup)
    rounds, clock = [], time.process_time if args.processor_time else time.perf_counter
    for _ in range(args.repeats):
        seconds = {kind: timed(step, device, args.steps, clock) for kind, step in steps.items()}
        rounds.append({"arch": arch, **{kind: args.batch_size / value for kind, value in seconds.items()}})
        record(rounds[-1])
    if args.profile:
        with torch.profiler.profile() as profile:
            steps["PS"]()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    return rounds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", action="append", help="network of the CIFAR-10 script (default: resnet20 and resnet18)")
    add("--batch-size", type=int, default=128, help="images per step (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--steps", type=int, default=1, help="steps per round and kind (default: %(default)s)")
    add("--warmup", type=int, default=1, help="untimed steps (default: %(default)s)")
    add("--channels-last", action="store_true", help="store activations as NHWC")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--threads", type=int, help="torch.set_num_threads (default: torch's own choice)")
    add("--processor-time", action="store_true", help="count the processor's time, for a machine that others use too")
    add("--profile", action="store_true", help="print a profile of a PS step")
    add("--csv", metavar="FILE", help="file for the measured images/s (default: none)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"batch {args.batch_size}, {hardware(device)}, {args.repeats} rounds of {args.steps} steps")
    everything, record = [], timing.row_writer(args.csv, ["arch", *KINDS])
    for arch in args.arch or ("resnet20", "resnet18"):
        rounds = measure(arch, args, device, record)
        everything += rounds
        for kind in KINDS:
            print(f"{arch:10} {kind:6} {statistics.median(row[kind] for row in rounds):10.1f} images/s")
        for kind in KINDS[1:]:
            ratio = statistics.median(row[kind] / row["float"] for row in rounds)
            print(f"{arch} {kind} / float, images/s in training: ratio {ratio:.2f}x")
    return everything


if __name__ == "__main__":
    main()
