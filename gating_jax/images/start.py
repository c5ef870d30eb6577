"""Trainings that start from trained parameters: of an ungated run, or of a file of weights.

Gates and exits are fresh. Of a file the classifier is fresh, too, where it has other classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.images.build import Experiment, build
from gating_jax.layers.gate import is_gate_path
from gating_jax.models.pretrained import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  load_pretrained,
  names_weights,
)
from gating_jax.models.vggs import is_dense_name
from gating_jax.terminal import say
from gating_jax.training import rundir, steps
from gating_jax.training.checkpoints import restore_newest
from gating_jax.training.rundir import RunDir, RunDirError
from gating_jax.training.steps import TrainState


def check_start(config: Config, *, with_checkpoint: bool = False) -> Config:
  """Returns the config of the run that `model.init_from` names.

  Args:
    config: the config of the run to start.
    with_checkpoint: whether the other run must have a checkpoint.
  Raises:
    RunDirError: there is no run, or it has no checkpoint.
    ValueError: the run is of another experiment, gated, or of another network.
  """
  start = RunDir(user_path(config.model.init_from))
  if not start.exists():
    raise RunDirError(
      f"model.init_from must name a run directory; {start.path} has no {rundir.CONFIG_FILE}"
    )
  if with_checkpoint and not start.has_checkpoint():
    raise RunDirError(_no_start(start))
  # Fields that their config lacks, being older, are taken from this one.
  theirs = config.copy_and_resolve_references()
  with theirs.unlocked():
    theirs.update(rundir.with_tuples(start.config()))
  # The fields that determine the names and shapes of parameters.
  for name, mine in (
    ("experiment", config.experiment),
    ("model.gating", "none"),
    ("model.name", config.model.name),
    ("model.width", config.model.width),
    ("model.inner_width", config.model.inner_width),
    ("model.stem", config.model.get("stem")),
    ("model.group_norm", config.model.group_norm),
  ):
    # Older configs have no stem.
    found = rundir.flatten(theirs).get(name)
    if found != mine:
      raise ValueError(
        f"model.init_from must name a run with {name}={mine!r}; that of {config.model.init_from} "
        f"has {found!r}"
      )
  return theirs


def _no_start(start: RunDir) -> str:
  """Returns the error for a run to start from that has no checkpoint."""
  return f"model.init_from must name a run with a checkpoint; {start.path} has none yet"


def check_can_start(experiment: Experiment) -> None:
  """Raises an error unless a training can start from what `model.init_from` names.

  Raises:
    RunDirError, FileNotFoundError: there is no run, or no file.
    ValueError: the run or the file is of another network; the message names the difference.
  """
  config = experiment.config
  if not names_weights(config.model.init_from):
    check_start(config)
    return
  # Shapes are enough for the check.
  shapes = jax.eval_shape(
    lambda: steps.init_state(
      experiment.model, experiment.optimiser, config.seed, experiment.test.shape
    )
  )
  _start_from_file(experiment, shapes)


def start_from(experiment: Experiment, state: TrainState) -> TrainState:
  """Returns a fresh state with the parameters and statistics that `model.init_from` names.

  They are those of a run's newest checkpoint, or of a file of weights.

  Args:
    experiment: the experiment to start.
    state: a fresh state of it.
  Raises:
    RunDirError: the run has no checkpoint.
    FileNotFoundError: there is no such file.
    ValueError: a parameter has no place here, or one that is not of a gate, of an exit or of a
      fresh classifier has none there.
  """
  folder = user_path(experiment.config.model.init_from)
  if names_weights(folder):
    started, said = _start_from_file(experiment, state)
    for line in said:
      say(line)
    return started
  theirs = build(check_start(experiment.config))
  like = jax.eval_shape(
    lambda: steps.init_state(theirs.model, theirs.optimiser, theirs.config.seed, theirs.test.shape)
  )
  # Shapes are enough to restore, so no state of theirs is initialised.
  found = restore_newest(RunDir(folder).checkpoints, like)
  if found is None:
    raise RunDirError(_no_start(RunDir(folder)))
  step, trained = found
  say(f"starting from the parameters of step {step} in {folder}")
  return state.replace(
    params=_merged(state.params, trained.params, folder),
    batch_stats=_merged(state.batch_stats, trained.batch_stats, folder),
  )


def _start_from_file(experiment: Experiment, state: TrainState) -> tuple[TrainState, list[str]]:
  """Returns a state with the weights of a file, and lines that say what was taken and made."""
  config = experiment.config
  file = user_path(config.model.init_from)
  _, variables = load_pretrained(file)
  theirs = dict(variables["params"])
  said = [f"starting from the weights in {file}"]
  # The dense layers at the end belong to the classes and to the size of images.
  fresh_head = _head_shapes(theirs) != _head_shapes(state.params)
  if fresh_head:
    theirs = {name: layer for name, layer in theirs.items() if not is_dense_name(name)}
    said.append(
      f"the classifier is fresh: the file's has the shapes {_head_text(variables['params'])}, this "
      f"one {_head_text(state.params)}"
    )
  fresh_gates = any(is_gate_path(path) for path in traverse_util.flatten_dict(state.params))
  if fresh_gates:
    said.append("the gates are fresh")
  data = config.data
  if (tuple(data.mean), tuple(data.std)) != (IMAGENET_MEAN, IMAGENET_STD):
    said.append(
      f"weights of torchvision's expect data.mean={IMAGENET_MEAN} and data.std={IMAGENET_STD}; the "
      f"config has {tuple(data.mean)} and {tuple(data.std)}"
    )

  def is_fresh(path: tuple[str, ...]) -> bool:
    """Returns whether a parameter keeps its initial value."""
    return _is_fresh(path) or (fresh_head and is_dense_name(path[0]))

  statistics = variables.get("batch_stats", {})
  started = state.replace(
    params=_merged(state.params, theirs, file, what="weights", is_fresh=is_fresh),
    batch_stats=_merged(state.batch_stats, statistics, file, what="weights"),
  )
  return started, said


def _head_shapes(params: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shapes of the dense layers at the end of a network, by path."""
  shapes = {}
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(params))
  for path, leaf in flat.items():
    if is_dense_name(path[0]):
      shapes[path] = tuple(leaf.shape)
  return shapes


def _head_text(params: Mapping[str, Any]) -> str:
  """Returns the shapes of the dense layers' kernels as text."""
  kernels = []
  for path, shape in _head_shapes(params).items():
    if path[-1] == "kernel":
      kernels.append(" x ".join(map(str, shape)))
  return ", ".join(kernels) or "of no dense layer"


def _is_fresh(path: tuple[str, ...]) -> bool:
  """Returns whether an ungated network has no such parameter: that of a gate or of an exit."""
  return is_gate_path(path) or path[0].startswith("exit")


def _merged(
  mine: Mapping[str, Any],
  theirs: Mapping[str, Any],
  source: Path,
  *,
  what: str = "a run",
  is_fresh: Callable[[tuple[str, ...]], bool] = _is_fresh,
) -> dict[str, Any]:
  """Merges flax's trees of two networks: theirs, and of mine what they do not have.

  Args:
    mine: the tree of the network that starts.
    theirs: that of the trained one.
    source: the folder or the file of the trained one.
    what: a word for the source.
    is_fresh: whether the parameter of a path may be missing in theirs.
  """
  ours: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(mine)
  loaded: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(theirs)
  for path in sorted(ours.keys() | loaded.keys()):
    here = ours[path].shape if path in ours else None
    there = loaded[path].shape if path in loaded else None
    if here != there and not (there is None and is_fresh(path)):
      raise ValueError(
        f"model.init_from must name {what} of the same network; {'/'.join(path)} has shape {here} "
        f"here and {there} in {source}"
      )
  return traverse_util.unflatten_dict({**ours, **loaded})
