"""Processor cores that this process may use."""

from __future__ import annotations

import os


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
