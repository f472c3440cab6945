"""The flags of the three training scripts: the original's spelling, types and defaults, and those added here."""

import argparse
import math
import os
import sys
from pathlib import Path

from deepshift.convert import SHIFT_TYPES
from deepshift.optim import OPTIMIZERS
from deepshift.quantizers import ROUNDINGS
from deepshift.run import fp16_refusal

ALL_LAYERS = 1_000_000  # a depth that no network has
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0")
KERNEL_ERROR = "Our custom kernel currently supports inference only, not training."  # the original's words


def str_to_bool(text: str) -> bool:
    """y, yes, t, true, on, 1 or n, no, f, false, off, 0 in any case. Raises ArgumentTypeError for anything else."""
    word = text.lower()
    if word not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"invalid truth value {text!r}; use True or False")
    return word in TRUE


class _Noted(argparse.Action):
    """Stores the value, and that it was given."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


def new_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(shift_type_given=False, shift_depth_given=False)
    return parser


def add_network_flags(parser, *, short_depth: bool):
    """Which network, which weights, and how it is converted."""
    add = parser.add_argument
    add("--model", default="", metavar="PATH", help="whole network from a file instead of a new one (default: none)")
    add("--weights", default="", metavar="PATH", help="weights from a file: float ones are converted (default: none)")
    names = ("-s", "--shift-depth") if short_depth else ("--shift-depth",)
    text = "layers to convert, counted from the last one; 0: none, and all if only --shift-type is given (default: 0)"
    add(*names, type=int, default=0, action=_Noted, metavar="N", help=text)
    add("-st", "--shift-type", choices=SHIFT_TYPES, default="PS", action=_Noted, help="default: %(default)s")
    add("-r", "--rounding", choices=ROUNDINGS, default="deterministic",
        help="rounding of shifts while training (default: %(default)s)")  # fmt: skip
    add("-wb", "--weight-bits", type=int, default=5, metavar="N", help="2 to 6 bits per weight (default: %(default)s)")
    add("-ab", "--activation-bits", nargs="+", default=["16", "16"], metavar="N",
        help="integer and fraction bits of activations (default: 16 16)")  # fmt: skip
    add("--pretrained", type=str_to_bool, default=False, metavar="BOOL",
        help="start from the trained float network (default: %(default)s)")  # fmt: skip


def add_training_flags(parser, *, epochs: int, lr: float, momentum: float, workers: int, seed: int | None):
    """Schedule and optimizer flags that all three scripts have."""
    add = parser.add_argument
    add("-j", "--workers", type=int, default=workers, metavar="N",
        help="processes that decode images; data sets in memory need none (default: %(default)s)")  # fmt: skip
    add("--epochs", type=int, default=epochs, metavar="N", help="default: %(default)s")
    add("-opt", "--optimizer", "--opt", default="SGD", metavar="NAME",
        help=f"one of {', '.join(OPTIMIZERS)} (default: %(default)s)")  # fmt: skip
    rate = ("--lr",) if momentum == 0 else ("--lr", "--learning-rate")
    add(*rate, type=float, default=lr, help="initial learning rate (default: %(default)s)")
    add("--momentum", type=float, default=momentum, help="of SGD (default: %(default)s)")
    add("--seed", type=int, default=seed, metavar="N",
        help=f"same seed, same bits on the CPU (default: {'a new one, logged' if seed is None else seed})")  # fmt: skip


def add_run_flags(parser):
    """What is run, and what is written."""
    add = parser.add_argument
    add("--resume", default="", metavar="PATH", help="checkpoint to go on with, read after conversion (default: none)")
    add("-e", "--evaluate", action="store_true", help="round the weights and test, no training")
    for name, default, text in (
        ("--save-model", True, "write weights.pth, model.pth, weights.packed"),
        ("--print-weights", True, "write the weights as text"),
        ("--use-kernel", False, "with -e: compute with integer shifts, or without --shift-depth with naive products"),
    ):
        add(name, type=str_to_bool, default=default, metavar="BOOL", help=f"{text} (default: %(default)s)")
    add("--desc", metavar="TEXT", help="suffix of the run's directory (default: none)")


def add_large_flags(parser, *, batch_size: int, lr_step_size: int | None, print_freq: int):
    """Flags of the CIFAR-10 and ImageNet scripts that the MNIST script does not have."""
    add = parser.add_argument
    add("--start-epoch", type=int, default=0, metavar="N", help="number of the first epoch (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=batch_size, metavar="N",
        help="of training, over all processes together, and of testing (default: %(default)s)")  # fmt: skip
    add(
        "--lr-schedule",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="lower --lr in steps (default: %(default)s)",
    )
    step = "at 80, 120, 160, 180" if lr_step_size is None else str(lr_step_size)
    add("--lr-step-size", type=int, default=lr_step_size, metavar="N", help=f"epochs of a step (default: {step})")
    add("--lr-sign", type=float, metavar="LR", help="learning rate of the signs (default: that of --lr)")
    add("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, help="default: %(default)s")
    add("-p", "--print-freq", type=int, default=print_freq, metavar="N", help="batches per line (default: %(default)s)")
    add("--gpu", type=int, metavar="N", help="use this GPU only (default: the first)")
    add("--world-size", type=int, default=-1, metavar="N", help="nodes of a distributed run (default: %(default)s)")
    add("--rank", type=int, default=-1, metavar="N", help="of this node (default: %(default)s)")
    add("--dist-url", default="tcp://224.66.41.62:23456", metavar="URL", help="tcp://HOST:PORT (default: %(default)s)")
    add("--dist-backend", default="nccl", metavar="NAME", help="nccl; on the CPU gloo is used (default: %(default)s)")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU of this node")


def add_added_flags(parser):
    """The flags that every paper's scripts have here; their defaults leave the original's behaviour."""
    add = parser.add_argument_group("added in this repository").add_argument
    add("--data-dir", default="./data", metavar="DIR",
        help="where data sets are, downloaded there if missing (default: %(default)s)")  # fmt: skip
    add("--embedded-data", action="store_true", help="use scikit-learn's digits, no download")
    add("--train-size", type=int, metavar="N", help="first N training images only (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--amp", default="off", choices=("off", "bf16", "fp16"), help="mixed precision (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--cuda-graph", action="store_true", help="record a training step once, replay it: one GPU")
    add("--channels-last", action="store_true", help="store activations as NHWC")
    add("--deterministic", action="store_true", help="same bits on a GPU too, slower")
    add("--output-dir", type=os.path.expanduser, default="./models", metavar="DIR", help="instead of ./models")
    add("--auto-resume", action="store_true", help="for sweeps: start, go on, or do nothing if the run is finished")
    add("--debug", action="store_true", help="show the traceback of an error")


def finish(parser, args, argv):
    """Check what argparse cannot and fill in what follows from other flags; mistakes end with exit status 2."""
    script = Path(sys.argv[0]).resolve()
    root = Path(__file__).resolve().parents[1]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    args.command = [name, *(sys.argv[1:] if argv is None else argv)]
    _check_bits(parser, args)
    _check_numbers(parser, args)
    if args.optimizer.lower() not in OPTIMIZERS:
        parser.error(f"unknown --optimizer {args.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")
    if args.use_kernel and not args.evaluate:
        parser.error(f"--use-kernel: {KERNEL_ERROR} Add -e")
    device = "cpu" if getattr(args, "no_cuda", False) else args.device
    if args.amp == "fp16" and (refusal := fp16_refusal(device)):
        parser.error(refusal)
    args.notes = []
    if args.shift_type_given and not args.shift_depth_given:
        args.shift_depth = ALL_LAYERS
        args.notes.append(f"--shift-type {args.shift_type} without --shift-depth: all layers are converted")
    if args.shift_depth and args.shift_type == "PS" and not args.evaluate:
        _advise_ps(args)
    return args


def _check_bits(parser, args):
    if not 2 <= args.weight_bits <= 6:
        parser.error(f"--weight-bits must be 2 to 6, not {args.weight_bits}")
    try:
        integer, fraction = map(int, args.activation_bits)
    except ValueError:
        given = " ".join(args.activation_bits)
        parser.error(f"--activation-bits takes two integers (integer and fraction bits), not: {given}")
    if integer < 1 or fraction < 0 or integer > 32 or fraction > 32:
        parser.error(f"--activation-bits must be 1 to 32 and 0 to 32, not {integer} and {fraction}")
    if args.use_kernel and args.shift_depth and integer + fraction > 32:
        parser.error(f"--use-kernel computes in 32 bits; --activation-bits {integer} {fraction} are more")
    args.activation_integer_bits, args.activation_fraction_bits = integer, fraction


def _check_numbers(parser, args):
    least = {"epochs": 1, "batch_size": 1, "test_batch_size": 1, "train_size": 1, "lr_step_size": 1, "log_interval": 1,
             "print_freq": 1, "batch_multiplier": 1, "workers": 0, "start_epoch": 0, "shift_depth": 0,
             "image_size": 32}  # fmt: skip
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    for name in ("lr", "lr_sign", "momentum", "weight_decay"):
        value = getattr(args, name, None)
        if value is not None and not (math.isfinite(value) and value >= 0 and (value > 0 or name != "lr")):
            parser.error(f"--{name.replace('_', '-')} must be a number of at least 0 (--lr: above 0), not {value}")


def _advise_ps(args):
    if args.optimizer.lower() == "sgd":
        args.notes.append("DeepShift-PS trains badly with SGD: the published results need --optimizer radam")
