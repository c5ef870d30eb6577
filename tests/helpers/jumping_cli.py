"""The command of `tiny_cli.py` with a clock that jumps an hour forwards and two backwards.

It jumps every second.
"""

import time

from gating_jax import cli
from gating_jax.models import resnets
from tests.helpers.tiny_cli import TINY

_true = time.time
JUMPS = (0, 3600, -3600)  # s


def jumping():
  return _true() + JUMPS[int(time.monotonic()) % len(JUMPS)]


if __name__ == "__main__":
  time.time = jumping
  resnets.RESNETS["tiny"] = TINY
  cli.main()
