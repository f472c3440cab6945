#!/usr/bin/env bash
# Every row of the README's ImageNet tables; torchvision's weights are downloaded.
#   bash deepshift/sweep_imagenet.sh DIR [extra flags for imagenet.py, e.g. --workers 16 --amp bf16]
# DIR holds train/ and val/. Finished runs are skipped, an interrupted one goes on. DRY_RUN=1 prints the commands,
# OUTPUT=DIR replaces ./models.
[ -n "${BASH_VERSION:-}" ] || { echo "$0: start it with bash: bash $0" >&2; exit 2; }
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: sweep_imagenet.sh DIR [flags], DIR holding train/ and val/" >&2; exit 2; }
exec bash "$(dirname "${BASH_SOURCE[0]}")/sweep.sh" imagenet "$@"
