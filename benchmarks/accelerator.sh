#!/usr/bin/env bash
# What a machine with one GPU or TPU is asked for in under 25 minutes: speed and share of peak, the losses, the Pallas
# kernel, CIFAR-10 recipes. Needs no network: it takes the jax of the machine, and what else is missing from WHEELS.
# Usage: bash benchmarks/accelerator.sh [--data=FOLDER] [--out=runs/accelerator] [--minutes=24] [--smoke]
# --data: a TFDS folder with cifar10, as array_record; without it there are no recipes. --smoke: the smallest form.
# PYTHON: the interpreter with jax (default: python3). WHEELS: a folder of wheels of the packages it lacks.
set -euo pipefail
for argument in "$@"; do
  case "$argument" in -h | --help) sed -n '2,6s/^# //p' "$0"; exit ;; esac
done
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python=${PYTHON:-python3}

if ! "$python" -c 'import sys, jax; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python must be Python 3.11 or newer with jax; name another by PYTHON" >&2
  exit 2
fi
lacking() {  # names of the packages of pyproject.toml that this interpreter lacks
  "$1" - "$here/pyproject.toml" << 'EOF'
import importlib.metadata, re, sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["train"] + extras["export"]:
  name = re.match(r"[\w.-]+", requirement)[0]
  try:
    importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    print(name)
EOF
}

missing=$(lacking "$python" | tr '\n' ' ')
if [ -n "$missing" ]; then
  if [ ! -d "${WHEELS:-}" ]; then
    echo "error: $python lacks: $missing" >&2
    echo "Where there is a network, fetch them for this Python and machine: pip wheel -w wheels $missing" >&2
    echo "and name the folder here: WHEELS=wheels bash benchmarks/accelerator.sh ..." >&2
    exit 2
  fi
  wheels=$(cd "$WHEELS" && pwd)
  venv="$here/.cache/accelerator"
  "$python" -m venv --clear "$venv"
  # What the interpreter has stays in use, also where it is itself of a virtual environment.
  "$python" -c 'import sys; print(*filter(None, sys.path[1:]), sep="\n")' > \
    "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/machine.pth"
  read -ra packages <<< "$missing"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$wheels" "${packages[@]}"
  python="$venv/bin/python"
fi
exec "$python" "$here/benchmarks/accelerator.py" "--elapsed=$SECONDS" "$@"
