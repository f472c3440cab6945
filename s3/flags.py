"""Flags of both scripts: those of the original, extensions, and those that every paper has here."""

import math
import os

from s3.run import fp16_refusal
from s3.runs import command_line

DIST_URL = "tcp://224.66.41.62:23456"


def add_original_flags(parser, *, epochs: int, print_freq: int):
    """The flags that both of the original's scripts have."""
    add = parser.add_argument
    add("data", metavar="DIR", nargs="?", help="folder with train/ and val/, a folder per class in each; other data "
        "sets: as --data-dir; needed for ImageNet unless --embedded-data is given")  # fmt: skip
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that decode images (default: %(default)s)")
    add("--epochs", type=int, default=epochs, metavar="N", help="default: %(default)s")
    add("--start-epoch", type=int, default=0, metavar="N", help="number of the first epoch (default: %(default)s)")
    add("-b", "--batch-size", type=int, default=256, metavar="N",
        help="of training and testing, over all processes together (default: %(default)s)")  # fmt: skip
    add("--lr", "--learning-rate", type=float, default=0.1, help="initial learning rate (default: %(default)s)")
    add("--momentum", type=float, default=0.9, metavar="M", help="of SGD (default: %(default)s)")
    add("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, metavar="W",
        help="of every parameter (default: %(default)s)")  # fmt: skip
    add("-p", "--print-freq", type=int, default=print_freq, metavar="N", help="batches per line (default: %(default)s)")
    add("--resume", default="", metavar="PATH", help="checkpoint to go on with or to test (default: none)")
    add("-e", "--evaluate", action="store_true", help="test, no training; train/ need not exist")
    add("--seed", type=int, metavar="N", help="same seed, same bits on the CPU (default: a new one, logged)")


def add_data_flags(group, datasets):
    """What to train on: extensions of both scripts."""
    add = group.add_argument
    add("--dataset", default="imagenet", choices=datasets,
        help="ImageNet folder, or 32x32 images for the CIFAR networks of the original's model file (default: "
        "%(default)s)")  # fmt: skip
    add("--num-classes", type=int, metavar="N", help="outputs of the network (default: the classes of the data)")
    add(
        "--image-size", type=int, default=224, metavar="N", help="side of the images of a folder (default: %(default)s)"
    )
    add("--skip-damaged", action="store_true", help="go on without images that cannot be decoded, naming them")
    add("--use-kernel", action="store_true", help="with -e: compute with packed weights of 2 to 4 bits")


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
    add("--output-dir", type=os.path.expanduser, default=".", metavar="DIR",
        help="where checkpoints and logs go (default: %(default)s)")  # fmt: skip
    add("--auto-resume", action="store_true", help="for sweeps: start, go on, or do nothing if the run is finished")
    add("--debug", action="store_true", help="show the traceback of an error")


def add_distributed_flags(parser):
    """main_eval.py's, of the PyTorch example that it is."""
    add = parser.add_argument
    add("--world-size", type=int, default=-1, metavar="N", help="nodes of a distributed run (default: %(default)s)")
    add("--rank", type=int, default=-1, metavar="N", help="of this node (default: %(default)s)")
    add("--dist-url", default=DIST_URL, metavar="URL", help="tcp://HOST:PORT or env:// (default: %(default)s)")
    add("--dist-backend", default="nccl", metavar="NAME", help="nccl; on the CPU gloo is used (default: %(default)s)")
    add("--gpu", type=int, metavar="N", help="use this GPU only (default: the first)")
    add("--multiprocessing-distributed", action="store_true", help="one process per GPU of this node")


def finish(parser, args, argv):
    """Check what argparse cannot and fill in what follows from other flags; mistakes end with exit status 2."""
    args.command = command_line(argv)
    args.embedded_data = args.embedded_data or args.dataset == "digits"
    if args.dataset != "imagenet":
        args.data_dir = args.data or args.data_dir
    elif args.data is None and not args.embedded_data:
        parser.error("the folder DIR with train/ and val/ is required (or --embedded-data, or another --dataset)")
    least = {"epochs": 1, "batch_size": 1, "print_freq": 1, "train_size": 1, "num_classes": 1, "image_size": 32,
             "workers": 0, "start_epoch": 0, "gpu": 0}  # fmt: skip
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    for name, dest in (("lr", "lr"), ("rs", "rs"), ("momentum", "momentum"), ("wd", "weight_decay")):
        value = getattr(args, dest, 0.0)
        if not (math.isfinite(value) and value >= 0 and (value > 0 or name != "lr")):
            parser.error(f"--{name} must be a number of at least 0 (--lr: above 0), not {value}")
    if args.use_kernel and not args.evaluate:
        parser.error("--use-kernel: the packed kernels are for inference, not for training; add -e")
    if args.amp == "fp16" and (refusal := fp16_refusal(args.device)):
        parser.error(refusal)
    return args
