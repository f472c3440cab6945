"""Test a compressed SVHN network, or train it further (Yu et al., CVPR 2018).

    python epsilon_resnet/svhnCompressedResnet.py --gpu 0 \\
        --cfg train_log.svhn-e_1.5-n_18/compressed_model_944200.cfg

The last line is `Error: <fraction>`, of 26,032 test images. --epochs and the
other flags: as cifarCompressedResnet.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from epsilon_resnet import cifarCompressedResnet as cifar
from epsilon_resnet import engine, flags


def build_parser():
    return cifar.build_parser(__doc__, "svhn")


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    flags.check(parser, args)
    return cifar.run(args, __file__, argv)


if __name__ == "__main__":
    sys.exit(engine.run_script(main))
