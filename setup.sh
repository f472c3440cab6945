# Sourced by run_all.sh and tests/run.sh:  . setup.sh requirements.txt
# Sets $PYTHON to an interpreter that has the requirements.
#   PYTHON set by the caller: used as it is, nothing is installed.
#   otherwise: .venv is made once, and remade when the requirements or the base Python change.
# Where NVIDIA's driver is too old for CUDA 13, requirements-cuda12.txt takes the place of requirements.txt.
# BASE_PYTHON chooses the interpreter that .venv is made from (default: python3).

_fail() { echo "setup: $*" >&2; exit 1; }

_driver_major() {  # of NVIDIA's driver, such as 535; empty where there is none
  { cat /proc/driver/nvidia/version || nvidia-smi --query-gpu=driver_version --format=csv,noheader; } 2>/dev/null \
    | grep -oE '[0-9]{3,}\.[0-9]+' | head -n 1 | cut -d. -f1 || true
}

_root=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd)
_requirements=${1:-requirements.txt}
_oldest_for_cuda13=580

# What .venv is made from when it has the packages of file $1 (and the development ones).
_stamp_of() { { "$_base" --version; cat "$_root/$1"; } | cksum; }
_dev_stamp_of() { { "$_base" --version; cat "$_root/$1" "$_root/requirements-dev.txt"; } | cksum; }

if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null 2>&1 || _fail "PYTHON=$PYTHON is not an executable; unset it to let .venv be made"
else
  _base=${BASE_PYTHON:-python3}
  command -v "$_base" >/dev/null 2>&1 || _fail "$_base not found; install Python 3.10 to 3.14, or set PYTHON or BASE_PYTHON"
  "$_base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
    || _fail "$("$_base" --version 2>&1) is not supported; set BASE_PYTHON to a Python 3.10 to 3.14"
  _have=$(cat "$_root/.venv/.requirements" 2>/dev/null || true)
  _have_dev=$(cat "$_root/.venv/.requirements-dev" 2>/dev/null || true)
  _driver=$(_driver_major) _packages=requirements.txt
  if [ -z "$_driver" ]; then
    # A cluster's front end without a GPU keeps what a node with one has made: on the CPU both do.
    [ "$_have" != "$(_stamp_of requirements-cuda12.txt)" ] || _packages=requirements-cuda12.txt
  elif [ "$_driver" -lt "$_oldest_for_cuda13" ] && [ "$(uname -m)" = x86_64 ]; then
    _packages=requirements-cuda12.txt
  fi
  # requirements-dev.txt includes requirements.txt, so an environment made for the tests also serves the runs.
  _stamp=$(_stamp_of "$_packages") _dev_stamp=$(_dev_stamp_of "$_packages")
  if [ "$_have" != "$_stamp" ]; then
    echo "setup: making .venv with $("$_base" --version 2>&1): some minutes, 5 to 8 GB with PyTorch's CUDA libraries; once" >&2
    [ "$_packages" = requirements.txt ] \
      || echo "setup: NVIDIA's driver $_driver is older than $_oldest_for_cuda13, which CUDA 13 needs: $_packages" >&2
    rm -rf "$_root/.venv"
    "$_base" -m venv "$_root/.venv" || _fail "cannot make $_root/.venv (on Debian: apt install python3-venv)"
    _have_dev=
  fi
  PYTHON="$_root/.venv/bin/python"
  if [ "$_have" != "$_stamp" ] || { [ "$_requirements" = requirements-dev.txt ] && [ "$_have_dev" != "$_dev_stamp" ]; }; then
    _quiet=--quiet
    [ -t 2 ] && _quiet=
    # What requirements-dev.txt asks for besides requirements.txt, in whose place there may be $_packages.
    : > "$_root/.venv/more.txt"
    [ "$_requirements" = requirements.txt ] || grep -v '^-r' "$_root/$_requirements" > "$_root/.venv/more.txt"
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install $_quiet --disable-pip-version-check -r "$_root/$_packages" -r "$_root/.venv/more.txt" \
      || _fail "installing $_requirements failed (see above); the next call tries again"
    echo "$_stamp" > "$_root/.venv/.requirements"
    if [ "$_requirements" = requirements-dev.txt ]; then echo "$_dev_stamp" > "$_root/.venv/.requirements-dev"; fi
  fi
fi
export PYTHON
