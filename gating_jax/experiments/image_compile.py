"""`--mode=compile`: a trained net for images compiled to skip what is closed, and what each strategy takes.

Reference: Bejnordi et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from gating_jax import timing
from gating_jax.experiments.build import Experiment
from gating_jax.inference.conditional import Conditional, compile_conditional
from gating_jax.inference.exiting import Exiting, compile_exits, fold_exits
from gating_jax.inference.folding import fold
from gating_jax.inference.inputs import spread
from gating_jax.models.early_exit import EarlyExitNet
from gating_jax.models.segmenter import Segmenter
from gating_jax.reports import time_picture
from gating_jax.training import rundir
from gating_jax.training.journal import write_json

TABLE_FILE, PICTURE_FILE = "compile.json", "compile.png"
_BATCHES, _REPEATS = (1, 64), 20
_CALIBRATION = 256  # images at most, evenly over the training set


def run(experiment: Experiment, run_dir: rundir.RunDir, step: int, variables: Mapping[str, Any]) -> None:
  """Prints the table, and writes it and its picture into the run directory.

  Raises:
    RunDirError: one of them is there, or is being written.
    ValueError: a model that cannot be folded.
  """
  with rundir.staged(run_dir.path, (TABLE_FILE, PICTURE_FILE)) as folder:
    _write(experiment, folder, step, variables)
  print(f"\nwritten: {run_dir.path / TABLE_FILE}, {run_dir.path / PICTURE_FILE}")


def _compiler(model: nn.Module, variables: Mapping[str, Any]) -> Callable[..., Conditional | Exiting]:
  """What makes a program of the net; of one for segmentation, of its backbone, where all its gates are."""
  if isinstance(model, EarlyExitNet):
    return functools.partial(compile_exits, fold_exits(model, variables))
  if isinstance(model, Segmenter):
    model, variables = model.backbone, {kind: tree["backbone"] for kind, tree in variables.items()}
  return functools.partial(compile_conditional, fold(model, variables))


def _write(experiment: Experiment, folder: Path, step: int, variables: Mapping[str, Any]) -> None:
  compiled = _compiler(experiment.model, variables)
  train = experiment.open_train()
  images = np.asarray(experiment.normalise(train.read(spread(len(train), _CALIBRATION))[0]), np.float32)
  timings = {size: [dataclasses.asdict(row) for row in compiled(
      input_shape=images.shape[1:], batch_size=size, calibration=images, repeats=_REPEATS).report()]
             for size in _BATCHES}
  print(f"checkpoint of step {step}, timed on {timing.device()}")
  for size, rows in timings.items():
    print(f"\n{size} image{'s' if size > 1 else ''} at a time\n" + time_picture.table(rows))
  write_json(folder / TABLE_FILE, {
      "step": step, "device": timing.device(), "jax_version": jax.__version__,
      "timings": {str(size): rows for size, rows in timings.items()}})
  time_picture.draw(folder / PICTURE_FILE, timings)
