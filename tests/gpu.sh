#!/usr/bin/env bash
# Everything that only a GPU can show, in stages that a machine lent for minutes can be cut off in:
#   bash tests/gpu.sh                            # smoke, tests, capture, bench, sanitizer: what each does: gpu_stages.py
#   bash tests/gpu.sh smoke tests                # some of them
#   OUT=results bash tests/gpu.sh --seconds 120  # at most 120 s for each; results, written at once, not to runs/gpu
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
case "${OUT:-}" in '' | /*) ;; *) export OUT="$PWD/$OUT" ;; esac
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
. ./setup.sh requirements-dev.txt
exec "$PYTHON" tests/gpu_stages.py "$@"
