#!/usr/bin/env bash
# Set up, then run the papers' main jobs:  bash run_all.sh [--data-dir DIR] [--only PAPER] [--full] ...   (see --help)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/setup.sh" requirements.txt
exec "$PYTHON" "$here/run_all.py" "$@"
