"""The parts of an experiment of continual learning, built from a config.

All settings are checked before the data are read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gating_jax.config_files import Config, completed
from gating_jax.continual.method import LearnerState, Method, Problem, TaskTable
from gating_jax.continual.registry import (
  METHODS,
  REHEARSALS,
  build_method,
  build_network,
  gradient_clip,
)
from gating_jax.data import augment, image_sets
from gating_jax.data.tasks import Task, make_tasks
from gating_jax.models.resnets import RESNETS
from gating_jax.models.summary import model_summary, reduced_macs
from gating_jax.models.vggs import VGGS
from gating_jax.training import devices, loop, optim, settings
from gating_jax.training.outlines import Outline


@dataclasses.dataclass(frozen=True)
class ContinualExperiment:
  """An experiment as a config describes it.

  Attributes:
    config: as given.
    tasks: the sequence of tasks, with their images.
    problem: what the method learns.
    method: of continual learning.
    dense_macs, dense_macs_reduced: multiply-accumulates of one image in the network without gates,
      with the head of one task; for the second see `models.summary.reduced_macs`.
    optimiser: fresh for every task.
    steps_per_epoch: steps in an epoch of any task.
  """

  config: Config
  tasks: tuple[Task, ...]
  problem: Problem
  method: Method
  dense_macs: int
  dense_macs_reduced: int
  optimiser: optax.GradientTransformation
  steps_per_epoch: int

  @property
  def unreadable(self) -> dict[str, str]:
    """Returns the reason for each file of the data that could not be read, by its path."""
    found: dict[str, str] = {}
    # All tasks are of the same two splits.
    for split in (self.tasks[0].train, self.tasks[0].test):
      found |= getattr(split, "unreadable", {})
    return found

  def file_entries(self) -> dict[str, int]:
    """Returns the entry of a result with the number of these files; none for data without files."""
    if not image_sets.has_folder(self.config.data.name):
      return {}
    return {"unreadable_files": len(self.unreadable)}

  @property
  def pretrain_steps(self) -> int:
    """Returns the steps of the phase before each task's own training."""
    return self.config.generator.steps if self.method.pretrain_step else 0

  @property
  def pretrain_batch_size(self) -> int:
    """Returns the images of one step of pretraining."""
    return self.config.generator.batch_size * self.config.generator.critic_steps

  @property
  def stages(self) -> range:
    """Returns the last task of each stage of learning.

    These are all tasks, or only the last one where all are learnt at once.
    """
    count = len(self.tasks)
    return range(count - 1, count) if self.method.simultaneous else range(count)

  @property
  def steps_per_task(self) -> int:
    """Counts the steps of a stage: its pretraining, its training, and one for its end."""
    return self.pretrain_steps + _training_steps(self.config.optim, self.steps_per_epoch) + 1

  @property
  def total_steps(self) -> int:
    """Counts the steps of the whole run."""
    return self.steps_per_task * len(self.stages)

  @property
  def steps_per_test(self) -> int:
    """Returns the steps between tests on a task's own validation images; 0 for none."""
    epochs = self.config.eval_every
    return max(1, round(epochs * self.steps_per_epoch)) if epochs else 0

  def first_step(self, task: int) -> int:
    """Returns the first step of the stage that ends with this task."""
    return self.steps_per_task * self.stages.index(task)

  def describe_training(self, task: int) -> str:
    """Returns a line that says how long a stage trains, in steps and in epochs of its images."""
    steps = _training_steps(self.config.optim, self.steps_per_epoch)
    learnt = range(task + 1) if self.method.simultaneous or self.method.cumulative else [task]
    images = sum(len(self.tasks[each].train) for each in learnt)
    # Tasks that are learnt at once have a batch each.
    batches = len(self.tasks) if self.method.simultaneous else 1
    epochs = steps * batches * self.config.optim.batch_size / images
    return f"task {task + 1}: {steps} steps, {epochs:.1f} epochs of {images:,} images"

  @property
  def task_names(self) -> list[str]:
    """Returns the names of the classes of each task."""
    # Every set has the names of all classes, in the order of learning.
    classes, count = self.tasks[0].train.class_names, self.problem.classes
    names = []
    for task in range(len(self.tasks)):
      # Places without a class have no name.
      own = filter(None, classes[task * count : (task + 1) * count])
      names.append(", ".join(own))
    return names

  def phases(self, task: int) -> list[loop.LoopSettings]:
    """Returns settings of the pretraining and the training of a task's stage."""
    first = self.first_step(task)

    def until(end, eval_every):
      """Returns the settings of a phase that ends with this step."""
      return loop.LoopSettings(
        end,
        log_every=self.config.log_every,
        checkpoint_every=self.config.checkpoint_every,
        eval_every=eval_every,
        # Epochs are those of the task.
        eval_from=first + self.pretrain_steps,
      )

    # The last step of a stage ends the task and is no training step.
    training = until(first + self.steps_per_task - 1, self.steps_per_test)
    if not self.pretrain_steps:
      return [training]
    return [until(first + self.pretrain_steps, 0), training]

  def key(self, purpose: int) -> jax.Array:
    """Returns a key of the run that no training step uses."""
    # Training steps fold the step into a key of the default kind: another kind gives other streams.
    return jax.random.fold_in(jax.random.key(self.config.seed, impl="rbg"), purpose)

  def fresh(self) -> LearnerState:
    """Creates a learner that has learnt nothing."""

    # One program is faster than an operation for every parameter.
    @jax.jit
    def init(key):
      """Initialises the learner from a PRNG key."""
      start = self.method.init(key)

      def untested():
        """Creates a part of the table: each needs a buffer of its own, to be donated."""
        # float32 as in `test_tasks`: another type would compile the step again for the second task.
        return jnp.full((len(self.tasks),) * 2, jnp.nan, jnp.float32)

      return LearnerState(
        step=jnp.zeros((), jnp.int32),
        task=jnp.zeros((), jnp.int32),
        params=start.params,
        batch_stats=start.batch_stats,
        opt_state=self.optimiser.init(start.params),
        memory=start.memory,
        table=TaskTable(*[untested() for _ in TaskTable._fields]),
      )

    return init(self.key(0))


def build(config: Config, outlines: Sequence[Outline] | None = None) -> ContinualExperiment:
  """Checks every setting, then reads the data.

  Args:
    config: of continual learning.
    outlines: of the tasks' training sets, to be used in place of the data.
  Raises:
    ValueError: a setting breaks its rule; the message names the field.
    DatasetNotPreparedError: the data set is not on disk.
  """
  config = completed(config)
  data, training = config.data, config.optim
  _check(config)
  sequence = _read_tasks(config) if outlines is None else tuple(map(_task_of, outlines))
  shape = sequence[0].train.shape
  settings.check_channels(data, shape[-1])
  # The smallest task sets the steps of an epoch, the same for all tasks.
  smallest = min(len(task.train) for task in sequence)
  if training.batch_size > smallest:
    raise ValueError(
      f"optim.batch_size must be at most {smallest}, the training images of the smallest task; "
      f"got {training.batch_size}"
    )
  problem = _build_problem(config, tasks=len(sequence), shape=shape)
  method = build_method(config, problem)
  # A step of pretraining takes one batch for each update of the critic.
  pretrain_batch = config.generator.batch_size * config.generator.critic_steps
  if method.pretrain_step and pretrain_batch > smallest:
    raise ValueError(
      f"generator.batch_size times generator.critic_steps must be at most {smallest}, the training "
      f"images of the smallest task; got {pretrain_batch}"
    )
  per_epoch = smallest // training.batch_size
  # The network without gates is what costs are compared with; at test time one head runs.
  dense = build_network(config, problem, classes=problem.classes, gated=False)
  return ContinualExperiment(
    config=config,
    tasks=sequence,
    problem=problem,
    method=method,
    dense_macs=model_summary(dense, problem.shape).macs,
    dense_macs_reduced=reduced_macs(dense, problem.shape),
    optimiser=_build_optimiser(config, per_epoch),
    steps_per_epoch=per_epoch,
  )


def _task_of(outline: Any) -> Task:
  # An outline has the length and the shape of a set: enough for every check.
  return Task(train=outline, validation=outline, test=outline)


def _read_tasks(config: Config) -> tuple[Task, ...]:
  """Reads the data set and splits it into tasks."""
  data = config.data

  def load(split):
    """Reads one split."""
    return image_sets.load(settings.source_of(data, split), data.image_size)

  train, test = load(data.train_split), load(data.test_split)
  with settings.named("tasks"):
    return make_tasks(train, test, **config.tasks)


def _build_problem(config: Config, *, tasks: int, shape: tuple[int, int, int]) -> Problem:
  """Builds the learning problem of so many tasks with images of this shape."""
  data = config.data

  def normalise(pixels):
    """Maps uint8 pixels to network input."""
    return augment.normalise(pixels, data.mean, data.std)

  def crop_and_flip(key, pixels):
    """Changes pixels at random, as in training."""
    # A key per example of the whole batch: the changes do not depend on the number of devices.
    return augment.crop_and_flip(
      key, pixels, pad=data.crop_padding, flip=data.flip, axis_name=devices.AXIS
    )

  listed = config.tasks.classes
  own = None if listed is None else tuple(len(group) for group in listed)
  return Problem(
    tasks=tasks,
    classes=config.tasks.classes_per_task if own is None else max(own),
    own_classes=None if own is None or len(set(own)) == 1 else own,
    shape=shape,
    axis_name=devices.AXIS,
    normalise=normalise,
    batch_size=config.optim.eval_batch_size,
    augment=crop_and_flip,
  )


def _training_steps(training: Config, steps_per_epoch: int) -> int:
  """Returns the steps of each task's training, without its pretraining and its end.

  An epoch is one of the smallest task: where that is tiny, the others would hardly be trained.
  """
  given = training.steps_per_task
  return training.epochs * steps_per_epoch if given is None else given


def _build_optimiser(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
  """Builds the optimiser of one task."""
  training = config.optim
  with settings.named("optim"):
    sgd = optim.sgd(
      optim.configured_rate(training, _training_steps(training, steps_per_epoch)),
      momentum=training.momentum,
      weight_decay=training.weight_decay,
      # HAT's masks are gate parameters too, and HAT sets their pace itself.
      gate_lr_multiplier=1.0 if config.method == "hat" else training.gate_lr_multiplier,
    )
  # Clips the gradient of the loss alone, before weight decay and momentum.
  return optax.chain(optax.clip_by_global_norm(gradient_clip(config)), sgd)


def _check(config: Config) -> None:
  """Raises ValueError for a setting that breaks its rule; the message names the field."""
  settings.check(
    config,
    choices={
      "method": METHODS,
      "model.name": (*VGGS, *RESNETS),
      "model.dtype": settings.DTYPES,
      "router.rehearsal": REHEARSALS,
      "optim.schedule": optim.LEARNING_RATES,
      "devices.backend": devices.BACKENDS,
    },
    positive=(
      "model.width",
      "optim.learning_rate",
      "optim.gate_lr_multiplier",
      "optim.drop_factor",
      "optim.grad_clip_norm",
    ),
    not_negative=(
      "optim.weight_decay",
      "generator.gates.noise_scale",
      "generator.gates.sparsity",
      "generator.gates.patience",
    ),
    at_least={
      "seed": 0,
      "data.crop_padding": 0,
      "data.image_size": 0,
      "tasks.classes_per_task": 1,
      "tasks.count": 0,
      "replay.batch_size": 1,
      "generator.steps": 1,
      "generator.batch_size": 1,
      "generator.latent": 1,
      "generator.width": 1,
      "optim.epochs": 1,
      "optim.batch_size": 1,
      "optim.eval_batch_size": 1,
      "log_every": 1,
      "checkpoint_every": 1,
    },
    numbers=("data.mean", "data.std"),
    rules={
      "data.std": (lambda std: min(std) > 0, "a tuple of positive numbers"),
      "optim.lr_drop_at": (settings.all_numbers, "a tuple of fractions"),
      # Batches are split evenly over the devices.
      "replay.batch_size": settings.divides_over_devices(),
      "optim.batch_size": settings.divides_over_devices(),
      "optim.eval_batch_size": settings.divides_over_devices(),
      "generator.batch_size": settings.divides_over_devices(),
      "generator.gates.threshold": (lambda value: 0 <= value < 1, "a fraction in [0, 1)"),
      "eval_every": (
        lambda epochs: epochs is None or 0 <= epochs < math.inf,
        "None or a finite number >= 0",
      ),
      "tasks.order_seed": (lambda seed: seed is None or seed >= 0, "None or >= 0"),
    },
  )
  # Checked here as well, before the data are read.
  gradient_clip(config)
  _check_tasks(config)


def _check_tasks(config: Config) -> None:
  """Raises a ValueError unless the listed tasks and the steps of each are valid."""
  given = config.optim.steps_per_task
  if given is not None and given < 1:
    raise ValueError(f"optim.steps_per_task must be >= 1 or None; got {given}")
  listed = config.tasks.classes
  if listed is None:
    return
  for group in listed:
    if not isinstance(group, (tuple, list)) or not all(isinstance(c, int) for c in group):
      raise ValueError(f"tasks.classes must be a tuple of tuples of numbers, or None; got {listed}")
  # A generator makes images of every class that a head has.
  generates = config.method == "dgm" or (
    config.method == "gates" and config.router.rehearsal not in ("episodic", "none")
  )
  if generates and len({len(group) for group in listed}) > 1:
    what = "method='dgm'" if config.method == "dgm" else f"rehearsal={config.router.rehearsal!r}"
    raise ValueError(f"tasks.classes must have as many classes in every task with {what}")
