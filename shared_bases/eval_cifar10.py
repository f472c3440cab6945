"""Test a network with shared filter bases on CIFAR-10.

    python shared_bases/eval_cifar10.py --model=ResNet56_DoubleShared \\
        --shared_rank=16 --unique_rank=1 \\
        --pretrained=./checkpoint/CIFAR10-ResNet56_DoubleShared-S16-U1-L10.0-0.pth

Prints top-1 and top-5 accuracy and error in percent. Checkpoints of the
original and of train_cifar10.py give the accuracy that training printed, to
the last digit. Nothing in a file is executed.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine, evaluation_script

DATASET = "cifar10"
build_parser = partial(evaluation_script.build_parser, DATASET, __doc__)
main = partial(evaluation_script.main, DATASET, __doc__)

if __name__ == "__main__":
    sys.exit(engine.run_script(main))
