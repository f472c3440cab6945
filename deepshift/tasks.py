"""What differs between the three scripts: data, parameter groups, schedule, lines and files. Used by training.py."""

import argparse
import csv
import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from common.data import TensorLoader, load_dataset, load_digits_set
from deepshift import engine
from deepshift.optim import parameter_groups
from deepshift.runs import RunError
from deepshift.zoo import INPUT_SHAPES

PUBLISHED = Path(__file__).with_name("published.csv")
COMPARED_FLAGS = (
    "arch", "pretrained", "shift_type", "shift_depth", "rounding", "weight_bits", "activation_bits", "epochs",
    "start_epoch", "batch_size", "batch_multiplier", "optimizer", "lr", "lr_schedule", "lr_step_size", "lr_sign",
    "momentum", "weight_decay", "alternate_update", "freeze", "desc", "evaluate", "normalize",
)  # fmt: skip


class Task:
    """One script's part of a run. Subclasses set the constants and override what is theirs."""

    dataset: str  # mnist, cifar10 or imagenet
    columns: list[str]  # of train_log.csv
    first_number = 0  # of the epochs in train_log.csv and in the names of files
    top5 = False
    saves_last = False  # weights.pth is of the last epoch, not of the best
    logs_regulariser = False
    parse_args: Callable[[list[str]], argparse.Namespace]  # the script's

    def __init__(self, parse_args):
        self.parse_args = parse_args
        self.input_shape = self.summary_shape = INPUT_SHAPES[self.dataset]

    def groups(self, args, model) -> list[dict]:
        """Parameter groups of the optimizer."""
        return parameter_groups(model, args.lr, args.lr_sign, args.weight_decay)

    def learning_rates(self, args, base: list[float], epoch: int) -> list[float]:
        """Rate of each group in a 0-based epoch; base: their rates at the start."""
        return list(base)

    def announce(self, rates, say):
        """The line at the start of an epoch."""
        say("current lr ", rates)

    def train_lines(self, args, epoch, loader, shown):
        prefix = f"Epoch: [{epoch}]"
        return engine.BatchLines(prefix, len(loader), args.print_freq, top5=self.top5, shown=shown)

    def test_lines(self, args, loader, shown):
        return engine.BatchLines("Test: ", len(loader), args.print_freq, top5=self.top5, shown=shown)

    def test_batch(self, args) -> tuple[int, str]:
        """Images that are tested at once, and the flag that says how many."""
        return args.batch_size, "--batch-size"

    def report(self, result, say):
        """The line after a test."""
        say(f" * Acc@1 {result.top1:.3f}" + (f" Acc@5 {result.top5:.3f}" if self.top5 else ""))

    def keeps(self, epoch: int) -> bool:
        """Whether the checkpoint of this epoch is kept under its own name."""
        return False

    def published_command(self, args) -> str | None:
        """The command in published.csv that these flags repeat, None if there is none."""
        for command, theirs in self._published.items():
            same = all(getattr(args, name, None) == getattr(theirs, name, None) for name in COMPARED_FLAGS)
            if same and bool(args.weights) == bool(theirs.weights) and not args.model:
                return command.removeprefix("python ")
        return None

    @functools.cached_property
    def _published(self) -> dict[str, argparse.Namespace]:
        """Commands of this script in published.csv, parsed."""
        with open(PUBLISHED, newline="") as file:
            commands = dict.fromkeys(row["command"] for row in csv.DictReader(file))
        parsed = {}
        for command in commands:
            words = shlex.split(re.sub(r"<[^>]*>", "DIR", command))
            if words[:2] == ["python", f"{self.dataset}.py"] and "versus" not in words:
                parsed[command] = self.parse_args(words[2:])
        return parsed


def memory_loaders(dataset: str, args, device, world, *, seed, mean, std, test_batch_size, augment):
    """Training and test loader of a data set in memory, or of the embedded digits in its shape.

    augment: pad and flip of the training images. Raises DataError if the data cannot be used, RunError if there are
    too few images for the processes.
    """
    channels, size, _ = INPUT_SHAPES[dataset]

    def images(split):
        if args.embedded_data:
            return load_digits_set(split, channels=channels, size=size)
        return load_dataset(dataset, args.data_dir, split=split)

    common = {"mean": mean, "std": std, "device": device, "rank": world.rank, "world_size": world.size,
              "channels_last": args.channels_last}  # fmt: skip
    try:
        test = TensorLoader(images("test"), test_batch_size, train=False, **common)
        if args.evaluate:
            return None, test
        train_set = images("train")
        train_set = train_set if args.train_size is None else train_set.subset(args.train_size)
        return TensorLoader(train_set, args.batch_size, train=True, seed=seed, **augment, **common), test
    except ValueError as error:
        raise RunError(f"{error}; use fewer processes or a larger --batch-size") from None
