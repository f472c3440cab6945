"""Train and test DeepShift on ImageNet or any folder like it (arXiv 1905.13298).

    python deepshift/imagenet.py DIR --arch resnet18 --pretrained True \\
        --shift-depth 1000 --shift-type PS --desc from_pretrained \\
        --lr 1e-3 --lr-step 5 --epochs 15 --opt radam

DIR holds train/ and val/, each with a folder per class. Published: 69.27% top-1,
89.00% top-5. Files go to models/imagenet/<arch>/<label>/.

Test a saved file:   add -e --resume models/.../model_best.pth.tar
Without a download:  --embedded-data instead of DIR (and --image-size 64 to see
                     something on a CPU)
Several processes:   torchrun --nproc_per_node=2 deepshift/imagenet.py ..., or
                     --multiprocessing-distributed for all GPUs of a machine
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data import DataError, ImageFolderLoader, write_digits_folder
from deepshift import engine, flags
from deepshift.launch import run_task
from deepshift.runs import RunError
from deepshift.tasks import Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUMMARY_SIZE = 228  # as in the original
CLASSES = 1000
EVERY = 10  # epochs between the checkpoints that are kept


class ImageNet(Task):
    """ImageNet: all groups share one rate in steps, gradients may add up over batches, the loss has the regulariser."""

    dataset = "imagenet"
    columns = ["epoch", "train_loss", "train_top1_acc", "train_top5_acc", "train_time", "test_loss", "test_top1_acc",
               "test_top5_acc", "test_time", "cumulative_time"]  # fmt: skip
    top5 = True
    logs_regulariser = True

    def __init__(self, parse_args, image_size=224):
        super().__init__(parse_args)
        self.input_shape = (3, image_size, image_size)
        size = SUMMARY_SIZE if image_size == 224 else image_size
        self.summary_shape = (3, size, size)

    def learning_rates(self, args, base, epoch):
        """One rate for all groups: as in the original the schedule overrides --lr-sign."""
        if not args.lr_schedule:
            return list(base)
        return [args.lr / 10 ** (epoch // args.lr_step_size)] * len(base)

    def row(self, epoch, trained, tested, seconds):
        train = [trained.loss, trained.top1, trained.top5, trained.seconds]
        return [epoch, *train, tested.loss, tested.top1, tested.top5, tested.seconds, seconds]

    def test_rows(self, result):
        """As in the original the cumulative time has a line of its own."""
        total = result.seconds * result.batches
        numbers = [result.loss, result.top1, result.top5, result.seconds]
        return [["test_loss", "test_top1_acc", "test_top5_acc", "test_time", "cumulative_time"], numbers, [total]]

    def epochs_in_paper(self, args):
        return 15 if args.weights or args.pretrained else 90

    def keeps(self, epoch):
        return epoch % EVERY == 0

    def loaders(self, args, seed, device, world):
        root = write_digits_folder(Path(args.data_dir) / "digits") if args.embedded_data else Path(args.data)
        options = {"mean": MEAN, "std": STD, "size": args.image_size, "workers": args.workers, "device": device,
                   "rank": world.rank, "world_size": world.size, "channels_last": args.channels_last}  # fmt: skip
        try:
            test = ImageFolderLoader(root, args.batch_size, train=False, **options)
            if len(test.classes) > CLASSES:
                raise DataError(f"{root} has {len(test.classes)} classes, the networks have {CLASSES} outputs")
            if args.evaluate:
                return None, test
            limit = args.train_size
            return ImageFolderLoader(root, args.batch_size, train=True, seed=seed, limit=limit, **options), test
        except ValueError as error:
            raise RunError(f"{error}; use fewer processes or a larger --batch-size") from None


def build_parser():
    parser = flags.new_parser(__doc__)
    add = parser.add_argument
    add("data", metavar="DIR", nargs="?", help="folder with train/ and val/; needed unless --embedded-data is given")
    add("-a", "--arch", default="resnet18", metavar="ARCH",
        help="a classification network of torchvision, mobilenetv1 or mobilenetv2 (default: %(default)s)")  # fmt: skip
    flags.add_network_flags(parser, short_depth=True)
    flags.add_training_flags(parser, epochs=90, lr=0.1, momentum=0.9, workers=4, seed=None)
    flags.add_large_flags(parser, batch_size=256, lr_step_size=30, print_freq=10)
    add("-bm", "--batch-multiplier", type=int, default=1, metavar="N",
        help="batches whose gradients make one update (default: %(default)s)")  # fmt: skip
    add("--opt-ckpt", default="", metavar="PATH", help="state of the optimizer from a file (default: none)")
    flags.add_run_flags(parser)
    flags.add_added_flags(parser)
    parser.add_argument("--image-size", type=int, default=224, metavar="N",
                        help="side of the square images; added here (default: %(default)s)")  # fmt: skip
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    args.dataset = "imagenet"
    if args.data is None and not args.embedded_data:
        parser.error("the folder DIR with train/ and val/ is required (or --embedded-data); "
                     "after -ab put another option or -- before it")  # fmt: skip
    from deepshift.zoo import architectures

    if args.arch not in architectures("imagenet"):
        parser.error(f"--arch {args.arch}: not a classification network of the installed torchvision, mobilenetv1 or "
                     "mobilenetv2")  # fmt: skip
    return flags.finish(parser, args, argv)


def main(argv=None):
    args = parse_args(argv)
    return run_task(ImageNet(parse_args, args.image_size), args)


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
