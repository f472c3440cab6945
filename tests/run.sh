#!/usr/bin/env bash
# Set up and run the tests:  bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup.sh requirements-dev.txt
exec "$PYTHON" -m pytest "$@"
