"""The `--mode=compile` of continual learning: each task's network, compiled to skip closed gates.

Reference: Abati et al., 2020.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax

from gating_jax.continual.build import ContinualExperiment
from gating_jax.continual.method import LearnerState
from gating_jax.continual.registry import build_network
from gating_jax.inference import folding
from gating_jax.inference.compiled import Timing
from gating_jax.inference.conditional import compile_conditional
from gating_jax.inference.folded import FoldedNet
from gating_jax.reports import conclusion, timings
from gating_jax.training import rundir


def compile_run(
  experiment: ContinualExperiment, run_dir: rundir.RunDir, step: int, learner: LearnerState
) -> None:
  """Times every learnt task's network, the task known, and writes the tables.

  Each network is calibrated on the training images of its task.

  Args:
    experiment: of the run.
    run_dir: where the tables go.
    step: of the learner.
    learner: with the tasks learnt so far.
  Raises:
    RunDirError: the tables exist, or are being written.
    ValueError: as in `check_compilable`.
  """
  # Fails before anything is compiled.
  check_compilable(experiment)
  tables = timings.write_times(run_dir, step, _tables(experiment, jax.device_get(learner)))
  conclusion.conclude_times(run_dir, step, tables)


def check_compilable(experiment: ContinualExperiment) -> None:
  """Raises ValueError for a method without conditional gates per task, or an unfoldable model."""
  if experiment.method.task_net is None:
    raise ValueError(
      "method must have conditional gates per task to be compiled, as 'gates' and "
      f"'multitask_gates' have; got {experiment.config.method!r}"
    )
  # The methods' networks end at their features.
  folding.check_foldable(
    build_network(experiment.config, experiment.problem, classes=None, gated=True)
  )


def _tables(
  experiment: ContinualExperiment, learner: LearnerState
) -> Iterator[tuple[str, Sequence[Timing]]]:
  """Yields the title and the timings of each table, task by task."""
  for task in range(int(learner.task)):
    compiled = functools.partial(compile_conditional, folded_net(experiment, learner, task))
    images = timings.calibration_images(experiment.tasks[task].train, experiment.problem.normalise)
    for title, rows in timings.time_images(compiled, images):
      yield f"task {task + 1}, {experiment.task_names[task]}: {title}", rows


def folded_net(experiment: ContinualExperiment, learner: LearnerState, task: int) -> FoldedNet:
  """Folds the network of a learnt task, its head included.

  Args:
    experiment: of the run.
    learner: that has learnt the task.
    task: its index.
  Raises:
    ValueError: the model cannot be folded.
  """
  task_net = experiment.method.task_net
  assert task_net is not None  # which has been checked
  net = task_net(learner, task)
  # The model ends at its features; the head is the task's own.
  return dataclasses.replace(folding.fold(net.model, net.variables), classifier=net.classifier)
