# Sourced from the repository's root: makes .venv with the pinned packages and this one, if needed, and activates it.
# PYTHON names the interpreter (default: python3); EXTRAS the extra packages, such as [dev].

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or newer is needed; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
  exit 1
fi

# Changes of any of these files make a new installation.
wanted="${EXTRAS:-} $(cat requirements.txt pyproject.toml | cksum)"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (once; a minute or two)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  # The pins are those of Python 3.11; another Python takes what pyproject.toml allows.
  pins=(-c requirements.txt)
  .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || pins=()
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${pins[@]}" -e ".${EXTRAS:-}"
  echo "$wanted" > .venv/installed
fi
. .venv/bin/activate

cores() {
  python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())'
}
