"""Test plain networks with discrete convolution weights, such as converted S3.

    python s3/main_eval.py --evaluate --arch resnet18 \\
        --resume s3-3bit-resnet18-pytorch-imagenet.pth.tar /path/to/imagenet

Published: 69.508% top-1, 88.968% top-5. The file is one of convert.py (plain
or packed), one of the original, or any checkpoint of a torchvision network.
As the PyTorch example that it is, the script also trains these networks.

CIFAR networks:      --dataset cifar10 --arch resnet20
Packed kernels:      add --use-kernel
Several processes:   torchrun --nproc_per_node=2 s3/main_eval.py ..., or
                     --multiprocessing-distributed for all GPUs of a machine
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from s3 import engine, flags
from s3.checkpoints import require_same
from s3.launch import run_task
from s3.network import Config
from s3.resnet import DATASETS, IMAGENET_DEPTHS, architectures, build_resnet
from s3.runs import RunError
from s3.schedule import step_rate
from s3.training import Task

OWN_RESNETS = tuple(f"resnet{depth}" for depth in IMAGENET_DEPTHS)
PRETRAINED_CLASSES = 1000


class PlainTask(Task):
    """Torchvision's networks, and float ResNets of 32x32 images; a tenth of the rate every 30 epochs."""

    epochs_in_paper = 90

    def announce(self, args, say):
        if args.gpu is not None:
            say(f"Use GPU: {args.gpu} for training")
        say(f"=> {'using pre-trained' if args.pretrained else 'creating'} model '{args.arch}'")

    def build(self, args, classes):
        if args.dataset != "imagenet":
            return build_resnet(args.dataset, args.arch, classes, "float")
        from torchvision import models

        if not args.pretrained:
            return models.get_model(args.arch, num_classes=classes)
        if classes != PRETRAINED_CLASSES:
            raise RunError(f"--pretrained has {PRETRAINED_CLASSES} classes, the data has {classes}; add --num-classes "
                           f"{PRETRAINED_CLASSES}, or leave --pretrained out")  # fmt: skip
        known = models.get_model_weights(args.arch)
        try:
            return models.get_model(args.arch, weights=getattr(known, "IMAGENET1K_V1", known.DEFAULT))
        except (OSError, RuntimeError) as error:  # no network; a file with another checksum
            raise RunError(f"--pretrained: cannot download {args.arch} ({error}); give a file with --resume") from None

    def config(self, args, classes) -> Config | None:
        """The network as one of ours, None if it is another of torchvision's."""
        if args.dataset == "imagenet" and args.arch not in OWN_RESNETS:
            return None
        return Config(args.dataset, args.arch, classes, "float", 3)

    def describe(self, args, classes):
        return Config(args.dataset, args.arch, classes, "float", 3).as_dict()

    def check(self, args, loaded, classes):
        theirs = loaded.config
        if theirs is not None and theirs.method != "float":
            raise RunError(f"{loaded.path} has latent tensors; convert it with convert.py, or evaluate it with "
                           f"main.py -e {theirs.in_flags()}")  # fmt: skip
        config = self.config(args, classes)
        if config is not None and theirs is not None:
            require_same(loaded, config)

    def learning_rate(self, args, epoch):
        return step_rate(args.lr, epoch)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--arch", default="resnet18", metavar="ARCH",
                        help="a classification network of torchvision (default: %(default)s)")  # fmt: skip
    flags.add_original_flags(parser, epochs=90, print_freq=10)
    parser.add_argument("--pretrained", action="store_true", help="torchvision's trained weights, downloaded")
    flags.add_distributed_flags(parser)
    flags.add_data_flags(parser.add_argument_group("extensions (not in the original's script)"), DATASETS)
    flags.add_added_flags(parser)
    return parser


def parse_args(argv=None) -> argparse.Namespace:
    parser = build_parser()
    args = flags.finish(parser, parser.parse_args(argv), argv)
    if args.dataset != "imagenet":
        known = architectures(args.dataset)
    else:
        from torchvision import models

        known = models.list_models(module=models)
    if args.arch not in known:
        names = ", ".join(known)
        parser.error(f"--arch {args.arch}: not a network for --dataset {args.dataset}; choose from {names}")
    if args.pretrained and args.dataset != "imagenet":
        parser.error("--pretrained: torchvision has weights for ImageNet only; give a file with --resume")
    return args


def main(argv=None) -> int:
    return run_task(PlainTask(), parse_args(argv))


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
