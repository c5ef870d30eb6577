#!/usr/bin/env bash
# One job of gating-jax on all workers of a Cloud TPU VM or pod slice. Each must have the repository and .venv.
# Usage: NAME=tpu ZONE=us-central2-b bash launch/tpu.sh [--help] [--dry-run] arguments of gating-jax
# Needs gcloud, logged in. The run directory must be one that all workers see: a mounted bucket or file share.
# FOLDER: the folder of the repository on the workers (default: gating_jax in the home folder).
# RESTARTS: how often a failed job is restarted (default 0); never where that cannot help (status 2). A slice that was
# preempted is not created again.
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
if [ ${#arguments[@]} -eq 0 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ]; then
  usage >&2
  exit 2
fi
# shellcheck source=launch/restarts.sh
. "$(dirname "${BASH_SOURCE[0]}")/restarts.sh"
printf -v remote '%q ' .venv/bin/gating-jax "${arguments[@]}" --coordinator=auto
command=(gcloud compute tpus tpu-vm ssh "$NAME" "--zone=$ZONE" --worker=all
         "--command=cd $(printf %q "${FOLDER:-gating_jax}") && exec $remote")
if [ "$dry_run" ]; then
  printf '%q ' "${command[@]}"
  echo
  show_restarts
  exit 0
fi
trap 'stopping=yes' TERM INT
# It returns when all workers' processes have ended; gcloud's status is that of one.
with_restarts "${command[@]}"; exit  # on one line: the file may change meanwhile
