"""Test a network with shared filter bases on CIFAR-100.

    python shared_bases/eval_cifar100.py --model=ResNet34_SingleShared \\
        --shared_rank=32 --unique_rank=1 \\
        --pretrained=./checkpoint/CIFAR100-ResNet34_SingleShared-S32-U1-L10.0-0.pth

Prints top-1 and top-5 accuracy and error in percent. Checkpoints of the
original and of train_cifar100.py give the accuracy that training printed, to
the last digit. Nothing in a file is executed.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine, evaluation_script

DATASET = "cifar100"
build_parser = partial(evaluation_script.build_parser, DATASET, __doc__)
main = partial(evaluation_script.main, DATASET, __doc__)

if __name__ == "__main__":
    sys.exit(engine.run_script(main))
