"""Training steps of continual learning, ends of tasks and tests, for any method.

Axes: B examples on this device, M resident images, T tasks.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.continual.build import ContinualExperiment
from gating_jax.continual.method import Batch, LearnerState, Method, TaskData, TaskTable
from gating_jax.data import image_sets
from gating_jax.data.image_sets import Images
from gating_jax.ops.collectives import mean_over_devices
from gating_jax.training import devices, hosts
from gating_jax.training.devices import value_and_grad_over_devices
from gating_jax.training.steps import Advance
from gating_jax.types import Array

# The test of one task: `(learner, task, seen, split="test") -> ` its entries of the table, and
# `predictions`; the split is `test` or `validation`.
TaskTest = Callable[..., dict[str, Any]]

_AUGMENT, _METHOD = range(2)


def make_step(
  method: Method,
  optimiser: optax.GradientTransformation,
  prepare: Callable[[Array, Array], Array],
  *,
  seed: int,
  steps_per_epoch: int,
  axis_name: Hashable | None = None,
) -> Callable[[LearnerState, Array, Array, Array], tuple[LearnerState, dict[str, Array]]]:
  """Makes the training step of a method.

  Metrics are scalars over the whole batch. All randomness is a function of `seed` and
  `learner.step`.

  Args:
    method: of continual learning.
    optimiser: changes the parameters.
    prepare: `(key, pixels) -> x`, augments and normalises.
    seed: of all randomness.
    steps_per_epoch: steps in an epoch of a task.
    axis_name: mapped device axis, if any.
  Returns:
    `(learner, pixels [B, ...], labels [B], first_step) -> (learner, metrics)`, where `first_step`
      is the first step of the task.
  """

  def step(learner, pixels, labels, first_step):
    """Takes one training step on `[B, H, W, D]` pixels and `[B]` labels."""
    # By the step alone, so that a resumed run draws the same.
    key = jax.random.fold_in(jax.random.key(seed), learner.step)
    # `learner.step` counts over all tasks; a schedule of the method counts from the task's first
    # step.
    epochs, place = jnp.divmod(learner.step - first_step, steps_per_epoch)
    batch = Batch(
      x=prepare(jax.random.fold_in(key, _AUGMENT), pixels),
      labels=labels,
      key=jax.random.fold_in(key, _METHOD),
      epoch=epochs + place / steps_per_epoch,
      # 0 for the first step of an epoch, 1 for the last; an epoch of one step has only 0.
      place=place / max(1, steps_per_epoch - 1),
    )
    differentiate = value_and_grad_over_devices(
      _with_total(method.loss), axis_name=axis_name, has_aux=True
    )
    (_, (terms, batch_stats)), grads = differentiate(learner.params, learner, batch)
    metrics = mean_over_devices(terms, axis_name)
    # Before the optimiser: the gradient of the loss, without momentum and weight decay.
    grads = method.gradient(grads, learner, batch)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    updates, opt_state = optimiser.update(grads, learner.opt_state, learner.params)
    # After the optimiser: only here are momentum and weight decay part of the step.
    updates, memory = method.update(updates, grads, learner)
    params = optax.apply_updates(learner.params, updates)
    metrics["state_norm"] = optax.tree.norm((params, batch_stats))
    return learner.replace(
      step=learner.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
      memory=memory,
    ), metrics

  return step


def _with_total(loss):
  """Makes a loss that returns its total among the terms."""

  def with_total(params, learner, batch):
    """Returns the total loss, and its terms with the total among them."""
    total, (terms, batch_stats) = loss(params, learner, batch)
    return total, ({"loss": total, **terms}, batch_stats)

  return with_total


def make_advance(experiment: ContinualExperiment) -> Callable[[int], Advance]:
  """Makes the training steps of each stage, on all devices.

  Returns:
    `task -> (learner, step) -> (learner, metrics)`, for the stage that ends with this task.
  """
  config, method = experiment.config, experiment.method
  step = make_step(
    method,
    experiment.optimiser,
    experiment.problem.prepare,
    seed=config.seed,
    steps_per_epoch=experiment.steps_per_epoch,
    axis_name=devices.AXIS,
  )
  # Mapped once, not for each task: one program serves all of them.
  train = devices.map_over_devices(
    step,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
    results=(devices.REPLICATED, devices.REPLICATED),
    backend=config.devices.backend,
    donate=(0,),
  )
  pretrain = method.pretrain_step and devices.map_over_devices(
    method.pretrain_step,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
    results=(devices.REPLICATED, devices.REPLICATED),
    backend=config.devices.backend,
    donate=(0,),
  )

  def of_task(task):
    """Makes the steps of the stage that ends with this task."""
    read = _make_read(experiment, task)
    begin = experiment.first_step(task)
    # The stage begins with the pretraining; schedules count from the first step of the training.
    first = begin + experiment.pretrain_steps

    def advance(learner, step):
      """Takes one step, of the pretraining or of the training."""
      if pretrain is not None and step < first:
        pixels, labels = read(step - begin, experiment.pretrain_batch_size)
        learner, metrics = pretrain(learner, pixels, labels)
      else:
        pixels, labels = read(step - first, config.optim.batch_size)
        learner, metrics = train(learner, pixels, labels, np.int32(first))
      # The loop takes metrics of several steps a call.
      return learner, {name: value[None] for name, value in metrics.items()}

    return advance

  return of_task


def _make_read(
  experiment: ContinualExperiment, task: int
) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
  """Makes `(step, batch_size) -> (pixels, labels)` of the stage that ends with this task."""
  sets = training_sets(experiment, task)
  # Every task has a number of its own below T, so that no two runs or tasks share an order.
  seed = experiment.config.seed * len(experiment.tasks)
  process = (jax.process_index(), jax.process_count())

  def read(step, size):
    """Reads this process's part of a batch: pixels `[B, H, W, D]` and labels `[B]`."""
    pixels, labels = [], []
    for number, images in sets.items():
      index = image_sets.process_indices(
        seed + number, step, 1, batch_size=size, examples=len(images), process=process
      )[:, 0]
      of_set = images.read(index)
      pixels.append(of_set[0])
      labels.append(of_set[1])
    # `Method.simultaneous`: task t at positions t, T + t, 2 T + t, ...
    return image_sets.interleave(pixels), image_sets.interleave(labels)

  return read


def training_sets(experiment: ContinualExperiment, task: int) -> dict[int, Images]:
  """Returns the training sets of the stage that ends with this task.

  Args:
    experiment: of the run.
    task: the last task of the stage.
  Returns:
    sets by number; every batch has the same number of images of each.
  """
  method = experiment.method
  first = 0 if method.cumulative or method.simultaneous else task
  sets = [each.train for each in experiment.tasks[first : task + 1]]
  return dict(enumerate(sets)) if method.simultaneous else {task: image_sets.join(sets)}


def end_task(
  method: Method,
  optimiser: optax.GradientTransformation,
  learner: LearnerState,
  data: TaskData,
  *,
  learnt: int,
  key: Array,
) -> LearnerState:
  """Takes the step that ends a task: the next one begins with a fresh optimiser.

  Args:
    method: of continual learning.
    optimiser: as in `make_step`.
    learner: at the end of the task's training.
    data: the images of the task.
    learnt: number of tasks learnt with this one.
    key: of all randomness.
  """
  learner = method.end_task(learner, data, key)
  learner = learner.replace(
    step=learner.step + 1,
    task=jnp.full_like(learner.task, learnt),
    opt_state=optimiser.init(learner.params),
  )
  # The step donates its buffers: arrays that a method keeps twice need one each.
  return jax.tree.map(jnp.copy, learner)


def finish_task(
  experiment: ContinualExperiment, learner: LearnerState, task: int, *, evaluate: TaskTest
) -> LearnerState:
  """Ends a stage: ends its task, tests all tasks so far and prepares for the next one.

  Args:
    experiment: of the run.
    learner: at the end of the stage's training.
    task: the last task of the stage.
    evaluate: as `make_evaluate` returns it.
  Returns:
    the learner with which the next stage begins.
  """
  return test_tasks(_end_stage(experiment, learner, task), evaluate, task + 1)


def validate(
  experiment: ContinualExperiment, learner: LearnerState, task: int, *, evaluate: TaskTest
) -> float:
  """Tests a learner on the validation images of a stage, as if the stage ended here.

  Args:
    experiment, learner, task, evaluate: as in `finish_task`; the learner is not changed.
  Returns:
    the accuracy with the task known; the mean over tasks that are learnt at once.
  """
  # Methods predict with what they keep of a task at its end, such as its gates.
  ended = _end_stage(experiment, learner, task)
  learnt = range(task + 1) if experiment.method.simultaneous else [task]
  tested = [evaluate(ended, each, task + 1, split="validation") for each in learnt]
  return float(np.mean([of_task["aware"] for of_task in tested]))


def _end_stage(experiment: ContinualExperiment, learner: LearnerState, task: int) -> LearnerState:
  """Ends the last task of a stage, or all tasks where they are learnt at once."""
  method = experiment.method
  # Tasks that are learnt at once end together, on the images of all of them.
  ended = experiment.tasks if method.simultaneous else experiment.tasks[task : task + 1]
  train = image_sets.join([each.train for each in ended])
  validation = image_sets.join([each.validation for each in ended])
  learner = end_task(
    method,
    experiment.optimiser,
    learner,
    data=TaskData(*train.read(slice(None)), *validation.read(slice(None))),
    learnt=task + 1,
    key=experiment.key(task + 1),
  )
  return devices.replicate(learner)


def test_tasks(learner: LearnerState, evaluate: TaskTest, learnt: int) -> LearnerState:
  """Tests all tasks learnt, and fills the table's row of the last one.

  Args:
    learner: that has learnt the tasks.
    evaluate: as `make_evaluate` returns it.
    learnt: number of tasks learnt.
  Returns:
    the learner with the new table.
  """
  tested = [evaluate(learner, task, learnt) for task in range(learnt)]
  # Earlier rows stay as they were measured.
  columns = {}
  for name, column in learner.table._asdict().items():
    row = np.asarray([of_task[name] for of_task in tested], np.float32)
    columns[name] = np.asarray(column.at[learnt - 1, :learnt].set(row))
  return learner.replace(table=devices.replicate(TaskTable(**columns)))


class TaskPredictions(NamedTuple):
  """Classes of the images of a task, `[M]` each, in the order of learning.

  Attributes:
    labels: the true ones.
    known: predicted with the task known.
    chosen: predicted with the task unknown.
  """

  labels: np.ndarray
  known: np.ndarray
  chosen: np.ndarray


def predict_tasks(learner: LearnerState, evaluate: TaskTest, learnt: int) -> list[TaskPredictions]:
  """Predicts the classes of the test images of all tasks learnt.

  Args:
    learner, evaluate, learnt: as in `test_tasks`.
  """
  return [evaluate(learner, task, learnt)["predictions"] for task in range(learnt)]


def make_evaluate(experiment: ContinualExperiment) -> TaskTest:
  """Makes the test of one task.

  Returns:
    `(learner, task, seen, split="test") -> ` the entries of the table for the images of `task` in
    this split, and their `predictions`.
  """
  config, method, problem = experiment.config, experiment.method, experiment.problem

  # Shapes depend on the number of tasks seen: each has its own program, and only the newest is
  # needed.
  @functools.lru_cache(maxsize=1)
  def mapped(seen):
    """Makes the test of one batch after so many tasks, on all devices."""

    def test(learner, pixels, labels, task):
      """Tests `[B, H, W, D]` pixels with `[B]` labels; each result is `[B]`."""
      predicted = method.predict(learner, problem.normalise(pixels), task, seen)
      aware, agnostic = predicted.aware, predicted.agnostic
      # Outputs that stand for no class are never chosen.
      if problem.own_classes is not None:
        present = jnp.asarray(problem.present)
        aware = jnp.where(present[task], aware, -jnp.inf)
        agnostic = jnp.where(present.ravel(), agnostic, -jnp.inf)
      chosen = jnp.argmax(agnostic, axis=-1)
      # Classes are numbered task by task.
      known = jnp.argmax(aware, axis=-1) + task * problem.classes
      return {
        "aware": known == labels,
        "agnostic": chosen == labels,
        "task": chosen // problem.classes == task,
        "macs": predicted.macs,
        "agnostic_macs": predicted.agnostic_macs,
        "known_class": known,
        "chosen_class": chosen,
      }

    return devices.map_over_devices(
      test,
      args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
      results=devices.BATCH,
      backend=config.devices.backend,
    )

  def evaluate(learner, task, seen, split="test"):
    """Returns the mean results on the images of `task`, and their `TaskPredictions`."""
    run, values = mapped(seen), collections.defaultdict(list)
    images = getattr(experiment.tasks[task], split)
    for batch, count in image_sets.padded_batches(images, problem.batch_size):
      results = hosts.allgather(run(learner, *hosts.local_shard(batch), np.int32(task)))
      # The last batch is padded: only its first `count` images are new.
      for name, of_batch in results.items():
        values[name].append(np.asarray(of_batch)[:count])
    found: dict[str, Any] = {}
    for name in TaskTable._fields:
      # float64: a float32 mean of MACs loses digits.
      found[name] = float(np.concatenate(values[name]).mean(dtype=np.float64))
    found["predictions"] = TaskPredictions(
      labels=np.asarray(images.labels),
      known=np.concatenate(values["known_class"]),
      chosen=np.concatenate(values["chosen_class"]),
    )
    return found

  return evaluate
