#!/usr/bin/env bash
# One job of gating-jax on several nodes of a Slurm cluster, one process for each node.
# Usage: sbatch --nodes=N [other options of sbatch] launch/slurm.sh arguments of gating-jax
#        bash launch/slurm.sh --help, or --dry-run and arguments of gating-jax
# Call it from the repository, with .venv in it. All nodes must share its file system, and that of the run directory.
# RESTARTS: how often a failed job is restarted (default 0); never where that cannot help (status 2).
# Slurm numbers the processes (--coordinator=auto). With sbatch --requeue it also restarts a job that lost a node.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
set -euo pipefail

usage() {
  sed -n '2,7s/^# //p' "$0"
}

# --help, -h and --dry-run may stand anywhere; gating-jax takes the rest.
dry_run='' arguments=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) usage; exit ;;
    --dry-run) dry_run=yes ;;
    *) arguments+=("$argument") ;;
  esac
done
if [ ${#arguments[@]} -eq 0 ]; then
  usage >&2
  exit 2
fi
# The command is Slurm's own copy of this file: the repository is where sbatch was called.
repository="${SLURM_SUBMIT_DIR:-$(pwd)}"
[ -f "$repository/launch/restarts.sh" ] || { echo "error: call it from the repository; this is $repository" >&2; exit 2; }
# shellcheck source=launch/restarts.sh
. "$repository/launch/restarts.sh"
# When one process ends, the others have 30 s; they say first what they know of the failure, and srun returns the largest
# status. --signal above lets a job save before its time is over.
command=(srun --kill-on-bad-exit=0 --wait=30 "$repository/.venv/bin/gating-jax" "${arguments[@]}" --coordinator=auto)
if [ "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  show_restarts
  exit 0
fi
trap 'stopping=yes' TERM INT
with_restarts "${command[@]}"; exit  # on one line: the file may change meanwhile
