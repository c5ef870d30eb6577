"""Numbers of a continual-learning run: its result, and its scores after each task.

Axes: T tasks, S tasks learnt so far, U gated units of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gating_jax.continual import metrics
from gating_jax.continual.build import ContinualExperiment
from gating_jax.continual.method import Footprint, LearnerState, TaskTable


def collect_result(experiment: ContinualExperiment, learner: LearnerState) -> dict[str, Any]:
  """Collects the result of the tasks learnt so far.

  Args:
    experiment: of the run.
    learner: after one task or more.
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
    "task_aware": _accuracy_metrics(table.aware),
    "task_agnostic": _accuracy_metrics(table.agnostic),
    "task_classifier_accuracy": float(table.task[-1].mean()),
    "dense_macs": experiment.dense_macs,
    "dense_macs_reduced": experiment.dense_macs_reduced,
    "task_aware_macs": float(table.macs[-1].mean()),
    "task_agnostic_macs": float(table.agnostic_macs[-1].mean()),
    "params": footprint.params,
    # Images that a cumulative method trains on again are a cost too.
    "memory_mb": footprint.memory_mb + _kept_images(experiment, learnt),
  }
  if footprint.relevant:
    result["free_units"] = free_units(footprint, learnt)
    # Rows of later tasks use no unit yet: two of them would overlap fully.
    overlap = unit_overlap(footprint.relevant)[:learnt, :learnt]
    result |= {"gate_overlap": overlap.tolist(), "mean_gate_overlap": metrics.mean_overlap(overlap)}
  return result


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
    free = metrics.filter_use(units[:learnt]).free[-1]
    counts[layer] = (int(free), units.shape[1])
  return counts


def _accuracy_metrics(accuracies: np.ndarray) -> dict[str, Any]:
  """Returns an accuracy matrix and its metrics, for the result."""
  return {"accuracies": _with_nulls(accuracies), **vars(metrics.summarise(accuracies))}


def _kept_images(experiment: ContinualExperiment, learnt: int) -> float:
  """Measures, in 10**6 bytes, the images of earlier tasks that a method trains on again."""
  earlier = experiment.tasks[: learnt - 1] if experiment.method.cumulative else ()
  return sum(task.train.pixels.nbytes for task in earlier) / 1e6


def scores(learner: LearnerState) -> dict[str, float]:
  """Averages over the tasks learnt so far; names are those of the flattened result."""
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


def _with_nulls(matrix: np.ndarray) -> list[list[float | None]]:
  """Converts a matrix to rows for JSON, which has no NaN."""
  return np.where(np.isnan(matrix), None, matrix).tolist()


def unit_overlap(relevant: Mapping[str, np.ndarray]) -> np.ndarray:
  """Computes the `[T, T]` overlap of tasks over the units of all layers.

  Args:
    relevant: `[T, U]` bool by layer, the units that each task uses.
  """
  return metrics.gate_overlap(np.concatenate(list(relevant.values()), axis=1))
