#!/usr/bin/env bash
# Set up and run the tests:  bash tests/run.sh [pytest arguments]
# One process per processor (-n 0: all in this one), each on one thread unless OMP_NUM_THREADS says otherwise.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." >/dev/null
. ./setup.sh requirements-dev.txt
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -n auto --maxprocesses=8 --dist worksteal "$@"
