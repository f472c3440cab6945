#!/usr/bin/env bash
# The rows of one table, called by sweep_cifar10.sh and sweep_cifar100.sh:  sweep.sh DATASET [extra flags for main.py]
# Runs one after the other in the calling directory, so checkpoints land in ./checkpoint; a failed run does not stop the rest.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -uo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
python=${PYTHON:-$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}
dataset=$1
shift
failed=0

train() {
  local command=("$python" "$here/main.py" "--dataset=$dataset" "$@" --auto-resume ${extra[@]+"${extra[@]}"})
  echo "+ ${command[*]}"
  [ -n "${DRY_RUN:-}" ] && return
  "${command[@]}"
  local status=$?
  [ "$status" = 130 ] && exit 130
  [ "$status" = 0 ] || { echo "sweep: exit status $status of: ${command[*]}" >&2; failed=$((failed + 1)); }
}

extra=("$@")

# Reductions of the published rows with expansion 1, 3, 6, 9 (plain words: macOS still has bash 3, without associative arrays).
block_reductions() {
  case "$1 $dataset" in
    20*) echo 7.2 2.8 1.5 0.98 ;;
    56*) echo 7.6 2.9 1.5 0.98 ;;
    "110 cifar10") echo 7.8 2.9 1.5 0.95 ;;
    110*) echo 7.8 2.9 1.5 0.98 ;;
  esac
}
depthwise_reductions() {
  case "$1" in
    20) echo 1.12 0.38 0.19 0.125 ;;
    56) echo 1.12 0.37 0.19 0.124 ;;
    110) echo 1.1 0.37 0.19 0.123 ;;
  esac
}

for depth in 20 56 110; do
  for expansion in 1 3 6 9; do train "--arch=shiftresnet$depth" "--expansion=$expansion"; done
  for reduction in $(block_reductions $depth); do
    train "--arch=resnet$depth" "--reduction=$reduction" --reduction-mode=block
  done
  if [ "$dataset" = cifar100 ]; then
    for reduction in $(depthwise_reductions $depth); do
      train "--arch=depthwiseresnet$depth" "--reduction=$reduction"
    done
  fi
  train "--arch=resnet$depth"
done
[ "$failed" = 0 ] || { echo "sweep: $failed runs failed" >&2; exit 1; }
