"""Train networks with shared filter bases on ILSVRC2012 (arXiv 2006.05066).

    python shared_bases/train_ilsvrc.py --lr=0.1 --momentum=0.9 \\
        --weight_decay=1e-4 --lambdaR=10 --shared_rank=32 --unique_rank=1 \\
        --batch_size=512 --dataset_path=DIR --model=ResNet34_DoubleShared \\
        --visible_device=0,1,2,3

DIR holds train/ and val/, each with a folder per class. Published: 27.20%
top-1 and 8.93% top-5 error (best of 150 epochs) with 9.76M parameters. Files
are those of train_cifar10.py, named ILSVRC-..., and one more every 5 epochs.

Several visible GPUs are all used, one process each; on several machines, start
with torchrun. Without a download: add --embedded-data (and --image-size=64 to
see something on a CPU).
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine, training_script

DATASET = "ilsvrc"
build_parser = partial(training_script.build_parser, DATASET, __doc__)
parse_args = partial(training_script.parse_args, DATASET, __doc__)
main = partial(training_script.main, DATASET, __doc__)

if __name__ == "__main__":
    sys.exit(engine.run_script(main))
