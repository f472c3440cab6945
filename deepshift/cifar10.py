"""Train and test DeepShift on CIFAR-10 (arXiv 1905.13298).

    python deepshift/cifar10.py --arch resnet20 --shift-depth 1000 \\
        --shift-type PS --optimizer radam

Published: 88.84% after 200 epochs. Files go to models/cifar10/<arch>/<label>/,
here resnet20/shift_ps_all_wb_5.

Test a saved file:   add -e --resume models/.../model_best.pth.tar
Without a download:  add --embedded-data
Several processes:   torchrun --nproc_per_node=2 deepshift/cifar10.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepshift import engine, flags
from deepshift.launch import run_task
from deepshift.tasks import Task, memory_loaders
from deepshift.zoo import architectures

MOMENTS = {  # mean and standard deviation of the colours
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DROPS = (80, 120, 160, 180)  # epochs; 0-based
WARMED_UP = ("resnet110", "resnet1202")  # one epoch at a tenth of the rate


class Cifar10(Task):
    """CIFAR-10: rates in steps, signs and shifts in turn if asked, the regulariser outside the logged loss."""

    dataset = "cifar10"
    columns = ["epoch", "train_loss", "train_top1_acc", "train_time", "test_loss", "test_top1_acc", "test_time"]

    def learning_rates(self, args, base, epoch):
        """Rates of the groups: others, signs, shifts."""
        rates = [rate * lr_factor(args, epoch) for rate in base]
        if args.alternate_update:
            return [rates[0], 0.0, rates[0]] if epoch % 2 else [rates[0], rates[0], 0.0]
        return rates

    def row(self, epoch, trained, tested, seconds):
        return [epoch, trained.loss, trained.top1, trained.seconds, tested.loss, tested.top1, tested.seconds]

    def test_rows(self, result):
        return [["test_loss", "test_top1_acc", "test_time"], [result.loss, result.top1, result.seconds]]

    def epochs_in_paper(self, args):
        return 15 if args.weights or args.pretrained else 200

    def loaders(self, args, seed, device, world):
        mean, std = MOMENTS[args.normalize]
        return memory_loaders("cifar10", args, device, world, seed=seed, mean=mean, std=std,
                              test_batch_size=args.batch_size, augment={"pad": 4, "flip": True})  # fmt: skip


def lr_factor(args, epoch: int) -> float:
    """Learning rate of a 0-based epoch over --lr."""
    if not args.lr_schedule:
        return 1.0
    # The original's warm-up never ends in PyTorch since 1.4; here it ends after the first epoch, as was meant.
    start = 0.1 if args.arch in WARMED_UP and epoch == 0 else 1.0
    steps = epoch // args.lr_step_size if args.lr_step_size else sum(epoch >= drop for drop in DROPS)
    return start / 10**steps


def build_parser():
    parser = flags.new_parser(__doc__)
    names = [name for name in architectures("cifar10")]
    parser.add_argument("-a", "--arch", default="resnet18", choices=names, metavar="ARCH",
                        help=f"network, one of {', '.join(names)} (default: %(default)s)")  # fmt: skip
    flags.add_network_flags(parser, short_depth=True)
    flags.add_training_flags(parser, epochs=200, lr=0.1, momentum=0.9, workers=4, seed=None)
    flags.add_large_flags(parser, batch_size=128, lr_step_size=None, print_freq=50)
    parser.add_argument("-alt", "--alternate-update", type=flags.str_to_bool, default=False, metavar="BOOL",
                        help="train shifts in odd and signs in even epochs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--freeze", type=flags.str_to_bool, default=False, metavar="BOOL",
                        help="keep the float parameters as they are (default: %(default)s)")  # fmt: skip
    flags.add_run_flags(parser)
    flags.add_added_flags(parser)
    parser.add_argument("--normalize", default="cifar10", choices=tuple(MOMENTS),
                        help="mean and standard deviation of the images: those of ImageNet for networks that were "
                             "trained so elsewhere; added here (default: %(default)s)")  # fmt: skip
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    args.dataset = "cifar10"
    return flags.finish(parser, args, argv)


def main(argv=None):
    return run_task(Cifar10(parse_args), parse_args(argv))


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
