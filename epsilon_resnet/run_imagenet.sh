#!/usr/bin/env bash
# Train on ImageNet: 101 layers with epsilon 2.0, compress, test; 101 with 2.1; 152 with 1.8.
#   DATA=/path/to/ILSVRC12 epsilon_resnet/run_imagenet.sh [extra flags for the training commands]
# A finished run is skipped, an interrupted one goes on. GPU=0,1 uses these devices throughout. DRY_RUN=1 prints the
# commands. The log directories have their final names from the start, so that nothing is renamed afterwards.
. "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
data=${DATA:?set DATA to the ILSVRC12 folder}

train() {
  local gpus=$1 depth=$2 epsilon=$3 name=$4
  shift 4
  run imagenetEpsilonResnet.py --gpu "${GPU:-$gpus}" --data "$data" -d "$depth" -e "$epsilon" \
    --output-dir "$name" --auto-resume "$@"
}

train 0,1,2,3 101 2.0 imagenet-e_2-d_101 "$@"
run compressModel.py --dir imagenet-e_2-d_101 --step 550000
run imagenetCompressedResnet.py --data "$data" --gpu "${GPU:-2}" \
  --cfg imagenet-e_2-d_101/train_log/imagenetEpsilonResnet/compressed_model_550000.cfg
train 0,1,2,3 101 2.1 imagenet-e_2.1-d_101 "$@"
train 0,1,2,3,4,5 152 1.8 imagenet-e_1.8-d_152 "$@"
finish
