#!/usr/bin/env bash
# Train the rows of one data set's tables, called by sweep_<dataset>.sh:  sweep.sh DATASET [extra flags for train_<dataset>.py]
# Runs one after the other in the calling directory, so checkpoints land in ./checkpoint; a failed run does not stop the rest.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -uo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
python=${PYTHON:-$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}
dataset=$1
shift
extra=("$@")
failed=0

# train MODEL [flags]: the README's flags come first, then the row's, then the caller's, which win.
train() {
  local model=$1
  shift
  local command=("$python" "$here/train_$dataset.py" --lr=0.1 --momentum=0.9 --lambdaR=10 "--model=$model" "$@"
    --auto-resume ${extra[@]+"${extra[@]}"})
  echo "+ ${command[*]}"
  [ -n "${DRY_RUN:-}" ] && return
  "${command[@]}"
  local status=$?
  [ "$status" = 130 ] && exit 130
  [ "$status" = 0 ] || { echo "sweep: exit status $status of: ${command[*]}" >&2; failed=$((failed + 1)); }
}

case "$dataset" in
  cifar10)
    common=(--weight_decay=5e-4 --batch_size=256)
    for depth in 32 56; do
      train "ResNet${depth}_SingleShared" --shared_rank=8 --unique_rank=1 "${common[@]}"
      train "ResNet${depth}_SingleShared" --shared_rank=16 --unique_rank=1 "${common[@]}"
      train "ResNet${depth}_DoubleShared" --shared_rank=16 --unique_rank=1 "${common[@]}"
    done
    ;;
  cifar100)
    common=(--weight_decay=5e-4 --batch_size=256)
    for rank in 8 16 32; do
      train ResNet34_SingleShared "--shared_rank=$rank" --unique_rank=1 "${common[@]}"
    done
    train DenseNet121_SingleShared --shared_rank=16 --unique_rank=1 "${common[@]}"
    train ResNext50_SingleShared --shared_rank=64 --unique_rank=4 "${common[@]}"
    train MobileNetV2_Shared "${common[@]}"
    ;;
  ilsvrc)
    gpus=(--visible_device=0,1,2,3)
    # September 2020: batch 512, and its schedule for MobileNetV2
    for rank in 32 48; do
      train ResNet34_DoubleShared "--shared_rank=$rank" --unique_rank=1 --weight_decay=1e-4 --batch_size=512 "${gpus[@]}" \
        --recipe=sep20
    done
    train MobileNetV2_Shared --weight_decay=1e-4 --batch_size=512 "${gpus[@]}" --recipe=sep20
    # May 2021: batch 256. A folder of its own, since networks of both tables have the same names.
    may=(--batch_size=256 "${gpus[@]}" --output-dir=./checkpoint/may2021)
    train ResNet34_DoubleShared --shared_rank=48 --unique_rank=1 --weight_decay=1e-4 "${may[@]}"
    train ResNet50_SharedSingle --weight_decay=4e-5 "${may[@]}"
    train ResNet50_Shared --weight_decay=1e-4 "${may[@]}"
    train ResNet101_SharedSingle --weight_decay=1e-4 "${may[@]}"
    train MobileNetV2_Shared --weight_decay=1e-5 "${may[@]}"
    train MobileNetV2_SharedDouble --weight_decay=1e-5 "${may[@]}"
    ;;
  *) echo "sweep: unknown data set $dataset; use cifar10, cifar100 or ilsvrc" >&2; exit 2 ;;
esac
[ "$failed" = 0 ] || { echo "sweep: $failed runs failed" >&2; exit 1; }
