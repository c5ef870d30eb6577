"""Rehearsal memories for the task classifier: images of earlier tasks, or generators of them.

Axes: M images, T tasks, C classes of a task.
Reference: Abati et al., 2020, section 3.4; Gulrajani et al., 2017 (WGAN-GP).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.continual import replay_memory, shared_net
from gating_jax.continual.generators import wgan
from gating_jax.continual.method import Batch, LearnerState, Problem, TaskData, tree_megabytes
from gating_jax.models.generator import Critic, Generator
from gating_jax.ops.collectives import example_keys
from gating_jax.types import Array

Memory = Mapping[str, Any]


class Replay(NamedTuple):
  """Rehearsed images for one training batch.

  Attributes:
    x: `[R, H, W, D]` network input.
    labels: `[R]` positions in the order of classes.
    batch_weight: weight of the batch itself in the loss; these images have the rest. With it all
      classes so far have the same weight.
  """

  x: Array
  labels: Array
  batch_weight: Array


@dataclasses.dataclass(frozen=True)
class Rehearsal:
  """A memory of images, as pure functions.

  Attributes:
    init: `key -> memory`.
    replay: `(memory, batch, task, key) -> Replay` in a step of this task's training. All tasks have
      equal parts in it, except those that only the batch shows.
    recall: `(memory, data, task, key) -> (pixels, labels)` at the end of this task, images of every
      task up to it.
    keep: `(memory, data, task, key) -> memory`, after `recall`.
    megabytes: `(memory, learnt) -> float`, 10**6 bytes needed after so many tasks.
    pretrain_step: `(memory, pixels, labels) -> (memory, metrics)`, a step of the phase before each task's
      own training, with labels in 0, ..., C - 1; None without one.
  """

  init: Callable[[Array], Memory]
  replay: Callable[[Memory, Batch, Array, Array], Replay]
  recall: Callable[[Memory, TaskData, int, Array], tuple[np.ndarray, np.ndarray]]
  keep: Callable[[Memory, TaskData, int, Array], Memory]
  megabytes: Callable[[Memory, int], float]
  pretrain_step: Callable[[Memory, Array, Array], tuple[Memory, Mapping[str, Array]]] | None = None


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

  def replayed(memory, batch, task, key):
    """Draws images of earlier tasks for one training batch."""
    x, labels, _, _ = replay_memory.draw_inputs(
      memory["episodes"], key, batch, problem, settings.batch_size
    )
    # The batch is one of task + 1 tasks.
    return Replay(x, labels, 1 / (task + 1))

  def recall(memory, data, task, key):
    """Returns the kept images and all those of the ending task, `[M, H, W, D]`."""
    # Empty slots hold no image.
    kept = np.asarray(memory["episodes"].labels) != replay_memory.EMPTY
    join = lambda old, new: np.concatenate([np.asarray(old)[kept], np.asarray(new)])
    return join(memory["episodes"].pixels, data.pixels), join(
      memory["episodes"].labels, data.labels
    )

  return Rehearsal(
    init=lambda key: {"episodes": replay_memory.empty(settings.images, problem.shape)},
    replay=replayed,
    recall=recall,
    keep=lambda memory, data, task, key: {
      "episodes": replay_memory.add_task(memory["episodes"], data.pixels, data.labels, key)
    },
    megabytes=lambda memory, learnt: tree_megabytes(memory),
  )


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
  generator = Generator(problem.shape, latent=latent, width=width, classes=problem.classes)
  critic = Critic(width=width, classes=problem.classes)
  # Every task starts from the same initial state.
  fresh = lambda: wgan.init_state(generator, critic, settings, seed)
  step = wgan.make_train_step(generator, critic, settings, seed=seed, axis_name=problem.axis_name)

  def make(params, z, labels):
    """Generates uint8 pixels `[M, H, W, D]` from latents and `[M]` labels."""
    return wgan.to_pixels(generator.apply({"params": params}, z, labels)[0])

  def replay_step(memory, batch, task, key):
    """Generates images of all tasks so far for one training batch."""
    return replay_of_all(
      make, with_this(memory, task), problem, task, key, count=replayed, latent=latent
    )

  def init(key):
    """Initialises the generators of all tasks, and the training of the first."""
    state = fresh()
    # Room for all tasks from the start: shapes never change.
    return {"generators": shared_net.stack(state.average, problem.tasks), "training": state}

  def with_this(memory, task):
    """Returns the generators of all tasks, that of the current task included."""
    return shared_net.put(memory["generators"], task, memory["training"].average)

  def keep(memory, data, task, key):
    """Keeps the task's generator and initialises the next one."""
    # Images are generated with the averaged parameters, so only these are kept.
    return {"generators": with_this(memory, task), "training": fresh()}

  def recall(memory, data, task, key):
    """Generates pixels `[M, H, W, D]` and labels `[M]` of all tasks up to this one."""
    generators = with_this(memory, task)
    # Lazily: the variables of one task at a time.
    each = ({"params": jax.tree.map(lambda x, t=t: x[t], generators)} for t in range(task + 1))
    return generated(generator, each, key, images)

  def pretrain_step(memory, pixels, labels):
    """Trains the current task's generator for one step."""
    state, metrics = step(memory["training"], pixels, labels)
    return {**memory, "training": state}, metrics

  return Rehearsal(
    init,
    replay_step,
    recall,
    keep,
    lambda memory, learnt: tree_megabytes(jax.tree.map(lambda x: x[:learnt], memory["generators"])),
    pretrain_step,
  )


def make_pretrain_step(
  rehearsal: Rehearsal | None, problem: Problem
) -> Callable[[LearnerState, Array, Array], tuple[LearnerState, Mapping[str, Array]]] | None:
  """Makes a method's pretraining step from that of its rehearsal.

  The method must keep the rehearsal's memory as `memory["rehearsal"]`.

  Args:
    rehearsal: of the method, if any.
    problem: the learning problem.
  Returns:
    the step, as in `Method`; None where the rehearsal has none.
  """
  if rehearsal is None or rehearsal.pretrain_step is None:
    return None

  def pretrain_step(learner, pixels, labels):
    """Trains the generator for one step on images of the learner's task."""
    # Generators are conditional on the classes of one task, from 0.
    own = labels - learner.task * problem.classes
    memory, metrics = rehearsal.pretrain_step(learner.memory["rehearsal"], pixels, own)
    return learner.replace(
      step=learner.step + 1, memory={**learner.memory, "rehearsal": memory}
    ), metrics

  return pretrain_step


def replay_of_all(
  make: Callable[[Any, Array, Array], Array],
  each: Any,
  problem: Problem,
  task: Array,
  key: Array,
  *,
  count: int,
  latent: int,
) -> Replay:
  """Generates images of all tasks up to this one, every class with the same probability.

  Args:
    make: `(one, z, labels) -> pixels`, from one task's own part, latents and classes of the task.
    each: the own parts of all tasks, a tree of `[T, ...]`.
    problem: the learning problem.
    task: the task being learnt, from 0.
    key: PRNG key.
    count: images, over all devices.
    latent: size of z.
  Returns:
    a `Replay` of images of this task too, so the batch itself has weight 0.
  Raises:
    ValueError: `count` is not a multiple of the number of devices.
  """
  devices = 1 if problem.axis_name is None else lax.axis_size(problem.axis_name)
  if count % devices:
    raise ValueError(f"replayed images must be a multiple of the {devices} devices; got {count}")
  here = count // devices
  which, latents, changes = jax.random.split(key, 3)
  # A key per example: the classes do not depend on the number of devices.
  classes = jax.vmap(lambda key: jax.random.randint(key, (), 0, problem.classes * (task + 1)))(
    example_keys(which, here, problem.axis_name)
  )
  z = wgan.latents(latents, here, latent, problem.axis_name)
  of_task = classes // problem.classes

  def add(t, pixels):
    """Fills in the images of task t."""
    one = jax.tree.map(lambda x: x[t], each)
    return jnp.where(
      (of_task == t)[:, None, None, None], make(one, z, classes % problem.classes), pixels
    )

  # Every task makes all images, and each image is taken from its own task: shapes may not depend on
  # how many of each are drawn.
  pixels = lax.fori_loop(0, task + 1, add, jnp.zeros((here, *problem.shape), jnp.uint8))
  return Replay(problem.prepare(changes, pixels), classes, 0.0)


def check_images(images: int, problem: Problem) -> None:
  """Raises ValueError unless every class of a task can be generated."""
  if images < problem.classes:
    raise ValueError(
      f"generator.images must be at least {problem.classes}, one per class of a task; got {images}"
    )


def generated(
  generator: Generator, variables: Iterable[Any], key: Array, images: int
) -> tuple[np.ndarray, np.ndarray]:
  """Generates the same number of images of every task, in equal parts of its classes.

  Args:
    generator: of the classes of one task.
    variables: of each task.
    key: PRNG key of the latents.
    images: number of images per task.
  Returns:
    `(pixels, labels)`, with labels in the order of all classes.
  """
  parts = [
    _sample(generator, v, jax.random.fold_in(key, task), images) for task, v in enumerate(variables)
  ]
  return (
    np.concatenate([np.asarray(pixels) for pixels, _ in parts]),
    np.concatenate(
      # A generator numbers the classes of its task from 0.
      [np.asarray(labels) + t * generator.classes for t, (_, labels) in enumerate(parts)]
    ),
  )


# Variables are an argument, so that one program serves all tasks.
@functools.partial(jax.jit, static_argnums=(0, 3))
def _sample(generator: Generator, variables: Any, key: Array, images: int) -> tuple[Array, Array]:
  labels = jnp.arange(images) % generator.classes
  return wgan.to_pixels(
    generator.apply(variables, wgan.latents(key, images, generator.latent), labels)[0]
  ), labels
