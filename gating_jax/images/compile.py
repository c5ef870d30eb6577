"""`--mode=compile`: a trained image network compiled to skip closed units, and its times.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from gating_jax.images.build import Experiment
from gating_jax.inference import folding
from gating_jax.inference.compiled import CompiledImages
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.exits import compile_exits, fold_exits
from gating_jax.models.resnet_variants import EarlyExitNet
from gating_jax.models.resnets import ResNet
from gating_jax.models.segmenter import Segmenter
from gating_jax.models.vggs import VGG
from gating_jax.reports import conclusion, timings
from gating_jax.terminal import working
from gating_jax.training import rundir


def compile_run(
  experiment: Experiment,
  run_dir: rundir.RunDir,
  step: int,
  variables: Mapping[str, Any],
  *,
  then: Sequence[str] = (),
) -> None:
  """Writes tables of each strategy's time, calibrated on training images.

  Args:
    experiment: the experiment of the run.
    run_dir: the run directory.
    step: the step of the checkpoint.
    variables: its parameters and statistics.
    then: modes that may follow.
  Raises:
    RunDirError: the tables are there, or are being written.
    ValueError: as in `check_compilable`.
  """
  # Before the data are opened, which may take minutes.
  check_compilable(experiment.model)
  compiled = _compiler(experiment.model, variables)
  with working("opening the training data", "minutes for large sets"):
    images = timings.calibration_images(experiment.open_train(), experiment.normalise)
  tables = timings.write_times(
    run_dir, step, timings.time_images(compiled, images), pixels=images.shape[1:3]
  )
  conclusion.conclude_times(run_dir, step, tables, then=then)


def check_compilable(model: nn.Module) -> None:
  """Raises ValueError for a model that cannot be folded."""
  model = _timed(model)
  folding.check_foldable(
    model, (EarlyExitNet,) if isinstance(model, EarlyExitNet) else (ResNet, VGG)
  )


def skips(model: nn.Module) -> bool:
  """Returns whether the network has gates or exits.

  Without them there are times to compare with, but nothing is skipped.
  """
  model = _timed(model)
  # Scales close nothing.
  return isinstance(model, EarlyExitNet) or (model.gating != "none" and model.gate.decides)


def _timed(model: nn.Module) -> nn.Module:
  """Returns the compiled part: the backbone of a segmentation network, which has all its gates."""
  return model.backbone if isinstance(model, Segmenter) else model


def _compiler(model: nn.Module, variables: Mapping[str, Any]) -> Callable[..., CompiledImages]:
  """Returns a function that compiles the network, or the part of it that is compiled."""
  if isinstance(model, EarlyExitNet):
    # Exits decide for each image when to stop, and have a compiler of their own.
    return functools.partial(compile_exits, fold_exits(model, variables))
  if isinstance(model, Segmenter):
    # Flax names the variables of a submodule by its field.
    variables = {kind: tree["backbone"] for kind, tree in variables.items()}
  return functools.partial(compile_conditional, folding.fold(_timed(model), variables))
