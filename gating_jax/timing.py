"""Timings of competing functions, and the names of the ways to run a network.

Contenders take turns, so that drifts of the machine affect all of them alike.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from gating_jax.cores import usable_cores

# Ways to run a whole network, in this order: everything is computed, closed units too; everything,
# without gates; each part in its fastest way; a heavy net on chosen segments only; images leave at
# exits.
MASKED, UNGATED, CHOSEN, SEGMENTS, EXIT_DISPATCH = (
  "masked",
  "ungated",
  "chosen",
  "segments",
  "exit_dispatch",
)

# The baseline on the examples of a batch one after the other. Tables have the quicker of the two as
# `ungated`.
ONE_BY_ONE = "one by one"

# Called with the pieces done and their total.
ReportProgress = Callable[[int, int], None]

Name = TypeVar("Name", bound=Hashable)


def device() -> str:
  """Describes the machine that times belong to, in one line.

  It names the platform and the kind of device; for a CPU also its name and the number of cores. The
  cores are those that this process may use. The name is Linux's; elsewhere it is the architecture.
  """
  found = jax.devices()[0]
  if found.platform != "cpu":
    return f"{found.platform}: {found.device_kind}"
  # JAX calls every CPU just 'cpu', so the model is read from Linux.
  try:
    names = [
      line.partition(":")[2].strip()
      for line in Path("/proc/cpuinfo").read_text().splitlines()
      if line.startswith("model name")
    ]
  except OSError:
    names = []
  cores = usable_cores()
  return (
    f"cpu: {', '.join([*names[:1], platform.machine()])}, {cores} core{'' if cores == 1 else 's'}"
  )


def race(
  contenders: Mapping[Name, Callable[[], Any]],
  repeats: int,
  *,
  settle: bool = False,
  on_start: Callable[[], None] = lambda: None,
  on_turn: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
  """Measures the seconds of each contender's calls, in turns and after a warm-up.

  A call ends when its results are ready.

  Args:
    contenders: functions by name.
    repeats: number of timed calls of each.
    settle: whether every turn begins with an untimed call, which finds the caches and the memory
      pool as the previous contender left them.
    on_start: called after the first call of each contender, which takes longest if it compiles.
    on_turn: called after each turn of all contenders.
  Returns:
    the `repeats` times of each contender, in seconds.
  """
  # Compilation happens here, outside the measurement.
  for run in contenders.values():
    jax.block_until_ready(run())
    on_start()
  times = {name: [] for name in contenders}
  for _ in range(repeats):
    for name, run in contenders.items():
      if settle:
        jax.block_until_ready(run())
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
    on_turn()
  return times
