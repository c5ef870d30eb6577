"""Training state on disk, with orbax: saved in the background, restored from the newest intact one."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gating_jax.training import devices, hosts

_STATE, _META = "state", "meta"


class CheckpointError(Exception):
  """No checkpoint can be read where there should be one."""


class Checkpoints:
  """The checkpoints of one run, by step.

  Args:
    directory: created if missing; half-written checkpoints of a killed run in it are removed.
    keep: how many of the newest stay.
    read_only: nothing in the directory is changed, so that a run may be writing to it.
  """

  def __init__(self, directory: Path, keep: int = 3, *, read_only: bool = False):
    self._directory = directory.absolute()
    self._read_only = read_only
    self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=not read_only, enable_async_checkpointing=True,
            read_only=read_only, create=not read_only),
        item_names=(_STATE, _META),
    )

  def save(self, step: int, state: Any) -> None:
    """Begins to write `state`; a later save, or `close`, waits for it. A step already there is left alone.

    Raises:
      RuntimeError: orbax did not take the checkpoint.
    """
    if step in self._manager.all_steps():
      return
    if jax.process_count() > 1:  # what pmap returns is of this process alone
      state = devices.replicate(state)
    meta = {"step": step, "crc32": _checksum(state)}
    saved = self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))
    if not saved:
      raise RuntimeError(f"checkpoint of step {step} was not written in {self._directory}")

  def restore(self, like: Any, sharding: jax.sharding.Sharding) -> tuple[int, Any] | None:
    """The newest checkpoint that can be read, as `(step, state)`; None where there is none at all.

    A damaged one is reported and passed over; once an older one is read it is put aside, next to the folder.

    Args:
      like: a state of the same structure, or its shapes.
      sharding: where every array goes.
    Raises:
      CheckpointError: there are checkpoints, and none can be read. Nothing was changed.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      restored, error = None, None
      try:
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()))
        if _checksum(restored[_STATE]) != restored[_META]["crc32"]:
          raise ValueError("its values are not those that were saved")
      except Exception as raised:  # whatever orbax and its storage raise for a damaged file
        error = raised
      if hosts.any_of(error is not None):
        damaged[step] = (str(error).splitlines() or [type(error).__name__])[0] if error else "not by another process"
        logging.warning("checkpoint of step %d cannot be read, trying the one before: %s", step, damaged[step])
        continue
      if not self._read_only:
        for bad in damaged:
          self._put_aside(bad)
      return step, restored[_STATE]
    if damaged:
      reasons = "\n".join(f"  step {step}: {reason}" for step, reason in damaged.items())
      raise CheckpointError(f"no checkpoint in {self._directory} can be read:\n{reasons}\n"
                            "To start over, name another workdir or remove that folder.")
    return None

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def _put_aside(self, step: int) -> None:
    def rename():
      number = 0
      while (aside := self._directory.with_name(f"{self._directory.name}-damaged-{step}-{number}")).exists():
        number += 1
      (self._directory / str(step)).rename(aside)
      logging.warning("moved the damaged checkpoint of step %d to %s", step, aside)

    hosts.written(rename)
    self._manager.reload()


def _checksum(state: Any) -> int:
  """CRC-32 of all values of a replicated tree: orbax itself does not notice flipped bits."""
  crc = 0
  for leaf in jax.tree.leaves(state):
    crc = zlib.crc32(np.asarray(leaf.addressable_data(0)).tobytes(), crc)
  return crc
