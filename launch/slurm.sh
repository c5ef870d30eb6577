#!/usr/bin/env bash
# One job of gating-jax on several nodes of a Slurm cluster, one process for each node, from a shared folder with .venv.
# Usage: sbatch --nodes=N [other options of sbatch] launch/slurm.sh arguments of gating-jax
#        bash launch/slurm.sh --dry-run arguments of gating-jax
# The run directory must be on a file system that all nodes share. Slurm tells JAX who is who (--coordinator=auto).
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
dry_run=
if [ "$1" = --dry-run ]; then
  dry_run=yes
  shift
fi
# The command is Slurm's own copy of this file: the repository is where sbatch was called.
venv="${SLURM_SUBMIT_DIR:-$(pwd)}/.venv/bin"
# --kill-on-bad-exit ends the peers of a process that failed; --signal above lets a job save before its time is over.
command=(srun --kill-on-bad-exit=1 "$venv/gating-jax" "$@" --coordinator=auto)
if [ "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
