"""Processor cores that this process may use."""

from __future__ import annotations

import os

# More processes than these seldom decode faster than a network trains.
_MOST_WORKERS = 8


def usable_cores() -> int:
  """Returns the number of cores that this process may use, at least 1.

  A container or a batch queue often grants fewer than the machine has. Only Linux says so;
  elsewhere it is the number of all.

  >>> 1 <= usable_cores() <= os.cpu_count()
  True
  """
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def count_workers(sharing: int = 1) -> int:
  """Returns the number of processes that decode pictures: one for each core, at most 8.

  On one core it is 0: a process of its own would only add its start.

  Args:
    sharing: number of processes, this one included, that use the same cores.

  >>> count_workers() in (0, 2, 3, 4, 5, 6, 7, 8)
  True
  """
  cores = usable_cores()
  # A launcher that has given each process cores of its own has divided them already.
  if cores == os.cpu_count():
    cores //= sharing
  return min(cores, _MOST_WORKERS) if cores > 1 else 0
