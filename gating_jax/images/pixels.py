"""Fit and score of pixel classification; pixels labelled `IGNORED` are skipped.

Axes: N examples, H and W pixels, K classes.
Reference: Everingham et al., "The Pascal visual object classes challenge", 2015 (intersection over
union).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.data.scenes import IGNORED
from gating_jax.training.objectives import Fit, weighted_mean
from gating_jax.types import Array


def fit_pixels(logits: Array, labels: Array, axis_name: Hashable | None = None) -> Fit:
  """Computes the cross-entropy and the accuracy, means over the pixels that are not ignored.

  It is the `fit` of an `ImageObjective`; the means are over the whole batch.

  Args:
    logits: `[N, H, W, K]`.
    labels: `[N, H, W]` integers below K, or `IGNORED`.
    axis_name: as in `batch_shaping_loss`.
  """
  cross_entropy, correct, counted = _pixels(logits, labels)
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
  cross_entropy, _, counted = _pixels(logits, labels)
  return {
    "cross_entropy": jnp.sum(cross_entropy * counted, axis=(1, 2)),
    "confusion": confusion(jnp.argmax(logits, -1), labels, logits.shape[-1]),
  }


def confusion(predicted: Array, labels: Array, classes: int) -> Array:
  """Counts the pixels of each true class, the row, that were given each class, the column.

  Args:
    predicted: `[N, H, W]` integers below `classes`.
    labels: the same, or `IGNORED`.
    classes: K.
  Returns:
    `[N, K, K]` int32.

  >>> confusion(jnp.array([[[0, 1, 1]]]), jnp.array([[[0, 0, 255]]]), 2)[0].tolist()
  [[1, 1], [0, 0]]
  """
  labels = labels.astype(jnp.int32)
  # Each (true, predicted) pair has a number; ignored pixels share one more, which is cut off.
  pair = jnp.where(labels == IGNORED, classes**2, labels * classes + predicted)

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


def summarise(sums: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, float]:
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
  for k in np.flatnonzero(present):
    numbers[f"iou/{class_names[k]}"] = float(iou[k])
  return numbers


def _pixels(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
  """Returns `[N, H, W]` each: cross-entropy, correctness, and 1 for pixels not ignored."""
  counted = labels != IGNORED
  # `IGNORED` is no class: the cross-entropy needs a valid label, and its weight is 0.
  labels = jnp.where(counted, labels, 0).astype(jnp.int32)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return cross_entropy, jnp.argmax(logits, -1) == labels, counted.astype(logits.dtype)
