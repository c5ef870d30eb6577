"""Helpers of several test files: tiny networks, made data, processes and comparisons."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_DEVICES = "--xla_force_host_platform_device_count"

# The environment of the tests, where it says nothing else. Compiling takes most of the time, and
# the programs that users run take three times as long to compile; `bash tests/run.sh --optimised`
# tests them.
QUICK = {
  "XLA_FLAGS": f"{_DEVICES}=8 --xla_cpu_use_fusion_emitters=false",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  # Every program is kept: many are small, and loading one takes a tenth of compiling it.
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  # No operation says which line it comes from: looking that up is a twentieth of the time.
  "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
}


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
