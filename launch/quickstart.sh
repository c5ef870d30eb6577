#!/usr/bin/env bash
# Trains a channel-gated ResNet20 on scikit-learn's handwritten digits and prints what its gates learned.
# Sets up a virtual environment in .venv first. Usage: bash launch/quickstart.sh [run directory]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh

workdir=${1:-runs/digits}
# Virtual devices: on CPU, data parallelism uses the cores better than XLA's own threads.
export XLA_FLAGS="${XLA_FLAGS:---xla_force_host_platform_device_count=$(virtual_devices)}"
exec gating-jax --config=configs/digits_resnet20.py --workdir="$workdir" --mode=train
