"""Initialisation from an ungated checkpoint of the same network, with fresh gates."""

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
  """Returns the config of the run that `model.init_from` names.

  Raises:
    RunDirError: there is no run.
    ValueError: the run is of another experiment, gated, or of another network.
  """
  # Fields that their config lacks, being older, are taken from this one.
  theirs = config.copy_and_resolve_references()
  with theirs.unlocked():
    theirs.update(settings.with_tuples(rundir.RunDir(user_path(config.model.init_from)).config()))
  # The fields that determine the names and shapes of parameters.
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
        f"model.init_from must name a run with {name}={mine!r}; that of {config.model.init_from} "
        f"has {found!r}"
      )
  return theirs


def start(experiment: Experiment, state: steps.TrainState) -> steps.TrainState:
  """Returns a fresh state with parameters and statistics of the run `model.init_from` names.

  They are those of its newest checkpoint.

  Args:
    experiment: the experiment to start.
    state: a fresh state of it.
  Raises:
    RunDirError: the run has no checkpoint.
    ValueError: a parameter has no place here, or one that is not of a gate or of an exit has none
      there.
  """
  folder = user_path(experiment.config.model.init_from)
  theirs = build(check(experiment.config))
  like = jax.eval_shape(
    lambda: steps.init_state(theirs.model, theirs.optimiser, theirs.config.seed, theirs.test.shape)
  )
  # Shapes are enough to restore, so no state of theirs is initialised.
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
    # An ungated network has neither gates nor exits: these keep their initial values.
    fresh = there is None and (is_gate_path(path) or path[0].startswith("exit"))
    if here != there and not fresh:
      raise ValueError(
        f"model.init_from must name a run of the same network; {'/'.join(path)} has shape {here} "
        f"here and {there} in {folder}"
      )
  return traverse_util.unflatten_dict({**mine, **theirs})
