"""Loading of trained models from run directories."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import flax.linen as nn
import jax
import ml_collections

from gating_jax.paths import user_path


def load_run(workdir: str | os.PathLike) -> tuple[Any, Any, ml_collections.ConfigDict]:
  """Loads the model of a run directory and the values of its newest checkpoint.

      model, variables, config = load_run("runs/digits")
      logits, records = model.apply(variables, images)

  Images are `[N, H, W, D]`, normalised as `config.data.mean` and `config.data.std` say. A model for
  segmentation gives the logits of every pixel. One for long videos takes a dictionary: `{"light":
  ..., "heavy": ..., "valid": ...}`. For a run that learns task by task, `model` is its `Method` and
  `variables` its `LearnerState`: call `model.predict(variables, images, task, seen)`. Arrays are on the
  host; the model is for one device, or for several by sharded arguments.

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
  from gating_jax.continual import build as continual_build
  from gating_jax.continual import run as continual_run
  from gating_jax.images import build, classification, segmentation
  from gating_jax.training import rundir, settings
  from gating_jax.video import build as video_build
  from gating_jax.video import run as video_run

  run_dir = rundir.RunDir(user_path(workdir))
  config = settings.config_of(run_dir.path)
  kinds = {
    "classification": build.build,
    "segmentation": segmentation.build,
    "continual": continual_build.build,
    "long_video": video_build.build,
  }
  settings.one_of("experiment", config.experiment, kinds)
  # The outlines kept in the run directory stand in for the data, which need not be there.
  experiment = kinds[config.experiment](config, rundir.read_outlines(run_dir.path))
  if config.experiment == "continual":
    _, learner = continual_run.newest(experiment, run_dir)
    return experiment.method, jax.device_get(learner), config
  if config.experiment == "long_video":
    _, variables = video_run.newest(experiment, run_dir)
  else:
    _, state = classification.newest(experiment, run_dir)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
  # In training the model names the axis of a mapping over devices; outside one it must name none.
  return _without_axis(experiment.model), jax.device_get(variables), config


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
