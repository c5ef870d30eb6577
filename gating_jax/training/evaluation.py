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
FIRING = 8
# Images whose logits are kept, for histograms and pictures.
_KEPT_EXAMPLES = 2048


@dataclasses.dataclass(frozen=True)
class ImageBehaviour:
  """Results of a test for each image, `[M]`; the last three are None where an image has no class.

  Attributes:
    macs: total multiply-accumulates, including the ungated part.
    losses: cross-entropies.
    correct: whether the predicted class is the true one.
    predicted, labels: classes, as integers.
  """

  macs: np.ndarray
  losses: np.ndarray
  correct: np.ndarray | None
  predicted: np.ndarray | None
  labels: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class GateBehaviour:
  """Results of a test for each gate.

  Attributes:
    diagnosis: outcomes of the gates, from `outcomes.diagnose`.
    logits: `[<= 2048, G]`, of the first images.
    class_rates: `[K, G]`, the fraction of each class's images for which each gate is open; NaN for
      a class without images. None where an image has no class.
    firing: `[<= 8, G]`, the numbers of the images with the largest logits of each gate, largest
      first; -1 where the gate is closed.
  """

  diagnosis: gate_outcomes.Diagnosis
  logits: np.ndarray
  class_rates: np.ndarray | None
  firing: np.ndarray


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
  sums, each, tally, firing, logits, images = {}, collections.defaultdict(list), None, None, [], 0
  for (pixels, labels), valid in batches:
    # Padding is cut off here: each image counts once.
    part = {name: np.asarray(values)[:valid] for name, values in run(pixels, labels).items()}
    for name in part.keys() & {"macs", "cross_entropy", "correct", "predicted"}:
      each[name].append(part[name])
    if classes is not None:
      each["labels"].append(np.asarray(labels)[:valid])
    # Summed in float64: a test set has more MACs than float32 counts exactly.
    for name in part.keys() - {"gates", "gate_logits", "predicted"}:
      sums[name] = sums.get(name, 0) + np.sum(part[name], axis=0, dtype=np.float64)
    if "gates" in part:
      probs = gate_outcomes.open_probs(part["gate_logits"], noise_scale)
      # Without classes all images are of a single one, so that the tally needs no second form.
      labels = np.zeros(valid, np.int32) if classes is None else np.asarray(labels)[:valid]
      new = gate_outcomes.tally(part["gates"], probs, labels, classes or 1)
      tally = new if tally is None else tally + new
      # Closed gates get -inf: only images that open a gate are kept.
      firing = _largest(firing, np.where(part["gates"] > 0, part["gate_logits"], -np.inf), images)
      if images < _KEPT_EXAMPLES:
        logits.append(part["gate_logits"])
    images += valid
  # For an ungated net, MACs are those of the model; a gated one overwrites them below.
  result = {
    **summarise(sums, images),
    "images": images,
    "params": counts.params,
    "gate_params": counts.gate_params,
    "ungated_macs": counts.macs,
    "macs": counts.macs,
    "mac_ratio": 1.0,
  }
  each = {name: np.concatenate(parts) for name, parts in each.items()}
  macs = (
    counts.always_macs + each["macs"].astype(np.float64)
    if "macs" in each
    else np.full(images, float(counts.macs))
  )
  behaviour = ImageBehaviour(
    macs,
    each["cross_entropy"].astype(np.float64),
    *(each.get(name) for name in ("correct", "predicted", "labels")),
  )
  if tally is None:
    return Evaluation(result, behaviour, None)
  found = gate_outcomes.diagnose(tally)
  spent = statistics.mac_spread(behaviour.macs, behaviour.losses)
  result |= {**spent, "mac_ratio": spent["macs"] / counts.macs, **gate_outcomes.summary(found)}
  if found.class_information is not None:
    result["class_information_floor"] = found.floor
  # A class without images gives 0 / 0 = NaN.
  with np.errstate(invalid="ignore"):
    class_rates = None if classes is None else tally.opened / tally.examples[:, None]
  return Evaluation(
    result,
    behaviour,
    GateBehaviour(
      found,
      np.concatenate(logits)[:_KEPT_EXAMPLES],
      class_rates,
      np.where(firing[0] > -np.inf, firing[1], -1),
    ),
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


def _largest(
  before: tuple[np.ndarray, np.ndarray] | None, logits: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the largest logits of each gate so far and their images, `[<= FIRING, G]` each.

  Of equal logits the first image comes first.

  Args:
    before: the result for earlier images; None for none.
    logits: `[B, G]` of the next images, whose first is number `first`.
    first: the number of the first of these images.
  """
  numbers = np.broadcast_to(np.arange(first, first + len(logits))[:, None], logits.shape)
  if before is not None:
    logits, numbers = np.concatenate([before[0], logits]), np.concatenate([before[1], numbers])
  order = np.argsort(-logits, axis=0, kind="stable")[:FIRING]
  return np.take_along_axis(logits, order, axis=0), np.take_along_axis(numbers, order, axis=0)
