"""One run of either script: state from epoch to epoch, resume, files of an epoch."""

import math
import time

import torch
import torch.distributed as dist
from torch import nn

from s3 import engine
from s3.capture import StepGraph, why_not
from s3.checkpoints import Loaded, load_into, read_weights
from s3.observe import WeightWatch
from s3.runs import Run, RunError

RESULT_FLAGS = (
    "dataset", "arch", "method", "weight_bits", "init", "schedule", "num_classes", "image_size", "epochs",
    "start_epoch", "batch_size", "lr", "rs", "momentum", "weight_decay", "pretrained", "embedded_data", "train_size",
    "skip_damaged", "amp", "channels_last", "seed",
)  # fmt: skip


class Task:
    """One script's part of a run. Subclasses say what is built and how it is trained."""

    epochs_in_paper = 200

    def announce(self, args, say):
        """The lines before the network is built."""
        raise NotImplementedError

    def build(self, args, classes: int) -> nn.Module:
        """The network with initial weights."""
        raise NotImplementedError

    def describe(self, args, classes: int) -> dict:
        """Plain values that say which network it is."""
        raise NotImplementedError

    def check(self, args, loaded: Loaded, classes: int):
        """Raises RunError if a file is not for this script and these flags."""
        raise NotImplementedError

    def learning_rate(self, args, epoch: int) -> float:
        raise NotImplementedError

    def regulariser(self, args, model):
        """Function of no arguments that returns what is added to the loss, None if nothing is."""
        return None

    def published_command(self, args, classes: int) -> str | None:
        """The command in published.csv that these flags repeat, None if there is none."""
        return None


def changed_flags(args, recorded: dict) -> list[str]:
    """How the flags that decide a result differ from those of an earlier call, in words; an absent --seed fits any."""
    return [
        f"--{name.replace('_', '-')} {recorded.get(name)} (now {getattr(args, name)})"
        for name in RESULT_FLAGS
        if recorded.get(name) != getattr(args, name, recorded.get(name)) and not (name == "seed" and args.seed is None)
    ]


def shared_seed(seed: int | None, device, world) -> int:
    """--seed, or a new one that is the same in every process."""
    number = torch.tensor([torch.seed() % 2**31 if seed is None else seed], device=device)
    if world.size > 1:
        dist.broadcast(number, 0)
    return int(number)


class Training:
    """State of one run: the network and what changes from epoch to epoch. classes: outputs of the network."""

    def __init__(self, task: Task, args, device, world, seed: int, classes: int):
        self.task, self.args, self.device, self.world, self.seed = task, args, device, world, seed
        self.classes = classes
        self.say = print if world.is_main else (lambda *text, **options: None)
        self.first_epoch, self.seconds = args.start_epoch, 0.0
        self.best = {"top1": 0.0, "epoch": None}  # as in the original the first best must be above 0
        self.last = None  # top-1 of the last epoch
        torch.manual_seed(seed)
        self.net = task.build(args, classes)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.net.to(device, memory_format=memory_format)
        amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        self.options = engine.StepOptions(amp, scaler, task.regulariser(args, self.net))
        self.optimizer = torch.optim.SGD(self.net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
        if args.cuda_graph and (why := why_not(device, processes=world.size, amp=args.amp, compiled=args.compile)):
            raise RunError(f"--cuda-graph {why}")
        self.graph, self.test_graph = (StepGraph(device) if args.cuda_graph else None for _ in range(2))

    def resume(self, path: str, exact: bool):
        """Take over what a checkpoint holds: all of it if it is one of this repository, else what there is.

        exact: refuse one of other flags (--auto-resume); otherwise differences are only said.
        """
        self.say(f"=> loading checkpoint '{path}'")
        loaded = read_weights(path)
        self.task.check(self.args, loaded, self.classes)
        state = loaded.content if isinstance(loaded.content, dict) else {}
        if isinstance(state.get("args"), dict):
            changes = changed_flags(self.args, {**state["args"], "seed": state.get("seed")})
            if changes and exact:
                raise RunError(
                    f"{path} was trained with {', '.join(changes)}; use the same flags or another --output-dir"
                )
            if changes and not self.args.evaluate:
                self.say(f"note: {path} was trained with {', '.join(changes)}")
        load_into(self.net, loaded)
        if not self.args.evaluate:
            self._restore(path, state)
        epoch = f" (epoch {state['epoch']})" if "epoch" in state else ""
        self.say(f"=> loaded checkpoint '{path}'{epoch}")

    def _restore(self, path, state):
        """The epoch's number decides the rate, so the schedule goes on; the original began it anew."""
        self.first_epoch = int(state.get("epoch", self.first_epoch))
        self.best = {"top1": float(state.get("best_acc1") or 0.0), "epoch": state.get("best_epoch")}
        if "optimizer" in state:
            try:
                self.optimizer.load_state_dict(state["optimizer"])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise RunError(f"{path}: its optimizer does not fit this network ({error}); restore the file") from None
        if "rng" not in state:  # not of this repository: the rest starts anew
            return
        self.seed, self.seconds, self.last = state["seed"], state["seconds"], state["last"]
        if self.options.scaler is not None and state["scaler"] is not None:
            self.options.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def wrapped(self) -> nn.Module:
        """The network as the training loop calls it: under DDP and torch.compile where asked."""
        model = self.net
        if self.world.size > 1:
            model = nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        # Else the last, shorter batch makes all later ones run a slower graph that fits any size.
        return torch.compile(model, dynamic=False) if self.args.compile else model

    def new_step(self) -> engine.TrainingStep:
        """What each batch goes through."""
        return engine.TrainingStep(self.wrapped(), self.optimizer, self.device, self.options, world=self.world)

    def set_rate(self, epoch: int) -> float:
        rate = self.task.learning_rate(self.args, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def checkpoint_payload(self, next_epoch: int) -> dict:
        """Everything that an exact resume needs; the first five names are the original's."""
        on_gpu = self.device.type == "cuda"
        return {
            "epoch": next_epoch,
            "arch": self.args.arch,
            "state_dict": self.net.state_dict(),
            "best_acc1": torch.tensor(self.best["top1"], dtype=torch.float64),
            "optimizer": self.optimizer.state_dict(),
            "config": self.task.describe(self.args, self.classes),
            "best_epoch": self.best["epoch"],
            "last": self.last,
            "seconds": self.seconds,
            "seed": self.seed,
            "scaler": None if self.options.scaler is None else self.options.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "args": {name: getattr(self.args, name) for name in RESULT_FLAGS if hasattr(self.args, name)},
        }


def train(training: Training, run: Run, loaders) -> dict:
    """All remaining epochs. Returns the result: accuracy of the last epoch, and the best, chosen on the test set."""
    args, step, watch = training.args, training.new_step(), WeightWatch(training.net)
    for epoch in range(training.first_epoch, args.epochs):
        finish_epoch(training, run, run_epoch(training, step, loaders, watch, epoch))
    if training.last is None:
        raise RunError(f"--start-epoch or --resume begin at epoch {training.first_epoch} of {args.epochs}; "
                       "give more --epochs")  # fmt: skip
    return {
        "top1": training.last,
        "best_top1": training.best["top1"],
        "best_epoch": training.best["epoch"],
        "epochs": args.epochs,
        "epochs_in_paper": training.task.epochs_in_paper,
        "seconds": training.seconds,
        "checkpoint": str(run.checkpoint_path),
    }


def run_epoch(training: Training, step, loaders, watch: WeightWatch, epoch: int) -> dict:
    """Train and test once; returns the epoch's line of metrics.jsonl. Raises RunError for a loss that is not finite."""
    world, every = training.world, training.args.print_freq
    start, rate, before = time.monotonic(), training.set_rate(epoch), watch.look()
    loaders.train.set_epoch(epoch)
    lines = engine.BatchLines(f"Epoch: [{epoch}]", len(loaders.train), every, world.is_main)
    trained = engine.train_one_epoch(step, loaders.train, lines, epoch=epoch, graph=training.graph)
    lines = engine.BatchLines("Test: ", len(loaders.test), every, world.is_main)
    tested = engine.evaluate(training.net, loaders.test, lines, world=world, graph=training.test_graph)
    training.say(engine.summary_line(tested.top1, tested.top5), flush=True)
    if math.isnan(tested.loss):
        raise RunError(f"the test loss is NaN after epoch {epoch}; try a smaller --lr")
    return {
        "epoch": epoch,
        "lr": rate,
        "train_loss": trained.loss,
        "train_top1": trained.top1,
        "train_top5": trained.top5,
        "test_loss": tested.loss,
        "test_top1": tested.top1,
        "test_top5": tested.top5,
        **watch.compare(before),
        "seconds": time.monotonic() - start,
        "images_per_second": trained.seen / trained.seconds,
    }


def finish_epoch(training: Training, run: Run, record: dict):
    """Files of a finished epoch; the checkpoint last, so that a run killed before it repeats the epoch."""
    training.seconds += record["seconds"]
    training.last = record["test_top1"]
    is_best = record["test_top1"] > training.best["top1"]
    if is_best:
        training.best = {"top1": record["test_top1"], "epoch": record["epoch"]}
    run.log_epoch(record)
    payload = training.checkpoint_payload(record["epoch"] + 1)
    if is_best:
        run.save(run.best_path, payload)
    run.save(run.checkpoint_path, payload, keep_previous=True)
