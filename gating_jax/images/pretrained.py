"""A late start: the parameters of an ungated run of the same network, with gates that are fresh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax import traverse_util

from gating_jax.images.build import Experiment, build
from gating_jax.layers.gate import is_gate_path
from gating_jax.paths import user_path
from gating_jax.progress import say
from gating_jax.training import devices, rundir, settings, steps
from gating_jax.training.checkpoints import Checkpoints


def check(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config of the run that `model.init_from` names.

  Raises:
    RunDirError: there is no run.
    ValueError: it is of something else, gated, or of another network.
  """
  theirs = config.copy_and_resolve_references()
  with theirs.unlocked():
    theirs.update(settings.with_tuples(rundir.RunDir(user_path(config.model.init_from)).config()))
  for name, mine in (
    ("experiment", config.experiment),
    ("model.gating", "none"),
    ("model.name", config.model.name),
    ("model.width", config.model.width),
    ("model.inner_width", config.model.inner_width),
    ("model.group_norm", config.model.group_norm),
  ):
    found = rundir.flatten(theirs)[name]
    if found != mine:
      raise ValueError(
        f"model.init_from must name a run with {name}={mine!r}; that of {config.model.init_from} has "
        f"{found!r}"
      )
  return theirs


def start(experiment: Experiment, state: steps.TrainState) -> steps.TrainState:
  """A fresh state with the parameters and statistics of the newest checkpoint of the run that `model.init_from` names.

  Raises:
    RunDirError: it has none.
    ValueError: a parameter has no place here, or what is not of a gate or of an exit has none there.
  """
  folder = user_path(experiment.config.model.init_from)
  theirs = build(check(experiment.config))
  like = jax.eval_shape(
    lambda: steps.init_state(theirs.model, theirs.optimiser, theirs.config.seed, theirs.test.shape)
  )
  checkpoints = Checkpoints(rundir.RunDir(folder).checkpoints, read_only=True)
  try:
    found = checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()
  if found is None:
    raise rundir.RunDirError(
      f"model.init_from must name a run with a checkpoint; {folder} has none yet"
    )
  step, trained = found
  say(f"starting from the parameters of step {step} in {folder}")
  return state.replace(
    params=_merged(state.params, trained.params, folder),
    batch_stats=_merged(state.batch_stats, trained.batch_stats, folder),
  )


def _merged(mine: Mapping[str, Any], theirs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
  mine, theirs = traverse_util.flatten_dict(mine), traverse_util.flatten_dict(theirs)
  for path in sorted(mine.keys() | theirs.keys()):
    here, there = (tree[path].shape if path in tree else None for tree in (mine, theirs))
    fresh = there is None and (is_gate_path(path) or path[0].startswith("exit"))
    if here != there and not fresh:
      raise ValueError(
        f"model.init_from must name a run of the same network; {'/'.join(path)} has shape {here} here "
        f"and {there} in {folder}"
      )
  return traverse_util.unflatten_dict({**mine, **theirs})
