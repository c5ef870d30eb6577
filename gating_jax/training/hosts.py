"""The processes of a job, one for each host: who writes, what is whose, and what all must agree on.

All run the same program on the same config and share a file system; process 0 writes what only one may.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTO = "auto"
_PATIENCE = 20  # s, that the coordinator may start later


class PeerError(Exception):
  """Another process of the job could not go on; it has said why."""


def connect(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
  """Makes this process one of a job, before JAX is first used.

  Args:
    coordinator: `host:port` of process 0; or `auto` on Cloud TPU, Slurm and the like, which tell the rest as well.
    processes: how many there are.
    process: which of them this is, from 0.
  Raises:
    ValueError: they do not make a job.
    PeerError: no coordinator answers for 20 s; or not all processes were there within a minute, where jaxlib has not
      ended this one by itself.
  """
  if coordinator == AUTO:
    if (processes, process) != (None, None):
      raise ValueError(
        f"processes and process must be left out with coordinator=auto; got {processes}, {process}"
      )
    _join()
    return
  if processes is None or process is None or not 0 <= process < processes:
    raise ValueError(
      f"process must be in 0, ..., processes - 1, both given with a coordinator; got process {process}, "
      f"processes {processes}"
    )
  if process:
    _await(coordinator)
  _join(coordinator, processes, process)


def is_writer() -> bool:
  """Whether this process writes logs, results and pictures."""
  return jax.process_index() == 0


def any_of(said: bool) -> bool:
  """Whether any process says so; each waits for all."""
  return (
    said
    if jax.process_count() == 1
    else bool(np.any(multihost_utils.process_allgather(np.array(said))))
  )


def of_writer(number: int) -> int:
  """What the writer says, of up to 31 bits; each waits for all."""
  return (
    number
    if jax.process_count() == 1
    else int(multihost_utils.broadcast_one_to_all(np.array(number)))
  )


def written(write: Callable[[], None]) -> None:
  """`write` by the writer, done when this returns anywhere.

  Raises:
    PeerError: it failed, on all but the writer; there its own error.
  """
  error = None
  try:
    if is_writer():
      write()
  except Exception as raised:
    error = raised
  if any_of(error is not None):
    raise error or PeerError("process 0 stopped; see what it says")


def _await(coordinator: str) -> None:
  """Returns when something listens at `host:port`; jaxlib would abort the process where nothing does."""
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(f"coordinator must be auto or host:port; got {coordinator!r}")
  until = time.monotonic() + _PATIENCE
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > until:
        raise PeerError(
          f"no coordinator answers at {coordinator} for {_PATIENCE} s ({error}): is process 0 running "
          "there?"
        ) from None
    time.sleep(0.2)


def _join(*job: Any) -> None:
  try:
    jax.distributed.initialize(
      *job, initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
  except RuntimeError as error:
    raise PeerError(f"the processes of the job did not find each other: {error}") from error
  signal.signal(
    signal.SIGTERM, signal.SIG_DFL
  )  # which JAX takes for itself; the training loop asks for it


def share(tree: Any) -> Any:
  """This process's part of arrays that hold a whole batch each, `[N, ...]` to `[N / processes, ...]`."""
  return jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], tree)


def whole(tree: Any) -> Any:
  """The inverse of `share`, on every process."""
  return tree if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)
