"""Training and tests of gated segmentation networks in a run directory.

Reference: Zhao et al., 2017 (PSPNet); Bejnordi et al., 2020, section 4.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from gating_jax.data import scenes
from gating_jax.images import build as images
from gating_jax.images import classification, compile, pixels
from gating_jax.images.build import Experiment
from gating_jax.models.resnet import RESNETS
from gating_jax.models.segmenter import Segmenter
from gating_jax.models.summary import model_summary
from gating_jax.reports import images as image_pictures
from gating_jax.reports import tables
from gating_jax.terminal import working
from gating_jax.training import devices, steps
from gating_jax.training.rundir import Outline

# Test scenes to draw.
_DRAWN = 3


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
  """Runs a mode for segmentation in a run directory.

  `train` trains to the end from wherever the run directory stands; `evaluate` tests its newest
  checkpoint, `report` writes a page of it, and `compile` times programs that skip its closed gates.

  Args:
    config: the config of the run.
    workdir: the run directory.
    mode: one of these modes.
  """
  with working("opening the data", "minutes for large sets"):
    experiment = build(config)
  classification.run_task(TASK, experiment, workdir, mode, compile=compile.run)


def build(config: ml_collections.ConfigDict, known: Sequence[Outline] | None = None) -> Experiment:
  """Builds the experiment of a config of scenes.

  Args:
    config: the config.
    known: outlines of the training and the test set, in place of opening them.
  Raises:
    ValueError, DatasetNotPreparedError: as in `images.build.build`.
  """
  data = config.data
  side = (
    lambda v: isinstance(v, tuple) and len(v) == 2 and min(v) >= 8,
    "a tuple of height and width, each >= 8",
  )
  images.check(
    config,
    choices={"data.name": scenes.NAMES, "model.name": RESNETS},
    at_least={"data.train_scenes": 1, "data.test_scenes": 1, "data.digits": 1, "model.head": 1},
    rules={
      "data.size": side,
      "model.init_from": (lambda v: v is None, "None for segmentation"),
      "data.crop": (
        lambda v: v is None or side[0](v) and v[0] <= data.size[0] and v[1] <= data.size[1],
        "None or a tuple of height and width, each >= 8 and at most data.size",
      ),
    },
  )
  if data.name == scenes.MADE:
    make = lambda split, count, **seed: scenes.digit_scenes(
      split, scenes=count, size=data.size, most=data.digits, **seed
    )
    # The test set is the same for all seeds, so that these can be compared.
    return images.assemble(
      config,
      lambda: data.train_scenes,
      open_train=lambda: make("train", data.train_scenes, seed=config.seed),
      open_test=lambda: make("test", data.test_scenes),
      network=network,
      objective=pixels.PixelObjective,
      known=known,
    )
  opened = lambda split, **training: scenes.open_scenes(
    data.name,
    split,
    data.data_dir,
    size=data.size,
    seed=config.seed,
    workers=data.workers,
    **training,
  )
  open_train = lambda: opened(data.train_split, crop=data.crop, flip=data.flip)
  return images.assemble(
    config,
    lambda: len(open_train()),
    open_train=open_train,
    open_test=lambda: opened(data.test_split),
    network=network,
    objective=pixels.PixelObjective,
    # Trained on crops, tested on whole scenes: the costs of the two differ.
    train_shape=(*(data.crop or data.size), 3),
    known=known,
  )


def network(model: ml_collections.ConfigDict, classes: int) -> nn.Module:
  """Builds the residual network that `config.model` describes, with the head on its feature map.

  Args:
    model: the section `config.model`.
    classes: number of classes of a pixel.
  """
  # The head needs a feature map, so the backbone has no pooling and no classifier.
  backbone = images.network(model, None).clone(pool=False, output_stride=model.output_stride)
  return Segmenter(
    backbone, classes, features=model.head, dtype=backbone.dtype, axis_name=devices.AXIS
  )


def _summarise(experiment: Experiment, sums, scored: int) -> dict[str, float]:
  """Returns the numbers of the set, and the head's part of the network's MACs."""
  backbone = model_summary(experiment.model.backbone.clone(parent=None), experiment.test.shape)
  return pixels.summarise(sums, experiment.test.class_names) | {
    "head_macs": experiment.counts.macs - backbone.macs
  }


def _draw(experiment: Experiment, state: steps.TrainState) -> dict[str, tuple[Any, str]]:
  """Draws the first test scenes."""
  images, truth = experiment.test.read(np.arange(min(_DRAWN, len(experiment.test))))
  # Predictions alone: the scores of these scenes are not reported.
  scores = lambda logits, labels: {"predicted": logits.argmax(-1)}
  run = jax.jit(steps.make_eval_step(experiment.model, experiment.normalise, scores))
  # On one device: three scenes need not divide over all of them.
  results = jax.device_get(run(jax.device_get(state), images, truth))
  counts = experiment.counts
  macs = (
    counts.always_macs + results["macs"] if "macs" in results else np.full(len(images), counts.macs)
  )
  figure = image_pictures.draw_scenes(
    images, truth, results["predicted"], macs / counts.macs, experiment.test.class_names
  )
  return {
    "scenes.png": (
      figure,
      "Test scenes, the true class of every pixel and the predicted one; above, the "
      "multiply-accumulates of each, in % of those of the ungated net.",
    )
  }


TASK = dataclasses.replace(
  classification.TASK,
  prepare=lambda experiment, _, pixels: experiment.normalise(pixels),
  scores=pixels.pixel_scores,
  summarise=_summarise,
  noun="scene",
  score=("mean_iou", "mean IoU"),
  rows=tables.scene_rows,
  classes=lambda _: None,
  draw=_draw,
)
