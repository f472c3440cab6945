"""Train and test DeepShift on MNIST (arXiv 1905.13298): a fully connected and a convolutional network.

    python deepshift/mnist.py --type conv --shift-depth 1000 \\
        --shift-type PS --optimizer radam

Published: 99.12% after 10 epochs (3 to 5 minutes on a CPU). Files go to
models/mnist/simple_<type>/<label>/, here simple_conv/shift_ps_all_wb_5.

Test a saved file:   add -e --resume models/.../weights.pth
Without a download:  add --embedded-data
Several processes:   torchrun --nproc_per_node=2 deepshift/mnist.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepshift import engine, flags
from deepshift.launch import run_task
from deepshift.tasks import Task, memory_loaders

MEAN, STD = (0.1307,), (0.3081,)


class Mnist(Task):
    """MNIST: one parameter group, constant learning rate, the last epoch's weights are kept."""

    dataset = "mnist"
    columns = ["epoch", "train_loss", "test_loss", "test_accuracy"]
    first_number = 1
    saves_last = True

    def groups(self, args, model):
        return [{"params": [p for p in model.parameters()], "lr": args.lr}]

    def announce(self, rates, say):
        pass  # the original prints nothing here

    def train_lines(self, args, epoch, loader, shown):
        return engine.MnistLines(epoch + 1, loader, args.log_interval, shown)

    def test_lines(self, args, loader, shown):
        return None

    def test_batch(self, args):
        return args.test_batch_size, "--test-batch-size"

    def report(self, result, say):
        numbers = f"{result.correct}/{result.seen} ({result.top1:.0f}%)"
        say(f"\nTest set: Average loss: {result.loss:.4f}, Accuracy: {numbers}\n")

    def row(self, epoch, trained, tested, seconds):
        """A line of train_log.csv; as in the original the training loss is that of the last batch."""
        return [epoch + 1, trained.last_loss, tested.loss, tested.correct / tested.seen]

    def test_rows(self, result):
        return [["test_loss", "correct"], [result.loss, result.correct / result.seen]]

    def epochs_in_paper(self, args):
        return 10

    def loaders(self, args, seed, device, world):
        return memory_loaders("mnist", args, device, world, seed=seed, mean=MEAN, std=STD,
                              test_batch_size=args.test_batch_size, augment={})  # fmt: skip


def build_parser():
    parser = flags.new_parser(__doc__)
    add = parser.add_argument
    add("--type", choices=("linear", "conv"), default="linear", help="network (default: %(default)s)")
    flags.add_network_flags(parser, short_depth=False)
    flags.add_training_flags(parser, epochs=10, lr=0.01, momentum=0.0, workers=1, seed=1)
    add("--batch-size", type=int, default=64, metavar="N", help="of training (default: %(default)s)")
    add("--test-batch-size", type=int, default=1000, metavar="N", help="of testing (default: %(default)s)")
    add("--log-interval", type=int, default=10, metavar="N", help="batches per line (default: %(default)s)")
    add("--no-cuda", action="store_true", help="do not use a GPU")
    flags.add_run_flags(parser)
    flags.add_added_flags(parser)
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    args.dataset, args.arch = "mnist", f"simple_{args.type}"
    return flags.finish(parser, args, argv)


def main(argv=None):
    return run_task(Mnist(parse_args), parse_args(argv))


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
