#!/usr/bin/env bash
# Style, layering and tests, doctests included. Sets up a virtual environment in .venv first.
# Usage: bash tests/run.sh [pytest arguments]. GATING_JAX_DATA_DIR names a TFDS folder for the tests on real data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="[dev]" . launch/setup.sh

ruff check .
lint-imports --no-logo
python -m pytest -n logical --maxprocesses=8 --dist loadfile "$@"
