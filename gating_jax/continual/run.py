"""Run of a task sequence with any method, in a run directory.

Reference: Abati et al., 2020.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from gating_jax import runner
from gating_jax.config_files import Config
from gating_jax.continual import compile, metrics, report
from gating_jax.continual.build import ContinualExperiment, build
from gating_jax.continual.method import LearnerState, Method
from gating_jax.continual.training import (
  TaskPredictions,
  TaskTest,
  finish_task,
  make_advance,
  make_evaluate,
  predict_tasks,
  test_tasks,
  validate,
)
from gating_jax.data.checked_files import write_unreadable
from gating_jax.reports import conclusion, tables
from gating_jax.reports import predictions as prediction_tables
from gating_jax.reports.text import format_percent
from gating_jax.terminal import TRAINING, say, working
from gating_jax.training import hosts, outlines
from gating_jax.training.best_state import BEST_DIR, BestState, forget_best, restore_best
from gating_jax.training.checkpoints import Checkpoint
from gating_jax.training.closed_gates import CLOSED, NOTHING_LEFT, ClosingWatch, Limit
from gating_jax.training.rundir import RunDir

# The name of pretraining in messages: no other phase comes before the training on a task.
_PRETRAINING = "generator's training step"


def run(config: Config, workdir: Path, mode: str) -> None:
  """Runs a mode of continual learning.

  Args:
    config: of the experiment.
    workdir: run directory.
    mode: one of those of `runner.run`; `compile` times networks that skip closed gates.
  """
  with runner.opening_data(ContinualLearning, config, workdir, mode=mode):
    experiment = build(config)
  runner.run(ContinualLearning(experiment), workdir, mode)


@dataclasses.dataclass(frozen=True)
class ContinualLearning(runner.Programme):
  """The learning of tasks one after the other, or of all at once."""

  experiment: ContinualExperiment
  modes: ClassVar[Mapping[str, Callable[..., None]]] = {"compile": compile.compile_run}
  untrained: ClassVar[str] = "no task has been learnt"

  @property
  def model(self) -> Method:
    """Returns the method, which has the networks."""
    return self.experiment.method

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names of all classes, in the order of learning."""
    return tuple(self.experiment.tasks[0].train.class_names)

  @property
  def title(self) -> str:
    """Describes the method and the data set."""
    return f"{self.config.method} on {self.config.data.name}"

  def describe(self, result: Mapping[str, Any]) -> str:
    """Describes the method, the data set and the tasks that this result is of."""
    return f"{self.title}, {len(result['task_names'])} of {len(self.experiment.tasks)} tasks"

  def render(self, result: Mapping[str, Any]) -> str:
    """Returns the tables of all tasks as text."""
    return tables.render_tasks(result)

  def main_numbers(self, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the average accuracies, with what was forgotten, and the MACs."""
    learnt, numbers = len(result["task_names"]), []
    for name, words in (("task_aware", "task known"), ("task_agnostic", "task unknown")):
      if name not in result:
        continue
      accuracy, forgetting = result[name]["average_accuracy"], result[name]["forgetting"]
      text = f"{format_percent(accuracy, 2)}, mean of {learnt} tasks"
      # A single task has nothing to forget.
      if forgetting is not None:
        text += f"; forgetting: {100 * forgetting:z.2f} points"
      numbers.append((f"accuracy, {words}", text))
    # With the task known; with it unknown the cost depends on how it is inferred.
    macs, dense = result["task_aware_macs"], result["dense_macs"]
    ratio = f"{format_percent(macs / dense, 1)} of the net without gates"
    numbers.append(("MACs per image, task known", f"{macs:,.0f}, {ratio}"))
    return numbers

  def next_modes(self) -> list[str]:
    """Returns `compile` where the method's networks can be compiled."""
    return [] if conclusion.refusal(compile.check_compilable, self.experiment) else ["compile"]

  def fresh(self) -> LearnerState:
    """Creates a learner that has learnt nothing."""
    return self.experiment.fresh()

  def restore(self, run_dir: RunDir) -> Checkpoint | None:
    """Restores the newest checkpoint; None where no task has been learnt yet."""
    found = super().restore(run_dir)
    # Within the first task there is nothing to test yet.
    return found if found is not None and int(found.state.task) else None

  def train(self, run_dir: RunDir) -> dict[str, Any] | None:
    """Learns the tasks that are left; returns the result, or None where it was asked to stop."""
    experiment = self.experiment
    outlines.write_outlines(run_dir.path, [task.train for task in experiment.tasks])
    hosts.on_writer(write_unreadable, run_dir.path, experiment.unreadable)
    with working("making the network", "up to half a minute"):
      training = runner.Training(run_dir.path, self.fresh(), experiment.total_steps)
    with training:
      training.begin(
        f"{self.title}, {len(experiment.tasks)} tasks",
        others=lambda step: {_PRETRAINING: _pretrain_steps_left(experiment, step)},
      )
      # One for all stages, whose last program serves the predictions at the end.
      evaluate = make_evaluate(experiment)
      if not self._learn(training, evaluate):
        return None
      learner, step = training.state, training.step
      with working("drawing pictures", "up to a minute", training.say):
        hosts.on_writer(report.write_pictures, experiment, learner, run_dir, training.journal, step)
    predictions = self._predict(step, learner, evaluate)
    with working("writing the report", "up to a minute"):
      result = metrics.collect_result(experiment, learner, predictions)
      report.write_report(experiment, learner, run_dir, step=step, predictions=predictions)
      if predictions is not None:
        listed = report.list_predictions(experiment, predictions)
        hosts.on_writer(prediction_tables.write_csv, run_dir.path, listed)
    return result | {"step": step}

  def _predict(
    self, step: int, learner: LearnerState, evaluate: TaskTest
  ) -> list[TaskPredictions] | None:
    """Predicts the test images of all tasks learnt; None within a task, which is half learnt."""
    if step % self.experiment.steps_per_task:
      return None
    learnt = int(learner.task)
    with working(f"predicting the images of {learnt} tasks", "up to a minute"):
      return predict_tasks(learner, evaluate, learnt)

  def _learn(self, training: runner.Training, evaluate: TaskTest) -> bool:
    """Learns the tasks that are left; returns False where the training was asked to stop."""
    experiment = self.experiment
    advance_on, watch = make_advance(experiment), watch_tasks()
    end_stage = _make_end_stage(experiment, training, evaluate)
    for task in experiment.stages:
      # A resumed run has learnt some tasks already; one may have been killed before it forgot.
      if task < int(training.state.task):
        forget_best(_best_folder(training.folder, task))
        continue
      # Fails before the training of a task that cannot be learnt.
      experiment.method.check_capacity(training.state)
      training.say(experiment.describe_training(task))
      advance = advance_on(task)
      first = experiment.first_step(task) + experiment.pretrain_steps
      with _EpochChoice(experiment, training, task, evaluate=evaluate) as choice:
        for phase in experiment.phases(task):
          program = TRAINING if phase.total_steps > first else _PRETRAINING
          if not training.run(advance, phase, watch=watch, evaluate=choice.test, program=program):
            return False
        choice.take_best()
      # The loop has ended at the last training step; the step that ends the stage is made here.
      end_stage(task)
      choice.forget()
    return True

  def test(self, step: int, learner: LearnerState) -> dict[str, Any]:
    """Tests a learner on all tasks that it has learnt; returns the result."""
    experiment, learnt, predictions = self.experiment, int(learner.task), None
    # Within a task the parameters are those of the task being learnt: only the table has results.
    if step % experiment.steps_per_task:
      say(
        "a task is being learnt; the results are those of the earlier tasks, measured at the end "
        "of the last of them"
      )
    else:
      with working(
        f"testing on the images of {learnt} tasks", "programs are compiled first, up to a minute"
      ):
        evaluate = make_evaluate(experiment)
        learner = test_tasks(learner, evaluate, learnt)
        predictions = predict_tasks(learner, evaluate, learnt)
    return metrics.collect_result(experiment, learner, predictions)

  def report(
    self, run_dir: RunDir, step: int, learner: LearnerState, *, notice: str
  ) -> dict[str, Any]:
    """Writes the page of a learner, with the tests that followed each task."""
    predictions = self._predict(step, learner, make_evaluate(self.experiment))
    with working("drawing the report", "up to a minute"):
      report.write_report(
        self.experiment, learner, run_dir, step=step, notice=notice, predictions=predictions
      )
    return metrics.collect_result(self.experiment, learner, predictions)


class _EpochChoice:
  """The choice of the state that ends a stage, on the validation images of its task.

  A context around the training of the stage. Without `eval_every` nothing is tested on the way,
  and the last state is taken.
  """

  def __init__(
    self, experiment: ContinualExperiment, training: runner.Training, task: int, evaluate: TaskTest
  ):
    self._experiment, self._training = experiment, training
    self._task, self._evaluate = task, evaluate
    self._folder = _best_folder(training.folder, task)
    self._best = BestState(self._folder) if experiment.steps_per_test else None

  def __enter__(self) -> _EpochChoice:
    return self

  def __exit__(self, *_: object) -> None:
    if self._best is not None:
      self._best.__exit__()

  def test(self) -> None:
    """Tests the state reached, and keeps it if it is the best so far."""
    assert self._best is not None, "the loop tests only where eval_every is set"
    self._best.offer(self._training.step, self._training.state, self._score())

  def take_best(self) -> None:
    """Gives the training the best state in place of the last one, at the same step."""
    # Without a test on the way there is nothing to choose from.
    if self._best is None or self._best.score == -math.inf:
      return
    training, score = self._training, self._score()
    found = None
    if self._best.score > score:
      found = restore_best(self._folder, training.state)
    if found is None:
      return
    training.say(
      f"taking the state of step {found.step}, with the best validation accuracy: "
      f"{format_percent(self._best.score, 2)}, {format_percent(score, 2)} at the end"
    )
    # Steps are counted over all tasks: all that is random in the next task depends on it.
    training.state = found.state.replace(step=training.state.step)

  def forget(self) -> None:
    """Removes the best state, once the stage that it ended is saved."""
    if self._best is not None:
      forget_best(self._folder)

  def _score(self) -> float:
    """Tests the state reached on the validation images, and notes the accuracy in the journal."""
    training = self._training
    with working("testing on validation images", "up to a minute", training.say):
      score = validate(self._experiment, training.state, self._task, evaluate=self._evaluate)
    training.journal.write(training.step, "validation", {"task_aware": score})
    training.say(f"validation accuracy {format_percent(score, 2)} with the task known")
    return score


def _best_folder(folder: Path, task: int) -> Path:
  """Returns the folder of a task's best state: scores of two tasks are not compared."""
  return folder / BEST_DIR / f"task{task + 1}"


def _pretrain_steps_left(experiment: ContinualExperiment, step: int) -> int:
  """Counts the pretraining steps of all stages from this step on."""
  # Every stage has the same number of steps, its pretraining first.
  ended, within = divmod(step, experiment.steps_per_task)
  all_left = experiment.pretrain_steps * (len(experiment.stages) - ended)
  return all_left - min(within, experiment.pretrain_steps)


def _make_end_stage(
  experiment: ContinualExperiment, training: runner.Training, evaluate: TaskTest
) -> Callable[[int], None]:
  """Makes the last step of a stage, `task -> None`: it ends the task and tests all so far."""
  make_counts = report.make_histograms(experiment)

  def end_stage(task):
    """Ends the stage of this task, notes its results and saves the learner."""
    with working(
      f"ending task {task + 1} of {len(experiment.tasks)} and testing on all tasks so far",
      "up to a minute",
      training.say,
    ):
      learner = finish_task(experiment, training.state, task, evaluate=evaluate)
      # The gates of all tasks change at once where tasks are learnt together.
      ended = range(task + 1) if experiment.method.simultaneous else [task]
      counts = {}
      for each in ended:
        counts |= make_counts(learner, each)
      free = metrics.free_units(experiment.method.footprint(learner), task + 1)
    # The end of a stage is a step of its own: a resumed run does not repeat it.
    training.state, training.step = learner, training.step + 1
    scores = metrics.mean_scores(learner)
    line = dict(scores)
    known = format_percent(scores["task_aware.average_accuracy"], 2)
    unknown = format_percent(scores["task_agnostic.average_accuracy"], 2)
    text = f"after task {task + 1}: accuracy {known} with the task known, {unknown} without"
    for layer, (count, units) in free.items():
      line[f"free_units/{layer}"] = float(count)
      text += f"\n  free units, {layer}: {count} of {units}"
    training.journal.write(training.step, "test", line)
    training.journal.write_histograms(training.step, "test", counts)
    training.say(text)
    training.save()

  return end_stage


def watch_tasks() -> ClosingWatch:
  """Returns the watch over task gates: filters that a task closes are left for the next tasks."""
  advice = (
    "lower gates.sparsity, or raise gates.patience, the number of epochs that a task first learns "
    "without it"
  )
  return ClosingWatch([Limit(CLOSED, NOTHING_LEFT, advice)])
