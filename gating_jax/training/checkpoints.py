"""Training state on disk, with orbax: saved in the background, restored from the newest intact one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

_STATE, _META = "state", "meta"


class Checkpoints:
  """The checkpoints of one run, by step.

  Args:
    directory: created if missing; half-written checkpoints of a killed run in it are removed.
    keep: how many of the newest stay.
  """

  def __init__(self, directory: Path, keep: int = 3):
    self._directory = directory.absolute()
    self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True),
        item_names=(_STATE, _META),
    )

  def save(self, step: int, state: Any) -> None:
    """Begins to write `state`; a later save, or `close`, waits for it. A step already there is left alone.

    Raises:
      RuntimeError: orbax did not take the checkpoint.
    """
    if step in self._manager.all_steps():
      return
    saved = self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"step": step})))
    if not saved:
      raise RuntimeError(f"checkpoint of step {step} was not written in {self._directory}")

  def restore(self, like: Any, sharding: jax.sharding.Sharding) -> tuple[int, Any] | None:
    """The newest checkpoint that can be read, as `(step, state)`; None where there is none.

    A damaged one is reported, put aside next to the folder and passed over.

    Args:
      like: a state of the same structure, or its shapes.
      sharding: where every array goes.
    """
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()))
        return step, restored[_STATE]
      except Exception as error:  # whatever orbax and its storage raise for a damaged file
        aside = self._put_aside(step)
        logging.warning("checkpoint of step %d cannot be read and was moved to %s; trying the one before (%s)",
                        step, aside, str(error).splitlines()[0] if str(error) else type(error).__name__)
    return None

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.wait_until_finished()
    self._manager.close()

  def _put_aside(self, step: int) -> Path:
    number = 0
    while (aside := self._directory.with_name(f"{self._directory.name}-damaged-{step}-{number}")).exists():
      number += 1
    (self._directory / str(step)).rename(aside)
    self._manager.reload()
    return aside
