"""Metrics of a task sequence, and the result of a run that has learnt one.

Metrics are accuracy, forgetting, backward transfer, and use of units by tasks. They take whole
arrays, in the order in which the tasks were learnt. `collect_result` puts them together with the
costs.

Axes: T tasks, S tasks learnt so far, U units.
Reference: Lopez-Paz and Ranzato, 2017 (backward transfer); Chaudhry et al., 2018 (forgetting).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gating_jax.analysis import scores
from gating_jax.continual.build import ContinualExperiment
from gating_jax.continual.method import Footprint, LearnerState, TaskTable
from gating_jax.continual.training import TaskPredictions


@dataclasses.dataclass(frozen=True)
class Summary:
  """Plain numbers, fractions in [-1, 1]; None where undefined.

  Attributes:
    average_accuracy: mean over tasks after the last one.
    average_after: mean over the tasks learnt so far, after each task; None where nothing was
      tested.
    forgetting: mean over all tasks but the last of best minus final accuracy; negative where tasks
      gained.
    backward_transfer: mean over all tasks but the last of the gain since the task was learnt.
    reasons: why a number is None, by its name.
  """

  average_accuracy: float
  average_after: tuple[float | None, ...]
  forgetting: float | None
  backward_transfer: float | None
  reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


def summarise(accuracies: np.ndarray) -> Summary:
  """Computes the usual metrics of an accuracy matrix R.

      average    = mean_j R[T, j]
      forgetting = mean_(j<T) (max_(i<T) R[i, j] - R[T, j])
      backward   = mean_(j<T) (R[T, j] - R[j, j])

  Args:
    accuracies: `[T, T]`, row i after learning task i, column j on task j, in [0, 1]; NaN is allowed
      above the diagonal, and in all rows but the last where all tasks are learnt together.
  Raises:
    ValueError: a wrong shape, an accuracy outside [0, 1], or NaN on a learnt task, with its
      position.

  >>> summarise(np.array([[0.75, 0.5], [0.5, 1.0]]))  # doctest: +NORMALIZE_WHITESPACE
  Summary(average_accuracy=0.75, average_after=(0.75, 0.75), forgetting=0.25,
          backward_transfer=-0.25, reasons={})
  """
  accuracies = _checked_accuracies(accuracies)
  # R[j, j] is the accuracy just after task j.
  last, just_learnt = accuracies[-1], np.diag(accuracies)
  # Undefined for a single task, and for tasks learnt together: there is no earlier accuracy.
  forgetting = backward = None
  reasons: dict[str, str] = {}
  if reason := _why_no_sequence(accuracies):
    reasons |= {"forgetting": reason, "backward_transfer": reason}
  else:
    # forgetting = mean_(j<T) (max_(i<T) R[i, j] - R[T, j]); R[i, j] is NaN for i < j.
    forgetting = float(np.mean(np.nanmax(accuracies[:-1, :-1], axis=0) - last[:-1]))
    backward = float(np.mean(last[:-1] - just_learnt[:-1]))
  average_after = []
  for i, row in enumerate(accuracies):
    # NaN where nothing was tested after task i.
    average_after.append(None if np.isnan(row[i]) else float(np.mean(row[: i + 1])))
  return Summary(
    average_accuracy=float(np.mean(last)),
    average_after=tuple(average_after),
    forgetting=forgetting,
    backward_transfer=backward,
    reasons=reasons,
  )


def gate_overlap(is_open: np.ndarray) -> np.ndarray:
  """Computes the intersection over union of the units that each pair of tasks uses.

  Two tasks that use no unit use the same: their overlap is 1, as is every task's with itself.

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
  # Pairwise intersections in one product; a bool product would be a logical one, hence the cast.
  both = is_open @ is_open.T
  used = np.diag(both)
  # |A or B| = |A| + |B| - |A and B|
  either = used[:, None] + used - both
  return np.where(either > 0, both / np.maximum(either, 1), 1.0)


def unit_overlap(relevant: Mapping[str, np.ndarray]) -> np.ndarray:
  """Computes the `[T, T]` overlap of tasks over the units of all layers.

  Args:
    relevant: `[T, U]` bool by layer, the units that each task uses.
  """
  return gate_overlap(np.concatenate(list(relevant.values()), axis=1))


def mean_overlap(overlap: np.ndarray) -> float | None:
  """Averages `gate_overlap`, `[T, T]`, over pairs of tasks; None for a single task.

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
  """Counts the units that each task takes, reuses from older tasks and leaves free.

  Units owned by older tasks that this one does not use are in none of the three.

  Args:
    relevant: `[T, U]` bool, whether a unit is relevant to a task.
  Raises:
    ValueError: not bool, or not `[T, U]`.

  >>> filter_use(np.array([[True, True, False, False], [False, True, True, False]]))
  FilterUse(new=array([2, 1]), reused=array([0, 1]), free=array([2, 1]))
  """
  relevant = _checked_units("relevant", relevant)
  # A task owns a unit for all tasks after it.
  owned = np.logical_or.accumulate(relevant)
  before = np.concatenate([np.zeros_like(owned[:1]), owned[:-1]])
  return FilterUse(
    new=np.sum(relevant & ~before, axis=1),
    reused=np.sum(relevant & before, axis=1),
    free=np.sum(~owned, axis=1),
  )


def collect_result(
  experiment: ContinualExperiment,
  learner: LearnerState,
  predictions: Sequence[TaskPredictions] | None = None,
) -> dict[str, Any]:
  """Collects the result of the tasks learnt so far.

  Args:
    experiment: of the run.
    learner: after one task or more.
    predictions: of all tasks learnt, by this learner; None leaves out scores of single classes.
  Returns:
    the result as `reports.tables.render_tasks` wants it.
  """
  learnt = int(learner.task)

  def of_learnt(matrix):
    """Returns the `[S, S]` part of a table of the tasks learnt, in float64."""
    return np.asarray(matrix, np.float64)[:learnt, :learnt]

  table = TaskTable(*map(of_learnt, learner.table))
  footprint = experiment.method.footprint(learner)
  result = {
    "method": experiment.config.method,
    "task_names": experiment.task_names[:learnt],
    "task_aware": _accuracy_metrics(np.asarray(table.aware)),
    "task_agnostic": _accuracy_metrics(np.asarray(table.agnostic)),
    # The last row: tests of all tasks after the last one learnt.
    "task_classifier_accuracy": float(table.task[-1].mean()),
    "dense_macs": experiment.dense_macs,
    "dense_macs_reduced": experiment.dense_macs_reduced,
    "task_aware_macs": float(table.macs[-1].mean()),
    "task_agnostic_macs": float(table.agnostic_macs[-1].mean()),
    "params": footprint.params,
    # Images that a cumulative method trains on again are a cost too.
    "memory_mb": footprint.memory_mb + _kept_images(experiment, learnt),
    # In the order of learning; empty for places of a task that have none.
    "classes": list(experiment.tasks[0].train.class_names),
    **experiment.file_entries(),
  }
  for setting, accuracies in (("task_aware", table.aware), ("task_agnostic", table.agnostic)):
    known, last = setting == "task_aware", np.asarray(accuracies)[-1]
    result[setting] |= _baselines(experiment, last, known=known)
    if predictions is not None:
      result[setting] |= _class_scores(experiment, predictions, known=known)
  if footprint.relevant:
    result["free_units"] = free_units(footprint, learnt)
    # Rows of later tasks use no unit yet: two of them would overlap fully.
    overlap = unit_overlap(footprint.relevant)[:learnt, :learnt]
    result |= {"gate_overlap": overlap.tolist(), "mean_gate_overlap": mean_overlap(overlap)}
  return result


def _baselines(
  experiment: ContinualExperiment, accuracies: np.ndarray, *, known: bool
) -> dict[str, float]:
  """Returns the interval of the average accuracy, and that of the most common class.

  Args:
    experiment: of the run.
    accuracies: `[S]`, on each task learnt, after the last one.
    known: whether the task is known at the test.
  """
  images, largest = [], []
  for task in experiment.tasks[: len(accuracies)]:
    labels = np.asarray(task.test.labels)
    images.append(len(labels))
    largest.append(float(np.unique(labels, return_counts=True)[1].max() / len(labels)))
  # With the task unknown, one class is right on its own task alone.
  majority = np.mean(largest) if known else np.max(largest) / len(largest)
  interval = scores.mean_interval(accuracies.tolist(), images)
  entries = scores.interval_entries("average_accuracy", interval)
  return entries | {"majority_rate": float(majority)}


def _class_scores(
  experiment: ContinualExperiment, predictions: Sequence[TaskPredictions], *, known: bool
) -> dict[str, Any]:
  """Returns the scores of single classes and their confusions, over the tasks learnt."""
  names = experiment.tasks[0].train.class_names[: len(predictions) * experiment.problem.classes]
  confusion = np.zeros((len(names), len(names)), np.int64)
  trained = np.zeros(len(names), np.int64)
  for task, of_task in zip(experiment.tasks[: len(predictions)], predictions, strict=True):
    predicted = of_task.known if known else of_task.chosen
    confusion += scores.count_confusion(of_task.labels, predicted, len(names))
    trained += scores.count_labels(task.train.labels, len(names))
  # Places without a class have no name.
  own = [place for place, name in enumerate(names) if name]
  found = scores.classes_of_score(
    confusion[np.ix_(own, own)], [names[place] for place in own], trained=trained[own]
  )
  # That of `_baselines` is a mean over tasks, as the average accuracy is.
  del found["majority_rate"]
  return found


def mean_scores(learner: LearnerState) -> dict[str, float]:
  """Averages accuracy and MACs over the tasks learnt so far, by their names in a flat result."""
  learnt, table = int(learner.task), learner.table

  def mean(matrix):
    """Averages the entries of the last task learnt."""
    # Row i is measured after task i; later columns are of tasks not learnt yet.
    return float(np.mean(np.asarray(matrix)[learnt - 1, :learnt]))

  return {
    "task_aware.average_accuracy": mean(table.aware),
    "task_agnostic.average_accuracy": mean(table.agnostic),
    "task_aware_macs": mean(table.macs),
    "task_agnostic_macs": mean(table.agnostic_macs),
  }


def free_units(footprint: Footprint, learnt: int) -> dict[str, tuple[int, int]]:
  """Counts the units that no task learnt so far needs.

  Args:
    footprint: of the learner.
    learnt: number of tasks learnt.
  Returns:
    `(free, all)` units by layer; empty where tasks own no units.
  """
  counts = {}
  for layer, units in footprint.relevant.items():
    free = filter_use(units[:learnt]).free[-1]
    counts[layer] = (int(free), units.shape[1])
  return counts


def _accuracy_metrics(accuracies: np.ndarray) -> dict[str, Any]:
  """Returns an accuracy matrix and its metrics, for the result."""
  metrics = {"accuracies": _with_nulls(accuracies), **vars(summarise(accuracies))}
  # It would need tests of an untrained network, which no run makes. Results had the key from the
  # beginning, so whoever reads them may expect it.
  return metrics | {"forward_transfer": None}


def _kept_images(experiment: ContinualExperiment, learnt: int) -> float:
  """Measures, in 10**6 bytes, the images of earlier tasks that a method trains on again."""
  earlier = experiment.tasks[: learnt - 1] if experiment.method.cumulative else ()
  return sum(task.train.pixels.nbytes for task in earlier) / 1e6


def _with_nulls(matrix: np.ndarray) -> list[list[float | None]]:
  """Converts a matrix to rows for JSON, which has no NaN."""
  return np.where(np.isnan(matrix), np.array(None, object), matrix).tolist()


def _checked_accuracies(accuracies: np.ndarray) -> np.ndarray:
  """Returns an accuracy matrix in float64, after checking it as `summarise` says."""
  accuracies = np.asarray(accuracies, np.float64)
  if accuracies.ndim != 2 or accuracies.shape[0] != accuracies.shape[1] or not accuracies.size:
    raise ValueError(f"accuracies must be [T, T], T >= 1; got {accuracies.shape}")
  # Above the diagonal the tasks are not learnt yet, and NaN is allowed.
  missing = np.tril(np.isnan(accuracies))
  if _only_last(accuracies):
    # Tasks learnt together are tested once, in the last row.
    missing[:-1] = False
  _check_none(accuracies, missing, "known on every learnt task (row i, columns up to i)")
  _check_none(accuracies, (accuracies < 0) | (accuracies > 1), "in [0, 1]")
  return accuracies


def _check_none(accuracies: np.ndarray, wrong: np.ndarray, rule: str) -> None:
  """Raises ValueError where an accuracy is wrong, with its position."""
  if wrong.any():
    i, j = np.argwhere(wrong)[0]
    raise ValueError(f"accuracies must be {rule}; got {accuracies[i, j]} in row {i}, column {j}")


def _only_last(accuracies: np.ndarray) -> bool:
  """Tests whether only the last row was tested: all tasks are learnt together."""
  return bool(np.isnan(accuracies[:-1]).all())


def _why_no_sequence(accuracies: np.ndarray) -> str | None:
  """Explains why nothing can be forgotten; None where it can."""
  if len(accuracies) == 1:
    return "there is only one task"
  return "all tasks are learnt together" if _only_last(accuracies) else None


def _checked_units(name: str, units: np.ndarray) -> np.ndarray:
  """Returns `[T, U]` bool, after checking that it is that."""
  units = np.asarray(units)
  if units.ndim != 2 or units.dtype != bool or not units.size:
    raise ValueError(f"{name} must be bool [T, U], T and U >= 1; got {units.dtype} {units.shape}")
  return units
