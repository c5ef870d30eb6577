"""Scores of a sequence of tasks: what is learned, what is kept, and which units the tasks use.

Everything is computed on whole arrays, in the order in which the tasks were learned.

Axes: T tasks, U units.
Reference: Lopez-Paz and Ranzato, 2017 (the transfers); Chaudhry et al., 2018 (forgetting).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Summary:
  """Plain numbers, as shares in [-1, 1]; None where undefined.

  Attributes:
    average_accuracy: mean over tasks after the last one.
    average_after: after each task, the mean over the tasks learned so far; None where nothing was tested.
    forgetting: mean over tasks but the last of what is missing to their best accuracy; below 0 where they gained.
    backward_transfer: mean over tasks but the last of what they gained since they were learned.
    forward_transfer: mean over tasks but the first of their lead over a random-initialised net, just before learned.
    reasons: why a number is None, by its name.
  """

  average_accuracy: float
  average_after: tuple[float | None, ...]
  forgetting: float | None
  backward_transfer: float | None
  forward_transfer: float | None
  reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def summarise(accuracies: np.ndarray, *, baseline: np.ndarray | None = None) -> Summary:
  """The usual numbers of an accuracy matrix R.

      average = mean_j R[T, j]                    forgetting = mean_(j<T) (max_(i<T) R[i, j] - R[T, j])
      backward = mean_(j<T) (R[T, j] - R[j, j])   forward = mean_(j>1) (R[j-1, j] - baseline[j])

  Args:
    accuracies: `[T, T]`, row i after learning task i, column j on task j, in [0, 1]; NaN is allowed above the diagonal,
      and in all rows but the last where all tasks are learned together.
    baseline: `[T]` accuracies of a random-initialised net.
  Raises:
    ValueError: a shape is wrong, an accuracy is outside [0, 1], or one on a learned task is NaN, with its place.

  >>> summarise(np.array([[0.75, 0.5], [0.5, 1.0]]))  # doctest: +NORMALIZE_WHITESPACE
  Summary(average_accuracy=0.75, average_after=(0.75, 0.75), forgetting=0.25, backward_transfer=-0.25,
          forward_transfer=None, reasons={'forward_transfer': 'no accuracies of a random-initialised net are given'})
  """
  accuracies = _checked_accuracies(accuracies)
  if baseline is not None:
    baseline = _checked_baseline(baseline, len(accuracies))
  last, learned = accuracies[-1], np.diag(accuracies)
  forgetting = backward = forward = None
  reasons = {}
  if reason := _why_no_sequence(accuracies):
    reasons = dict.fromkeys(("forgetting", "backward_transfer"), reason)
  else:
    forgetting = float(np.mean(np.nanmax(accuracies[:-1, :-1], axis=0) - last[:-1]))
    backward = float(np.mean(last[:-1] - learned[:-1]))
  if reason := _why_no_forward_transfer(accuracies, baseline):
    reasons["forward_transfer"] = reason
  else:
    forward = float(np.mean(np.diag(accuracies, 1) - baseline[1:]))
  return Summary(
    average_accuracy=float(np.mean(last)),
    average_after=tuple(
      None if np.isnan(row[i]) else float(np.mean(row[: i + 1])) for i, row in enumerate(accuracies)
    ),
    forgetting=forgetting,
    backward_transfer=backward,
    forward_transfer=forward,
    reasons=reasons,
  )


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean and standard deviation (of the sample, N - 1) over seeds; None for the deviation of a single seed.

  >>> over_seeds([0.5, 1.0, 0.75])
  (0.75, 0.25)
  """
  if not len(values) or not all(map(math.isfinite, values)):
    raise ValueError(f"values must be one finite number a seed, at least one; got {list(values)}")
  return statistics.fmean(values), statistics.stdev(map(float, values)) if len(values) > 1 else None


def gate_overlap(is_open: np.ndarray) -> np.ndarray:
  """Intersection over union of the units that two tasks use.

  Two tasks that use nothing use the same: their overlap is 1, as every task's with itself.

  Args:
    is_open: `[T, U]` bool, whether a task uses a unit.
  Returns:
    `[T, T]` in [0, 1], symmetric.
  Raises:
    ValueError: not bool, or not `[T, U]`.

  >>> gate_overlap(np.array([[True, True, False], [False, True, True]]))
  array([[1.        , 0.33333333],
         [0.33333333, 1.        ]])
  """
  is_open = _checked_units("is_open", is_open).astype(np.int64)
  both = is_open @ is_open.T
  used = np.diag(both)
  either = used[:, None] + used - both
  return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def mean_overlap(overlap: np.ndarray) -> float | None:
  """Mean over pairs of tasks of `gate_overlap`, `[T, T]`; None for a single task.

  >>> mean_overlap(np.array([[1.0, 0.25], [0.25, 1.0]]))
  0.25
  """
  pairs = overlap[np.triu_indices(len(overlap), 1)]
  return float(pairs.mean()) if len(pairs) else None


class FilterUse(NamedTuple):
  """Counts `[T]` of a layer's units, task by task.

  Attributes:
    new: used by this task and by none before.
    reused: used by this task and owned by an older one.
    free: used by no task up to and including this one.
  """

  new: np.ndarray
  reused: np.ndarray
  free: np.ndarray


def filter_use(relevant: np.ndarray) -> FilterUse:
  """How many units each task takes, borrows from older tasks, and leaves to later ones.

  Units owned by older tasks that this one does not use are in none of the three.

  Args:
    relevant: `[T, U]` bool, whether a unit is relevant to a task.
  Raises:
    ValueError: not bool, or not `[T, U]`.

  >>> filter_use(np.array([[True, True, False, False], [False, True, True, False]]))
  FilterUse(new=array([2, 1]), reused=array([0, 1]), free=array([2, 1]))
  """
  relevant = _checked_units("relevant", relevant)
  owned = np.logical_or.accumulate(relevant)
  before = np.concatenate([np.zeros_like(owned[:1]), owned[:-1]])
  return FilterUse(
    *(np.sum(units, axis=1) for units in (relevant & ~before, relevant & before, ~owned))
  )


def _checked_accuracies(accuracies: np.ndarray) -> np.ndarray:
  accuracies = np.asarray(accuracies, np.float64)
  if accuracies.ndim != 2 or accuracies.shape[0] != accuracies.shape[1] or not accuracies.size:
    raise ValueError(f"accuracies must be [T, T], T >= 1; got {accuracies.shape}")
  missing, outside = np.isnan(accuracies), (accuracies < 0) | (accuracies > 1)
  if _only_last(accuracies):
    missing[:-1] = False
  for rule, bad in (
    ("known on every learned task (row i, columns up to i)", np.tril(missing)),
    ("in [0, 1]", outside),
  ):
    if bad.any():
      i, j = np.argwhere(bad)[0]
      raise ValueError(f"accuracies must be {rule}; got {accuracies[i, j]} in row {i}, column {j}")
  return accuracies


def _checked_baseline(baseline: np.ndarray, tasks: int) -> np.ndarray:
  baseline = np.asarray(baseline, np.float64)
  if baseline.shape != (tasks,) or not ((baseline >= 0) & (baseline <= 1)).all():
    raise ValueError(
      f"baseline must be [T] accuracies in [0, 1], T = {tasks}; got {baseline.tolist()}"
    )
  return baseline


def _only_last(accuracies: np.ndarray) -> bool:
  return bool(np.isnan(accuracies[:-1]).all())


def _why_no_sequence(accuracies: np.ndarray) -> str | None:
  if len(accuracies) == 1:
    return "there is one task only"
  return "all tasks are learned together" if _only_last(accuracies) else None


def _why_no_forward_transfer(accuracies: np.ndarray, baseline: np.ndarray | None) -> str | None:
  if reason := _why_no_sequence(accuracies):
    return reason
  if np.isnan(np.diag(accuracies, 1)).any():
    return "task heads are trained with their task: before it there is nothing to test"
  return "no accuracies of a random-initialised net are given" if baseline is None else None


def _checked_units(name: str, units: np.ndarray) -> np.ndarray:
  units = np.asarray(units)
  if units.ndim != 2 or units.dtype != bool or not units.size:
    raise ValueError(f"{name} must be bool [T, U], T and U >= 1; got {units.dtype} {units.shape}")
  return units
