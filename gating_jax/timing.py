"""How times are compared, and what contenders are called: in turns, so that drifts of the machine hit all alike."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

# Ways to run a whole network: all computed, closed units too; all, without gates; each part in its fastest way; a heavy
# net on chosen segments alone; images that leave at exits.
MASKED, UNGATED, CHOSEN, SEGMENTS, EXIT_DISPATCH = (
  "masked",
  "ungated",
  "chosen",
  "segments",
  "exit_dispatch",
)

Name = TypeVar("Name", bound=Hashable)


def device() -> str:
  """What times are of: platform, kind of device and, of a CPU, its name and how many cores this process may use.

  The name is Linux's; elsewhere it is the architecture.
  """
  found = jax.devices()[0]
  if found.platform != "cpu":
    return f"{found.platform}: {found.device_kind}"
  try:
    names = [
      line.partition(":")[2].strip()
      for line in Path("/proc/cpuinfo").read_text().splitlines()
      if line.startswith("model name")
    ]
  except OSError:
    names = []
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  return (
    f"cpu: {', '.join([*names[:1], platform.machine()])}, {cores} core{'' if cores == 1 else 's'}"
  )


def race(
  contenders: Mapping[Name, Callable[[], Any]],
  repeats: int,
  *,
  settle: bool = False,
  on_start: Callable[[], None] = lambda: None,
) -> dict[Name, list[float]]:
  """Seconds of each contender's calls, taken in turns after a warm-up, until their results are there.

  Args:
    contenders: by name.
    repeats: calls of each.
    on_start: called after the first call of each, which takes longest where the contender is compiled then.
    settle: every turn begins with a call that is not timed, which finds the caches and the memory pool as another
      contender left them.
  """
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
  return times
