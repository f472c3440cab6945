"""Train and test S3 ResNets (arXiv 2107.03453): weights 0, +-1, +-2, +-4, 3 bits.

    python s3/main.py /path/to/imagenet

Published: ResNet-18, 69.83% top-1, 89.23% top-5 after 200 epochs. DIR holds
train/ and val/, each with a folder per class. Checkpoints (checkpoint.pth.tar,
model_best.pth.tar), metrics.jsonl and TensorBoard events go to --output-dir,
by default the current directory, as in the original.

Test a saved file:   add -e --resume model_best.pth.tar
Convert it:          s3/convert.py, then s3/main_eval.py
CIFAR networks:      --dataset cifar10 --arch resnet20
Without a download:  --embedded-data instead of DIR (with --image-size 64 to
                     see something on a CPU)
Several processes:   torchrun --nproc_per_node=2 s3/main.py ...
"""

import argparse
import csv
import functools
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from s3 import engine, flags
from s3.checkpoints import require_same
from s3.launch import run_task
from s3.network import Config
from s3.quantizers import S3_BITS, dense_weight_penalty
from s3.resnet import CIFAR_DEPTHS, DATASETS, METHODS, architectures
from s3.s3conv2dshift import STARTS, sparse_latents
from s3.schedule import SCHEDULES, cosine_rate
from s3.training import Task

PUBLISHED = Path(__file__).with_name("published.csv")
COMPARED_FLAGS = (
    "dataset", "arch", "method", "weight_bits", "init", "schedule", "image_size", "epochs", "start_epoch", "batch_size",
    "lr", "rs", "momentum", "weight_decay",
)  # fmt: skip
PUBLISHED_CLASSES = 1000


class S3Task(Task):
    """Latent tensors, the dense-weight regulariser, one cosine."""

    def announce(self, args, say):
        say(f"=> {'using pre-trained' if args.pretrained else 'creating'} model '{args.arch}'")
        if args.pretrained:
            say("note: as in the original, --pretrained loads nothing; give --resume")

    def config(self, args, classes) -> Config:
        return Config(args.dataset, args.arch, classes, args.method, args.weight_bits)

    def build(self, args, classes):
        return self.config(args, classes).build(args.init)

    def describe(self, args, classes):
        return self.config(args, classes).as_dict()

    def check(self, args, loaded, classes):
        require_same(loaded, self.config(args, classes))

    def learning_rate(self, args, epoch):
        return cosine_rate(args.lr, epoch, args.epochs, args.schedule)

    def regulariser(self, args, model):
        latents = sparse_latents(model)
        return (lambda: args.rs * dense_weight_penalty(latents)) if latents and args.rs else None

    def published_command(self, args, classes):
        for command, theirs in self._published.items():
            same = all(getattr(args, name) == getattr(theirs, name) for name in COMPARED_FLAGS)
            if same and classes == PUBLISHED_CLASSES:
                return command.removeprefix("python ")
        return None

    @functools.cached_property
    def _published(self) -> dict[str, argparse.Namespace]:
        """Commands of this script in published.csv, parsed; what stands in parentheses is a remark."""
        with open(PUBLISHED, newline="") as file:
            commands = dict.fromkeys(row["command"] for row in csv.DictReader(file))
        words = {command: shlex.split(re.sub(r"\(.*\)", "", command)) for command in commands}
        return {command: parse_args(w[2:]) for command, w in words.items() if w[:2] == ["python", "main.py"]}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_original_flags(parser, epochs=200, print_freq=100)
    add = parser.add_argument
    add("--rs", "--reg-sparse", type=float, default=1e-5, metavar="R",
        help="weight of the dense-weight regulariser, a sum over all weights (default: %(default)s)")  # fmt: skip
    add("--pretrained", action="store_true", help="changes the printed line only, as in the original")
    extension = parser.add_argument_group("extensions (not in the original's script)")
    add = extension.add_argument
    depths = ", ".join(map(str, CIFAR_DEPTHS))
    add("-a", "--arch", default="resnet18", metavar="ARCH", help="resnet18, 34, 50, 101 or 152; for 32x32 images "
        f"resnet of {depths}; all from the original's model file (default: %(default)s)")  # fmt: skip
    add("--method", default="s3", choices=METHODS, help="s3; denseshift: the successor (ICCV 2023), no zeros; float: "
        "the network that both replace (default: %(default)s)")  # fmt: skip
    add("--weight-bits", type=int, default=3, metavar="N", help="2, 3 or 4 by the method's general recursion; the "
        "published code has 3 (default: %(default)s)")  # fmt: skip
    add("--init", default="default", choices=STARTS, help="start of S3 weights; dense: none is zero, as in the "
        "original's first commit (default: %(default)s)")  # fmt: skip
    add("--schedule", default="original", choices=SCHEDULES, help="original: the cosine is a step ahead, the last "
        "epoch's rate is 0; fixed: it begins at --lr (default: %(default)s)")  # fmt: skip
    flags.add_data_flags(extension, DATASETS)
    flags.add_added_flags(parser)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = build_parser()
    args = flags.finish(parser, parser.parse_args(argv), argv)
    if args.arch not in architectures(args.dataset):
        names = ", ".join(architectures(args.dataset))
        parser.error(f"--arch {args.arch}: not a network for --dataset {args.dataset}; choose from {names}")
    if args.weight_bits not in S3_BITS:
        parser.error(f"--weight-bits must be 2, 3 or 4, not {args.weight_bits}")
    return args


def main(argv=None) -> int:
    return run_task(S3Task(), parse_args(argv))


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
