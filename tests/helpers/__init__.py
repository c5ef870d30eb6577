"""Helpers of several test files: tiny networks, made data, processes and comparisons."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_DEVICES = "--xla_force_host_platform_device_count"


def environment(devices, *, optimised=False, **variables):
  """Returns the environment of a child process that imports this tree and has so many devices.

  Its programs are those of the tests, or `optimised`, as those that users run.
  """
  flags = (
    []
    if optimised
    else [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(_DEVICES)]
  )
  if optimised:
    variables["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": " ".join([*flags, f"{_DEVICES}={devices}"]),
    **variables,
  }
