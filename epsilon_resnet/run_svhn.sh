#!/usr/bin/env bash
# Train on SVHN with 110 layers, compress, test; then 200 and 302 layers (epsilon 1.5).
#   epsilon_resnet/run_svhn.sh [extra flags for the training commands]
# A finished run is skipped, an interrupted one goes on. GPU=0 uses device 0 throughout, DATA_DIR=DIR has the data set,
# DRY_RUN=1 prints the commands.
. "$(dirname "${BASH_SOURCE[0]}")/run_common.sh"
step=$((200 * 4721))  # the last epoch; the original's 303420 is no epoch's end here, so it has no checkpoint
run svhnEpsilonResnet.py --gpu "${GPU:-2}" -n 18 -e 1.5 -o svhn-e_1.5-n_18 --auto-resume \
  ${DATA_DIR:+"--data-dir=$DATA_DIR"} "$@"
run compressModel.py --dir train_log.svhn-e_1.5-n_18 --step $step
run svhnCompressedResnet.py --cfg "train_log.svhn-e_1.5-n_18/compressed_model_$step.cfg" --gpu "${GPU:-2}" \
  ${DATA_DIR:+"--data-dir=$DATA_DIR"}
for n in 33 50; do
  run svhnEpsilonResnet.py --gpu "${GPU:-2}" -n $n -e 1.5 -o svhn-e_1.5-n_$n --auto-resume \
    ${DATA_DIR:+"--data-dir=$DATA_DIR"} "$@"
done
finish
