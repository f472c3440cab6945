#!/usr/bin/env bash
# Train every row of the README's CIFAR-10 table: all depths, expansions and block reductions, and the plain ResNets.
#   shiftresnet/sweep_cifar10.sh [extra flags for main.py, e.g. --recipe published --data-dir DIR]
# Finished runs are skipped, an interrupted one goes on. DRY_RUN=1 prints the commands.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" cifar10 "$@"
