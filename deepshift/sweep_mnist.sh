#!/usr/bin/env bash
# Both MNIST tables: networks FC and conv; original, Q and PS; from scratch and from pre-trained; 3 seeds, 30 runs.
#   bash deepshift/sweep_mnist.sh [extra flags for mnist.py, e.g. --data-dir DIR --device cpu]
# Runs of a seed go to models/seed<N>/ (OUTPUT=DIR: to DIR/seed<N>/). As many chains of runs as there are processors go at
# a time (JOBS=N: that many), each on one thread. Finished runs are skipped, an interrupted one goes on.
# SEEDS="1 2" chooses other seeds, DRY_RUN=1 prints the commands.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -uo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
python=${PYTHON:-$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}

# chain SEED TYPE [flags]: the five runs of one network and seed, one after the other.
chain() {
  local seed=$1 type=$2
  shift 2
  local out="${OUTPUT:-$PWD/models}/seed$seed" failed=0
  local weights="$out/mnist/simple_$type/shift_0/weights.pth"
  local network=()
  [ "$type" = conv ] && network=(--type conv)
  local q=(--shift-depth 1000 --shift-type Q) ps=(--shift-depth 1000 --shift-type PS --opt radam)
  run
  run "${q[@]}"
  run "${ps[@]}"
  run --weights "$weights" "${q[@]}" --desc from_pretrained
  run --weights "$weights" "${ps[@]}" --desc from_pretrained
  return $failed
}

run() {
  # channels-last: about 1.5 times the images/s of the convolutional network on a CPU
  local command=("$python" "$here/mnist.py" ${network[@]+"${network[@]}"} "$@" "--seed=$seed" "--output-dir=$out"
    --channels-last --auto-resume ${extra[@]+"${extra[@]}"})
  echo "+ ${command[*]}"
  [ -n "${DRY_RUN:-}" ] && return
  # One line per epoch is enough here.
  "${command[@]}" --log-interval=1000000 --print-weights=False | grep --line-buffered -E "Accuracy|Finished|finished|note" || true
  [ "${PIPESTATUS[0]}" = 0 ] || { echo "sweep: failed: ${command[*]}" >&2; failed=1; }
}

if [ "${1:-}" = --chain ]; then
  seed=$2 type=$3
  shift 3
  extra=("$@")
  chain "$seed" "$type"
  exit
fi
export OMP_NUM_THREADS=1
for type in conv linear; do  # the longer ones first
  for seed in ${SEEDS:-1 2 3}; do echo "$seed $type"; done
done | xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 bash -c 'exec bash "$0" --chain "${@: -2}" "${@:1:$#-2}"' "${BASH_SOURCE[0]}" "$@"
