"""Processes of a job, one for each host: who writes, sharding, and collectives on host values.

All run the same program on the same config and share a file system; process 0 writes what only one
may.
"""

from __future__ import annotations

import signal
import socket
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AUTO = "auto"
# Seconds that the coordinator may start later than the others.
_PATIENCE = 20


class PeerError(Exception):
  """The error of a process whose peer stopped; the peer has printed the cause."""


def connect(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
  """Makes this process one of a job, before JAX is first used.

  Args:
    coordinator: `host:port` of process 0; or `auto` on Cloud TPU, Slurm and the like, which supply
      the rest as well.
    processes: the number of processes.
    process: the number of this process, from 0.
  Raises:
    ValueError: the arguments do not describe a job.
    PeerError: no coordinator answers for 20 s; or not all processes were there within a minute,
      where jaxlib has not ended this one itself.
  """
  if coordinator == AUTO:
    if (processes, process) != (None, None):
      raise ValueError(
        f"processes and process must not be given with coordinator=auto; got {processes}, {process}"
      )
    _join()
    return
  if processes is None or process is None or not 0 <= process < processes:
    raise ValueError(
      "process must be in 0, ..., processes - 1, both required with a coordinator; got process "
      f"{process}, processes {processes}"
    )
  # Process 0 is the coordinator itself.
  if process:
    _await(coordinator)
  _join(coordinator, processes, process)


def is_writer() -> bool:
  """Returns whether this process writes logs, results and pictures."""
  return jax.process_index() == 0


def any_of(said: bool) -> bool:
  """Returns whether `said` is true in any process; each waits for all."""
  if jax.process_count() == 1:
    return said
  return bool(np.any(multihost_utils.process_allgather(np.array(said))))


def least_of(number: float) -> float:
  """Returns the least of all processes' numbers, up to rounding; each waits for all."""
  if jax.process_count() == 1:
    return number
  return float(np.min(multihost_utils.process_allgather(np.array(number, np.float32))))


def count_on_host() -> int:
  """Returns the number of the job's processes on this host; each waits for all."""
  if jax.process_count() == 1:
    return 1
  # Names of hosts have any length; arrays of the exchange have one.
  own = np.array(zlib.crc32(socket.gethostname().encode()) >> 1, np.int32)
  return int(np.sum(multihost_utils.process_allgather(own) == own))


def broadcast_from_writer(number: int) -> int:
  """Returns the writer's number, of up to 31 bits, in every process; each waits for all."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.array(number)))


def on_writer(write: Callable[..., Any], *args: Any, **settings: Any) -> None:
  """Runs `write` in the writer; it is done when this returns in any process.

  Args:
    write: what only one process may do.
    args, settings: its arguments.
  Raises:
    PeerError: it failed, in all processes but the writer; the writer raises its own error.
  """
  error = None
  try:
    if is_writer():
      write(*args, **settings)
  except Exception as raised:
    error = raised
  # An error is raised only after the exchange: otherwise the other processes would wait forever.
  if any_of(error is not None):
    raise error or PeerError("process 0 stopped; see its messages")


def _await(coordinator: str) -> None:
  """Waits until something listens at `host:port`; jaxlib would abort the process otherwise."""
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise ValueError(f"coordinator must be auto or host:port; got {coordinator!r}")
  # The clock of the day may jump; this one does not.
  until = time.monotonic() + _PATIENCE
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > until:
        raise PeerError(
          f"no coordinator answers at {coordinator} for {_PATIENCE} s ({error}): is process 0 "
          "running there?"
        ) from None
    time.sleep(0.2)


def _join(*job: Any) -> None:
  try:
    # With the defaults of JAX, a broken job would wait for minutes.
    jax.distributed.initialize(
      *job, initialization_timeout=60, heartbeat_timeout_seconds=10, shutdown_timeout_seconds=10
    )
  except RuntimeError as error:
    raise PeerError(f"the processes of the job could not connect: {error}") from error
  # JAX has taken over SIGTERM; the training loop handles it.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)


def local_shard(tree: Any) -> Any:
  """Returns this process's part of a whole batch: `[N, ...]` to `[N / processes, ...]`."""
  return jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], tree)


def allgather(tree: Any) -> Any:
  """Returns the whole batch, in every process, from the parts of all; inverts `local_shard`."""
  if jax.process_count() == 1:
    return tree
  return multihost_utils.process_allgather(tree, tiled=True)
