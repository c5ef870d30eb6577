"""Meaning of scores: 95 % intervals, the majority rate, single classes, and confusions.

A score alone misleads: an accuracy of one half means nothing where half of the examples are of one
class, and two scores may differ by chance. Everything is computed from predictions on a whole test
set.

Axes: M examples, K classes, T tasks.
Reference: Wilson, 1927 (interval of a fraction); Agresti and Coull, 1998; Efron, 1979 (bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Standard deviations on either side of a 95 % interval.
Z = 1.959964
# Results with more classes have the largest confusions alone.
MOST_CLASSES = 100
# Largest confusions in a result with more classes.
_MOST_CONFUSIONS = 50
# Resampled test sets of a bootstrap.
RESAMPLED = 200


class Interval(NamedTuple):
  """A 95 % interval."""

  low: float
  high: float


def fraction_interval(right: float, examples: int) -> Interval:
  """Computes Wilson's 95 % interval of a fraction.

  Args:
    right: examples that count.
    examples: all of them, at least one.
  Raises:
    ValueError: no example, or more that count than there are.

  >>> low, high = fraction_interval(50, 100)
  >>> print(f"{low:.4f} {high:.4f}")
  0.4038 0.5962
  """
  if not 0 <= right <= examples or not examples:
    raise ValueError(f"right must be in [0, examples], examples >= 1; got {right} of {examples}")
  fraction, spread = right / examples, Z**2 / examples
  centre = (fraction + spread / 2) / (1 + spread)
  half = Z * np.sqrt(fraction * (1 - fraction) / examples + spread / (4 * examples))
  half /= 1 + spread
  return Interval(max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def mean_interval(fractions: Sequence[float], examples: Sequence[int]) -> Interval:
  """Computes the 95 % interval of a mean of fractions, each over its own examples.

  The variance of each is that of Agresti and Coull, which is not 0 where all examples are right.

  Args:
    fractions: such as the accuracy on each of T tasks.
    examples: the number of examples of each.

  >>> low, high = mean_interval([1.0, 0.5], [100, 100])
  >>> print(f"{low:.3f} {high:.3f}")
  0.700 0.800
  """
  each, counts = np.asarray(fractions, np.float64), np.asarray(examples, np.float64)
  shrunk = (each * counts + Z**2 / 2) / (counts + Z**2)
  variance = np.sum(shrunk * (1 - shrunk) / (counts + Z**2)) / len(each) ** 2
  mean, half = float(each.mean()), float(Z * np.sqrt(variance))
  return Interval(max(0.0, mean - half), min(1.0, mean + half))


def bootstrap_interval(
  score: Callable[[np.ndarray], float], examples: int, resampled: int = RESAMPLED
) -> Interval:
  """Computes the 95 % interval of a score in [0, 1] of a test set, from resampled test sets.

  Args:
    score: of the examples with the given indices, `[M]`; NaN where it is not defined for them.
    examples: M.
    resampled: number of resampled test sets.
  """
  # A fixed seed: the same interval at each call.
  rng = np.random.default_rng(0)
  found = [score(rng.integers(examples, size=examples)) for _ in range(resampled)]
  # Nothing is known where the score is never defined.
  if np.all(np.isnan(found)):
    return Interval(0.0, 1.0)
  low, high = np.nanpercentile(found, (2.5, 97.5))
  return Interval(float(low), float(high))


def count_confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """Counts the examples `[K, K]` of each true class, the row, that were given each class.

  Args:
    labels, predicted: `[M]` integers below K.
    classes: K.

  >>> count_confusion(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
  [[1, 1], [0, 1]]
  """
  pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
  return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def classes_of_score(
  confusion: np.ndarray, class_names: Sequence[str], *, trained: np.ndarray | None = None
) -> dict[str, Any]:
  """Returns the entries of a result that put an accuracy into context.

  Args:
    confusion: `[K, K]`, of a whole test set.
    class_names: K names.
    trained: `[K]` training examples of each class; None where they are not known.
  Returns:
    `majority_rate`, the accuracy of always predicting the most common class of the test set;
    `class_accuracy` by name; `confusion` as rows, or `confusions`, the largest ones, of more than
    100 classes; `classes_without_test` and, where training examples are known,
    `classes_without_training`: names.
  """
  confusion = np.asarray(confusion)
  tested = confusion.sum(axis=1)
  accuracies = {}
  for k in np.flatnonzero(tested).tolist():
    accuracies[class_names[k]] = float(confusion[k, k] / tested[k])
  found: dict[str, Any] = {
    "majority_rate": float(tested.max() / max(tested.sum(), 1)),
    "class_accuracy": accuracies,
    "classes_without_test": [class_names[k] for k in np.flatnonzero(tested == 0).tolist()],
  }
  if len(confusion) <= MOST_CLASSES:
    found["confusion"] = confusion.astype(int).tolist()
  else:
    found["confusions"] = _largest_confusions(confusion, class_names)
  if trained is not None:
    found["classes_without_training"] = list_untrained(trained, class_names)
  return found


def list_untrained(trained: np.ndarray, class_names: Sequence[str]) -> list[str]:
  """Returns the names of the classes without a training example.

  Args:
    trained: `[K]` training examples of each class.
    class_names: K names.
  """
  return [class_names[k] for k in np.flatnonzero(np.asarray(trained) == 0).tolist()]


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
  """Counts the examples of each class, `[K]`.

  Args:
    labels: `[M]` integers below K, or `[M, K]` of 0 and 1.
    classes: K.
  """
  labels = np.asarray(labels)
  if labels.ndim == 2:
    return labels.sum(axis=0).astype(np.int64)
  return np.bincount(labels.astype(np.int64), minlength=classes)[:classes]


def score_predictions(
  labels: np.ndarray,
  predicted: np.ndarray,
  class_names: Sequence[str],
  *,
  trained: np.ndarray | None = None,
) -> dict[str, Any]:
  """Returns the entries of `classes_of_score`, with the interval of the accuracy.

  Args:
    labels, predicted: `[M]` classes, M >= 1.
    class_names, trained: as in `classes_of_score`.
  Returns:
    also `accuracy_low` and `accuracy_high`.
  """
  confusion = count_confusion(labels, predicted, len(class_names))
  interval = fraction_interval(int(np.trace(confusion)), int(confusion.sum()))
  return interval_entries("accuracy", interval) | classes_of_score(
    confusion, class_names, trained=trained
  )


def interval_entries(key: str, interval: Interval) -> dict[str, float]:
  """Returns the entries of a result for the interval of the score under a key."""
  return {f"{key}_low": interval.low, f"{key}_high": interval.high}


def interval_of(result: Mapping[str, Any], key: str) -> Interval | None:
  """Returns the interval of the score under a key of a result; None for an older result."""
  low, high = result.get(f"{key}_low"), result.get(f"{key}_high")
  return None if low is None or high is None else Interval(low, high)


def may_be_chance(first: float, other: float, intervals: tuple[Interval, Interval]) -> bool:
  """Returns whether the difference of two scores lies within its 95 % interval.

  The deviations of the two are added in squares, as of test sets that were drawn apart; for two
  scores on one test set that is cautious.

  Args:
    first, other: the scores.
    intervals: of the first and the other.

  >>> may_be_chance(0.60, 0.58, (Interval(0.5, 0.7), Interval(0.48, 0.68)))
  True
  """
  half, other_half = [(interval.high - interval.low) / 2 for interval in intervals]
  return abs(first - other) <= math.hypot(half, other_half)


def _largest_confusions(confusion: np.ndarray, class_names: Sequence[str]) -> list[list[Any]]:
  """Returns the true class, the predicted one and the count of the largest confusions."""
  wrong = confusion - np.diag(np.diag(confusion))
  # A stable sort: pairs with one count stay in the order of their classes.
  order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]
  found = []
  for true, given in zip(*np.unravel_index(order, wrong.shape), strict=True):
    if wrong[true, given]:
      found.append([class_names[true], class_names[given], int(wrong[true, given])])
  return found
