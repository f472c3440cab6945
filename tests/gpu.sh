#!/usr/bin/env bash
# Everything that only a GPU can show:  bash tests/gpu.sh
# Tests marked gpu, again under compute-sanitizer where that is installed, then every benchmark of the GPU kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. ./setup.sh requirements-dev.txt
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "gpu.sh: PyTorch sees no CUDA device here; the rest of the tests: bash tests/run.sh" >&2; exit 1; }
"$PYTHON" -m pytest -m gpu tests
if command -v compute-sanitizer >/dev/null; then
  # PyTorch's caching allocator would hide what goes beyond a tensor.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --tool memcheck \
    "$PYTHON" -m pytest -m gpu tests/common -k "every_kernel or equals_the_definition or half or naive or int8"
  compute-sanitizer --error-exitcode 1 --tool racecheck \
    "$PYTHON" -m pytest -m gpu tests/common -k "equals_the_definition or half or naive"
else
  echo "gpu.sh: compute-sanitizer is not installed (it comes with the CUDA toolkit): kernels run without it" >&2
fi
exec "$PYTHON" benchmarks/run.py --device cuda
