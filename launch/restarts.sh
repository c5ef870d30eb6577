# shellcheck shell=bash
# Sourced: runs a job; if it fails, restarts it from its newest checkpoint, at most RESTARTS times (default 0).
# A restart cannot fix status 2 of gating-jax (wrong arguments or missing data), nor the shell's 126 and 127 (a command
# that cannot be run, or is missing).

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  sed -n '2,4s/^# //p' "$0"
  echo "Usage: . launch/restarts.sh"
  exit
fi
[[ "${RESTARTS:-0}" =~ ^[0-9]+$ ]] || { echo "error: RESTARTS must be a number >= 0; got $RESTARTS" >&2; exit 2; }
stopping=  # set it, in a trap, when no restart is wanted any more

with_restarts() {  # command
  local attempt status
  for ((attempt = 1; ; attempt++)); do
    status=0
    "$@" || status=$?
    case "$status" in 0 | 2 | 126 | 127) return "$status" ;; esac
    if [ "$stopping" ] || [ "$attempt" -gt "${RESTARTS:-0}" ]; then return "$status"; fi
    echo "launch: status $status; restarting from its newest checkpoint ($attempt of $RESTARTS)" >&2
  done
}

show_restarts() {  # for a dry run
  if [ "${RESTARTS:-0}" -gt 0 ]; then echo "# if it fails, restart from its newest checkpoint, at most $RESTARTS times"; fi
}
