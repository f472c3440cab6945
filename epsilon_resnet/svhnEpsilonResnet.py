"""Train epsilon-ResNet on SVHN, train and extra images (Yu et al., CVPR 2018).

    python epsilon_resnet/svhnEpsilonResnet.py --gpu 2 -n 18 -e 1.5 -o svhn-e_1.5-n_18

200 epochs of 4721 steps; the repository of the paper states no SVHN error.
Flags and files as cifarEpsilonResnet.py. Then: compressModel.py,
svhnCompressedResnet.py.

Without a download:  add --embedded-data
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import cifarEpsilonResnet as cifar
from epsilon_resnet import flags
from epsilon_resnet.engine import run_script
from epsilon_resnet.launch import exit_status, run_training

EPSILON = 1.5


def build_parser():
    return cifar.build_parser(__doc__, EPSILON, "svhn")


def parse_args(argv=None):
    return cifar.parse_args(argv, __file__, build_parser())


def main(argv=None):
    args = parse_args(argv)
    published = flags.published_command(Path(__file__).name, build_parser(), args, cifar.REPRODUCES_FLAGS)
    return exit_status(run_training(args, __file__, argv, published))


if __name__ == "__main__":
    sys.exit(run_script(main))
