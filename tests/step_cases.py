"""Training of every paper, a few epochs on random images, as it is and by recorded steps: for tests and for a GPU.

`train(case, device, by_graph=…)` builds what the paper's script builds from the same flags and runs its own loop.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch

from common.data import ImageSet

IMAGES_SEED = 5


@dataclass(frozen=True)
class Case:
    """paper, its script's flags, and the adapter below that runs it."""

    name: str
    paper: str
    flags: tuple[str, ...]


CIFAR_S3 = ("--dataset", "cifar10", "--arch", "resnet20", "--embedded-data")
DEEPSHIFT = ("--embedded-data", "--print-weights", "False", "--save-model", "False", "--print-freq", "1000")
PS = ("--arch", "resnet20", "--shift-depth", "1000", "--shift-type", "PS")
CASES = [
    Case("shiftresnet20", "shiftresnet", ("--arch=shiftresnet20", "--expansion=3", "--embedded-data")),
    Case("resnet20 bf16", "shiftresnet", ("--arch=resnet20", "--amp=bf16", "--channels-last", "--embedded-data")),
    Case("Q", "deepshift", ("--arch", "resnet20", "--shift-depth", "1000", "--shift-type", "Q", *DEEPSHIFT)),
    Case("PS radam", "deepshift", (*PS, "--opt", "radam", *DEEPSHIFT)),
    Case("PS ranger", "deepshift", (*PS, "--opt", "ranger", *DEEPSHIFT)),
    Case("PS stochastic", "deepshift", (*PS, "--opt", "adam", "--rounding", "stochastic", *DEEPSHIFT)),
    Case("s3", "s3", CIFAR_S3),
    Case("s3 4 bits bf16", "s3", (*CIFAR_S3, "--weight-bits", "4", "--amp", "bf16", "--channels-last")),
    Case("float", "s3", (*CIFAR_S3, "--method", "float")),
    Case("s8u1", "shared_bases", ("--model=ResNet32_SingleShared", "--shared_rank=8", "--embedded-data")),
    Case("n=3", "epsilon_resnet", ("-n", "3", "-e", "2.5", "--cifar10", "--embedded-data")),
    Case("svhn n=3", "epsilon_resnet", ("-n", "3", "--embedded-data")),
]


def random_images(count: int) -> Callable:
    """Stands for load_digits_set: `count` random images of the shape asked for, the same at every call."""

    def load(split, channels=3, size=32):
        generator = torch.Generator().manual_seed(IMAGES_SEED + (split != "train"))
        images = torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)
        targets = torch.randint(10, (count,), generator=generator)
        return ImageSet(images, targets, [str(i) for i in range(10)], "random")

    return load


def train(case: Case, device, *, by_graph: bool, images: int, batch: int, epochs: int = 2, rate: float | None = None):
    """Returns (state dict with the optimizer's tensors and the results of each epoch, seconds of the last epoch).

    images: of the training set; a last, shorter batch is wanted. rate: a learning rate instead of the script's.
    """
    adapter = {"shiftresnet": _shiftresnet, "deepshift": _deepshift, "s3": _s3, "shared_bases": _shared_bases,
               "epsilon_resnet": _epsilon_resnet}[case.paper]  # fmt: skip
    extra = [f"--epochs={epochs}", "--seed=3"]
    extra += ["--batch_size" if case.paper in ("shared_bases", "epsilon_resnet", "shiftresnet") else "--batch-size",
              str(batch)]  # fmt: skip
    if rate is not None:
        extra += [f"--lr_schedule=0:{rate}" if case.paper == "epsilon_resnet" else f"--lr={rate}"]
    with contextlib.ExitStack() as stack:
        for place in ("shiftresnet.engine", "deepshift.tasks", "s3.inputs", "shared_bases.engine",
                      "epsilon_resnet.inputs"):  # fmt: skip
            stack.enter_context(mock.patch(f"{place}.load_digits_set", random_images(images)))
        net, optimizer, run_epoch = adapter([*case.flags, *extra], torch.device(device), by_graph)
        results = []
        for epoch in range(epochs):
            _wait(device)
            start = time.perf_counter()
            results.append(run_epoch(epoch))
            _wait(device)
            seconds = time.perf_counter() - start
    return _everything(net, optimizer, results), seconds


def _wait(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _everything(net, optimizer, results):
    found = {f"net {name}": tensor for name, tensor in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {name}": v for name, v in state.items() if isinstance(v, torch.Tensor)}
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()} | {"results": results}


def _shiftresnet(flags, device, by_graph):
    from shiftresnet import engine, main, training
    from shiftresnet.capture import StepGraph

    args, config = main.parse_args(flags)
    run = training.Training(args, config, device, engine.World())
    run.graph = StepGraph(device) if by_graph else None
    step, (loader, _) = run.new_step(), run.loaders()

    def epoch(number):
        loader.set_epoch(number)
        training.begin_epoch(step.optimizer, training.learning_rate(args, number))
        return engine.train_one_epoch(step, loader, epoch=number, graph=run.graph)

    return run.net, step.optimizer, epoch


def _deepshift(flags, device, by_graph):
    from deepshift import cifar10, engine
    from deepshift.capture import StepGraph
    from deepshift.optim import make_capturable
    from deepshift.training import Training

    args = cifar10.parse_args(flags)
    task = cifar10.Cifar10(cifar10.parse_args)
    run = Training(task, args, device, engine.World())
    if by_graph:
        assert make_capturable(run.optimizer, device)
        run.graph = StepGraph(device)
    elif device.type == "cuda":  # its arithmetic is not that of the other, so both sides take it
        for group in run.optimizer.param_groups:
            group |= {"capturable": True} if "capturable" in group else {}
    loader, _ = task.loaders(args, run.seed, device, engine.World())
    step = run.new_step()

    def epoch(number):
        run.set_rates(number)
        loader.set_epoch(number)
        lines = task.train_lines(args, number, loader, False)
        result = engine.train_one_epoch(step, loader, lines, epoch=number, graph=run.graph)
        return result.loss, result.top1, result.top5

    return run.net, run.optimizer, epoch


def _s3(flags, device, by_graph):
    from s3 import engine, main
    from s3.capture import StepGraph
    from s3.inputs import make_loaders
    from s3.training import Training

    args, world = main.parse_args(flags), engine.World()
    run = Training(main.S3Task(), args, device, world, 3, 10)
    run.graph = StepGraph(device) if by_graph else None
    loader, step = make_loaders(args, 3, device, world).train, run.new_step()

    def epoch(number):
        run.set_rate(number)
        loader.set_epoch(number)
        lines = engine.BatchLines("Epoch", len(loader), 1000, False)
        result = engine.train_one_epoch(step, loader, lines, epoch=number, graph=run.graph)
        return result.loss, result.top1, result.top5

    return run.net, run.optimizer, epoch


def _shared_bases(flags, device, by_graph):
    from shared_bases import engine, train_cifar10, training, training_script
    from shared_bases.capture import StepGraph

    args, config = training_script.parse_args("cifar10", train_cifar10.__doc__, flags)
    run = training.Training(args, config, device, engine.World())
    run.graph = StepGraph(device) if by_graph else None
    step, (loader, _) = run.first_step(), run.loaders()

    def epoch(number):
        run.done = number
        return training._train_epoch(run, loader, step, args.lr / (number + 1))

    return run.net, step.optimizer, epoch


def _epsilon_resnet(flags, device, by_graph):
    from epsilon_resnet import cifarEpsilonResnet, engine, svhnEpsilonResnet
    from epsilon_resnet.capture import StepGraph
    from epsilon_resnet.training import Data, Training

    script = cifarEpsilonResnet if "--cifar10" in flags else svhnEpsilonResnet
    args, world = script.parse_args(flags), engine.World()
    data = Data(args, 3, device, world)
    run = Training(args, None, device, world, 3, data)
    run.prepare()
    graph = StepGraph(device) if by_graph else None

    def epoch(number):
        data.train.set_epoch(number)
        for group in run.optimizer.param_groups:
            group["lr"] = run.rate / (number + 1)
        result = engine.train_one_epoch(run.steps, data.train, epoch=number + 1, epsilon=2.5, graph=graph)
        return result, run.statistics.as_dict()

    return run.net, run.optimizer, epoch
