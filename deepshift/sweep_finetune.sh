#!/usr/bin/env bash
# A trained float resnet20 converted to Q and PS with 5 and 4 bits: its accuracy right after conversion, and 3 epochs at
# learning rate 0.001.
#   bash deepshift/sweep_finetune.sh resnet20-12fca82f.th [extra flags for cifar10.py, e.g. --data-dir DIR]
# The file is of github.com/akamaster/pytorch_resnet_cifar10, whose networks see images normalized as ImageNet's. Runs go to
# ./models (OUTPUT=DIR: to DIR), a chain for each processor (JOBS=N: N), each on one thread. A finished run is skipped, an
# interrupted one goes on. DRY_RUN=1 prints the commands.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -uo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
export python=${PYTHON:-$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}
export here OMP_NUM_THREADS=1

# one BITS TYPE FILE [flags]: tests the converted network, then trains it.
one() {
  local bits=$1 type=$2 file=$3
  shift 3
  set -o pipefail
  local command=("$python" "$here/cifar10.py" --arch resnet20 --weights "$file" --normalize imagenet --print-weights False
    "--output-dir=${OUTPUT:-./models}" "$@")
  local shift=(--shift-type "$type" -wb "$bits")
  [ "$type" = PS ] && shift+=(--opt radam)
  local test=("${command[@]}" "${shift[@]}" -e --desc converted)
  local train=("${command[@]}" "${shift[@]}" --lr 1e-3 --epochs 3 --desc from_pretrained --auto-resume --seed 1)
  [ -n "${DRY_RUN:-}" ] && { echo "+ ${test[*]}"; echo "+ ${train[*]}"; return; }
  "${test[@]}" | shown "$type, $bits bits, as converted" || return
  "${train[@]}" | shown "$type, $bits bits, trained"
}

# shown TEXT: accuracies and the end of a run, with TEXT before them.
shown() {
  sed -un "s/^ \* /$1: /p; s/^\(.*inished\)/$1: \1/p"
}
export -f one shown

[ -f "${1:-}" ] || [ -n "${DRY_RUN:-}" ] || { echo "sweep_finetune.sh: give the file of the trained resnet20" >&2; exit 2; }
for bits in 5 4; do
  for type in Q PS; do echo "$bits $type"; done
done | xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 bash -c 'one "${@: -2}" "${@:1:$#-2}"' one "$@"
