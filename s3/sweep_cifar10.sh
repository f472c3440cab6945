#!/usr/bin/env bash
# S3 (3 bits) and its float twin, ResNet-20 on CIFAR-10, on one schedule; then the plot of both.
#   bash s3/sweep_cifar10.sh [flags for main.py, e.g. --data-dir DIR --epochs 20 --train-size 10000]
# SEEDS="1 2 3" and JOBS=2 runs at a time, one thread each; OUTPUT=DIR replaces runs/s3; METHODS="s3 denseshift float".
# Finished runs are skipped, an interrupted one goes on. DRY_RUN=1 prints the commands.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
if [[ -n "${PYTHON:-}" ]]; then python="$PYTHON"; elif [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
output=${OUTPUT:-runs/s3}
runs=()
commands=()
for seed in ${SEEDS:-1}; do
    for method in ${METHODS:-s3 float}; do
        run="$output/seed$seed/resnet20-$method"
        runs+=("$run")
        commands+=("$(printf '%q ' "$python" s3/main.py --dataset cifar10 --arch resnet20 --method "$method" \
            --batch-size 128 --epochs 200 --channels-last --seed "$seed" --auto-resume --output-dir "$run" "$@")")
    done
done
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%s\n' "${commands[@]}"
    exit 0
fi
mkdir -p "$output"
status=0
printf '%s\0' "${commands[@]}" | OMP_NUM_THREADS=1 xargs -0 -P "${JOBS:-2}" -I{} bash -c '{}' || status=$?
"$python" s3/plot.py "${runs[@]}" --output "$output/cifar10.png"
exit "$status"
