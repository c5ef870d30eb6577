"""A test set's score, multiply-accumulates and what the gates do, every image counted once.

Axes: M test images, B images of a batch, G gates of the network.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from gating_jax.models.counts import ModelCounts
from gating_jax.training import diagnosis

_KEPT_EXAMPLES = 2048
_TOP_IMAGES = 8
_DECILES = range(10, 100, 10)


@dataclasses.dataclass(frozen=True)
class GateBehaviour:
  """What gates did, and for which images.

  Attributes:
    diagnosis: of each gate.
    logits: `[<= 2048, G]` of the first images.
    class_rates: `[K, G]` share of the images of each class for which each gate is open.
    top_images: `[<= 8, G]` places of the images with the largest logits of each gate, the largest first.
    macs, losses: `[M]` of each image.
    correct: `[M]` whether each was classified correctly; None where that means nothing.
  """

  diagnosis: diagnosis.Diagnosis
  logits: np.ndarray
  class_rates: np.ndarray
  top_images: np.ndarray
  macs: np.ndarray
  losses: np.ndarray
  correct: np.ndarray | None


def summarise(sums: Mapping[str, np.ndarray], images: int) -> dict[str, float]:
  """A classifier's numbers, from the sums over images of what `steps.image_scores` returns."""
  return {"accuracy": float(sums["correct"] / images), "cross_entropy": float(sums["cross_entropy"] / images)}


def evaluate(
    run: Callable[[np.ndarray, np.ndarray], Mapping[str, np.ndarray]],
    batches: Iterable[tuple[tuple[np.ndarray, np.ndarray], int]],
    counts: ModelCounts,
    summarise: Callable[[Mapping[str, np.ndarray], int], dict[str, float]] = summarise,
    *,
    classes: int | None,
    noise_scale: float,
) -> tuple[dict[str, float], GateBehaviour | None]:
  """Runs a model over a test set.

  Args:
    run: `(pixels [B, ...], labels [B]) -> results`, those of `steps.make_eval_step`.
    batches: `((pixels, labels), valid)`; what follows the first `valid` examples is filling.
    counts: of the model.
    summarise: `(sums over images of each result, images) -> numbers`, first in the result.
    classes: number of different labels; None where an image has no label of its own.
    noise_scale: of the gates in training; 0 where they are not drawn.
  Returns:
    `(result, behaviour)`: numbers, and for a gated net what its gates did.
  """
  sums, each, tally, logits, top, images = {}, collections.defaultdict(list), None, [], None, 0
  for (pixels, labels), valid in batches:
    part = {name: np.asarray(values)[:valid] for name, values in run(pixels, labels).items()}
    for name in part.keys() - {"gates", "gate_logits"}:
      sums[name] = sums.get(name, 0) + np.sum(part[name], axis=0, dtype=np.float64)
    if "gates" in part:
      for name in {"macs", "cross_entropy", "correct"} & part.keys():
        each[name].append(part[name].astype(np.float64))
      top = _largest(top, part["gate_logits"], images)
      probs = diagnosis.open_probs(part["gate_logits"], noise_scale)
      labels = np.zeros(valid, np.int32) if classes is None else np.asarray(labels)[:valid]
      new = diagnosis.tally(part["gates"], probs, labels, classes or 1)
      tally = new if tally is None else tally + new
      if images < _KEPT_EXAMPLES:
        logits.append(part["gate_logits"])
    images += valid
  result = {
      **summarise(sums, images),
      "images": images,
      "params": counts.params,
      "gate_params": counts.gate_params,
      "ungated_macs": counts.macs,
      "macs": counts.macs,
      "mac_ratio": 1.0,
  }
  if tally is None:
    return result, None
  found = diagnosis.diagnose(tally)
  of_images = {name: np.concatenate(parts) for name, parts in each.items()}
  macs, losses = counts.fixed + of_images["macs"], of_images["cross_entropy"]
  spent = mac_spread(macs, losses)
  result |= {**spent, "mac_ratio": spent["macs"] / counts.macs, **diagnosis.summary(found)}
  if found.class_information is not None:
    result["class_information_floor"] = found.floor
  rates = tally.opened / np.maximum(tally.examples, 1)[:, None]
  return result, GateBehaviour(found, np.concatenate(logits)[:_KEPT_EXAMPLES], rates, top[1], macs, losses,
                               of_images.get("correct"))


def _largest(
    so_far: tuple[np.ndarray, np.ndarray] | None, logits: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
  """The largest logits of each gate and their images' places, both `[<= 8, G]`, after `[B, G]` more from a place on."""
  places = np.broadcast_to(first + np.arange(len(logits))[:, None], logits.shape)
  if so_far is not None:
    logits, places = np.concatenate([so_far[0], logits]), np.concatenate([so_far[1], places])
  order = np.argsort(-logits, axis=0, kind="stable")[:_TOP_IMAGES]
  return np.take_along_axis(logits, order, 0), np.take_along_axis(places, order, 0)


def mac_spread(macs: np.ndarray, losses: np.ndarray) -> dict[str, float]:
  """Multiply-accumulates over images: mean, spread, deciles, and means of four quarters from easy to hard.

  Args:
    macs: `[M]` of each image.
    losses: `[M]` their cross-entropies, by which quarter 1 is the easiest, quarter 4 the hardest.

  >>> mac_spread(np.arange(8.0), -np.arange(8.0))["macs_of_quarter1"]
  6.5
  """
  quarters = np.array_split(macs[np.argsort(losses, kind="stable")], min(4, len(macs)))
  return {
      "macs": float(np.mean(macs)),
      "macs_std": float(np.std(macs)),
      "macs_min": float(np.min(macs)),
      "macs_max": float(np.max(macs)),
      **{f"macs_p{p}": float(np.percentile(macs, p)) for p in _DECILES},
      **{f"macs_of_quarter{i}": float(np.mean(quarter)) for i, quarter in enumerate(quarters, 1)},
  }
