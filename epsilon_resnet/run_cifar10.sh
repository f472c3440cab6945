#!/usr/bin/env bash
# Train on CIFAR-10 with 110 layers, compress, test; then 200, 500 and 752 layers (epsilon 2.5).
#   epsilon_resnet/run_cifar10.sh [extra flags for the training commands]
# A finished run is skipped, an interrupted one goes on. GPU=0 uses device 0 throughout, DATA_DIR=DIR has the data set,
# DRY_RUN=1 prints the commands.
. "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
cifar cifar10 "$@"
finish
