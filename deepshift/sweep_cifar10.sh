#!/usr/bin/env bash
# Every row of the README's CIFAR-10 tables: original, Q and PS, from scratch and from pre-trained, 5 to 2 bits.
#   bash deepshift/sweep_cifar10.sh [extra flags for cifar10.py, e.g. --data-dir DIR --amp bf16]
# Finished runs are skipped, an interrupted one goes on. DRY_RUN=1 prints the commands, OUTPUT=DIR replaces ./models.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" cifar10 '' "$@"
