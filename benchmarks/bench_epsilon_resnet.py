"""What the gate costs: a training step of epsilon-ResNet with gates against one with plain additions.

    python benchmarks/bench_epsilon_resnet.py            # n = 18, batch 128

The step without gates adds residual and shortcut and keeps no statistics. Steps alternate, so that a busy machine hits
both alike; the first ratio is the median over the pairs. The second is free of the noise of whole steps: what gates add
to the additions of all blocks (forward and backward, best of many) and the statistics of a step, over the best step.
"""

import csv
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from benchmarks import timing
from epsilon_resnet import modules, schedules
from epsilon_resnet.averages import Statistics
from epsilon_resnet.engine import SIDE_WEIGHT
from epsilon_resnet.models import Config, Output, build_model
from epsilon_resnet.training import RECIPES, build_optimizer


def plain_addition(residual, shortcut, epsilon):
    """What stands in for the gate: the addition of an ordinary ResNet."""
    return residual + shortcut, residual.new_zeros((), dtype=torch.float32)


def make_step(model, device, batch_size, gated):
    """A function that runs one training step, as the engine does."""
    optimizer = build_optimizer(model, 0.01, RECIPES["cifar"])
    averages = Statistics(model.config, device)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    targets = torch.randint(10, (batch_size,), device=device)

    def step(number):
        output = model(images)
        loss = F.cross_entropy(output.logits, targets)
        cost = loss + SIDE_WEIGHT * F.cross_entropy(output.side_logits, targets)
        optimizer.param_groups[0]["weight_decay"] = schedules.weight_decay(number)
        optimizer.zero_grad(set_to_none=True)
        cost.backward()
        optimizer.step()
        if gated:
            averages.update(output, model.epsilon, loss, targets)

    return step


def timed(function, device):
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare_steps(n, batch_size, repeats, device):
    """(median seconds with gates, without, best without, median ratio of the pairs)."""
    torch.manual_seed(0)
    model = build_model(Config("cifar", n), epsilon=2.5).to(device).train()
    gated, plain = (make_step(model, device, batch_size, flag) for flag in (True, False))
    times = []
    for number in range(repeats + 1):
        with_gate = timed(lambda number=number: gated(number), device)
        with mock.patch.object(modules, "strict_identity", plain_addition):
            without = timed(lambda number=number: plain(number), device)
        if number:  # the first pair warms up
            times.append((with_gate, without))
            print(f"  pair {number}/{repeats}: {with_gate:.3f} s, {without:.3f} s", flush=True)
    gated_times, plain_times = zip(*times, strict=True)
    ratio = statistics.median(a / b for a, b in times)
    return statistics.median(gated_times), statistics.median(plain_times), min(plain_times), ratio


def compare_additions(n, batch_size, repeats, device):
    """Rows (shape, gated ms, plain ms) of one block's addition, forward and backward, best of `repeats`; n of each."""
    rows = []
    for channels, size in ((16, 32), (32, 16), (64, 8)):
        tensors = [torch.randn(batch_size, channels, size, size, device=device, requires_grad=True) for _ in range(2)]
        upstream, best = torch.ones_like(tensors[0]), []
        for function in (modules.strict_identity, plain_addition):

            def run(function=function, tensors=tensors, upstream=upstream):
                torch.autograd.grad(function(*tensors, 2.5)[0], tensors, upstream)

            best.append(min(timed(run, device) for _ in range(repeats)))
        rows.append((f"{n} additions of {batch_size}x{channels}x{size}x{size}", *(1e3 * n * value for value in best)))
    return [*rows, ("statistics", 1e3 * statistics_time(n, batch_size, repeats, device), 0.0)]


def statistics_time(n, batch_size, repeats, device):
    """Seconds of one update of the moving averages, best of `repeats`."""
    config = Config("cifar", n)
    averages, targets = Statistics(config, device), torch.randint(10, (batch_size,), device=device)
    logits = torch.randn(batch_size, 10, device=device)
    output = Output(logits, logits, torch.rand(len(config.block_names), device=device))
    return min(timed(lambda: averages.update(output, 2.5, logits.sum(), targets), device) for _ in range(repeats))


def main(argv=None):
    options = timing.parser(__doc__)
    options.set_defaults(repeats=7)
    options.add_argument("-n", type=int, default=18, help="blocks per group (default: %(default)s)")
    options.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    args = timing.parse(options, argv)
    title = f"n = {args.n}, batch {args.batch_size}"
    print(f"epsilon-ResNet {title}, {timing.hardware(args.device)}")
    rows = compare_additions(args.n, args.batch_size, 50, args.device)
    for name, gated, plain in rows:
        print(f"  {name}: {gated:.2f} ms with gates, {plain:.2f} ms without")
    gated, plain, best, ratio = compare_steps(args.n, args.batch_size, args.repeats, args.device)
    rows.append(("training step", 1e3 * gated, 1e3 * plain))
    extra = sum(row[1] - row[2] for row in rows[:-1]) / (1e3 * best)
    print(f"training step: median {gated:.3f} s with gates, {plain:.3f} s without; with / without ratio {ratio:.2f}x")
    print(f"gates and statistics / best step without gates ({best:.3f} s) ratio {extra:.4f}x")
    if not args.no_csv:
        write_csv(title, args.device, rows, {"step with / without": ratio, "gates / best step without": extra})


def write_csv(title, device, rows, ratios):
    """Write benchmarks/results/bench_epsilon_resnet.csv."""
    timing.RESULTS.mkdir(exist_ok=True)
    path, where = timing.RESULTS / "bench_epsilon_resnet.csv", (timing.hardware(device), timing.versions())
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("comparison", "name", "with_gates_ms", "without_ms", "ratio", "hardware", "versions"))
        writer.writerows((title, name, f"{gated:.3f}", f"{plain:.3f}", "", *where) for name, gated, plain in rows)
        writer.writerows((title, name, "", "", f"{value:.4f}", *where) for name, value in ratios.items())
    print(path)


if __name__ == "__main__":
    main()
