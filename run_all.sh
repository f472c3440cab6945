#!/usr/bin/env bash
# Set up, then run the papers' main jobs:  bash run_all.sh [--data-dir DIR] [--only PAPER] [--full] ...   (see --help)
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
here=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
. "$here/setup.sh" requirements.txt
exec "$PYTHON" "$here/run_all.py" "$@"
