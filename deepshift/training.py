"""One training run of any of the three scripts: state from epoch to epoch, resume, files of an epoch."""

import math
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn

from deepshift import engine
from deepshift.capture import StepGraph, why_not
from deepshift.checkpoints import load_into, read_weights, require_same
from deepshift.convert import round_shift_weights, shift_layers
from deepshift.network import build_network
from deepshift.optim import build_optimizer, load_state, make_capturable
from deepshift.packed import packed_payload
from deepshift.quantizers import shift_l2_norm
from deepshift.run import gpu_errors_explained
from deepshift.runs import Run, RunError

RESULT_FLAGS = (
    "arch", "model", "weights", "pretrained", "shift_type", "shift_depth", "rounding", "weight_bits", "activation_bits",
    "epochs", "batch_size", "batch_multiplier", "optimizer", "lr", "lr_schedule", "lr_step_size", "lr_sign", "momentum",
    "weight_decay", "alternate_update", "freeze", "dataset", "embedded_data", "train_size", "image_size", "normalize",
    "amp", "channels_last", "seed",
)  # fmt: skip


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
    """State of one run: the network and what changes from epoch to epoch. task: see tasks.Task."""

    def __init__(self, task, args, device, world):
        self.task, self.args, self.device, self.world = task, args, device, world
        self.say = print if world.is_main else (lambda *text, **options: None)
        self.first_epoch, self.seconds = getattr(args, "start_epoch", 0), 0.0
        self.best = {"top1": -1.0, "epoch": None}
        self.last = None  # Result of the last epoch's test
        self.seed = shared_seed(args.seed, device, world)
        torch.manual_seed(self.seed)
        network = build_network(args, task.dataset, self.say)
        self.net, self.config, self.label = network.model, network.config, network.label
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.net.to(device, memory_format=memory_format)
        amp = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[args.amp]
        scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        self.options = engine.StepOptions(amp, scaler, getattr(args, "batch_multiplier", 1))
        self.optimizer = None if args.evaluate else self._optimizer()
        self.graph = self._graph() if args.cuda_graph and not args.evaluate else None
        self.test_graph = None if self.graph is None else StepGraph(device)

    def _graph(self):
        args = self.args
        why = why_not(self.device, processes=self.world.size, amp=args.amp, compiled=args.compile)
        if why is None and self.options.batch_multiplier > 1:
            why = "does not go with --batch-multiplier, whose steps differ; leave one of them out"
        if why is None and not make_capturable(self.optimizer, self.device):
            why = f"does not go with --optimizer {args.optimizer}, which counts its steps on the host"
        if why is not None:
            raise RunError(f"--cuda-graph {why}")
        return StepGraph(self.device)

    def _optimizer(self):
        args = self.args
        groups = self.task.groups(args, self.net)
        if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
            raise RunError("no parameter is left to train; leave --freeze out")
        self.base_rates = [group["lr"] for group in groups]
        optimizer = build_optimizer(args.optimizer, groups, args.lr, args.momentum)
        shifts = optimizer.param_groups[2]["params"] if len(groups) == 3 else []
        if shifts and args.weight_decay > 0:
            self.options.regulariser = lambda: shift_l2_norm(shifts, args.weight_decay)
            self.options.logs_regulariser = self.task.logs_regulariser
        return optimizer

    def resume(self, path: str, exact: bool):
        """Take over what a checkpoint holds: all of it if it is one of this repository, else what there is.

        exact: refuse one of other flags (--auto-resume); otherwise differences are only said.
        """
        self.say(f"=> loading checkpoint '{path}'")
        loaded = read_weights(path)
        for note in require_same(loaded, self.config):
            self.say(f"note: {note}")
        state = loaded.content if isinstance(loaded.content, dict) else {}
        if isinstance(state.get("args"), dict):
            changes = changed_flags(self.args, {**state["args"], "seed": state["seed"]})
            if changes and exact:
                raise RunError(
                    f"{path} was trained with {', '.join(changes)}; use the same flags or another --output-dir"
                )
            if changes and not self.args.evaluate:
                self.say(f"note: {path} was trained with {', '.join(changes)}")
        load_into(self.net, loaded)
        if not self.args.evaluate and "optimizer" in state:
            self._restore(path, state)
        epoch = f" (epoch {state['epoch']})" if "epoch" in state and self.task.dataset != "mnist" else ""
        self.say(f"=> loaded checkpoint '{path}'{epoch}")

    def _restore(self, path, state):
        self.first_epoch = int(state.get("epoch", self.first_epoch))
        best = state.get("best_acc1")
        self.best = {"top1": -1.0 if best is None else float(best), "epoch": state.get("best_epoch")}
        self.load_optimizer(path, state["optimizer"])
        if "rng" not in state:  # of the original: the rest starts anew
            return
        self.seed, self.seconds = state["seed"], state["seconds"]
        self.last = engine.Result(**state["last"])
        if self.options.scaler is not None and state["scaler"] is not None:
            self.options.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def load_optimizer(self, path: str, state):
        """State of an optimizer, from a checkpoint. Raises RunError if it is of another one."""
        try:
            load_state(self.optimizer, state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: its optimizer does not fit this run ({error}); give the --optimizer and "
                           "--shift-depth it was trained with, or load it with --weights") from None  # fmt: skip

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

    def set_rates(self, epoch: int) -> list[float]:
        rates = self.task.learning_rates(self.args, self.base_rates, epoch)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return rates

    def weights_payload(self, model, result) -> dict:
        """weights.pth and model.pth: rounded weights, the network they belong to, and what they were measured at."""
        return {"config": self.config, "state_dict": model.state_dict(), "top1": result.top1}

    def checkpoint_payload(self, next_epoch: int) -> dict:
        """Everything that an exact resume needs; the first six names are the original's."""
        on_gpu = self.device.type == "cuda"
        return {
            "epoch": next_epoch,
            "arch": self.config["arch"],
            "state_dict": self.net.state_dict(),
            "best_acc1": self.best["top1"],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None,  # the rates of an epoch follow from its number
            "config": self.config,
            "best_epoch": self.best["epoch"],
            "last": asdict(self.last),
            "seconds": self.seconds,
            "seed": self.seed,
            "scaler": None if self.options.scaler is None else self.options.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            "args": {name: getattr(self.args, name) for name in RESULT_FLAGS if hasattr(self.args, name)},
        }

    def save_weights(self, run: Run, rounded: nn.Module, result):
        """weights.pth, model.pth and weights.packed of a rounded network (--save-model)."""
        if not self.args.save_model or not self.world.is_main:
            return
        payload = self.weights_payload(rounded, result)
        run.save("weights.pth", payload)
        run.save("model.pth", payload)
        if shift_layers(rounded):
            try:
                run.save("weights.packed", {**packed_payload(rounded, self.config), "top1": result.top1})
            except ValueError as error:
                self.say(f"note: no weights.packed is written: {error}")


def train(training: Training, run: Run, loaders) -> dict:
    """All remaining epochs. Returns the result: accuracy of the last epoch, and the best, chosen on the test set."""
    task, args, world, (train_loader, test_loader) = training.task, training.args, training.world, loaders
    step, rounded = training.new_step(), None
    for epoch in range(training.first_epoch, args.epochs):
        start, rates = time.monotonic(), training.set_rates(epoch)
        task.announce(rates, training.say)
        train_loader.set_epoch(epoch)
        lines = task.train_lines(args, epoch, train_loader, world.is_main)
        trained = engine.train_one_epoch(step, train_loader, lines, epoch=epoch, graph=training.graph)
        rounded = round_shift_weights(training.net, clone=True)  # what is saved is what is measured
        lines = task.test_lines(args, test_loader, world.is_main)
        with gpu_errors_explained(*task.test_batch(args)):
            training.last = engine.evaluate(rounded, test_loader, lines, world=world, graph=training.test_graph)
        task.report(training.last, training.say)
        if math.isnan(training.last.loss):
            raise RunError(f"the test loss is NaN after epoch {epoch}; try a smaller --lr")
        seconds = time.monotonic() - start
        training.seconds += seconds
        finish_epoch(training, run, rounded, epoch, rates, trained, seconds)
    if training.last is None:
        raise RunError(f"--start-epoch or --resume begin at epoch {training.first_epoch} of {args.epochs}; "
                       "give more --epochs")  # fmt: skip
    if task.saves_last:
        rounded = rounded or round_shift_weights(training.net, clone=True)
        training.save_weights(run, rounded, training.last)
        if args.print_weights:
            run.write_weights_log("weights_log.txt", rounded)
    return {
        "top1": training.last.top1,
        "best_top1": training.best["top1"],
        "best_epoch": training.best["epoch"],
        "epochs": args.epochs,
        "epochs_in_paper": task.epochs_in_paper(args),
        "seconds": training.seconds,
        "checkpoint": str(run.checkpoint_path),
    }


def finish_epoch(training: Training, run: Run, rounded, epoch: int, rates, trained, seconds: float):
    """Files of a finished epoch; the checkpoint last, so that a run killed before it repeats the epoch."""
    task, args, tested = training.task, training.args, training.last
    is_best = tested.top1 > training.best["top1"]
    if is_best:
        training.best = {"top1": tested.top1, "epoch": epoch}
        if not task.saves_last:
            training.save_weights(run, rounded, tested)
    if args.print_weights:
        run.write_weights_log(f"weights_log_{epoch + task.first_number}.txt", training.net)
        if not task.saves_last:
            run.write_weights_log("weights_log.txt", rounded)
    record = {
        "epoch": epoch,
        "lr": rates[0],
        "train_loss": trained.loss,
        "train_top1": trained.top1,
        "test_loss": tested.loss,
        "test_top1": tested.top1,
        "seconds": seconds,
        "images_per_second": trained.seen / (trained.seconds * trained.batches),
    }
    if task.top5:
        record |= {"train_top5": trained.top5, "test_top5": tested.top5}
    run.log_epoch(record, task.row(epoch, trained, tested, training.seconds))
    payload = training.checkpoint_payload(epoch + 1)
    if is_best and not task.saves_last:
        run.save("model_best.pth.tar", payload)
    if task.keeps(epoch):
        run.save(f"checkpoint_{epoch}.pth.tar", payload)
    run.save("checkpoint.pth.tar", payload, keep_previous=True)
