"""Training throughput of S3 ResNets against the float network of the same shape.

    python benchmarks/bench_s3_training.py --batch-size 32 --repeats 5

ImageNet ResNet-18 on random images of 224 pixels, SGD with momentum and weight
decay for both, S3 with its regulariser: what is compared is a whole step. Each
repeat times both networks one after the other; ratios are of images/s, within a
repeat, the median shown. --parts times what S3 adds; --profile tells where a
step's time goes.
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
from s3.network import Config
from s3.quantizers import dense_weight_penalty
from s3.resnet import CLASSES, METHODS
from s3.runs import hardware
from s3.s3conv2dshift import latent_layers, sparse_latents

REG_SPARSE = 1e-5


def training_step(config, images, targets, channels_last):
    """(a function that makes one training step, the network)."""
    torch.manual_seed(0)
    model = config.build()
    model.to(images.device, memory_format=torch.channels_last if channels_last else torch.contiguous_format).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    latents = sparse_latents(model)

    def step():
        loss = F.cross_entropy(model(images), targets)
        if latents:
            loss = loss + REG_SPARSE * dense_weight_penalty(latents)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step, model


def timed(function, device, steps, clock) -> float:
    """Seconds per call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    for _ in range(steps):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - start) / steps


def weights_step(model):
    """A function that builds all discrete weights, the regulariser and their gradients, without any convolution."""
    layers, latents = latent_layers(model).values(), sparse_latents(model)
    upstream = [torch.randn_like(layer.weight) for layer in layers]

    def step():
        model.zero_grad(set_to_none=True)
        torch.autograd.backward([layer.discrete_weight() for layer in layers], upstream)
        if latents:
            dense_weight_penalty(latents).backward()

    return step


def measure(arch, args, device, record) -> list[dict]:
    """Images per second of every method, one dict per repeat; record(dict) is called at once."""
    size = args.image_size or (224 if args.dataset == "imagenet" else 32)
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    if args.channels_last:
        images = images.to(memory_format=torch.channels_last)
    classes = CLASSES[args.dataset]
    targets = torch.randint(classes, (args.batch_size,), device=device)
    clock = time.process_time if args.processor_time else time.perf_counter
    methods = ("float", *(args.method or ("s3",)))
    built = {method: training_step(Config(args.dataset, arch, classes, method, args.weight_bits), images, targets,
                                   args.channels_last) for method in methods}  # fmt: skip
    for step, _ in built.values():
        timed(step, device, args.warmup, clock)
    rounds = []
    for _ in range(args.repeats):
        seconds = {method: timed(step, device, args.steps, clock) for method, (step, _) in built.items()}
        rounds.append({"arch": arch, **{method: args.batch_size / value for method, value in seconds.items()}})
        record(rounds[-1])
    for method in methods[1:]:
        if args.parts:
            part = timed(weights_step(built[method][1]), device, 3, clock)
            print(f"{arch} {method}: weights and their gradients {1e3 * part:.1f} ms of a step")
        if args.profile:
            with torch.profiler.profile() as profile:
                built[method][0]()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
    return rounds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", action="append", help="network of main.py (default: resnet18)")
    add("--dataset", default="imagenet", choices=("imagenet", "cifar10"), help="whose (default: %(default)s)")
    add("--method", action="append", choices=METHODS[:2], help="compared with float (default: s3)")
    add("--weight-bits", type=int, default=3, choices=(2, 3, 4), help="default: %(default)s")
    add("--image-size", type=int, metavar="N", help="side of the images (default: 224, cifar10: 32)")
    add("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--steps", type=int, default=1, help="steps per round and method (default: %(default)s)")
    add("--warmup", type=int, default=1, help="untimed steps (default: %(default)s)")
    add("--channels-last", action="store_true", help="store activations as NHWC")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--threads", type=int, help="torch.set_num_threads (default: torch's own choice)")
    add("--processor-time", action="store_true", help="count the processor's time, for a machine that others use too")
    add("--parts", action="store_true", help="time building the weights by itself")
    add("--profile", action="store_true", help="print a profile of a step")
    add("--csv", metavar="FILE", help="file for the measured images/s (default: none)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"batch {args.batch_size}, {hardware(device)}, {args.repeats} rounds of {args.steps} steps")
    everything, record = [], timing.row_writer(args.csv, ["arch", "float", *(args.method or METHODS[:1])])
    for arch in args.arch or ("resnet18",):
        rounds = measure(arch, args, device, record)
        everything += rounds
        methods = [name for name in rounds[0] if name != "arch"]
        for method in methods:
            print(f"{arch:10} {method:11} {statistics.median(row[method] for row in rounds):10.2f} images/s")
        for method in methods[1:]:
            ratio = statistics.median(row[method] / row["float"] for row in rounds)
            print(f"{arch} {method} / float, images/s in training: ratio {ratio:.2f}x")
    return everything


if __name__ == "__main__":
    main()
