"""Checkpoints by orbax: saved in the background, restored from the newest intact one.

All processes of a job hold the same state: one writes it, every one reads it, and all learn whether
it went well. For orbax each process is alone: its barriers would hold the others up for ten minutes
where one fails.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gating_jax.checks import HANDLES, check_storable, first_line, user_path
from gating_jax.terminal import warn
from gating_jax.training import devices, hosts

# Bytes for all that is written next to the values, the journal included.
_SPARE = 2**20
# Seconds. Orbax measures its time-outs by the clock of the day, which may jump: none may end early.
_FOR_EVER = 10**7
_STATE, _META = "state", "meta"


class CheckpointError(Exception):
  """The error of checkpoints that exist while none can be read."""


class Checkpoint(NamedTuple):
  """A state as it was after so many steps, on all devices."""

  step: int
  state: Any


def restore_newest(directory: Path, like: Any) -> Checkpoint | None:
  """Restores the newest checkpoint of a training that may still write there.

  Args:
    directory: the folder of the checkpoints; nothing in it is changed.
    like: a state of the same structure, or its shapes.
  Returns:
    the checkpoint, or None where there is none at all.
  Raises:
    CheckpointError: there are checkpoints, and none can be read.
  """
  checkpoints = Checkpoints(directory, read_only=True)
  try:
    return checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()


class Checkpoints:
  """The checkpoints of one run, by step.

  Args:
    directory: created if missing; half-written checkpoints of a killed run in it are removed.
    keep: the number of newest checkpoints to keep.
    read_only: changes nothing in the directory, so that a run may be writing to it.
  Raises:
    ValueError: checkpoints cannot be written in the directory, see `checks.check_storable`.
  """

  def __init__(self, directory: Path, keep: int = 3, *, read_only: bool = False):
    self._directory = user_path(directory).absolute()
    self._read_only = read_only
    self._handle: int | None = None
    self._address = str(self._directory)
    logging.get_absl_logger().addFilter(_is_not_orbax)
    if not read_only:
      check_storable("directory", self._directory)
      hosts.on_writer(self._directory.mkdir, parents=True, exist_ok=True)
      hosts.on_writer(self._open, keep)
    # All processes but the writer, and every read-only one, open the directory for reading.
    if read_only or not hosts.is_writer():
      self._open(None)

  def save(self, step: int, state: Any) -> None:
    """Begins to write a state; a later save, or `wait`, waits for the end.

    A step that is already there is left alone.

    Args:
      step: the number of steps taken.
      state: a tree of arrays, the same on all devices.
    Raises:
      OSError: this checkpoint, or one begun before, cannot be written.
      PeerError: the same, in all processes but the writer.
    """
    hosts.on_writer(self._save, step, state)

  def restore(self, like: Any, sharding: jax.sharding.Sharding) -> Checkpoint | None:
    """Restores the newest checkpoint that can be read.

    A damaged checkpoint is reported and skipped; once an older one is read, the damaged one is
    moved next to the folder.

    Args:
      like: a state of the same structure, or its shapes.
      sharding: the placement of every array, the same value on all devices.
    Returns:
      the checkpoint, or None where there is none at all.
    Raises:
      CheckpointError: there are checkpoints, and none can be read. Nothing was changed.
    """
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
    untried, damaged = set(self._manager.all_steps()), {}
    # The writer chooses the step, so that all processes read the same one.
    while (step := hosts.broadcast_from_writer(max(untried, default=-1))) >= 0:
      untried.discard(step)
      restored: Any = {}
      error = None
      try:
        restored = self._manager.restore(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
          ),
        )
        if _checksum(restored[_STATE]) != restored[_META]["crc32"]:
          raise ValueError("its values differ from those that were saved")
      # Orbax and its storage raise all kinds of errors for a damaged file.
      except Exception as raised:
        error = raised
      # A checkpoint counts as damaged in all processes where one cannot read it.
      if hosts.any_of(error is not None):
        damaged[step] = self._first_line(error) if error else "another process could not read it"
        warn(
          "checkpoint of step %d cannot be read, trying the previous one: %s", step, damaged[step]
        )
        continue
      self._check_shapes(restored[_STATE], target)
      if not self._read_only:
        for bad in damaged:
          self._put_aside(bad)
      return Checkpoint(step, _placed(restored[_STATE], sharding))
    if damaged:
      reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
      raise CheckpointError(
        f"no checkpoint in {self._directory} can be read:\n{reasons}\n"
        "To start over, choose another workdir or delete that folder."
      )
    return None

  def _check_shapes(self, restored: Any, target: Any) -> None:
    """Raises a CheckpointError unless an intact state is of the network: orbax does not look."""
    mine = dict(jax.tree_util.tree_leaves_with_path(target))
    for path, value in jax.tree_util.tree_leaves_with_path(restored):
      if value.shape != mine[path].shape:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise CheckpointError(
          f"the checkpoint in {self._directory} is of another network: {name} has shape "
          f"{value.shape}, the config's has {mine[path].shape}"
        )

  def resume(self, fresh: Any) -> Checkpoint:
    """Restores the newest checkpoint; where there is none, takes a fresh state for that of step 0.

    Args:
      fresh: the state with which training begins.
    Raises:
      CheckpointError: as in `restore`.
    """
    found = self.restore(fresh, devices.replicated_sharding())
    return Checkpoint(0, devices.replicate(fresh)) if found is None else found

  def wait(self) -> None:
    """Waits until everything saved is on disk. Raises as `save` does."""
    hosts.on_writer(self._finish)

  def close(self) -> None:
    """Finishes writing, for this process alone, and closes the directory: others may be gone."""
    try:
      self._finish()
    finally:
      self._manager.close()
      if self._handle is not None:
        os.close(self._handle)
        self._handle = None

  def _open(self, keep: int | None) -> None:
    """Opens orbax's manager.

    Args:
      keep: the number of newest checkpoints to keep; None for reading alone.
    """
    reads, me = keep is None, jax.process_index()
    if self._handle is None and HANDLES.is_dir() and self._directory.is_dir():
      # Orbax and TensorStore take [ ] * ? for patterns and a backslash for a slash, and fail where
      # a name is not UTF-8.
      self._handle = os.open(self._directory, os.O_RDONLY)
      self._address = str(HANDLES / str(self._handle))
    self._manager = ocp.CheckpointManager(
      self._address,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        # Only a writer may remove what a killed run left half-written.
        cleanup_tmp_directories=not reads,
        enable_async_checkpointing=not reads,
        async_options=None if reads else ocp.AsyncOptions(timeout_secs=_FOR_EVER),
        read_only=reads,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
        ),
      ),
      item_names=(_STATE, _META),
    )

  def _save(self, step: int, state: Any) -> None:
    if step in self._manager.all_steps():
      return
    # A copy: the next step may be given the buffers of this state.
    values = jax.tree.map(lambda x: np.array(x.addressable_data(0)), state)
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(values),
      meta=ocp.args.JsonSave({"step": step, "crc32": _checksum(values)}),
    )
    with self._writing():
      needed = sum(x.nbytes for x in jax.tree.leaves(values)) + _SPARE
      free = shutil.disk_usage(self._directory).free
      # Checked here, since orbax reports a full disk in many words.
      if free < needed:
        raise OSError(
          f"no space left on device: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free"
        )
      if not self._manager.save(step, args=items):
        raise RuntimeError(f"orbax refused to save step {step}")

  def _finish(self) -> None:
    with self._writing():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    # Orbax and its storage raise all kinds of errors for a full disk.
    except Exception as error:
      raise OSError(
        f"a checkpoint cannot be written in {self._directory}: {self._first_line(error)}"
      ) from error

  def _first_line(self, error: Exception) -> str:
    """Returns the first line of an error, with the directory under its own name."""
    return first_line(error).replace(self._address, str(self._directory))

  def _put_aside(self, step: int) -> None:
    def rename():
      """Moves the checkpoint next to the directory, under an unused name."""
      # Numbered: an earlier checkpoint of this step may have been moved there.
      number = 0
      while (
        aside := self._directory.with_name(f"{self._directory.name}-damaged-{step}-{number}")
      ).exists():
        number += 1
      (self._directory / str(step)).rename(aside)
      warn("moved the damaged checkpoint of step %d to %s", step, aside)

    hosts.on_writer(rename)
    # Orbax remembers the steps that it has seen.
    self._manager.reload()


def _checksum(values: Any) -> int:
  """Returns the CRC-32 of all values: orbax itself does not notice flipped bits."""
  crc = 0
  for leaf in jax.tree.leaves(values):
    crc = zlib.crc32(leaf.tobytes(), crc)
  return crc


def _placed(values: Any, sharding: jax.sharding.Sharding) -> Any:
  """Returns device arrays of values that are the same in every process."""

  def place(array):
    """Puts the parts of an array on their devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

  return jax.tree.map(place, values)


def _is_not_orbax(record: Any) -> bool:
  """Returns whether a log record is not of orbax, which logs its errors with tracebacks as well."""
  return "orbax" not in record.pathname
