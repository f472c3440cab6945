"""Train epsilon-ResNet on ImageNet (Yu et al., CVPR 2018), or test it.

    python epsilon_resnet/imagenetEpsilonResnet.py --gpu 0,1,2,3 --data DIR -d 101 -e 2.0

Published: 20.12% of the layers discarded, top-1 error 0.232 after 110 epochs
of 5000 steps, 86 hours on 4 V100. DIR has train/ and val/, each with one
folder of images per class. The run is in train_log/imagenetEpsilonResnet/;
a line learning_rate:1e-4 in its hyper.txt overrides the schedule.

Test:                --eval --load FILE --data DIR --gpu 0
Without a download:  add --embedded-data (digits), or --fake (random pixels)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import engine, flags, imagenet_inputs, inputs
from epsilon_resnet.checkpoints import read_network
from epsilon_resnet.launch import exit_status, run_training
from epsilon_resnet.models import IMAGENET_BLOCKS
from epsilon_resnet.run import gpu_errors_explained
from epsilon_resnet.runs import RunError, command_line
from epsilon_resnet.training import RECIPES

EPSILON = 2.0


def build_parser(doc: str = __doc__, gated: bool = True):
    """Flags of this script, and without epsilon's of imagenetCompressedResnet.py."""
    parser = flags.new_parser(doc)
    parser.add_argument("--gpu", required=True, help="comma list of devices; several give one process each")
    parser.add_argument("--data", dest="data_dir", metavar="DIR", help="ILSVRC12 folder with train/ and val/")
    parser.add_argument("--load", metavar="FILE", help="checkpoint to start from, to go on with, or to test")
    parser.add_argument("--fake", action="store_true", help="random images, batch 64, 1000 batches; for benchmarks")
    parser.add_argument(
        "--data_format",
        default="NCHW",
        choices=("NCHW", "NHWC"),
        help="NHWC is --channels-last (default: %(default)s)",
    )
    parser.add_argument(
        "-d", "--depth", type=int, default=18, choices=tuple(IMAGENET_BLOCKS), help="default: %(default)s"
    )
    parser.add_argument("--eval", action="store_true", help="test --load on val, print the errors and end")
    if gated:
        parser.add_argument(
            "-e", "--epsilon", type=flags.number, default=EPSILON, help="threshold of the gates (default: %(default)s)"
        )
    parser.add_argument("--cfg", metavar="FILE", help="ignored, as in the original" if gated else "compressed network")
    extra = parser.add_argument_group("added in this repository")
    flags.add_data_flags(extra, data_dir=False)
    flags.add_training_flags(
        extra, f"{RECIPES['imagenet'].epochs}; the schedule scales with it", "256 over all GPUs", gated
    )
    extra.add_argument("--workers", type=int, default=4, help="processes that decode images (default: %(default)s)")
    extra.add_argument("--image-size", type=int, default=224, metavar="S", help="default: %(default)s")
    extra.add_argument("--bgr", action="store_true", help="test: feed BGR images, for weights of the original")
    parser.set_defaults(dataset="imagenet", output=None)
    return parser


def parse_args(argv=None, script: str = __file__, parser=None):
    """Flags with defaults filled in. Mistakes end with one line and exit status 2."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    flags.check(parser, args)
    if args.eval and not args.load:
        parser.error("--eval needs --load FILE, the checkpoint to test")
    if args.workers < 0:
        parser.error(f"--workers must be 0 or more, not {args.workers}")
    args.command = command_line(script, argv)
    args.epochs = RECIPES["imagenet"].epochs if args.epochs is None else args.epochs
    args.channels_last = args.channels_last or args.data_format == "NHWC"
    args.log_name = f"train_log/{Path(script).stem}"
    return args


@gpu_errors_explained(inputs.TEST_BATCH_SIZE)
def print_errors(args, model) -> list[float]:
    """Test a network on val; prints the two lines of the original and returns [top-1, top-5] as fractions."""
    world, device = engine.join_world(args.gpu, args.device)
    root = imagenet_inputs.folder(args.data_dir, args.embedded_data)
    loader = imagenet_inputs.validation_loader(
        root, inputs.TEST_BATCH_SIZE, size=args.image_size, workers=args.workers, device=device, bgr=args.bgr
    )
    if len(loader.classes) > model.config.num_classes:
        raise RunError(f"the network has {model.config.num_classes} classes, {root}/val has {len(loader.classes)}")
    batches = inputs.TestBatches(loader, world.rank, world.size)
    if args.bgr:
        batches = ((images.flip(1), targets) for images, targets in batches)
        batches = _Sized(batches, len(loader.shards), device)
    errors = engine.evaluate(model.to(device), batches, world=world)["errors"]
    if world.is_main:
        print(f"Top1 Error: {errors[0]!r}\nTop5 Error: {errors[1]!r}")
    return errors


class _Sized:
    def __init__(self, batches, count, device):
        self.batches, self.count, self.device = batches, count, device

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(self.batches)


def main(argv=None):
    parser = build_parser()
    args = parse_args(argv)
    if args.eval:
        print_errors(args, read_network(args.load).build())
        return 0
    published = flags.published_command(Path(__file__).name, parser, args, ("depth", "epsilon"))
    return exit_status(run_training(args, __file__, argv, published))


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
