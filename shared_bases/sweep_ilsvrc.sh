#!/usr/bin/env bash
# Train every row of the README's ILSVRC2012 tables, of September 2020 and of May 2021.
#   shared_bases/sweep_ilsvrc.sh [extra flags for train_ilsvrc.py, e.g. --dataset_path DIR --seed 1]
# Finished runs are skipped, an interrupted one goes on. DRY_RUN=1 prints the commands.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" ilsvrc "$@"
