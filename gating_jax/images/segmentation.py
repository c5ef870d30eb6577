"""Training and tests of gated segmentation networks in a run directory.

An image is a scene, with a class for every pixel. Pixels labelled `IGNORED` are skipped, in the
loss and in the scores.

Axes: N examples, H and W pixels, K classes.
Reference: Zhao et al., 2017 (PSPNet); Bejnordi et al., 2020, section 4.2; Everingham et al., "The
Pascal visual object classes challenge", 2015 (intersection over union).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax import runner
from gating_jax.analysis import scores as class_scores
from gating_jax.config_files import Config, completed
from gating_jax.data import scenes
from gating_jax.images import build as image_build
from gating_jax.images import compile
from gating_jax.images.build import Experiment
from gating_jax.images.checks import check_config
from gating_jax.images.classification import Classification
from gating_jax.models.resnets import RESNETS
from gating_jax.models.segmenter import Segmenter
from gating_jax.models.summary import model_summary
from gating_jax.reports import images as image_pictures
from gating_jax.reports import tables
from gating_jax.training import devices, steps
from gating_jax.training.evaluation import Evaluation
from gating_jax.training.objectives import Fit, weighted_mean
from gating_jax.training.outlines import Outline
from gating_jax.training.steps import TrainState
from gating_jax.types import Array

# Test scenes to draw.
_DRAWN = 3


def run(config: Config, workdir: Path, mode: str) -> None:
  """Runs a mode for segmentation in a run directory.

  Args:
    config: the config of the run.
    workdir: the run directory.
    mode: one of those of `runner.run`; `compile` times programs that skip closed gates.
  """
  with runner.opening_data(Segmentation, config, workdir, mode=mode):
    experiment = build(config)
  runner.run(Segmentation(experiment), workdir, mode)


def build(config: Config, outlines: Sequence[Outline] | None = None) -> Experiment:
  """Builds the experiment of a config of scenes.

  Args:
    config: the config.
    outlines: of the training and the test set, in place of opening them.
  Raises:
    ValueError, DatasetNotPreparedError: as in `images.build.build`.
  """
  config = completed(config)
  data = config.data

  def is_size(value):
    """Checks for a height and a width that a network can take."""
    return isinstance(value, tuple) and len(value) == 2 and min(value) >= 8

  def is_crop(value):
    """Checks for a size within that of the scenes, or for none."""
    if value is None:
      return True
    return is_size(value) and value[0] <= data.size[0] and value[1] <= data.size[1]

  check_config(
    config,
    choices={"data.name": scenes.NAMES, "model.name": RESNETS},
    at_least={"data.train_scenes": 1, "data.test_scenes": 1, "data.digits": 1, "model.head": 1},
    rules={
      "data.size": (is_size, "a tuple of height and width, each >= 8"),
      "model.init_from": (lambda path: path is None, "None for segmentation"),
      "data.crop": (
        is_crop,
        "None or a tuple of height and width, each >= 8 and at most data.size",
      ),
    },
  )
  open_sets = _made_sets if data.name == scenes.MADE else _opened_sets
  sets = open_sets(data, config.seed)
  return image_build.assemble(
    config,
    sets.size,
    open_train=sets.open_train,
    open_test=sets.open_test,
    network=network,
    fit=fit_pixels,
    train_shape=sets.train_shape,
    outlines=outlines,
  )


class _Sets(NamedTuple):
  """The sets of a run, as `images.build.assemble` takes them."""

  size: Callable[[], int]
  open_train: Callable[[], Any]
  open_test: Callable[[], Any]
  train_shape: tuple[int, int, int] | None = None


def _made_sets(data: Config, seed: int) -> _Sets:
  """Returns sets of scenes that are made of digits."""

  def make(split, count, **training):
    """Makes the scenes of a split."""
    return scenes.make_scenes(split, scenes=count, size=data.size, most=data.digits, **training)

  return _Sets(
    size=lambda: data.train_scenes,
    open_train=functools.partial(make, "train", data.train_scenes, seed=seed),
    # The test set is the same for all seeds, so that these can be compared.
    open_test=functools.partial(make, "test", data.test_scenes),
  )


def _opened_sets(data: Config, seed: int) -> _Sets:
  """Returns sets of scenes on disk."""

  def opened(split, **training):
    """Opens a split."""
    return scenes.open_scenes(
      data.name,
      split,
      data.data_dir,
      size=data.size,
      seed=seed,
      workers=data.workers,
      **training,
    )

  def open_train():
    """Opens the training set, which crops and flips."""
    return opened(data.train_split, crop=data.crop, flip=data.flip)

  return _Sets(
    size=lambda: len(open_train()),
    open_train=open_train,
    open_test=functools.partial(opened, data.test_split),
    # Trained on crops, tested on whole scenes: the costs of the two differ.
    train_shape=(*(data.crop or data.size), 3),
  )


def network(model: Config, classes: int) -> nn.Module:
  """Builds the residual network that `config.model` describes, with the head on its feature map.

  Args:
    model: the section `config.model`.
    classes: number of classes of a pixel.
  """
  # The head needs a feature map, so the backbone has no pooling and no classifier.
  backbone = image_build.network(model, None).clone(pool=False, output_stride=model.output_stride)
  return Segmenter(
    backbone, classes, features=model.head, dtype=backbone.dtype, axis_name=devices.AXIS
  )


class Segmentation(Classification):
  """The classification of pixels: an image is a scene, without a class of its own."""

  score = ("mean_iou", "mean IoU")
  modes: ClassVar[Mapping[str, Callable[..., None]]] = {"compile": compile.compile_run}

  def prepare(self, key: jax.Array, pixels: jax.Array) -> jax.Array:
    """Normalises uint8 pixels; the data set itself crops and flips scenes with their labels."""
    return self.experiment.normalise(pixels)

  @staticmethod
  def scores(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns the results of each scene, from its pixels."""
    return pixel_scores(logits, labels)

  def summarise(self, sums: Mapping[str, Any], images: int) -> dict[str, float]:
    """Returns the numbers of the set, and the head's part of the network's MACs."""
    experiment = self.experiment
    backbone = model_summary(experiment.model.backbone.clone(parent=None), experiment.test.shape)
    return summarise_pixels(sums, experiment.test.class_names) | {
      "head_macs": experiment.counts.macs - backbone.macs
    }

  def class_entries(self, evaluated: Evaluation) -> dict[str, Any]:
    """Returns the entries of a result that say what its scores are worth, from pixels.

    Pixels of a scene are alike, so that intervals are of resampled scenes.
    """
    each = evaluated.images.confusion
    if each is None:
      return {}

    def mean_iou(index):
      """Returns the mean IoU of some of the scenes."""
      iou = intersection_over_union(each[index].sum(axis=0))
      return float(np.mean(iou[~np.isnan(iou)])) if np.any(~np.isnan(iou)) else math.nan

    def accuracy(index):
      """Returns the fraction of the pixels of some of the scenes that are right."""
      confusion = each[index].sum(axis=0)
      return float(np.trace(confusion) / confusion.sum()) if confusion.any() else math.nan

    entries = class_scores.classes_of_score(each.sum(axis=0), self.experiment.test.class_names)
    for key, score in (("mean_iou", mean_iou), ("accuracy", accuracy)):
      interval = class_scores.bootstrap_interval(score, len(each))
      entries |= class_scores.interval_entries(key, interval)
    return entries

  def rows(self, result: Mapping[str, Any]) -> list[tables.Row]:
    """Returns the result as names and values, the score first."""
    return tables.scene_rows(result)

  def classes(self) -> None:
    """Returns None: a scene has pixels of several classes."""

  def draw(self, state: TrainState) -> dict[str, tuple[Any, str]]:
    """Draws the first test scenes."""
    experiment = self.experiment
    images, truth = experiment.test.read(np.arange(min(_DRAWN, len(experiment.test))))

    def predict(logits, labels):
      """Returns the predictions alone: the scores of these scenes are not reported."""
      return {"predicted": logits.argmax(-1)}

    run_batch = jax.jit(steps.make_eval_step(experiment.model, experiment.normalise, predict))
    # On one device: three scenes need not divide over all of them.
    results = jax.device_get(run_batch(jax.device_get(state), images, truth))
    counts = experiment.counts
    macs = counts.of_results(results, count=len(images))
    figure = image_pictures.draw_scenes(
      images,
      truth=truth,
      predicted=results["predicted"],
      mac_ratios=macs / counts.macs,
      class_names=experiment.test.class_names,
    )
    return {
      "scenes.png": (
        figure,
        "Test scenes, the true class of every pixel and the predicted one; above, the "
        "multiply-accumulates of each, in % of those of the ungated net.",
      )
    }


def fit_pixels(logits: Array, labels: Array, axis_name: Hashable | None = None) -> Fit:
  """Computes the cross-entropy and the accuracy, means over the pixels that are not ignored.

  It is the `fit` of an `ImageObjective`; the means are over the whole batch.

  Args:
    logits: `[N, H, W, K]`.
    labels: `[N, H, W]` integers below K, or `IGNORED`.
    axis_name: as in `batch_shaping_loss`.
  """
  cross_entropy, correct, counted = _compare_pixels(logits, labels)
  mean_loss = weighted_mean(cross_entropy, counted, axis_name)
  return Fit(mean_loss, weighted_mean(correct, counted, axis_name))


def pixel_scores(logits: Array, labels: Array) -> dict[str, Array]:
  """Computes for each example its `cross_entropy` and `confusion`.

  Args:
    logits: `[N, H, W, K]`.
    labels: `[N, H, W]` integers below K, or `IGNORED`.
  Returns:
    `cross_entropy` `[N]`, the sum over an example's pixels, and `confusion` `[N, K, K]`.
  """
  cross_entropy, _, counted = _compare_pixels(logits, labels)
  return {
    "cross_entropy": jnp.sum(cross_entropy * counted, axis=(1, 2)),
    "confusion": count_confusion(jnp.argmax(logits, -1), labels, logits.shape[-1]),
  }


def count_confusion(predicted: Array, labels: Array, classes: int) -> Array:
  """Counts the pixels of each true class, the row, that were given each class, the column.

  Args:
    predicted: `[N, H, W]` integers below `classes`.
    labels: the same, or `IGNORED`.
    classes: K.
  Returns:
    `[N, K, K]` int32.

  >>> count_confusion(jnp.array([[[0, 1, 1]]]), jnp.array([[[0, 0, 255]]]), 2)[0].tolist()
  [[1, 1], [0, 0]]
  """
  labels = labels.astype(jnp.int32)
  # Each (true, predicted) pair has a number; ignored pixels share one more, which is cut off.
  pair = jnp.where(labels == scenes.IGNORED, classes**2, labels * classes + predicted)

  def count_pairs(pairs):
    """Counts each pair of one example's pixels, `[K^2]`."""
    return jnp.bincount(pairs.ravel(), length=classes**2 + 1)[:-1]

  return jax.vmap(count_pairs)(pair).reshape(-1, classes, classes)


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
  """Computes the intersection over union of each class, `[K]`.

      IoU_k = |true k and predicted k| / |true k or predicted k|

  It is NaN for a class that neither the ground truth nor the prediction has.

  Args:
    confusion: `[K, K]`, summed over a whole set.

  >>> intersection_over_union(np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
  array([0.5       , 0.57142857,        nan])
  """
  # The union counts the pixels of both once: row sum plus column sum minus the diagonal.
  both = np.diag(confusion).astype(np.float64)
  either = confusion.sum(axis=0) + confusion.sum(axis=1) - both
  return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def summarise_pixels(
  sums: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> dict[str, float]:
  """Returns a set's numbers from the sums over its examples of `pixel_scores`.

  `mean_iou` is the mean over classes that occur in the ground truth or the prediction; the others
  have no `iou/...` of their own.

  Args:
    sums: sums of `cross_entropy`, and of `confusion` `[K, K]`.
    class_names: K names.
  """
  # A set whose pixels are all ignored scores 0.
  pixels = max(float(sums["confusion"].sum()), 1.0)
  iou = intersection_over_union(sums["confusion"])
  # A class that occurs nowhere has no IoU, and must not count as 0.
  present = ~np.isnan(iou)
  numbers = {
    "mean_iou": float(np.mean(iou[present])) if present.any() else 0.0,
    # The diagonal counts the pixels that are right.
    "accuracy": float(np.trace(sums["confusion"])) / pixels,
    "cross_entropy": float(sums["cross_entropy"]) / pixels,
  }
  for k in np.flatnonzero(present).tolist():
    numbers[f"iou/{class_names[k]}"] = float(iou[k])
  return numbers


def _compare_pixels(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
  """Returns `[N, H, W]` each: cross-entropy, correctness, and 1 for pixels not ignored."""
  counted = labels != scenes.IGNORED
  # `IGNORED` is no class: the cross-entropy needs a valid label, and its weight is 0.
  labels = jnp.where(counted, labels, 0).astype(jnp.int32)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return cross_entropy, jnp.argmax(logits, -1) == labels, counted.astype(logits.dtype)
