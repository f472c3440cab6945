#!/usr/bin/env bash
# The rows of one data set's tables, called by sweep_cifar10.sh and sweep_imagenet.sh:  sweep.sh DATASET FOLDER [extra flags]
# Runs every command of published.csv one after the other, float networks before those that start from them. FOLDER: of
# ImageNet, '' for CIFAR-10. Runs go to ./models (OUTPUT=DIR: to DIR). A failed run does not stop the rest.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -uo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
python=${PYTHON:-$([ -x "$here/../.venv/bin/python" ] && echo "$here/../.venv/bin/python" || echo python3)}
dataset=$1 folder=$2
shift 2
output=${OUTPUT:-./models}
failed=0

commands() {
  "$python" - "$here/published.csv" "$dataset.py" <<'END'
import csv, re, sys
with open(sys.argv[1], newline="") as file:
    rows = dict.fromkeys(row["command"] for row in csv.DictReader(file))
chosen = [re.sub(r"<[^>]*>", "", row).split()[1:] for row in rows if "versus" not in row]
for words in sorted((words for words in chosen if words[0] == sys.argv[2]), key=lambda words: "--weights" in words):
    print(*words[1:])
END
}

while read -r line; do
  read -ra words <<< "${line//.\/models/$output}"
  command=("$python" "$here/$dataset.py" ${folder:+"$folder"} "${words[@]}" "--output-dir=$output" --auto-resume
    --print-weights=False ${@+"$@"})
  echo "+ ${command[*]}"
  [ -n "${DRY_RUN:-}" ] && continue
  "${command[@]}" < /dev/null
  status=$?
  [ "$status" = 130 ] && exit 130
  [ "$status" = 0 ] || { echo "sweep: exit status $status of: ${command[*]}" >&2; failed=$((failed + 1)); }
done < <(commands)
exit $((failed > 0))
