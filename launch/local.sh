#!/usr/bin/env bash
# Runs gating-jax as one job of N processes on this machine, as N hosts would. If one fails, the others are ended within
# half a minute, and with RESTARTS the job resumes from its newest checkpoint. Ctrl-C or SIGTERM stops all at one step.
# Usage: bash launch/local.sh [--help] [--dry-run] N arguments of gating-jax
# RESTARTS: how often a failed job is restarted (default 0); never where that cannot help (status 2).
# DEVICES: virtual devices of each process, on CPU (default: the number in XLA_FLAGS, or one).
# GATING_JAX: the command (default: gating-jax of .venv).
set -uo pipefail

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
processes=${arguments[0]:-}
arguments=(${arguments[@]+"${arguments[@]:1}"})  # bash below 4.4 takes an empty array for a missing one
if [[ ! "$processes" =~ ^[1-9][0-9]*$ ]] || [ ${#arguments[@]} -eq 0 ]; then
  usage >&2
  exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/restarts.sh
. "$here/restarts.sh"
[[ "${DEVICES:-1}" =~ ^[1-9][0-9]*$ ]] || { echo "error: DEVICES must be a number >= 1; got $DEVICES" >&2; exit 2; }
if [ -n "${DEVICES:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
fi
venv="$here/../.venv/bin"
read -ra program <<< "${GATING_JAX:-$venv/gating-jax}"
PATH="$venv:$PATH"

command_of() {  # port, process
  command=("${program[@]}" "${arguments[@]}" "--coordinator=localhost:$1" "--processes=$processes" "--process=$2")
}

if [ "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    command_of PORT "$i"
    printf '%q ' ${DEVICES:+env "XLA_FLAGS=$XLA_FLAGS"} "${command[@]}"
    echo
  done
  show_restarts
  exit 0
fi

pids=()
trap 'stopping=yes; kill -TERM "${pids[@]}" 2> /dev/null' TERM INT

# shellcheck disable=SC2329  # called by run_job
running() {  # whether any process still is, after so many tenths of a second
  local waited
  for ((waited = 0; waited < $1; waited++)); do
    kill -0 "${pids[@]}" 2> /dev/null || return 1
    sleep 0.1
  done
}

# shellcheck disable=SC2329  # called by with_restarts
run_job() {  # returns the status of one that failed first, within 0.2 s, or 2 where any ended with that
  local port i pid failed=0 active=() left=()
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
  pids=()
  for ((i = 0; i < processes; i++)); do
    command_of "$port" "$i"
    "${command[@]}" &
    pids+=($!)
  done
  if [ "$stopping" ]; then kill -TERM "${pids[@]}"; fi
  # Looked at in turns: bash below 5.1 cannot wait for whichever process ends first and say which it was.
  active=("${pids[@]}")
  while [ ${#active[@]} -gt 0 ] && [ "$failed" -eq 0 ]; do
    sleep 0.2
    left=()
    for pid in "${active[@]}"; do
      if kill -0 "$pid" 2> /dev/null; then
        left+=("$pid")
      elif [ "$failed" -eq 0 ]; then
        wait "$pid" 2> /dev/null
        failed=$?
      fi
    done
    active=(${left[@]+"${left[@]}"})
  done
  if [ "$failed" -eq 0 ]; then return 0; fi
  echo "launch: a process of the job ended with status $failed; ending the others" >&2
  # They have 3 s to say why, if they know. Without all of them none can save, so that nothing is lost by SIGKILL.
  if running 30; then kill -KILL "${pids[@]}" 2> /dev/null; fi
  for pid in "${pids[@]}"; do
    wait "$pid" 2> /dev/null
    if [ $? -eq 2 ]; then failed=2; fi
  done
  return "$failed"
}

with_restarts run_job; exit  # on one line: bash reads on in a file that may have changed meanwhile
