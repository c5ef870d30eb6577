# shellcheck shell=bash
# Sourced: runs a job, and again from its newest checkpoint if it fails, RESTARTS times at most (default 0).
# Status 2 of gating-jax is what a restart cannot mend, such as wrong arguments or data that are not there.

[[ "${RESTARTS:-0}" =~ ^[0-9]+$ ]] || { echo "error: RESTARTS must be a number >= 0; got $RESTARTS" >&2; exit 2; }
stopping=  # set it, in a trap, when no restart is wanted any more

with_restarts() {  # command
  local attempt status
  for ((attempt = 1; ; attempt++)); do
    status=0
    "$@" || status=$?
    if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ "$stopping" ] || [ "$attempt" -gt "${RESTARTS:-0}" ]; then
      return "$status"
    fi
    echo "launch: status $status; starting it again, from its newest checkpoint ($attempt of $RESTARTS)" >&2
  done
}

show_restarts() {  # for a dry run
  if [ "${RESTARTS:-0}" -gt 0 ]; then echo "# if it fails, again from its newest checkpoint, at most $RESTARTS times"; fi
}
