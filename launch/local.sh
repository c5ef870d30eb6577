#!/usr/bin/env bash
# Runs gating-jax as one job of N processes on this machine, as N hosts would. If one fails, the others are ended within
# half a minute, and with RESTARTS the job goes on from its newest checkpoint. Ctrl-C or SIGTERM stops all at one step.
# Usage: bash launch/local.sh [--dry-run] N arguments of gating-jax
# RESTARTS: how often a job that failed is started again (default 0).
# DEVICES: virtual devices of each process, on CPU (default: as many as XLA_FLAGS says, or one).
# GATING_JAX: the command (default: gating-jax of .venv).
set -uo pipefail

usage() {
  sed -n '2,7s/^# //p' "$0" >&2
  exit 2
}

dry_run=
if [ "${1:-}" = --dry-run ]; then
  dry_run=yes
  shift
fi
processes=${1:-}
[[ "$processes" =~ ^[1-9][0-9]*$ ]] || usage
shift
[ $# -gt 0 ] || usage
[[ "${RESTARTS:-0}" =~ ^[0-9]+$ ]] || { echo "error: RESTARTS must be a number >= 0; got $RESTARTS" >&2; exit 2; }
[[ "${DEVICES:-1}" =~ ^[1-9][0-9]*$ ]] || { echo "error: DEVICES must be a number >= 1; got $DEVICES" >&2; exit 2; }
if [ -n "${DEVICES:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
fi
venv="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin"
read -ra program <<< "${GATING_JAX:-$venv/gating-jax}"
PATH="$venv:$PATH"

command_of() {  # port, process
  command=("${program[@]}" "${arguments[@]}" "--coordinator=localhost:$1" "--processes=$processes" "--process=$2")
}

arguments=("$@")
if [ "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    command_of PORT "$i"
    printf '%q ' ${DEVICES:+env "XLA_FLAGS=$XLA_FLAGS"} "${command[@]}"
    echo
  done
  exit 0
fi

pids=()
stopping=
end_all() {  # of what still runs: SIGTERM, and SIGKILL after 15 s
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2> /dev/null; done
  for ((waited = 0; waited < 150; waited++)); do
    kill -0 "${pids[@]}" 2> /dev/null || break
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -KILL "$pid" 2> /dev/null; done
}
trap 'stopping=yes; kill -TERM "${pids[@]}" 2> /dev/null' TERM INT

for ((attempt = 0; attempt <= ${RESTARTS:-0}; attempt++)); do
  if [ "$stopping" ]; then break; fi
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < processes; i++)); do
    command_of "$port" "$i"
    "${command[@]}" &
    pids+=($!)
  done
  if [ "$stopping" ]; then kill -TERM "${pids[@]}"; fi
  failed=0 left=$processes
  while [ "$left" -gt 0 ] && [ "$failed" -eq 0 ]; do
    wait -n -p ended
    status=$?
    if [ -z "${ended:-}" ]; then continue; fi  # a signal to this script ended the wait
    left=$((left - 1))
    failed=$status
  done
  if [ "$failed" -eq 0 ]; then exit 0; fi
  echo "launch: a process of the job ended with status $failed; ending the others" >&2
  end_all
  wait
  if [ "$stopping" ] || [ "$failed" -eq 2 ]; then break; fi  # 2: wrong arguments, which stay wrong
  if [ "$attempt" -lt "${RESTARTS:-0}" ]; then
    echo "launch: starting it again, from its newest checkpoint ($((attempt + 1)) of $RESTARTS)" >&2
  fi
done
exit "${failed:-143}"
