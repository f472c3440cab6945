# Sourced by the run_*.sh scripts: `run SCRIPT FLAGS…` in the calling directory. DRY_RUN=1 prints the commands only.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -uo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
python=${PYTHON:-$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}
failed=0

run() {
  local script=$1
  shift
  echo "+ $python $here/$script $*"
  [ -n "${DRY_RUN:-}" ] && return
  "$python" "$here/$script" "$@"
  local status=$?
  [ "$status" = 130 ] && exit 130
  [ "$status" = 0 ] || { echo "exit status $status of: $script $*" >&2; failed=$((failed + 1)); }
}

finish() {
  [ "$failed" = 0 ] || { echo "$failed commands failed" >&2; exit 1; }
}

# The experiments of one CIFAR data set:  cifar DATASET [extra flags for the training commands]
# A finished training run is not repeated, an interrupted one goes on. GPU chooses the device (default: the original's),
# DATA_DIR says where the data set is.
cifar() {
  local dataset=$1 n
  shift
  run cifarEpsilonResnet.py --gpu "${GPU:-1}" -n 18 -e 2.5 -o "$dataset-e_2.5-n_18" "--$dataset" \
    --auto-resume --keep_step 303420 ${DATA_DIR:+"--data-dir=$DATA_DIR"} "$@"
  run compressModel.py --dir "train_log.$dataset-e_2.5-n_18" --step 303420
  run cifarCompressedResnet.py --cfg "train_log.$dataset-e_2.5-n_18/compressed_model_303420.cfg" --gpu "${GPU:-2}" \
    "--$dataset" ${DATA_DIR:+"--data-dir=$DATA_DIR"}
  for n in 33 83 125; do
    run cifarEpsilonResnet.py --gpu "${GPU:-2}" -n $n -e 2.5 -o "$dataset-e_2.5-n_$n" "--$dataset" --auto-resume \
      ${DATA_DIR:+"--data-dir=$DATA_DIR"} "$@"
  done
}
