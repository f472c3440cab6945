"""Train ResNets with shared filter bases on CIFAR-10 (arXiv 2006.05066).

    python shared_bases/train_cifar10.py --lr=0.1 --momentum=0.9 \\
        --weight_decay=5e-4 --lambdaR=10 --shared_rank=16 --unique_rank=1 \\
        --batch_size=256 --model=ResNet56_DoubleShared

Published: 6.30% test error (best of 300 epochs) with 0.32M parameters. The
best network is kept in checkpoint/CIFAR10-<model>-S<s>-U<u>-L<lambda>-0.pth,
the rest of the run (metrics.jsonl, TensorBoard events, last.pt for --resume)
in the folder of that name.

Without a download:  add --embedded-data
Several processes:   torchrun --nproc_per_node=2 shared_bases/train_cifar10.py
                     --visible_device=0,1 ...
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine, training_script

DATASET = "cifar10"
build_parser = partial(training_script.build_parser, DATASET, __doc__)
parse_args = partial(training_script.parse_args, DATASET, __doc__)
main = partial(training_script.main, DATASET, __doc__)

if __name__ == "__main__":
    sys.exit(engine.run_script(main))
