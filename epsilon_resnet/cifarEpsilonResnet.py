"""Train epsilon-ResNet on CIFAR-10 or CIFAR-100 (Yu et al., CVPR 2018).

    python epsilon_resnet/cifarEpsilonResnet.py --gpu 1 -n 18 -e 2.5 -o cifar10-e_2.5-n_18 --cifar10

Published: error 0.0524 on CIFAR-10 after 390,000 steps (1000 epochs), n = 18,
epsilon 2.5; 13.5 hours on the authors' GPU. One of --cifar10 and --cifar100
must be given. The run is in train_log.<output>/: log.log, stat.json,
model-<step>.pth after every epoch, metrics.jsonl, TensorBoard events.
Then: compressModel.py, cifarCompressedResnet.py.

To go on with a run:  --load train_log.X/model-<step>.pth -o X  or --auto-resume
Without a download:   add --embedded-data
Several processes:    --gpu 0,1 or torchrun --nproc_per_node=2 ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import flags
from epsilon_resnet.engine import run_script
from epsilon_resnet.launch import exit_status, run_training
from epsilon_resnet.runs import command_line
from epsilon_resnet.training import RECIPES

EPSILON = 2.5
REPRODUCES_FLAGS = ("num_units", "epsilon", "dataset")


def build_parser(doc: str = __doc__, epsilon: float = EPSILON, family: str = "cifar"):
    """Flags of this script, and without the data set's of svhnEpsilonResnet.py."""
    parser = flags.new_parser(doc)
    parser.add_argument("--gpu", help="comma list of devices; several give one process each (default: the first)")
    parser.add_argument(
        "-n", "--num_units", type=int, default=18, help="blocks per group, 6n + 2 layers (default: %(default)s)"
    )
    parser.add_argument("--load", metavar="FILE", help="checkpoint to start from; one in the log directory: go on")
    parser.add_argument(
        "-e", "--epsilon", type=flags.number, default=epsilon, help="threshold of the gates (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", help="suffix of the log directory train_log.<output> (default: none)")
    if family == "cifar":
        which = parser.add_mutually_exclusive_group(required=True)
        which.add_argument("--cifar10", dest="dataset", action="store_const", const="cifar10", help="10 classes")
        which.add_argument("--cifar100", dest="dataset", action="store_const", const="cifar100", help="100 classes")
    else:
        parser.set_defaults(dataset=family)
    extra = parser.add_argument_group("added in this repository")
    flags.add_data_flags(extra)
    flags.add_training_flags(extra, f"{RECIPES[family].epochs}; the schedule scales with it", "128 for each GPU")
    return parser


def parse_args(argv=None, script: str = __file__, parser=None):
    """Flags with defaults filled in. Mistakes end with one line and exit status 2."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    flags.check(parser, args)
    family = "svhn" if args.dataset == "svhn" else "cifar"
    args.command = command_line(script, argv)
    args.epochs = RECIPES[family].epochs if args.epochs is None else args.epochs
    args.log_name = f"train_log.{args.output}" if args.output else "train_log"
    return args


def main(argv=None):
    parser = build_parser()
    args = parse_args(argv)
    published = flags.published_command(Path(__file__).name, parser, args, REPRODUCES_FLAGS)
    if args.dataset == "cifar100":
        print("args.dataset: False")  # as in the original
    return exit_status(run_training(args, __file__, argv, published))


if __name__ == "__main__":
    sys.exit(run_script(main))
