"""Two tasks of tiny images, and the settings for learning them with convolutions in a second."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.continual import training
from gating_jax.continual.method import LearnerState, Problem, TaskData, TaskTable

TASKS, CLASSES, SHAPE = 2, 2, (4, 4, 1)


def problem(axis_name=None):
  return Problem(
    TASKS,
    CLASSES,
    SHAPE,
    lambda pixels: jnp.asarray(pixels, jnp.float32) / 127.5 - 1,
    axis_name,
    batch_size=64,
  )


def task(number, count=64, seed=0):
  """Makes noise with or without bright and dark columns (task 0) or rows (task 1)."""
  random = np.random.default_rng([seed, number])
  labels = np.arange(count) % 2
  stripes = np.where(np.arange(4) % 2, 60, -60) * np.ones((4, 1))
  stripes = labels[:, None, None] * (stripes if number == 0 else stripes.T)
  pixels = np.clip(128 + stripes + random.normal(0, 25, (count, 4, 4)), 0, 255).astype(np.uint8)[
    ..., None
  ]
  labels = (labels + CLASSES * number).astype(np.int32)
  return TaskData(pixels, labels, pixels[:8], labels[:8])


def optimiser(rate=0.1):
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9)
  )


def learner(method, number=0, seed=0):
  start = jax.jit(method.init)(jax.random.key(seed))
  return LearnerState(
    jnp.zeros((), jnp.int32),
    jnp.int32(number),
    *start[:2],
    optimiser().init(start.params),
    start.memory,
    TaskTable(*[()] * 5),
  )


def step(method, axis_name=None, rate=0.1, steps_per_epoch=10):
  return training.make_step(
    method,
    optimiser(rate),
    lambda key, pixels: problem().normalise(pixels),
    seed=0,
    steps_per_epoch=steps_per_epoch,
    axis_name=axis_name,
  )


def train(method, learner, data, count=40, **settings):
  """Returns the learner after so many steps on the whole set."""
  one, first = step(method, **settings), learner.step
  run = jax.jit(
    lambda learner: jax.lax.fori_loop(
      0, count, lambda i, state: one(state, data.pixels, data.labels, first)[0], learner
    )
  )
  return run(learner)


def end(method, learner, data, seed=0):
  learner = method.end_task(learner, data, jax.random.key(seed))
  return learner.replace(task=learner.task + 1, opt_state=optimiser().init(learner.params))


def aware(method, learner, number, seen, data=None):
  """Returns `[N, C]` logits of a task's images, by default new ones."""
  data = task(number, seed=1) if data is None else data
  return np.asarray(
    jax.jit(method.predict, static_argnums=3)(
      learner, problem().normalise(data.pixels), number, seen
    ).aware
  )


def accuracy(method, learner, number, seen):
  data = task(number, seed=1)
  return np.mean(
    aware(method, learner, number, seen, data).argmax(-1) == data.labels - CLASSES * number
  )


def same_shapes(a, b):
  """Checks that two trees have the same structure, shapes and dtypes."""
  shapes = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.asarray(x).dtype), tree)
  return jax.tree.structure(a) == jax.tree.structure(b) and shapes(a) == shapes(b)
