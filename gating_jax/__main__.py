"""Entrance of the command: `gating-jax`, or `python -m gating_jax`."""

import sys

from gating_jax.extras import missing_extra
from gating_jax.interrupts import ending_at_once


def main() -> None:
  """Runs the command; one line says which extra to install where a library is missing."""
  try:
    with ending_at_once():
      # Imported here: it needs libraries that an installation without extras lacks.
      from gating_jax import cli
    cli.main()
  except ImportError as error:
    line = missing_extra(error)
    if line is None:
      raise
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)


if __name__ == "__main__":
  main()
