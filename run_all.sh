#!/usr/bin/env bash
# Set up, then run the papers' main jobs:  bash run_all.sh [--data-dir DIR] [--only PAPER] [--full] ...   (see --help)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup.sh requirements.txt
exec "$PYTHON" run_all.py "$@"
