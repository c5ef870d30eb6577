"""How times are compared: contenders in turns, so that drifts of the machine hit all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def race(
    contenders: Mapping[Name, Callable[[], Any]], repeats: int, *, settle: bool = False
) -> dict[Name, list[float]]:
  """Seconds of each contender's calls, taken in turns after a warm-up, until their results are there.

  Args:
    contenders: by name.
    repeats: calls of each.
    settle: every turn begins with a call that is not timed, which finds the caches and the memory pool as another
      contender left them.
  """
  for run in contenders.values():
    jax.block_until_ready(run())
  times = {name: [] for name in contenders}
  for _ in range(repeats):
    for name, run in contenders.items():
      if settle:
        jax.block_until_ready(run())
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append(time.perf_counter() - start)
  return times
