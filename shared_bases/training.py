"""One training run: schedule, state from epoch to epoch, resume. What training_script.py runs."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from common.checkpoints import CheckpointError
from shared_bases import engine
from shared_bases.capture import StepGraph, why_not
from shared_bases.checkpoints import existing_path, load_network, read_checkpoint
from shared_bases.models import Config, build_model
from shared_bases.regulariser import mean_similarity, similarity_terms
from shared_bases.runs import Run, RunError

RESULT_FLAGS = (
    "lr",
    "momentum",
    "weight_decay",
    "lambdaR",
    "batch_size",
    "epochs",
    "recipe",
    "starting_epoch",
    "pretrained",
    "embedded_data",
    "train_size",
    "image_size",
    "amp",
    "channels_last",
    "seed",
)
SAVED_EVERY = 5  # epochs, ILSVRC2012 only


@dataclass(frozen=True)
class Schedule:
    """epochs; for each drop the number of epochs before it and the learning rate's factor from there on.

    restart: at each drop training goes on from the best network so far, with a new optimizer.
    """

    epochs: int
    drops: tuple[tuple[int, float], ...]
    restart: bool = False

    def factor(self, done: int, epochs: int) -> float:
        """Factor of the learning rate in the epoch after `done` epochs, the whole being scaled to `epochs`."""
        return ([1.0] + [factor for before, factor in self.drops if done * self.epochs >= before * epochs])[-1]

    def starts_stage(self, done: int, epochs: int) -> bool:
        """Whether a new stage begins after `done` epochs."""
        return self.restart and done > 0 and self.factor(done, epochs) != self.factor(done - 1, epochs)


_CIFAR = ((150, 0.1), (225, 0.01))
_MOBILE = ((150, 0.1), (225, 0.01))
# sep20: what the published tables were trained with; head: the original's last version; steps: what that meant to do.
SCHEDULES = {
    "cifar10": {"head": Schedule(300, _CIFAR)},
    "cifar100": {
        "sep20": Schedule(300, _CIFAR, restart=True),
        "steps": Schedule(300, _CIFAR),
        "head": Schedule(300, ()),
    },
    "ilsvrc": {name: Schedule(150, ((60, 0.1), (100, 0.01), (140, 0.001))) for name in ("head", "sep20")},
}
MOBILENET_SCHEDULES = {  # ILSVRC2012 only
    "head": Schedule(300, (*_MOBILE, (285, 0.005))),
    "sep20": Schedule(300, (*_MOBILE, (285, 0.001))),
}


def schedule_of(dataset: str, model: str, recipe: str) -> Schedule:
    """Schedule of a network under one of SCHEDULES[dataset]."""
    if dataset == "ilsvrc" and model.startswith("MobileNetV2"):
        return MOBILENET_SCHEDULES[recipe]
    return SCHEDULES[dataset][recipe]


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


class Training:
    """State of one run: the network, its optimizer and what changes from epoch to epoch."""

    def __init__(self, args, config: Config, device, world):
        self.args, self.config, self.device, self.world = args, config, device, world
        self.schedule = schedule_of(args.dataset, args.model, args.recipe)
        self.similarity = config.entry.similarity
        self.done, self.seconds = args.starting_epoch, 0.0
        self.best = {"acc": -1.0, "acc5": 0.0, "epoch": None, "path": None}
        self.seed = shared_seed(args.seed, device, world)
        torch.manual_seed(self.seed)
        self.net = build_model(config)
        self.amp_dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        self.scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        self._optimizer_state = None
        if args.cuda_graph and (why := why_not(device, processes=world.size, amp=args.amp, compiled=args.compile)):
            raise RunError(f"--cuda-graph {why}")
        self.graph, self.test_graph = (StepGraph(device) if args.cuda_graph else None for _ in range(2))

    def start_from(self, path: str) -> dict:
        """--pretrained: weights, best accuracy and optimizer of a checkpoint. Returns what was read."""
        path = existing_path(path)
        model, found = load_network(path, self.config)
        self.config = found["config"]
        self.net, self._optimizer_state = model, found["optimizer"]
        if self._optimizer_state is not None:
            try:
                self.new_optimizer().load_state_dict(self._optimizer_state)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{path}: its optimizer is not that of its network ({error})") from None
        if found["acc"] is not None:
            # As in the original: the best top-5 starts at 0.
            epoch = None if found["epoch"] is None else found["epoch"] - 1
            self.best = {"acc": found["acc"], "acc5": found["acc5"] or 0.0, "epoch": epoch, "path": path}
        return found

    def resume(self, run: Run) -> bool:
        """Take over the last state of the run; False if there is none."""
        state = run.load_last()
        if state is None:
            return False
        held = Config(**state["config"])
        if held != self.config and held.text() != self.config.text():
            raise RunError(
                f"{run.last_path} holds {held.text()}, the flags ask for {self.config.text()}; use the flags it was "
                "trained with or another --output-dir"
            )
        changes = changed_flags(self.args, {**state["args"], "seed": state["seed"]})
        if changes and (self.args.auto_resume or self.args.seed not in (None, state["seed"])):
            raise RunError(
                f"{run.last_path} was trained with {', '.join(changes)}; use the same flags or another --output-dir"
            )
        if changes and self.world.is_main:
            print(f"note: this run was started with {', '.join(changes)}")
        if held != self.config:
            self.config, self.net = held, build_model(held)
        self.net.load_state_dict(state["net_state_dict"])
        self._optimizer_state = state["optimizer_state_dict"]
        self.seed, self.best, self.seconds = state["seed"], state["best"], state["seconds"]
        self.done = state["epoch"]
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        return True

    def loaders(self):
        """Training and test loader. --channels-last and the ranks' shards are theirs."""
        options = {"seed": self.seed, "channels_last": self.args.channels_last}
        return [engine.make_loader(self.args, train, self.device, self.world, **options) for train in (True, False)]

    def wrapped(self) -> nn.Module:
        """The network as the training loop calls it: on the device, under DDP and torch.compile where asked."""
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        self.net.to(self.device, memory_format=memory_format)
        model = self.net
        if self.world.size > 1:
            model = nn.parallel.DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        # Else the last, shorter batch makes all later ones run a slower graph that fits any size.
        return torch.compile(model, dynamic=False) if self.args.compile else model

    def new_optimizer(self) -> torch.optim.SGD:
        args = self.args
        return torch.optim.SGD(self.net.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)

    def first_optimizer(self) -> torch.optim.SGD:
        """A new optimizer, with the momentum of the checkpoint that the run goes on from."""
        optimizer = self.new_optimizer()
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            for group in optimizer.param_groups:
                group.update(momentum=self.args.momentum, weight_decay=self.args.weight_decay)
            self._optimizer_state = None
        return optimizer

    def first_step(self) -> engine.TrainingStep:
        """What each batch goes through, with the optimizer that the run begins or goes on with."""
        return engine.TrainingStep(
            self.wrapped(),
            self.net,
            self.first_optimizer(),
            self.device,
            similarity=self.similarity,
            weight=self.args.lambdaR,
            world=self.world,
            amp_dtype=self.amp_dtype,
            scaler=self.scaler,
        )

    def renew(self, step: engine.TrainingStep):
        """A new optimizer; steps recorded with the old one's momentum are recorded again."""
        step.optimizer = self.new_optimizer()
        if self.graph is not None:
            self.graph = StepGraph(self.device)

    def restart_from_best(self):
        """Back to the best network so far, the same in every process."""
        if self.world.is_main:
            self.net.load_state_dict(read_checkpoint(self.best["path"])["net"])
        if self.world.size > 1:
            for tensor in self.net.state_dict().values():
                dist.broadcast(tensor, 0)

    def measured(self) -> dict:
        """Orthogonality of the shared bases now: R (sum of its terms) and the mean absolute cosine, None without."""
        with torch.no_grad():
            terms = similarity_terms(self.net, self.similarity)
        return {
            "similarity": float(sum(terms)) if terms else None,
            "mean_abs_cosine": mean_similarity(self.net),
        }

    def payload(self, optimizer, acc: float, acc5: float) -> dict:
        """What the original's checkpoints hold, and the configuration. epoch: from 1."""
        return {
            "net_state_dict": self.net.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "acc": acc,
            "acc5": acc5,
            "epoch": self.done,
            "config": self.config.as_dict(),
            "channels_last": self.args.channels_last,
        }

    def last_payload(self, optimizer, acc: float, acc5: float) -> dict:
        return {
            **self.payload(optimizer, acc, acc5),
            "best": self.best,
            "seconds": self.seconds,
            "seed": self.seed,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "args": {name: getattr(self.args, name) for name in RESULT_FLAGS},
        }


def train(training: Training, run: Run, loaders) -> dict:
    """All remaining epochs. Returns the result: accuracy of the last epoch, and the best, chosen on the test set."""
    args = training.args
    step, accuracy = training.first_step(), None
    while training.done < args.epochs:
        accuracy = _one_epoch(training, run, loaders, step)
    if accuracy is None:  # resumed after the last epoch: nothing left to train
        state = run.load_last()
        if state is None or training.done > args.epochs:
            raise RunError(f"{training.done} epochs are done already; give more than --epochs={args.epochs}")
        accuracy = state["acc"]
    best = training.best
    if training.world.is_main:
        print(f"\nBest_Acc_top1 = {best['acc']:.3f}\nBest_Acc_top5 = {best['acc5']:.3f}", flush=True)
    return {
        "top1": accuracy,
        "best_top1": best["acc"],
        "best_top5": best["acc5"],
        "best_epoch": best["epoch"],
        "epochs": args.epochs,
        "epochs_in_paper": training.schedule.epochs,
        "seconds": training.seconds,
        "checkpoint": run.best_path,
    }


def _one_epoch(training: Training, run: Run, loaders, step: engine.TrainingStep) -> float:
    """Train, test and save once; a new stage gets a new optimizer. Returns the test accuracy in percent."""
    args, world, (train_loader, test_loader) = training.args, training.world, loaders
    index, start = training.done, time.monotonic()
    if world.is_main:
        print(f"\nCuda {args.visible_device} {'Basis ' if training.similarity else ''}Epoch: {index + 1}", flush=True)
    rate = args.lr * training.schedule.factor(index, args.epochs)
    train_loss, train_top1, train_top5 = _train_epoch(training, train_loader, step, rate)
    train_seconds = time.monotonic() - start
    test_loss, top1, top5 = engine.evaluate(training.net, test_loader, world=world, graph=training.test_graph)
    training.done += 1
    improved = _save_epoch(training, run, step.optimizer, top1, top5)
    seconds = time.monotonic() - start
    training.seconds += seconds
    if world.is_main:
        print(f"Training_Acc_Top1 = {train_top1:.3f}\nTraining_Acc_Top5 = {train_top5:.3f}")
        _print_test(training, test_loss, top1, top5, improved)
        print(f"Time:  {seconds}", flush=True)
    trained = {"epoch": index, "lr": rate, "train_loss": train_loss, "train_top1": train_top1, "train_top5": train_top5}
    tested = {"test_loss": test_loss, "test_top1": top1, "test_top5": top5, **training.measured()}
    speed = {"seconds": seconds, "images_per_second": train_loader.num_images / train_seconds}
    run.log_epoch({**trained, **tested, **speed})
    if training.done < args.epochs and training.schedule.starts_stage(training.done, args.epochs):
        if world.is_main:
            print(f"Restarting from {training.best['path']}, epoch {training.best['epoch'] + 1}", flush=True)
        training.restart_from_best()
        training.renew(step)
    run.save_last(training.last_payload(step.optimizer, top1, top5))
    return top1


def _train_epoch(training: Training, loader, step, rate: float):
    """Train once over the images at learning rate `rate`. Returns (loss, top-1, top-5)."""
    for group in step.optimizer.param_groups:
        group["lr"] = rate
    # Random numbers of an epoch (dropout) depend on seed, epoch and rank only, so a resumed run draws the same.
    torch.manual_seed((training.seed * 1_000_003 + training.done) * 4099 + training.world.rank)
    loader.set_epoch(training.done)
    return engine.train_one_epoch(step, loader, epoch=training.done + 1, graph=training.graph)


def _save_epoch(training: Training, run: Run, optimizer, top1: float, top5: float) -> bool:
    """Save the best network, and ILSVRC2012's every few epochs. Returns whether this epoch's is the best."""
    improved = top1 > training.best["acc"]
    if improved:
        training.best = {"acc": top1, "acc5": top5, "epoch": training.done - 1, "path": run.best_path}
        run.save_best(training.payload(optimizer, top1, top5))
    if training.args.dataset == "ilsvrc" and training.done % SAVED_EVERY == 0:
        run.save_numbered(training.payload(optimizer, top1, top5), training.done)
    return improved


def _print_test(training: Training, test_loss: float, top1: float, top5: float, improved: bool):
    """The original's lines on the test set, which are not the same on CIFAR and ILSVRC2012, and one more."""
    if training.args.dataset == "ilsvrc":
        print(f"Test_Acc_Top1/5 = {top1:.3f}\t{top5:.3f}")
        if improved:
            print(f"Saving Best..\nBest_Acc_top1/5 = {top1:.3f}\t{top5:.3f}")
        if training.done % SAVED_EVERY == 0:
            print("Saving..")
        return
    print(f"Test: loss {test_loss:.4f}, top-1 {top1:.3f}%, top-5 {top5:.3f}%")
    if improved:
        print(f"Best_Acc_top1 = {top1:.3f}\nBest_Acc_top5 = {top5:.3f}")
