#!/usr/bin/env bash
# Style, layering and tests, doctests included. Sets up a virtual environment in .venv first.
# Usage: bash tests/run.sh [--slow] [--optimised] [pytest arguments]
#   no option    what every change must pass: ten minutes at most on two cores, the installation included
#   --slow       the other tier, after that one: soaks, kills, many processes, the browser, real data, long fuzzes and
#                mutations; GATING_JAX_DATA_DIR names a TFDS folder for the tests on real data
#   --optimised  the programs that users run: with all of XLA's optimisations, which take longer to compile
set -euo pipefail

# Help may be asked for anywhere, and starts nothing.
for argument in "$@"; do
  case "$argument" in -h | --help) sed -n '2,7s/^# //p' "$0"; exit ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=fast
while [ $# -gt 0 ]; do
  case "$1" in
    --slow) tier=slow ;;
    --optimised)
      export JAX_DISABLE_MOST_OPTIMIZATIONS=0
      export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=8}" ;;
    *) break ;;
  esac
  shift
done

EXTRAS="[dev]" . launch/setup.sh

# Both leave a record of their times, which the slow tier checks, where they run all of their tests.
record=(--junit-xml=".cache/$tier.xml")
if [ $# -gt 0 ] || [ "${JAX_DISABLE_MOST_OPTIMIZATIONS:-1}" = 0 ]; then
  record=()
else
  rm -f ".cache/$tier.xml"
fi
together=(python -m pytest -n logical --maxprocesses=8 --dist loadfile ${record[@]+"${record[@]}"})
if [ "$tier" = fast ]; then
  ruff check .
  ruff format --check --quiet . || { echo 'error: ruff format . would change files' >&2; exit 1; }
  lint-imports --no-logo
  "${together[@]}" -m "not slow" "$@"
  exit
fi

slow=("${together[@]}" --no-loadscope-reorder)
if [ $# -gt 0 ]; then
  "${slow[@]}" -m slow "$@"
  exit
fi
# A part that fails does not keep the others from running: each is long.
failed=0
"${slow[@]}" -m "slow and not alone" || failed=1
python -m pytest -m "slow and alone" || failed=1
python -m tests.mutations || failed=1
exit "$failed"
