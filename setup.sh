# Sourced by run_all.sh and tests/run.sh:  . setup.sh requirements.txt
# Sets $PYTHON to an interpreter that has the requirements.
#   PYTHON set by the caller: used as it is, nothing is installed.
#   otherwise: .venv is made once, and remade when the requirements or the base Python change.
# BASE_PYTHON chooses the interpreter that .venv is made from (default: python3).

_fail() { echo "setup: $*" >&2; exit 1; }

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
_requirements="$_root/${1:-requirements.txt}"

if [ -n "${PYTHON:-}" ]; then
  command -v "$PYTHON" >/dev/null 2>&1 || _fail "PYTHON=$PYTHON is not an executable; unset it to let .venv be made"
else
  _base=${BASE_PYTHON:-python3}
  command -v "$_base" >/dev/null 2>&1 || _fail "$_base not found; install Python 3.10 to 3.14, or set PYTHON or BASE_PYTHON"
  "$_base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' \
    || _fail "$("$_base" --version 2>&1) is not supported; set BASE_PYTHON to a Python 3.10 to 3.14"
  # requirements-dev.txt includes requirements.txt, so an environment made for the tests also serves the runs.
  _stamp=$({ "$_base" --version; cat "$_root/requirements.txt"; } | cksum)
  _dev_stamp=$({ "$_base" --version; cat "$_root/requirements.txt" "$_root/requirements-dev.txt"; } | cksum)
  _have=$(cat "$_root/.venv/.requirements" 2>/dev/null || true)
  _have_dev=$(cat "$_root/.venv/.requirements-dev" 2>/dev/null || true)
  if [ "$_have" != "$_stamp" ]; then
    echo "setup: making .venv with $("$_base" --version 2>&1): some minutes, about 5 GB with PyTorch's CUDA libraries; once" >&2
    rm -rf "$_root/.venv"
    "$_base" -m venv "$_root/.venv" || _fail "cannot make $_root/.venv (on Debian: apt install python3-venv)"
    _have_dev=
  fi
  PYTHON="$_root/.venv/bin/python"
  if [ "$_have" != "$_stamp" ] || { [ "${_requirements##*/}" = requirements-dev.txt ] && [ "$_have_dev" != "$_dev_stamp" ]; }; then
    _quiet=--quiet
    [ -t 2 ] && _quiet=
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install $_quiet --disable-pip-version-check -r "$_requirements" \
      || _fail "installing ${_requirements##*/} failed (see above); the next call tries again"
    echo "$_stamp" > "$_root/.venv/.requirements"
    if [ "${_requirements##*/}" = requirements-dev.txt ]; then echo "$_dev_stamp" > "$_root/.venv/.requirements-dev"; fi
  fi
fi
export PYTHON
