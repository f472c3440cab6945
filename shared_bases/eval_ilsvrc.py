"""Test a network with shared filter bases on ILSVRC2012.

    python shared_bases/eval_ilsvrc.py --model=ResNet34_DoubleShared \\
        --shared_rank=32 --unique_rank=1 \\
        --pretrained=./checkpoint/ILSVRC-ResNet34_DoubleShared-S32-U1-L10.0-0,1,2,3.pth \\
        --dataset_path=DIR

Prints top-1 and top-5 accuracy and error in percent. Checkpoints of the
original and of train_ilsvrc.py give the accuracy that training printed, to
the last digit. Nothing in a file is executed.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine, evaluation_script

DATASET = "ilsvrc"
build_parser = partial(evaluation_script.build_parser, DATASET, __doc__)
main = partial(evaluation_script.main, DATASET, __doc__)

if __name__ == "__main__":
    sys.exit(engine.run_script(main))
