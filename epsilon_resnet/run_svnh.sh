#!/usr/bin/env bash
# The original's spelling of run_svhn.sh.
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_svhn.sh" "$@"
