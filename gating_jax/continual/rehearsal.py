"""Rehearsals: sources of images of earlier tasks, for task classifiers and deep generative memory.

A rehearsal is used as a whole by a method that has one: `episodic` keeps images in a replay memory
(`replay_memory`), `generative` trains generators of them. ER, DER++, A-GEM and iCaRL have no
rehearsal: they use a replay memory directly.

Axes: M images, T tasks, C classes of a task.
Reference: Abati et al., 2020, section 3.4; Gulrajani et al., 2017 (WGAN-GP).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.continual import replay_memory
from gating_jax.continual.generators import wgan
from gating_jax.continual.method import (
  Batch,
  LearnerState,
  MemoryNode,
  Problem,
  TaskData,
  first_tasks,
  put_task,
  stack_tasks,
  task_entry,
  tree_megabytes,
)
from gating_jax.models.generator import Critic, Generator
from gating_jax.ops.collectives import example_keys
from gating_jax.types import Array


class ReplayedImages(NamedTuple):
  """Images of a rehearsal for one training batch.

  Attributes:
    x: `[R, H, W, D]` network input.
    labels: `[R]` positions in the order of classes.
    batch_weight: weight of the batch itself in the loss; these images have the rest. With it all
      classes so far have the same weight.
  """

  x: Array
  labels: Array
  batch_weight: Array | float


class ReplayFunction(Protocol):
  """Rehearses images for a training batch, as `Rehearsal.replay`."""

  def __call__(self, memory: Any, batch: Batch, task: Array, key: Array) -> ReplayedImages: ...


class KeepFunction(Protocol):
  """A function that returns the memory at the end of a task, as `Rehearsal.keep`."""

  def __call__(self, memory: Any, data: TaskData, task: int, key: Array) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Rehearsal:
  """A source of images of earlier tasks, as pure functions over a memory of its own type.

  Attributes:
    init: `key -> memory`.
    replay: `(memory, batch, task, key) -> ReplayedImages` in a step of this task's training. All
      tasks have equal parts in it, except those that only the batch shows.
    recall: `(memory, data, task, key) -> (pixels, labels)` at the end of this task, images of every
      task up to it.
    keep: `(memory, data, task, key) -> memory`, after `recall`.
    megabytes: `(memory, learnt) -> float`, 10**6 bytes needed after so many tasks.
    pretrain_step: `(memory, pixels, labels) -> (memory, metrics)`, a step of the phase before each
      task's own training, with labels in 0, ..., C - 1; None without one.
  """

  init: Callable[[Array], Any]
  replay: ReplayFunction
  recall: Callable[[Any, TaskData, int, Array], tuple[np.ndarray, np.ndarray]]
  keep: KeepFunction
  megabytes: Callable[[Any, int], float]
  pretrain_step: Callable[[Any, Array, Array], tuple[Any, Mapping[str, Array]]] | None = None

  @classmethod
  def of_methods(cls, functions: Any) -> Rehearsal:
    """Returns the methods of an object that have the names of the fields."""
    return cls(**{field.name: getattr(functions, field.name) for field in dataclasses.fields(cls)})


class EpisodicMemory(MemoryNode):
  """The memory of `episodic`.

  Attributes:
    episodes: images of earlier tasks.
  """

  episodes: replay_memory.ReplayMemory


def episodic(problem: Problem, settings: replay_memory.ReplaySettings) -> Rehearsal:
  """Keeps images of earlier tasks, the same number for every class.

  `recall` returns all images of the task that ends.

  Args:
    problem: the learning problem.
    settings: sizes of the memory and of each draw.
  Raises:
    ValueError: fewer images than classes.
  """
  if settings.images < problem.all_classes:
    raise ValueError(
      f"replay.images must be at least {problem.all_classes}, one per class; got {settings.images}"
    )

  def init(key):
    """Creates an empty memory."""
    # All slots from the start: the shapes of a learner never change.
    return EpisodicMemory(replay_memory.empty(settings.images, problem.shape))

  def replay(memory, batch, task, key):
    """Draws images of earlier tasks for one training batch."""
    drawn = replay_memory.draw_inputs(
      memory.episodes, key=key, batch=batch, problem=problem, count=settings.batch_size
    )
    # The batch is one of task + 1 tasks.
    return ReplayedImages(drawn.x, drawn.labels, 1 / (task + 1))

  def recall(memory, data, task, key):
    """Returns the kept images and all those of the ending task, `[M, H, W, D]`."""
    labels = np.asarray(memory.episodes.labels)
    # Empty slots hold no image.
    is_filled = labels != replay_memory.EMPTY
    kept = np.asarray(memory.episodes.pixels)[is_filled]
    pixels = np.concatenate([kept, np.asarray(data.pixels)])
    return pixels, np.concatenate([labels[is_filled], np.asarray(data.labels)])

  def keep(memory, data, task, key):
    """Adds the task's images to the memory."""
    kept = replay_memory.add_task(memory.episodes, data.pixels, data.labels, key=key)
    return EpisodicMemory(kept)

  def megabytes(memory, learnt):
    """Returns the size of the memory, the same after any number of tasks."""
    return tree_megabytes(memory)

  return Rehearsal(init, replay, recall=recall, keep=keep, megabytes=megabytes)


class GenerativeMemory(MemoryNode):
  """The memory of `generative`.

  Attributes:
    generators: parameters of the generators of all tasks, `[T, ...]`.
    training: state of the current task's training.
  """

  generators: Any
  training: wgan.WganState


def generative(
  problem: Problem,
  settings: wgan.WganSettings,
  *,
  images: int,
  replayed: int,
  latent: int,
  width: int,
  seed: int,
) -> Rehearsal:
  """Trains one generator per task, each before the task itself is learnt.

  All recalled images are generated, those of the task that ends too: among real and generated
  images a classifier would learn that difference, and not the tasks.

  Args:
    problem: the learning problem.
    settings: of the generators' training.
    images: images recalled of every task, in equal parts of its classes.
    replayed: images that go with each training batch, over all devices.
    latent: size of the generators' input.
    width: of generators and critic.
    seed: of the generators' training.
  Raises:
    ValueError: fewer `images` than classes of a task.
  """
  check_images(images, problem)
  generators = _TaskGenerators(
    problem,
    Generator(problem.shape, latent=latent, width=width, classes=problem.classes),
    Critic(width=width, classes=problem.classes),
    settings=settings,
    images=images,
    replayed=replayed,
    seed=seed,
  )
  return Rehearsal.of_methods(generators)


@dataclasses.dataclass(frozen=True)
class _TaskGenerators:
  """The functions of `generative`, over a `GenerativeMemory`."""

  problem: Problem
  generator: Generator
  critic: Critic
  settings: wgan.WganSettings
  images: int
  replayed: int
  seed: int

  def init(self, key: Array) -> GenerativeMemory:
    """Initialises the generators of all tasks, and the training of the first."""
    state = self._fresh()
    # Room for all tasks from the start: shapes never change.
    return GenerativeMemory(stack_tasks(state.average, self.problem.tasks), state)

  def replay(
    self, memory: GenerativeMemory, batch: Batch, task: Array, key: Array
  ) -> ReplayedImages:
    """Generates images of all tasks so far for one training batch."""
    return replay_of_all(
      self._generate,
      self._with_current(memory, task),
      self.problem,
      task=task,
      key=key,
      count=self.replayed,
      latent=self.generator.latent,
    )

  def recall(
    self, memory: GenerativeMemory, data: TaskData, task: int, key: Array
  ) -> tuple[np.ndarray, np.ndarray]:
    """Generates pixels `[M, H, W, D]` and labels `[M]` of all tasks up to this one."""
    generators = self._with_current(memory, task)

    def variables_of(t):
      """Returns the variables of one task's generator."""
      return {"params": task_entry(generators, t)}

    return generate_tasks(self.generator, variables_of, tasks=task + 1, images=self.images, key=key)

  def keep(
    self, memory: GenerativeMemory, data: TaskData, task: int, key: Array
  ) -> GenerativeMemory:
    """Keeps the task's generator and initialises the next one."""
    return GenerativeMemory(self._with_current(memory, task), self._fresh())

  def megabytes(self, memory: GenerativeMemory, learnt: int) -> float:
    """Returns the size, in 10**6 bytes, of the generators of the tasks learnt."""
    return tree_megabytes(first_tasks(memory.generators, learnt))

  def pretrain_step(
    self, memory: GenerativeMemory, pixels: Array, labels: Array
  ) -> tuple[GenerativeMemory, Mapping[str, Array]]:
    """Trains the current task's generator for one step."""
    step = wgan.make_wgan_step(
      self.generator,
      self.critic,
      self.settings,
      seed=self.seed,
      axis_name=self.problem.axis_name,
    )
    state, metrics = step(memory.training, pixels, labels)
    return memory.replace(training=state), metrics

  def _fresh(self) -> wgan.WganState:
    """Returns the state from which every task starts."""
    return wgan.init_state(self.generator, self.critic, self.settings, seed=self.seed)

  def _generate(self, params: Any, z: Array, labels: Array) -> Array:
    """Generates uint8 pixels `[M, H, W, D]` from latents and `[M]` labels."""
    return wgan.to_pixels(self.generator.apply({"params": params}, z, labels)[0])

  def _with_current(self, memory: GenerativeMemory, task: int | Array) -> Any:
    """Returns the generators of all tasks, that of the current task included."""
    # Images are generated with the averaged parameters, so only these are kept.
    return put_task(memory.generators, task, memory.training.average)


def make_pretrain_step(
  rehearsal: Rehearsal | None, problem: Problem
) -> Callable[[LearnerState, Array, Array], tuple[LearnerState, Mapping[str, Array]]] | None:
  """Makes a method's pretraining step from that of its rehearsal.

  The method must keep the rehearsal's memory as `memory.rehearsal`.

  Args:
    rehearsal: of the method, if any.
    problem: the learning problem.
  Returns:
    the step, as in `Method`; None where the rehearsal has none.
  """
  if rehearsal is None or rehearsal.pretrain_step is None:
    return None
  advance = rehearsal.pretrain_step

  def pretrain_step(learner, pixels, labels):
    """Trains the generator for one step on images of the learner's task."""
    # Generators are conditional on the classes of one task, from 0.
    own = labels - learner.task * problem.classes
    rehearsed, metrics = advance(learner.memory.rehearsal, pixels, own)
    # The steps of the run are counted, those of pretraining among them.
    memory = learner.memory.replace(rehearsal=rehearsed)
    return learner.replace(step=learner.step + 1, memory=memory), metrics

  return pretrain_step


def replay_of_all(
  generate: Callable[[Any, Array, Array], Array],
  own: Any,
  problem: Problem,
  *,
  task: Array,
  key: Array,
  count: int,
  latent: int,
) -> ReplayedImages:
  """Generates images of all tasks up to this one, every class with the same probability.

  Args:
    generate: `(own, z, labels) -> pixels`, from one task's own part, latents and classes of the
      task.
    own: the own parts of all tasks, a tree of `[T, ...]`.
    problem: the learning problem.
    task: the task being learnt, from 0.
    key: PRNG key.
    count: images, over all devices.
    latent: size of z.
  Returns:
    images of this task too, so the batch itself has weight 0.
  Raises:
    ValueError: `count` is not a multiple of the number of devices.
  """
  devices = 1 if problem.axis_name is None else lax.axis_size(problem.axis_name)
  if count % devices:
    raise ValueError(f"replayed images must be a multiple of the {devices} devices; got {count}")
  here = count // devices
  which, latents, changes = jax.random.split(key, 3)

  def draw_class(key):
    """Draws one of the classes seen."""
    return jax.random.randint(key, (), 0, problem.classes * (task + 1))

  # A key per example: the classes do not depend on the number of devices.
  labels = jax.vmap(draw_class)(example_keys(which, here, problem.axis_name))
  tasks, classes = problem.task_of(labels), labels % problem.classes
  z = wgan.draw_latents(latents, here, size=latent, axis_name=problem.axis_name)

  def add(t, pixels):
    """Fills in the images of task t."""
    generated = generate(task_entry(own, t), z, classes)
    return jnp.where((tasks == t)[:, None, None, None], generated, pixels)

  # Every task makes all images, and each image is taken from its own task: shapes may not depend on
  # how many of each are drawn.
  pixels = lax.fori_loop(0, task + 1, add, jnp.zeros((here, *problem.shape), jnp.uint8))
  return ReplayedImages(problem.prepare(changes, pixels), labels, 0.0)


def check_images(images: int, problem: Problem) -> None:
  """Raises ValueError unless every class of a task can be generated."""
  if images < problem.classes:
    raise ValueError(
      f"generator.images must be at least {problem.classes}, one per class of a task; got {images}"
    )


def generate_tasks(
  generator: Generator,
  variables_of: Callable[[int], Any],
  *,
  tasks: int,
  images: int,
  key: Array,
) -> tuple[np.ndarray, np.ndarray]:
  """Generates the same number of images of every task, in equal parts of its classes.

  Args:
    generator: of the classes of one task.
    variables_of: `task -> variables`; called task by task, so that those of one are there at once.
    tasks: number of tasks.
    images: number of images per task.
    key: PRNG key of the latents.
  Returns:
    `(pixels, labels)`, with labels in the order of all classes.
  """
  all_pixels, all_labels = [], []
  for task in range(tasks):
    # A key per task: a task's images do not depend on how many tasks there are.
    of_task = jax.random.fold_in(key, task)
    pixels, classes = _sample(generator, variables_of(task), key=of_task, images=images)
    all_pixels.append(np.asarray(pixels))
    # A generator numbers the classes of its task from 0.
    all_labels.append(np.asarray(classes) + task * generator.classes)
  return np.concatenate(all_pixels), np.concatenate(all_labels)


# Variables are an argument, so that one program serves all tasks.
@functools.partial(jax.jit, static_argnames=("generator", "images"))
def _sample(
  generator: Generator, variables: Any, *, key: Array, images: int
) -> tuple[Array, Array]:
  """Generates pixels `[M, H, W, D]` and their classes `[M]`."""
  # The classes in turn, so that their counts differ by at most 1.
  classes = jnp.arange(images) % generator.classes
  z = wgan.draw_latents(key, images, generator.latent)
  generated, _ = generator.apply(variables, z, classes)
  return wgan.to_pixels(generated), classes
