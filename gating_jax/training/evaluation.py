"""Test sets: score, multiply-accumulates and gate statistics, each image counted once.

Axes: M test images, B images of a batch, G gates of the network, K classes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gating_jax.analysis import outcomes as gate_outcomes
from gating_jax.analysis import statistics
from gating_jax.models.summary import ModelCounts

# Images kept for each gate.
MOST_OPEN = 8
# Images whose logits are kept, for histograms and pictures.
_KEPT_EXAMPLES = 2048


@dataclasses.dataclass(frozen=True)
class ImageBehaviour:
  """Results of a test for each image, `[M]`; `correct` and the next two are None without a class.

  Attributes:
    macs: total multiply-accumulates, including the ungated part.
    losses: cross-entropies.
    correct: whether the predicted class is the true one.
    predicted, labels: classes, as integers.
    confusion: `[M, K, K]` pixels of each true class that were given each class; None where an
      image has a class of its own.
  """

  macs: np.ndarray
  losses: np.ndarray
  correct: np.ndarray | None
  predicted: np.ndarray | None
  labels: np.ndarray | None
  confusion: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GateBehaviour:
  """Results of a test for each gate.

  Attributes:
    diagnosis: outcomes of the gates, from `outcomes.diagnose`.
    logits: `[<= 2048, G]`, of the first images.
    class_rates: `[K, G]`, the fraction of each class's images for which each gate is open; NaN for
      a class without images. None where an image has no class.
    most_open_images: `[<= 8, G]`, the numbers of the images with the largest logits of each gate,
      largest first; -1 where the gate is closed.
  """

  diagnosis: gate_outcomes.Diagnosis
  logits: np.ndarray
  class_rates: np.ndarray | None
  most_open_images: np.ndarray


class Evaluation(NamedTuple):
  """Results of a test.

  Attributes:
    result: numbers, by name.
    images: the behaviour on each image.
    gates: that of each gate; None for a network without gates.
  """

  result: dict[str, Any]
  images: ImageBehaviour
  gates: GateBehaviour | None


def summarise(sums: Mapping[str, np.ndarray], images: int) -> dict[str, float]:
  """Returns a classifier's numbers: `accuracy` and `cross_entropy`.

  Args:
    sums: sums over images of the results of `steps.image_scores`.
    images: the number of images.
  """
  return {
    "accuracy": float(sums["correct"] / images),
    "cross_entropy": float(sums["cross_entropy"] / images),
  }


def evaluate(
  run: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]],
  batches: Iterable[tuple[tuple[np.ndarray, np.ndarray], int]],
  counts: ModelCounts,
  summarise: Callable[[Mapping[str, np.ndarray], int], dict[str, float]] = summarise,
  *,
  classes: int | None,
  noise_scale: float,
) -> Evaluation:
  """Runs a model over a test set.

  Args:
    run: `(pixels [B, ...], labels [B]) -> results`, those of `steps.make_eval_step`.
    batches: `((pixels, labels), valid)`; examples after the first `valid` are padding.
    counts: summary of the model.
    summarise: `(sums over images of each result, images) -> numbers`, first in the result.
    classes: number of different labels; None where an image has no label of its own.
    noise_scale: noise scale of the gates in training; 0 where they are not drawn.
  """
  images, gates = _ImageResults(), _GateResults(classes, noise_scale)
  for (pixels, labels), valid in batches:
    # Padding is cut off here: each image counts once.
    results = {name: np.asarray(values)[:valid] for name, values in run(pixels, labels).items()}
    labels = None if classes is None else np.asarray(labels)[:valid]
    if "gates" in results:
      gates.add(results, labels, first=images.count)
    images.add(results, labels)
  behaviour = images.behaviour(counts)
  # For an ungated net, MACs are those of the model; a gated one overwrites them below.
  result = {
    **summarise(images.sums, images.count),
    "images": images.count,
    "params": counts.params,
    "gate_params": counts.gate_params,
    "ungated_macs": counts.macs,
    "macs": counts.open_macs,
    "mac_ratio": counts.open_macs / counts.macs,
  }
  if gates.tally is None:
    return Evaluation(result, behaviour, None)
  found = gates.behaviour()
  result |= statistics.mac_spread(behaviour.macs, behaviour.losses)
  result["mac_ratio"] = result["macs"] / counts.macs
  result |= gate_outcomes.summary(found.diagnosis)
  if found.diagnosis.class_information is not None:
    result["class_information_floor"] = found.diagnosis.floor
  return Evaluation(result, behaviour, found)


class _ImageResults:
  """The results of a test so far, for images.

  Attributes:
    count: the number of images.
    sums: sums over images of each result.
  """

  # Results that are kept for each image, and those that have no meaning as a sum.
  _KEPT = ("macs", "cross_entropy", "correct", "predicted", "confusion")
  _NOT_SUMMED = ("gates", "gate_logits", "predicted")

  def __init__(self):
    self.count = 0
    self.sums = {}
    self._each = collections.defaultdict(list)

  def add(self, results: Mapping[str, np.ndarray], labels: np.ndarray | None) -> None:
    """Adds the results of further images, and their labels where they have one each."""
    for name, values in results.items():
      if name in self._KEPT:
        self._each[name].append(values)
      # Summed in float64: a test set has more MACs than float32 counts exactly.
      if name not in self._NOT_SUMMED:
        total = np.sum(values, axis=0, dtype=np.float64)
        self.sums[name] = self.sums.get(name, 0) + total
    if labels is not None:
      self._each["labels"].append(labels)
    self.count += len(results["cross_entropy"])

  def behaviour(self, counts: ModelCounts) -> ImageBehaviour:
    """Returns the results for each image of a model of these sizes."""
    each = {name: np.concatenate(parts) for name, parts in self._each.items()}
    return ImageBehaviour(
      macs=counts.of_results(each, count=self.count),
      losses=each["cross_entropy"].astype(np.float64),
      correct=each.get("correct"),
      predicted=each.get("predicted"),
      labels=each.get("labels"),
      confusion=each.get("confusion"),
    )


class _GateResults:
  """The results of a test so far, for gates.

  Attributes:
    tally: counts of open gates; None where there are no gates.
  """

  def __init__(self, classes: int | None, noise_scale: float):
    self.tally: gate_outcomes.Tally | None = None
    self._classes, self._noise_scale = classes, noise_scale
    self._logits: list[np.ndarray] = []
    self._largest: _Largest | None = None

  def add(
    self, results: Mapping[str, np.ndarray], labels: np.ndarray | None, *, first: int
  ) -> None:
    """Adds the gates of further images, of which the first is number `first`."""
    logits = results["gate_logits"]
    probs = gate_outcomes.open_probs(logits, noise_scale=self._noise_scale)
    # Without classes all images are of a single one, so that the tally needs no second form.
    if labels is None:
      labels = np.zeros(len(logits), np.int32)
    new = gate_outcomes.tally(results["gates"], probs, labels, classes=self._classes or 1)
    self.tally = new if self.tally is None else self.tally + new
    # Closed gates get -inf: only images that open a gate are kept.
    opening = np.where(results["gates"] > 0, logits, -np.inf)
    self._largest = _add_largest(self._largest, opening, first)
    if first < _KEPT_EXAMPLES:
      self._logits.append(logits)

  def behaviour(self) -> GateBehaviour:
    """Returns the results for each gate."""
    if self.tally is None or self._largest is None:
      raise ValueError("no image was added")
    class_rates = None
    if self._classes is not None:
      # A class without images gives 0 / 0 = NaN.
      with np.errstate(invalid="ignore"):
        class_rates = self.tally.opened / self.tally.examples[:, None]
    return GateBehaviour(
      diagnosis=gate_outcomes.diagnose(self.tally),
      logits=np.concatenate(self._logits)[:_KEPT_EXAMPLES],
      class_rates=class_rates,
      most_open_images=np.where(self._largest.logits > -np.inf, self._largest.images, -1),
    )


def histograms(gates: GateBehaviour, layers: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
  """Returns the `layer_histograms` of a test: of the logits kept, and of open rates on all images.

  Args:
    gates: behaviour of the gates.
    layers: name and number of gates of each layer, in the order of the gates.
  """
  names, sizes = zip(*layers, strict=True)
  ends = np.cumsum(sizes)[:-1]
  return statistics.layer_histograms(
    names, np.split(gates.logits, ends, axis=1), np.split(gates.diagnosis.open_rates, ends)
  )


class _Largest(NamedTuple):
  """The largest logits of each gate, and the numbers of their images, `[<= MOST_OPEN, G]` each."""

  logits: np.ndarray
  images: np.ndarray


def _add_largest(before: _Largest | None, logits: np.ndarray, first: int) -> _Largest:
  """Returns the largest logits so far. Of equal logits the first image comes first.

  Args:
    before: the result for earlier images; None for none.
    logits: `[B, G]` of the next images.
    first: the number of the first of these images.
  """
  images = np.broadcast_to(np.arange(first, first + len(logits))[:, None], logits.shape)
  if before is not None:
    logits = np.concatenate([before.logits, logits])
    images = np.concatenate([before.images, images])
  # A stable sort keeps the order of equal logits.
  order = np.argsort(-logits, axis=0, kind="stable")[:MOST_OPEN]
  return _Largest(
    np.take_along_axis(logits, order, axis=0), np.take_along_axis(images, order, axis=0)
  )
