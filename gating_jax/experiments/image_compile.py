"""`--mode=compile`: a trained net for images compiled to skip what is closed, and what each strategy takes.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from gating_jax.experiments import time_table
from gating_jax.experiments.build import Experiment
from gating_jax.inference import folding
from gating_jax.inference.conditional import Conditional, compile_conditional
from gating_jax.inference.exiting import Exiting, compile_exits, fold_exits
from gating_jax.models.early_exit import EarlyExitNet
from gating_jax.models.resnet import ResNet
from gating_jax.models.segmenter import Segmenter
from gating_jax.models.vgg import VGG
from gating_jax.training import rundir


def run(experiment: Experiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]) -> None:
  """Writes the tables, calibrated on training images.

  Raises:
    RunDirError: they are there, or are being written.
    ValueError: a model that cannot be folded.
  """
  compiled = _compiler(experiment.model, variables)
  images = time_table.calibration(experiment.open_train(), experiment.normalise)
  time_table.write(run_dir, step, time_table.of_images(compiled, images))


def check(model: nn.Module) -> None:
  """Raises ValueError unless the net has gates or exits that a program can skip by."""
  if isinstance(model, Segmenter):
    model = model.backbone
  exits = isinstance(model, EarlyExitNet)
  folding.check(model, (EarlyExitNet,) if exits else (ResNet, VGG))
  if model.gating == "none" and not exits:
    raise ValueError("model.gating must be one that skips something; got 'none'")


def _compiler(model: nn.Module, variables: Mapping[str, Any]) -> Callable[..., Conditional | Exiting]:
  """What makes a program of the net; of one for segmentation, of its backbone, where all its gates are."""
  if isinstance(model, EarlyExitNet):
    return functools.partial(compile_exits, fold_exits(model, variables))
  if isinstance(model, Segmenter):
    model, variables = model.backbone, {kind: tree["backbone"] for kind, tree in variables.items()}
  return functools.partial(compile_conditional, folding.fold(model, variables))
