"""Flags that several scripts of this paper share, and the checks of their values."""

import argparse
import csv
import math
import os
import shlex
from pathlib import Path

from epsilon_resnet.run import fp16_refusal
from epsilon_resnet.schedules import parse_schedule

PUBLISHED = Path(__file__).with_name("published.csv")


def number(text: str) -> float:
    """A threshold: 0 or more."""
    value = float(text)
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"epsilon must be 0 or more, not {text}")
    return value


number.__name__ = "epsilon"  # argparse names it in its message


def new_parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_flags(group, *, data_dir: bool = True):
    """Where the images are; in every script."""
    if data_dir:
        group.add_argument(
            "--data-dir",
            metavar="DIR",
            help="where data sets are, downloaded there if missing (default: $TENSORPACK_DATASET/<set>_data if that "
            "is set, as in the original, else ./data)",
        )
    group.add_argument("--embedded-data", action="store_true", help="use scikit-learn's digits, no download")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N, instead of --gpu (default: %(default)s)"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_training_flags(group, epochs: str, batch_size: str, gated: bool = True):
    """What a training run can do besides the original's flags; the defaults are the original's behaviour.

    gated: with the flags that only concern gates.
    """
    group.add_argument("--epochs", type=int, help=f"length of training (default: {epochs})")
    group.add_argument("--train-size", type=int, metavar="N", help="first N training images only (default: all)")
    group.add_argument("--batch_size", type=int, metavar="N", help=f"default: {batch_size}")
    group.add_argument("--steps_per_epoch", type=int, metavar="N", help="default: one pass over the images")
    group.add_argument(
        "--lr_schedule",
        metavar="E:RATE,...",
        help="rate set after epoch E, such as 0:0.1,82:0.01 (default: the paper's, scaled to --epochs)",
    )
    if gated:
        _add_gate_flags(group)
    else:
        group.set_defaults(lr_reset_schedule=None, lr_stat="count", epsilon_start_epoch=0, plain=True, epsilon=0.0)
    group.add_argument("--weight_decay", type=float, metavar="W", help="default: the paper's")
    group.add_argument("--amp", default="off", choices=("off", "bf16", "fp16"), help="default: %(default)s")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--cuda-graph", action="store_true", help="record a training step once, replay it: one GPU")
    group.add_argument("--channels-last", action="store_true", help="store activations as NHWC")
    group.add_argument("--seed", type=int, help="same seed, same bits on the CPU (default: a new one, logged)")
    group.add_argument("--deterministic", action="store_true", help="same bits on a GPU too, slower")
    group.add_argument(
        "--output-dir",
        type=os.path.expanduser,
        default=".",
        metavar="DIR",
        help="where train_log... goes (default: the working directory)",
    )
    group.add_argument(
        "--keep_step",
        type=int,
        action="append",
        metavar="STEP",
        help="keep this checkpoint too, besides the last ten and one per half hour; may be given several times",
    )
    group.add_argument(
        "--auto-resume", action="store_true", help="for sweeps: start, go on, or do nothing if this run is finished"
    )


def _add_gate_flags(group):
    group.add_argument(
        "--lr_reset_schedule",
        metavar="E:RATE,...",
        help="the same after blocks were lost, counted from that epoch, or none to never start again "
        "(default: the paper's, scaled to --epochs)",
    )
    group.add_argument(
        "--lr_stat",
        default="count",
        choices=("count", "ema_raw"),
        help="what starts the schedule again: the number of closed blocks, or the original's float32 moving average "
        "of it, which misses single blocks (default: %(default)s)",
    )
    group.add_argument(
        "--epsilon_start_epoch",
        type=int,
        default=0,
        metavar="K",
        help="epsilon is 0 up to epoch K; the original's last revision has 150 for CIFAR (default: %(default)s)",
    )
    group.add_argument(
        "--plain", action="store_true", help="no gates and no side branch: the pre-activation ResNet, the baseline"
    )


def check(parser: argparse.ArgumentParser, args):
    """Mistakes in the values of the flags end with one line and exit status 2."""
    for name in ("batch_size", "epochs", "train_size", "steps_per_epoch", "num_units", "image_size"):
        value, least = getattr(args, name, None), 2 if name == "num_units" else 1
        if value is not None and value < least:
            flag = name.replace("_", "-") if name in ("train_size", "image_size") else name
            parser.error(f"--{flag} must be at least {least}, not {value}")
    if args.epsilon_start_epoch < 0:
        parser.error(f"--epsilon_start_epoch must be 0 or more, not {args.epsilon_start_epoch}")
    if args.weight_decay is not None and not 0 <= args.weight_decay < float("inf"):
        parser.error(f"--weight_decay must be 0 or more, not {args.weight_decay:g}")
    for name in ("lr_schedule", "lr_reset_schedule"):
        text = getattr(args, name)
        if text and not (name == "lr_reset_schedule" and text == "none"):
            try:
                parse_schedule(text)
            except ValueError as error:
                parser.error(f"--{name}: {error}")
    if args.amp == "fp16" and (refusal := fp16_refusal(args.device)):
        parser.error(refusal)


def published_command(script: str, parser: argparse.ArgumentParser, args, names: tuple[str, ...]) -> str | None:
    """The published command of `script` whose flags `names` have these values, written as in published.csv, or None."""
    if args.embedded_data or args.train_size or args.plain or getattr(args, "fake", False):
        return None
    with open(PUBLISHED, newline="") as file:
        commands = {row["command"] for row in csv.DictReader(file)}
    for command in sorted(commands):
        words = shlex.split(command)
        if words[1:2] == [script] and "&&" not in words:
            published = parser.parse_args(words[2:])
            if all(getattr(published, name) == getattr(args, name) for name in names):
                return command.removeprefix("python ")
    return None
