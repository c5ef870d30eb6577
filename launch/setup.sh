# shellcheck shell=bash
# Sourced from the repository's root: makes .venv with the pinned packages and this one, if needed, and activates it.
# PYTHON names the interpreter (default: python3); EXTRAS the extra packages (default: [all]), such as [dev]. Needs `set -e`.

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  sed -n '2,3s/^# //p' "$0"
  echo "Usage: . launch/setup.sh"
  exit
fi
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
  exit 1
fi

# Changes of these files make a new installation; one with more packages serves as well.
extras=${EXTRAS:-[all]}
wanted=$(cat requirements.txt pyproject.toml | cksum)
installed=$(cat .venv/installed 2>/dev/null || true)
if [ "$installed" != "$wanted $extras" ] && [ "$installed" != "$wanted [dev]" ]; then
  echo "installing $extras into .venv, once; a minute or two, up to ten on a slow network; pip says nothing meanwhile"
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv
  # The pins are those of Python 3.11; another Python takes what pyproject.toml allows.
  pins=(-c requirements.txt)
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || pins=()
  .venv/bin/python -m pip install --quiet --disable-pip-version-check ${pins[@]+"${pins[@]}"} -e ".$extras"
  .venv/bin/python -c 'from gating_jax.native import build; build.main()'  # where there is a C++ compiler
  echo "$wanted $extras" > .venv/installed
fi
# shellcheck source=/dev/null
. .venv/bin/activate

# The largest power of two up to the number of cores and 8, so that batches divide over it.
virtual_devices() {
  python -c 'import os; print(1 << min(os.cpu_count() or 1, 8).bit_length() - 1)'
}
