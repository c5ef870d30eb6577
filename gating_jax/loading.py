"""Loading of trained models from run directories."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from gating_jax.paths import user_path

if TYPE_CHECKING:
  import ml_collections


def load_run(workdir: str | os.PathLike) -> tuple[Any, Any, ml_collections.ConfigDict]:
  """Loads the model of a run directory and the values of its newest checkpoint.

      model, variables, config = load_run("runs/digits")
      logits, records = model.apply(variables, images)

  Images are `[N, H, W, D]`, normalised as `config.data.mean` and `config.data.std` say. A model for
  segmentation gives the logits of every pixel. One for long videos takes a dictionary: `{"light":
  ..., "heavy": ..., "valid": ...}`. For a run that learns task by task, `model` is its `Method` and
  `variables` its `LearnerState`: call `model.predict(variables, images, task, seen)`. Arrays are on
  the host; the model is for one device, or for several by sharded arguments.

  Args:
    workdir: a run directory with a checkpoint; the run may still be training.
  Returns:
    `(model, variables, config)`: a Flax module, its `params` and `batch_stats`, and the run's
    config.
  Raises:
    RunDirError: there is no run, or it has no checkpoint yet.
    CheckpointError: no checkpoint can be read.
    DatasetNotPreparedError: the run is of an earlier version, which does not keep the classes and
      shapes of its data, and the data are not where the config says.
    ValueError: this version cannot read a field of the config; the message names it.
  """
  # Imported here: `import gating_jax` would otherwise load every programme.
  from gating_jax import runner
  from gating_jax.continual.run import ContinualLearning
  from gating_jax.continual.run import build as build_continual
  from gating_jax.images.classification import Classification
  from gating_jax.images.classification import build as build_classification
  from gating_jax.images.segmentation import Segmentation
  from gating_jax.images.segmentation import build as build_segmentation
  from gating_jax.training import rundir, settings
  from gating_jax.video.run import LongVideo
  from gating_jax.video.run import build as build_video

  run_dir = rundir.RunDir(user_path(workdir))
  config = settings.config_of(run_dir.path)
  kinds = {
    "classification": (build_classification, Classification),
    "segmentation": (build_segmentation, Segmentation),
    "continual": (build_continual, ContinualLearning),
    "long_video": (build_video, LongVideo),
  }
  settings.one_of("experiment", config.experiment, kinds)
  build, kind = kinds[config.experiment]
  # The outlines kept in the run directory stand in for the data, which need not be there.
  programme = kind(build(config, rundir.read_outlines(run_dir.path)))
  _, state = runner.newest(programme, run_dir)
  variables = programme.variables(state)
  if config.experiment == "continual":
    return programme.experiment.method, variables, config
  # In training the model names the axis of a mapping over devices; outside one it must name none.
  return _without_axis(programme.experiment.model), variables, config


def _without_axis(model: nn.Module) -> nn.Module:
  """Returns the module, its submodules included, without the axis of a mapping over devices."""
  changes = {}
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    # Flax keeps the parent in a field of the same kind; following it would never end.
    if isinstance(value, nn.Module) and field.name != "parent":
      changes[field.name] = _without_axis(value)
  if hasattr(model, "axis_name"):
    changes["axis_name"] = None
  return model.clone(parent=None, **changes)
