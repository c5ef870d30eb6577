"""Loading of trained models from run directories."""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import TYPE_CHECKING, Any

import flax.linen as nn

from gating_jax import programmes
from gating_jax.checks import one_of, user_path
from gating_jax.extras import naming_extra

if TYPE_CHECKING:
  from gating_jax.config_files import Config


@naming_extra()
def load_run(workdir: str | os.PathLike) -> tuple[Any, Any, Config]:
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
    TypeError: `workdir` is no path.
    ValueError: this version cannot read a field of the config; the message names it.

  >>> load_run("runs/none")
  Traceback (most recent call last):
  gating_jax.training.rundir.RunDirError: workdir runs/none holds no run: it has no config.json
  """
  # Imported here: `from gating_jax import *` would otherwise load what runs need.
  from gating_jax import runner
  from gating_jax.ops import arguments
  from gating_jax.terminal import say_error
  from gating_jax.training import outlines, rundir, settings

  arguments.instance("workdir", workdir, (str, os.PathLike), rule="a path")
  run_dir = rundir.RunDir(user_path(workdir))
  config = settings.config_of(run_dir.path)
  one_of("experiment", config.experiment, programmes.PROGRAMMES)
  row = programmes.PROGRAMMES[config.experiment]
  module = importlib.import_module(row.module)
  # The outlines kept in the run directory stand in for the data, which need not be there.
  experiment = module.build(config, outlines.read_outlines(run_dir.path))
  programme = getattr(module, row.programme)(experiment)
  # The stdout of the caller's program is not ours.
  _, state = runner.newest(programme, run_dir, tell=say_error)
  model = programme.model
  # In training a module names the axis of a mapping over devices; outside one it must name none.
  if isinstance(model, nn.Module):
    model = _without_axis(model)
  return model, programme.variables(state), config


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
