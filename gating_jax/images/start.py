"""Trainings that start from trained parameters: of an ungated run, or of a file of weights.

Gates and exits are fresh. Of a file each dense layer at the end is fresh, too, that has another
shape there, or is not there.

With `model.importance` gates begin with the importance of the trained network's units for a prior,
or a narrower network begins as the trained one pruned by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
from flax import traverse_util

from gating_jax import config_files
from gating_jax.checks import user_path
from gating_jax.config_files import Config
from gating_jax.data import image_sets
from gating_jax.images.build import Experiment, build
from gating_jax.images.checks import PRIOR, PRUNE
from gating_jax.layers.gate import GateSettings, is_gate_path
from gating_jax.models import importance as units
from gating_jax.models.pretrained import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  RESNET_NAMES,
  describe_named,
  describe_network,
  names_weights,
  read_network,
)
from gating_jax.models.vggs import VGG, VGGS, is_dense_name
from gating_jax.terminal import say
from gating_jax.training import outlines, rundir, settings
from gating_jax.training.checkpoints import Checkpoint, restore_newest
from gating_jax.training.rundir import RunDir, RunDirError
from gating_jax.training.steps import TrainState

# Training images from which the importance of units is taken, where the config does not say.
_IMPORTANCE_IMAGES = 512
# torchvision's networks of a config's names. Its VGG16 has BatchNorm.
_THEIR_NAMES = {**{name: name for name in RESNET_NAMES}, "vgg16": "vgg16_bn"}


class Weights(NamedTuple):
  """A network and its variables, as a file of weights has them."""

  model: nn.Module
  variables: dict[str, Any]


def restore_network(config: Config, run_dir: RunDir) -> tuple[Experiment, Checkpoint | None]:
  """Builds the experiment of a run, and restores the variables of its network.

  The run keeps outlines of its data, so that they need not be there. Those of a run of an earlier
  version, which keeps none, are opened.

  Args:
    config: the config of the run.
    run_dir: its run directory.
  Returns:
    the experiment; and the newest checkpoint with `params` and `batch_stats` for its state, or None
    where there is none.
  Raises:
    ValueError, DatasetNotPreparedError: as in `build`.
    RunDirError: the outlines are damaged.
    CheckpointError: there are checkpoints, and none can be read.
  """
  experiment = build(config, outlines.read_outlines(run_dir.path))
  # Shapes are enough to restore, so no state is initialised.
  found = restore_newest(run_dir.checkpoints, jax.eval_shape(experiment.init_state))
  if found is None:
    return experiment, None
  variables = {"params": found.state.params, "batch_stats": found.state.batch_stats}
  return experiment, Checkpoint(found.step, variables)


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
  known = config_files.completed(ml_collections.ConfigDict(rundir.with_tuples(start.config())))
  # Other fields that their config lacks, being older, are taken from this one.
  theirs = config.copy_and_resolve_references()
  with theirs.unlocked():
    theirs.update(known)
  # A pruned network is narrower where units were: inside blocks, or in all layers of a chain.
  pruned = "model.width" if config.model.name in VGGS else "model.inner_width"
  prunes = config.model.importance.form == PRUNE
  fields = rundir.flatten(theirs)
  # The fields that determine the names and shapes of parameters.
  for name, mine in (
    ("experiment", config.experiment),
    ("model.gating", "none"),
    ("model.name", config.model.name),
    ("model.width", config.model.width),
    ("model.inner_width", config.model.inner_width),
    ("model.stem", config.model.stem),
    ("model.group_norm", config.model.group_norm),
  ):
    found = fields[name]
    if prunes and name == pruned:
      if found is None or found < mine:
        raise ValueError(
          f"{name} must be at most that of the run that model.init_from names, {found}, where "
          f"model.importance.form is {PRUNE!r}; got {mine}"
        )
      continue
    if found != mine:
      raise ValueError(
        f"model.init_from must name a run with {name}={mine!r}; that of {config.model.init_from} "
        f"has {found!r}"
      )
  return theirs


def read_weights(config: Config) -> Weights:
  """Returns the network and the variables of the file of weights that `model.init_from` names.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no weights of a network that is known, or of another than `model.name`.
  """
  mine, file = config.model.name, user_path(config.model.init_from)
  with settings.named("model.init_from"):
    model, variables = read_network(file)
  # The structure says more than the first shape that differs.
  if mine in _THEIR_NAMES:
    found, wanted = describe_network(model), describe_named(_THEIR_NAMES[mine])
    if found != wanted:
      raise ValueError(
        f"model.init_from must name weights of the network of model.name={mine!r}, {wanted}; those "
        f"in {file} are of {found}, which load_pretrained reads in Python"
      )
  return Weights(model, variables)


def _no_start(start: RunDir) -> str:
  """Returns the error for a run to start from that has no checkpoint."""
  return f"model.init_from must name a run with a checkpoint; {start.path} has none yet"


def check_can_start(experiment: Experiment, weights: Weights | None = None) -> None:
  """Raises an error unless a training can start from what `model.init_from` names.

  Args:
    experiment: the experiment to start.
    weights: those of the file, where they are read already.
  Raises:
    RunDirError, FileNotFoundError: there is no run, or no file.
    ValueError: the run or the file is of another network; the message names the difference.
  """
  config = experiment.config
  if not names_weights(config.model.init_from):
    check_start(config)
    return
  # Shapes are enough for the check.
  shapes = jax.eval_shape(experiment.init_state)
  image = jax.ShapeDtypeStruct((1, *experiment.test.shape), np.float32)
  _start_from_file(experiment, shapes, image, weights=weights)


def start_from(
  experiment: Experiment, state: TrainState, train: Any = None, weights: Weights | None = None
) -> TrainState:
  """Returns a fresh state with the parameters and statistics that `model.init_from` names.

  They are those of a run's newest checkpoint, or of a file of weights.

  Args:
    experiment: the experiment to start.
    state: a fresh state of it.
    train: the training set, for the importance of units where `model.importance.form` is set.
    weights: those of the file, where they are read already.
  Raises:
    RunDirError: the run has no checkpoint.
    FileNotFoundError: there is no such file.
    ValueError: a parameter has no place here, or one that is not of a gate, of an exit or of a
      fresh classifier has none there.
  """
  folder, images = user_path(experiment.config.model.init_from), None
  if experiment.config.model.importance.form is not None:
    images = _read_images(experiment, train)
    say(f"the importance of units is taken from {len(images)} training images")
  if names_weights(folder):
    started, said = _start_from_file(experiment, state, images, weights=weights)
    for line in said:
      say(line)
    return _with_prior(experiment, started, images)
  theirs, found = restore_network(check_start(experiment.config), RunDir(folder))
  if found is None:
    raise RunDirError(_no_start(RunDir(folder)))
  step, taken = found
  say(f"starting from the parameters of step {step} in {folder}")
  if experiment.config.model.importance.form == PRUNE:
    taken = _pruned(theirs.model, taken, state, images=images)
  started = state.replace(
    params=_merged(state.params, taken["params"], folder),
    batch_stats=_merged(state.batch_stats, taken["batch_stats"], folder),
  )
  return _with_prior(experiment, started, images)


def _read_images(experiment: Experiment, train: Any) -> jax.Array:
  """Reads training images as the network takes them, evenly spaced in their set.

  Of a union they are the first of training, of which all sets have equal shares.
  """
  count = experiment.config.model.importance.images or _IMPORTANCE_IMAGES
  if train.shares is None:
    index = np.linspace(0, len(train) - 1, min(count, len(train))).astype(int)
  else:
    count = min(count, train.in_epoch)
    index = image_sets.batch_indices(
      experiment.config.seed, step=0, batch_size=count, examples=train.shares
    )
  pixels, _ = train.read(index)
  return experiment.normalise(pixels)


def _pruned(
  model: nn.Module,
  variables: Mapping[str, Any],
  state: TrainState,
  *,
  images: Any,
  is_fresh: Callable[[tuple[str, ...]], bool] = lambda path: False,
) -> dict[str, Any]:
  """Returns the variables of a trained network, pruned to the widths of a state.

  Args:
    model: the trained network, without gates.
    variables: its variables.
    state: of the narrower network.
    images: for the importance of units; or their shape, for a check of the widths alone.
    is_fresh: whether the narrower network's parameter of a path is not taken.
  """
  # Gates mark the units; the smallest there are.
  gated = model.clone(gating="channel", gate=GateSettings(context="none"))
  shapes = jax.eval_shape(gated.init, jax.random.key(0), jax.eval_shape(lambda x: x[:1], images))
  # On the host: each process computes the same, alone.
  variables = jax.device_get(dict(variables))
  flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(variables)
  made: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(shapes))
  for path, leaf in made.items():
    if is_gate_path(path):
      flat[path] = np.zeros(leaf.shape, leaf.dtype)
  marked = traverse_util.unflatten_dict(flat)
  is_shape = isinstance(images, jax.ShapeDtypeStruct)
  measure = units.describe_units if is_shape else units.unit_importance
  wanted = {}
  for collection in ("params", "batch_stats"):
    for path, leaf in traverse_util.flatten_dict(dict(getattr(state, collection))).items():
      if not is_fresh(path):
        wanted[collection, *path] = leaf
  found = measure(gated, marked, images)
  taken = units.select_units(variables, found, traverse_util.unflatten_dict(wanted))
  return {"params": {}, "batch_stats": {}, **taken}


def _with_prior(experiment: Experiment, state: TrainState, images: Any) -> TrainState:
  """Returns a state whose gates begin with the importance of units, where the config says so."""
  section = experiment.config.model.importance
  if section.form != PRIOR:
    return state
  # On the host: each process computes the same, alone.
  variables = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
  found = units.unit_importance(experiment.model, variables, images)
  # That of the network, where the config leaves it to be solved for.
  share = experiment.model.gate.share
  if experiment.share is not None:
    share = min(1.0, float(np.asarray(experiment.share(0))))
  static = tuple(section.static_layers or ())
  for is_static in (False, True):
    # Gates of static layers keep the gain 0, and stay the same for all images.
    gain = 0.0 if is_static else section.gain or 0.0
    variables = units.with_prior(
      variables,
      [unit for unit in found if unit.gate[0].startswith(static) == is_static],
      scale=section.scale or units.SCALE,
      gain=gain,
      share=share,
    )
  return state.replace(params=variables["params"], batch_stats=variables["batch_stats"])


def _start_from_file(
  experiment: Experiment, state: TrainState, images: Any, *, weights: Weights | None = None
) -> tuple[TrainState, list[str]]:
  """Returns a state with the weights of a file, and lines that say what was taken and made.

  Args:
    experiment: the experiment to start.
    state: a fresh state of it.
    images: for the importance of units, or their shape; unused where the config needs none.
    weights: those of the file, where they are read already.
  """
  config = experiment.config
  file = user_path(config.model.init_from)
  model, variables = weights or read_weights(config)
  if isinstance(model, VGG):
    # Dense layers that slide over large maps are not taken.
    model = model.clone(max_map=None)
  theirs = dict(variables["params"])
  said = [f"starting from the weights in {file}"]
  # The dense layers at the end belong to the classes and to the size of images.
  found, wanted = _dense_shapes(theirs), _dense_shapes(state.params)
  fresh = {layer for layer, shapes in wanted.items() if shapes != found.get(layer)}
  for layer in found.keys() - (wanted.keys() - fresh):
    del theirs[layer]
  said += _describe_dense(found, wanted, config.model.name)
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
    return _is_fresh(path) or path[0] in fresh

  statistics = variables.get("batch_stats", {})
  if config.model.importance.form == PRUNE:
    whole = {"params": variables["params"], "batch_stats": statistics}
    with settings.named("model.init_from"):
      taken = _pruned(model, whole, state, images=images, is_fresh=is_fresh)
    theirs, statistics = taken["params"], taken["batch_stats"]
  started = state.replace(
    params=_merged(state.params, theirs, file, what="weights", is_fresh=is_fresh),
    batch_stats=_merged(state.batch_stats, statistics, file, what="weights"),
  )
  return started, said


def _dense_shapes(params: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
  """Returns the shapes of the parameters of each dense layer at the end of a network."""
  shapes = {}
  for name, layer in params.items():
    if is_dense_name(name):
      shapes[name] = {variable: tuple(leaf.shape) for variable, leaf in layer.items()}
  return shapes


def _describe_dense(found: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> list[str]:
  """Returns lines that name each dense layer which is fresh, or dropped.

  Args:
    found, wanted: shapes of those of the file, and of the network to train, by layer.
    name: of the network to train.
  """
  said = []
  for layer in sorted(found.keys() | wanted.keys()):
    subject = f"the {layer}" if layer == "classifier" else layer
    there = _kernel_text(found[layer]) if layer in found else "no such layer"
    if layer not in wanted:
      why = f"model.name={name!r} has no such layer"
      said.append(f"{subject} of the file, {there}, is dropped: {why}")
    elif found.get(layer) != wanted[layer]:
      said.append(f"{subject} is fresh: {_kernel_text(wanted[layer])} here, the file has {there}")
  return said


def _kernel_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
  """Returns the shape of a dense layer's kernel as text."""
  return " x ".join(map(str, shapes["kernel"]))


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
