"""One training run of ShiftResNet: recipe, state from epoch to epoch, resume. What main.py runs."""

import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from common.data import TensorLoader
from shiftresnet import engine
from shiftresnet.capture import StepGraph, why_not
from shiftresnet.checkpoints import read_network
from shiftresnet.models import Config, build_model
from shiftresnet.runs import Run, RunError

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
RESULT_FLAGS = (
    "lr",
    "batch_size",
    "epochs",
    "recipe",
    "dataset",
    "embedded_data",
    "train_size",
    "amp",
    "channels_last",
    "seed",
)


@dataclass(frozen=True)
class Recipe:
    """Length of training, first epochs of the second and third learning rate, and the initial batch-norm scales."""

    epochs: int
    drops: tuple[int, int]
    uniform_batchnorm: bool


RECIPES = {
    "final": Recipe(164, (82, 123), uniform_batchnorm=False),  # the original's last version, on today's PyTorch
    "published": Recipe(160, (82, 124), uniform_batchnorm=True),  # what the tables were trained with
}


def learning_rate(args, epoch: int) -> float:
    """Learning rate of a 0-based epoch: divided by 10 at each drop of the recipe, scaled to --epochs."""
    recipe = RECIPES[args.recipe]
    return args.lr / 10 ** sum(epoch * recipe.epochs >= drop * args.epochs for drop in recipe.drops)


def changed_flags(args, recorded: dict) -> list[str]:
    """How the flags that decide a result differ from those of an earlier call, in words; an absent --seed fits any."""
    return [
        f"--{name.replace('_', '-') if name != 'batch_size' else name} {recorded.get(name)} (now {getattr(args, name)})"
        for name in RESULT_FLAGS
        if recorded.get(name) != getattr(args, name) and not (name == "seed" and args.seed is None)
    ]


def build_network(args, config: Config) -> nn.Module:
    """The network with its initial weights; draws from torch's global generator."""
    model = build_model(config)
    if RECIPES[args.recipe].uniform_batchnorm:  # the default of PyTorch up to 1.1
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight)
    return model


def shared_seed(seed: int | None, device, world) -> int:
    """--seed, or a new one that is the same in every process."""
    number = torch.tensor([torch.seed() % 2**31 if seed is None else seed], device=device)
    if world.size > 1:
        dist.broadcast(number, 0)
    return int(number)


class Training:
    """State of one run: the network and what changes from epoch to epoch."""

    def __init__(self, args, config, device, world):
        self.args, self.config, self.device, self.world = args, config, device, world
        self.first_epoch, self.best, self.seconds = 0, {"acc": -1.0, "epoch": None}, 0.0
        self.seed = shared_seed(args.seed, device, world)
        torch.manual_seed(self.seed)
        self.net = build_network(args, config)
        self.amp_dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        self.scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        if args.cuda_graph and (why := why_not(device, processes=world.size, amp=args.amp, compiled=args.compile)):
            raise RunError(f"--cuda-graph {why}")
        self.graph = StepGraph(device) if args.cuda_graph else None

    def resume(self, run: Run) -> bool:
        """Take over the last state of the run, or the weights of a file of the original. False if there is neither."""
        state = run.load_last()
        if state is None:
            return self._start_from(run.best_path)
        if Config(**state["config"]) != self.config:
            held = Config(**state["config"])
            raise RunError(
                f"{run.last_path} holds {held.arch}{held.suffix()}, the flags ask for "
                f"{self.config.arch}{self.config.suffix()}; use the flags it was trained with or another --output-dir"
            )
        changes = changed_flags(self.args, {**state["args"], "seed": state["seed"]})
        if changes and (self.args.auto_resume or self.args.seed not in (None, state["seed"])):
            raise RunError(
                f"{run.last_path} was trained with {', '.join(changes)}; use the same flags or another --output-dir"
            )
        if changes and self.world.is_main:
            print(f"note: this run was started with {', '.join(changes)}")
        self.net.load_state_dict(state["net"])
        self.seed, self.best, self.seconds = state["seed"], state["best"], state["seconds"]
        self.first_epoch = state["epoch"] + 1
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        return True

    def _start_from(self, best_path: str) -> bool:
        # As in the original: its files have the best network only, and training repeats that network's epoch.
        names = [best_path, best_path.replace("_1.0", "_1", 1)]  # the original wrote _1 when -e was not given
        path = next((name for name in names if os.path.exists(name)), None)
        if path is None:
            return False
        found = read_network(path)
        if found["config"] != self.config:
            held = found["config"]
            raise RunError(f"{path} holds {held.arch}{held.suffix()}, not {self.config.arch}{self.config.suffix()}")
        self.net.load_state_dict(found["net"])
        if found["acc"] is not None and found["epoch"] is not None:
            self.best, self.first_epoch = {"acc": found["acc"], "epoch": found["epoch"]}, found["epoch"]
        return True

    def loaders(self):
        """Training and test loader. --channels-last and the ranks' shards are theirs."""
        args, world = self.args, self.world
        train = engine.load_split(args.dataset, args.data_dir, "train", args.embedded_data, args.train_size)
        test = engine.load_split(args.dataset, args.data_dir, "test", args.embedded_data)
        if args.batch_size < world.size or len(train) < world.size:
            raise RunError(
                f"{world.size} processes need at least {world.size} images in a batch and in the training set"
            )
        loader = TensorLoader(
            train,
            args.batch_size,
            train=True,
            mean=engine.MEAN,
            std=engine.STD,
            pad=4,
            flip=True,
            seed=self.seed,
            device=self.device,
            rank=world.rank,
            world_size=world.size,
            channels_last=args.channels_last,
        )
        return loader, engine.test_loader(test, self.device, world, args.channels_last)

    def wrapped(self) -> nn.Module:
        """The network as the training loop calls it: on the device, under DDP and torch.compile where asked."""
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        self.net.to(self.device, memory_format=memory_format)
        model = self.net
        if self.world.size > 1:
            model = nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        # Else the last, shorter batch makes all later ones run a slower graph that fits any size.
        return torch.compile(model, dynamic=False) if self.args.compile else model

    def new_step(self) -> engine.TrainingStep:
        """What each batch goes through, with its optimizer."""
        optimizer = torch.optim.SGD(
            self.net.parameters(), lr=self.args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        return engine.TrainingStep(
            self.wrapped(), optimizer, self.device, world=self.world, amp_dtype=self.amp_dtype, scaler=self.scaler
        )

    def best_payload(self, acc, epoch) -> dict:
        return {
            "net": self.net.state_dict(),
            "acc": acc,
            "epoch": epoch,
            "config": self.config.as_dict(),
            "channels_last": self.args.channels_last,
        }

    def last_payload(self, acc, epoch) -> dict:
        return {
            **self.best_payload(acc, epoch),
            "best": self.best,
            "seconds": self.seconds,
            "seed": self.seed,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "args": {name: getattr(self.args, name) for name in RESULT_FLAGS},
        }


def train(training: Training, run: Run, loaders) -> dict:
    """All remaining epochs. Returns the result: accuracy of the last epoch, and the best, chosen on the test set."""
    args, step, test_top1 = training.args, training.new_step(), None
    for epoch in range(training.first_epoch, args.epochs):
        if training.world.is_main:
            print(f"\nEpoch: {epoch}", flush=True)
        row = _run_epoch(training, step, loaders, epoch)
        test_top1 = row["test_top1"]
        if test_top1 > training.best["acc"]:
            _save_best(training, run, test_top1, epoch)
        run.log_epoch(row)
        run.save_last(training.last_payload(test_top1, epoch))
    if test_top1 is None:  # resumed after the last epoch: nothing left to train
        state = run.load_last()
        if state is None:
            raise RunError(
                f"{run.best_path} is at epoch {training.first_epoch} of {args.epochs} already; give more --epochs"
            )
        test_top1 = state["acc"]
    return {
        "top1": test_top1,
        "best_top1": training.best["acc"],
        "best_epoch": training.best["epoch"],
        "epochs": args.epochs,
        "epochs_in_paper": RECIPES["published"].epochs,
        "seconds": training.seconds,
        "checkpoint": run.best_path,
    }


def begin_epoch(optimizer, rate: float):
    """Set the rate and start momentum from zero: the original made a new optimizer every epoch.

    In place, because a recorded step goes on using the same tensors; a new optimizer's first momentum is the gradient,
    which zero plus the gradient is too.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
        for parameter in group["params"]:
            momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                momentum.zero_()


def _run_epoch(training, step, loaders, epoch) -> dict:
    """Train and test once. Returns the line of metrics.jsonl."""
    train_loader, test_loader = loaders
    start, rate = time.monotonic(), learning_rate(training.args, epoch)
    train_loader.set_epoch(epoch)
    begin_epoch(step.optimizer, rate)
    train_loss, train_top1 = engine.train_one_epoch(step, train_loader, epoch=epoch, graph=training.graph)
    train_seconds = time.monotonic() - start
    test_loss, test_top1 = engine.evaluate(training.net, test_loader, world=training.world)
    seconds = time.monotonic() - start
    training.seconds += seconds
    return {
        "epoch": epoch,
        "lr": rate,
        "train_loss": train_loss,
        "train_top1": train_top1,
        "test_loss": test_loss,
        "test_top1": test_top1,
        "seconds": seconds,
        "images_per_second": train_loader.num_images / train_seconds,
    }


def _save_best(training, run, top1, epoch):
    training.best = {"acc": top1, "epoch": epoch}
    if training.world.is_main:
        print("Saving..")
    run.save_best(training.best_payload(top1, epoch))
    if training.world.is_main:
        print(f"* Saved checkpoint to {run.best_path}", flush=True)
