"""Test a compressed ImageNet network, train it further, or train the baseline.

    python epsilon_resnet/imagenetCompressedResnet.py --gpu 2 --data DIR \\
        --cfg train_log/imagenetEpsilonResnet/compressed_model_550000.cfg

Prints `Top1 Error: ` and `Top5 Error: `. Published for 6 of 33 blocks removed:
0.23182 and 0.06744. With --cfg and --epochs N it is trained N epochs more.
Without --cfg: --eval --load FILE tests a plain pre-activation ResNet, and
with neither, one is trained: the paper's baseline (-d 101: 0.227).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import cifarCompressedResnet as cifar
from epsilon_resnet import engine, flags, pruning
from epsilon_resnet import imagenetEpsilonResnet as imagenet
from epsilon_resnet.checkpoints import read_network
from epsilon_resnet.launch import exit_status, run_training
from epsilon_resnet.runs import RunError


def build_parser():
    return imagenet.build_parser(__doc__, gated=False)


def main(argv=None):
    parser = build_parser()
    asked = parser.parse_args(argv).epochs
    args = imagenet.parse_args(argv, __file__, parser)
    if args.cfg:
        compressed = pruning.read_compressed(args.cfg)
        if compressed.config.arch != "imagenet":
            raise RunError(f"{args.cfg} is of a CIFAR or SVHN network; use the script of that data set")
        cifar.print_fields(compressed)
        args.depth = compressed.config.size
        if asked:
            return cifar.fine_tune(args, compressed, __file__, argv)
        imagenet.print_errors(args, compressed.network.build())
        return 0
    if args.eval:
        imagenet.print_errors(args, read_network(args.load).build())
        return 0
    args.plain = False  # so that the published command of the baseline is found
    published = flags.published_command(Path(__file__).name, parser, args, ("depth",))
    args.plain = True
    return exit_status(run_training(args, __file__, argv, published))


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
