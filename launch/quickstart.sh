#!/usr/bin/env bash
# Trains a channel-gated ResNet20 on scikit-learn's handwritten digits and prints what its gates learnt.
# Sets up a virtual environment in .venv first: a minute or two, once. The training takes two minutes on two cores.
# Usage: bash launch/quickstart.sh [--help] [--dry-run] [run directory, by default runs/digits]
set -euo pipefail

dry_run='' arguments=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) sed -n '2,4s/^# //p' "$0"; exit ;;
    --dry-run) dry_run=yes ;;
    -*) echo "error: unknown option $argument; see --help" >&2; exit 2 ;;
    *) arguments+=("$argument") ;;
  esac
done
if [ ${#arguments[@]} -gt 1 ]; then
  echo "error: one run directory, not ${#arguments[@]}; see --help" >&2
  exit 2
fi
command=(gating-jax --config=configs/digits_resnet20.py --workdir="${arguments[0]:-runs/digits}")

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "$dry_run" ]; then
  echo ". launch/setup.sh"
  printf '%q ' "${command[@]}"
  echo
  exit
fi
. launch/setup.sh
# Virtual devices: on CPU, data parallelism uses the cores better than XLA's own threads.
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=$(virtual_devices)}"
exec "${command[@]}"
