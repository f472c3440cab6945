"""One training run: recipe, data, state from epoch to epoch, resume. What the training scripts run."""

import os
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from common.data import DataError
from epsilon_resnet import engine, imagenet_inputs, inputs, schedules
from epsilon_resnet.averages import Statistics, block_averages, side_name
from epsilon_resnet.capture import StepGraph, why_not
from epsilon_resnet.checkpoints import read_network
from epsilon_resnet.models import NUM_CLASSES, Config, build_model, config_from_dict
from epsilon_resnet.runs import Run, RunError, load_state

MOMENTUM = 0.9
RESULT_FLAGS = (
    "dataset", "embedded_data", "train_size", "epochs", "steps_per_epoch", "batch_size", "epsilon",
    "epsilon_start_epoch", "lr_schedule", "lr_reset_schedule", "lr_stat", "weight_decay", "plain", "amp",
    "channels_last", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What differs between the data sets (spec of the paper's experiments, Sec. 4)."""

    epochs: int
    batch_size: int
    weight_decay: float
    decay_every: int | None  # steps after which weight decay falls to a fifth
    nesterov: bool
    most_steps: int | None = None  # per epoch
    batch_is_global: bool = False  # else per GPU


RECIPES = {
    "cifar": Recipe(1000, 128, 2e-4, 480_000, nesterov=False),
    "svhn": Recipe(200, 128, 2e-4, 480_000, nesterov=False),
    "imagenet": Recipe(110, 256, 1e-4, None, nesterov=True, most_steps=5000, batch_is_global=True),
}


def family(dataset: str) -> str:
    """cifar, svhn or imagenet: whose recipe and schedules a data set has."""
    return dataset if dataset in RECIPES else "cifar"


def changed_flags(args, recorded: dict) -> list[str]:
    """How the flags that decide a result differ from those of an earlier call, in words; an absent --seed fits any."""
    return [
        f"--{name} {recorded.get(name)} (now {getattr(args, name)})"
        for name in RESULT_FLAGS
        if recorded.get(name) != getattr(args, name) and not (name == "seed" and args.seed is None)
    ]


def shared_seed(seed: int | None, device, world) -> int:
    """--seed, or a new one that is the same in every process."""
    number = torch.tensor([torch.seed() % 2**31 if seed is None else seed], device=device)
    if world.size > 1:
        dist.broadcast(number, 0)
    return int(number)


def learning_rate_of(args) -> schedules.LearningRate:
    """The paper's schedule, its epochs scaled to --epochs, or the one of the flags."""
    name = family(args.dataset)
    factor = args.epochs / RECIPES[name].epochs
    initial = schedules.scaled(schedules.INITIAL[name], factor)
    after_loss = schedules.scaled(schedules.AFTER_LOSS[name], factor)
    if args.lr_schedule:
        initial = schedules.parse_schedule(args.lr_schedule)
    if args.lr_reset_schedule:
        none = args.lr_reset_schedule == "none"
        after_loss = None if none else schedules.parse_schedule(args.lr_reset_schedule)
    return schedules.LearningRate(initial, after_loss)


def build_optimizer(net: nn.Module, rate: float, recipe: Recipe) -> torch.optim.SGD:
    """SGD; the first group has the weights of convolutions and classifiers, the only ones that decay (Sec. 4)."""
    decayed = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in net.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=recipe.nesterov)


def batch_size_of(args) -> int:
    """Images of a training step, as the flags say: of one process, or of all on ImageNet."""
    usual = RECIPES[family(args.dataset)].batch_size
    return args.batch_size or (imagenet_inputs.FAKE_BATCH_SIZE if getattr(args, "fake", False) else usual)


class Data:
    """Training and test batches of a run, as its flags say. classes: outputs of the network."""

    def __init__(self, args, seed, device, world):
        self.args, self.recipe, self.world = args, RECIPES[family(args.dataset)], world
        base = args.batch_size or self.recipe.batch_size
        self.batch_size = base // world.size * world.size if self.recipe.batch_is_global else base * world.size
        if self.batch_size < world.size:
            raise RunError(f"--batch_size {base} is too small for {world.size} processes")
        self.pixel_mean = None
        options = {"device": device, "channels_last": args.channels_last}
        make = self._imagenet if args.dataset == "imagenet" else self._in_memory
        loader, self.test, self.classes, divisor = make(seed, options)
        steps = args.steps_per_epoch or loader.num_images // base
        if self.recipe.most_steps and not args.steps_per_epoch:
            steps = min(steps, self.recipe.most_steps)
        self.train = inputs.epoch_batches(loader, self.batch_size, max(steps, 1), divisor)

    def _in_memory(self, seed, options):
        args, ranks = self.args, {"rank": self.world.rank, "world_size": self.world.size}
        train, test = inputs.load_sets(args.dataset, args.data_dir, args.embedded_data)
        everything = [train, test]
        self.pixel_mean = inputs.pixel_mean(*everything)
        train = train if args.train_size is None else train.subset(args.train_size)
        self._require_images(len(train))
        loader = inputs.training_loader(
            args.dataset, train, self.batch_size, self.pixel_mean, seed=seed, **ranks, **options
        )
        batches = inputs.test_batches(test, self.pixel_mean, **ranks, **options)
        return loader, batches, NUM_CLASSES[args.dataset], inputs.DIVISOR

    def _imagenet(self, seed, options):
        args, world = self.args, self.world
        if args.fake:
            self.batch_size = (args.batch_size or imagenet_inputs.FAKE_BATCH_SIZE) * world.size
            share = self.batch_size // world.size
            steps = args.steps_per_epoch or imagenet_inputs.FAKE_STEPS
            fake = [imagenet_inputs.FakeLoader(share, count, args.image_size, options["device"], args.channels_last)
                    for count in (steps, max(1, steps // 100))]  # fmt: skip
            fake[0].batch_sizes = [self.batch_size] * steps
            fake[0].num_images = self.batch_size * steps
            return fake[0], inputs.TestBatches(fake[1]), 1000, 1.0
        root = imagenet_inputs.folder(args.data_dir, args.embedded_data)
        shared = {"size": args.image_size, "workers": args.workers, **options}
        loader = imagenet_inputs.ImagenetLoader(
            root, self.batch_size, mean=imagenet_inputs.MEAN, std=imagenet_inputs.STD, limit=args.train_size, seed=seed,
            rank=world.rank, world_size=world.size, **shared,
        )  # fmt: skip
        self._require_images(loader.num_images)
        test = imagenet_inputs.validation_loader(root, inputs.TEST_BATCH_SIZE, **shared)
        return loader, inputs.TestBatches(test, world.rank, world.size), len(loader.classes), 1.0

    def _require_images(self, count):
        if count < self.batch_size:
            raise DataError(
                f"{count} training images are fewer than a batch of {self.batch_size}; "
                "use a smaller --batch_size or a larger --train-size"
            )


class Training:
    """State of one run: the network and what changes from epoch to epoch."""

    def __init__(self, args, config: Config | None, device, world, seed: int, data: Data):
        self.args, self.device, self.world, self.data, self.seed = args, device, world, data, seed
        self.recipe = RECIPES[family(args.dataset)]
        size = args.depth if args.dataset == "imagenet" else args.num_units
        arch = "imagenet" if args.dataset == "imagenet" else "cifar"
        self.config = config or Config(arch, size, data.classes, gated=not args.plain)
        if self.config.num_classes != data.classes:
            raise RunError(f"the network has {self.config.num_classes} classes, the data {data.classes}")
        torch.manual_seed(seed)
        self.net = build_model(self.config, args.epsilon)
        self.learning_rate = learning_rate_of(args)
        if not self.config.gated:
            self.learning_rate.after_loss = None
        self.amp_dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        self.scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        if args.cuda_graph and (why := why_not(device, processes=world.size, amp=args.amp, compiled=args.compile)):
            raise RunError(f"--cuda-graph {why}")
        self.graph = StepGraph(device) if args.cuda_graph else None
        self.epoch, self.seconds, self.best = 0, 0.0, {"top1": -1.0, "epoch": None}
        self.val_error: list[float] = []
        self.resumed = None

    def resume(self, path):
        """Go on after the epoch of a checkpoint of this run. Raises CheckpointError or RunError if it does not fit."""
        state = load_state(path)
        if "lr_state" not in state or "optimizer" not in state:
            raise RunError(f"{path} is no checkpoint of a training run; start from it with another -o")
        if config_from_dict(state["config"]) != self.config:
            raise RunError(f"{path} holds another network than the flags ask for; use the same flags or another -o")
        changes = changed_flags(self.args, {**state["args"], "seed": state["seed"]})
        if changes and (self.args.auto_resume or self.args.seed not in (None, state["seed"])):
            raise RunError(f"{path} was trained with {', '.join(changes)}; use the same flags or another -o")
        if changes and self.world.is_main:
            print(f"note: this run was started with {', '.join(changes)}")
        self.resumed = state

    def load_weights(self, path):
        """Start from the weights of another run's checkpoint. Raises CheckpointError or RunError if they do not fit."""
        found = read_network(path)
        try:
            self.net.load_state_dict(found.state)
        except RuntimeError:
            raise RunError(f"{path} holds another network ({found.config}) than the flags ask for") from None

    def prepare(self):
        """Move to the device, make the optimizer, take over the state to go on from. Sets `model`, what steps call."""
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        state = self.resumed
        if state is not None:
            self.net.load_state_dict(state["model"])
        self.net.to(self.device, memory_format=memory_format)
        first_rate, _ = self.learning_rate.after_epoch(0)
        self.rate = schedules.INITIAL_LEARNING_RATE if first_rate is None else first_rate
        self.optimizer = build_optimizer(self.net, self.rate, self.recipe)
        self.statistics = Statistics(self.config, self.device)
        if state is not None:
            self._restore(state)
        self.model = self.net
        if self.world.size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            self.model = nn.parallel.DistributedDataParallel(self.model, ids)
        if self.args.compile:
            # Else the last, shorter batch makes all later ones run a slower graph that fits any size.
            self.model = torch.compile(self.model, dynamic=False)
        self.steps = self._training_step()

    def _training_step(self) -> engine.TrainingStep:
        args = self.args
        decay = partial(
            schedules.weight_decay,
            initial=self.recipe.weight_decay if args.weight_decay is None else args.weight_decay,
            every=self.recipe.decay_every,
        )
        return engine.TrainingStep(
            self.model, self.optimizer, self.statistics, self.device, world=self.world, decay=decay,
            amp_dtype=self.amp_dtype, scaler=self.scaler,
        )  # fmt: skip

    def _restore(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load(state["ema"])
        self.learning_rate.load_state_dict(state["lr_state"])
        self.rate, self.epoch = state["learning_rate"], state["epoch"]
        self.best, self.seconds, self.val_error = state["best"], state["seconds"], state["val_error"]
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])

    @property
    def step(self) -> int:
        return self.epoch * len(self.data.train)

    def payload(self) -> dict:
        """Everything in a model-<step>.pth."""
        config, args = self.config, self.args
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "arch": config.arch,
            "dataset": args.dataset,
            "n" if config.arch == "cifar" else "depth": config.size,
            "num_classes": config.num_classes,
            "config": config.as_dict(),
            "epsilon": self.net.epsilon,
            "ema": self.statistics.as_dict(),
            "lr_state": self.learning_rate.state_dict(),
            "learning_rate": self.rate,
            "val_error": self.val_error,
            "args": {name: getattr(args, name) for name in RESULT_FLAGS},
            "seed": self.seed,
            "best": self.best,
            "seconds": self.seconds,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "pixel_mean": self.data.pixel_mean,
        }

    def weight_cost(self) -> float:
        """Weight decay as a part of the cost: lambda / 2 * sum of squared weights."""
        group = self.optimizer.param_groups[0]
        squares = torch.stack([parameter.detach().float().square().sum() for parameter in group["params"]]).sum()
        return group["weight_decay"] / 2 * squares.item()

    def log_statistics(self, test: dict) -> dict[str, float]:
        """Everything that the original printed after an epoch, under its names."""
        config, values = self.config, self.statistics.as_dict()
        cifar = config.arch == "cifar"
        names = ("val_error",) if cifar else ("val-error-top1", "val-error-top5")
        values |= dict(zip(names, test["errors"], strict=True))
        values |= {"wd_cost" if cifar else "l2_regularize_loss": self.weight_cost(), "learning_rate": self.rate}
        if cifar:
            values["validation_cost"] = test["loss"]
        if config.gated:
            values |= {"epsilon": self.net.epsilon, side_name(config, "val_error"): test["side_error"]}
        return values


def train(training: Training, run: Run) -> dict:
    """All remaining epochs. Returns the result: accuracy of the last epoch, and the best, chosen on the test set."""
    args = training.args
    if training.epoch >= args.epochs:
        raise RunError(f"all {args.epochs} epochs are done already; give more --epochs, or another -o to start again")
    while training.epoch < args.epochs:
        _one_epoch(training, run)
    top1 = 100 * (1 - training.val_error[0])
    return {
        "top1": top1,
        "best_top1": training.best["top1"],
        "best_epoch": training.best["epoch"],
        "epochs": args.epochs,
        "epochs_in_paper": training.recipe.epochs,
        "seconds": training.seconds,
        "checkpoint": str(run.directory / f"model-{training.step}.pth"),
    }


def _one_epoch(training, run):
    args, world, start = training.args, training.world, time.monotonic()
    epoch, rate = training.epoch + 1, training.rate
    run.message("Start Epoch %d ...", epoch)
    if world.is_main:
        print(f"\nEpoch {epoch}/{args.epochs}", flush=True)
    training.net.epsilon = schedules.epsilon_in_epoch(epoch, args.epsilon, args.epsilon_start_epoch)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.data.train.set_epoch(epoch - 1)
    result = engine.train_one_epoch(
        training.steps, training.data.train, epoch=epoch, epsilon=training.net.epsilon, graph=training.graph
    )
    train_seconds = time.monotonic() - start
    training.epoch = epoch
    run.message("Epoch %d (global_step %d) finished, time:%.2f sec.", epoch, training.step, train_seconds)
    test = engine.evaluate(training.net, training.data.test, world=world)
    training.seconds += time.monotonic() - start
    training.val_error = test["errors"]
    top1 = 100 * (1 - test["errors"][0])
    if top1 > training.best["top1"]:
        training.best = {"top1": top1, "epoch": epoch - 1}
    statistics = training.log_statistics(test)
    record = _record(training, result, test, rate)
    _set_learning_rate(training, run, statistics, record)
    record["seconds"] = time.monotonic() - start
    record["images_per_second"] = training.data.train.num_images / train_seconds
    run.log_epoch(record, statistics, training.step)
    run.save(training.payload())


def _record(training, result, test, rate):
    """The epoch's line in metrics.jsonl; epochs count from 0 there."""
    record = {"epoch": training.epoch - 1, "lr": rate}
    for name, values in (("train", result), ("test", test)):
        record[f"{name}_loss"] = values["loss"]
        record[f"{name}_top1"] = 100 * (1 - values["errors"][0])
        if len(values["errors"]) > 1:
            record[f"{name}_top5"] = 100 * (1 - values["errors"][1])
    if training.config.gated:
        averages = training.statistics.as_dict()
        blocks = list(block_averages(averages, training.config).values())
        record |= {
            "epsilon": training.net.epsilon,
            "closed_blocks": sum(value >= 0.5 for value in blocks),
            "discarded_cnt": averages["discarded_cnt"],
            "discarded_ratio": averages["discarded_ratio"],
            "is_discarded": [float(f"{value:.5g}") for value in blocks],
        }
    return record


def _set_learning_rate(training, run, statistics, record):
    count = statistics.get("discarded_cnt") if training.args.lr_stat == "ema_raw" else record.get("closed_blocks")
    new_rate, rule = training.learning_rate.after_epoch(training.epoch, count)
    run.message("[LearningRateSetter] Triggered,learning_rate cur=%f", training.rate)
    if training.learning_rate.after_loss is not None:
        history = ",".join(f"{value:.5g}" for value in training.learning_rate.history[-2:])
        run.message("[LearningRateSetter] Triggered, history: %s", history)
        run.message("[LearningRateSetter] Triggered, return %d", rule)
    override = _hyper_parameter(run, "learning_rate")
    new_rate = new_rate if override is None else override
    if new_rate is not None and new_rate != training.rate:
        text = f"learning_rate at epoch {training.epoch + 1} will change to {new_rate:.8f}"
        run.message(text)
        if training.world.is_main:
            print(f" {text}", flush=True)
        training.rate = new_rate


def _hyper_parameter(run, name):
    """Value of `name` in hyper.txt of the log directory (`name:value` per line), None if it is not there."""
    try:
        lines = (run.directory / "hyper.txt").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == name:
            try:
                return float(value)
            except ValueError:
                raise RunError(f"{run.directory}/hyper.txt: {line!r} is no {name}:NUMBER") from None
    return None


def is_inside(path, directory) -> bool:
    """Whether a file lies directly in a folder."""
    return os.path.realpath(os.path.dirname(os.path.abspath(path))) == os.path.realpath(directory)
