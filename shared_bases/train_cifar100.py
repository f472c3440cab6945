"""Train networks with shared filter bases on CIFAR-100 (arXiv 2006.05066).

    python shared_bases/train_cifar100.py --lr=0.1 --momentum=0.9 \\
        --weight_decay=5e-4 --lambdaR=10 --shared_rank=32 --unique_rank=1 \\
        --batch_size=256 --model=ResNet34_SingleShared

Published: 21.79% test error (best of 300 epochs) with 7.73M parameters. The
schedule is the one of the published tables (September 2020): 150 epochs, then
twice 75 at a tenth of the rate, each from the best network so far. The
original's last version never lowers the rate: --recipe=head.

Files are those of train_cifar10.py, named CIFAR100-...

Without a download:  add --embedded-data
Several processes:   torchrun --nproc_per_node=2 shared_bases/train_cifar100.py
                     --visible_device=0,1 ...
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared_bases import engine, training_script

DATASET = "cifar100"
build_parser = partial(training_script.build_parser, DATASET, __doc__)
parse_args = partial(training_script.parse_args, DATASET, __doc__)
main = partial(training_script.main, DATASET, __doc__)

if __name__ == "__main__":
    sys.exit(engine.run_script(main))
