"""The state of a training with the best validation score, next to its newest checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from gating_jax.checks import is_number
from gating_jax.training import hosts, rundir
from gating_jax.training.checkpoints import Checkpoint, Checkpoints, restore_newest
from gating_jax.training.journal import read_json, write_json

# In a run directory: the folder of its best state, as the folder of a training.
BEST_DIR = "best"
_SCORE_FILE = "score.json"


class BestState:
  """The state of a training with the highest validation score so far, in a folder of its own.

  A context: at its end the checkpoints are closed.

  Args:
    folder: of the best state alone.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._checkpoints = Checkpoints(folder / rundir.CHECKPOINT_DIR, keep=1)
    # Kept from before a restart: steps that are taken again have the same scores again.
    kept = read_json(folder / _SCORE_FILE)
    score = kept.get("score") if isinstance(kept, dict) else None
    self.score = float(score) if is_number(score) else -math.inf

  def __enter__(self) -> BestState:
    return self

  def __exit__(self, *_: object) -> None:
    self._checkpoints.close()

  def offer(self, step: int, state: Any, score: float) -> None:
    """Keeps a state if its score is higher than all before."""
    if not score > self.score:
      return
    self._checkpoints.save(step, state)
    # On disk before its score: a score never stands for a state that is missing.
    self._checkpoints.wait()
    hosts.on_writer(write_json, self._folder / _SCORE_FILE, {"step": step, "score": score})
    self.score = score


def restore_best(folder: Path, like: Any) -> Checkpoint | None:
  """Restores the state of a `BestState` with this folder; `like` is one of the same structure."""
  return restore_newest(folder / rundir.CHECKPOINT_DIR, like)


def forget_best(folder: Path) -> None:
  """Removes the folder of a best state that is not needed any more."""
  hosts.on_writer(shutil.rmtree, folder, ignore_errors=True)
