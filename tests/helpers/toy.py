"""A class-incremental problem that trains in a moment: three tasks of two classes.

Each class is a bright spot at its own place.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.continual import training
from gating_jax.continual.method import LearnerState, Network, Problem, TaskData
from gating_jax.training import devices

TASKS, CLASSES, SHAPE = 3, 2, (4, 4, 1)
OPTIMISER = optax.sgd(0.1, momentum=0.9)


class Dense(nn.Module):
  classes: int | None

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.Dense(16, name="hidden")(x.reshape(len(x), -1)))
    return (x if self.classes is None else nn.Dense(self.classes, name="classifier")(x)), ()


def normalise(pixels):
  return pixels.astype(jnp.float32) / 255


def problem(axis_name=None):
  return Problem(TASKS, CLASSES, SHAPE, normalise, axis_name, batch_size=16)


def network(axis_name=None, scope="seen", model=None):
  return Network(model or Dense(TASKS * CLASSES), problem(axis_name), macs=1, scope=scope)


def images(task, per_class=20, seed=0):
  """Makes the `TaskData` of one task: pixel 2 c of class c is bright, on noise."""
  random = np.random.default_rng([seed, task])
  labels = np.repeat(np.arange(CLASSES) + task * CLASSES, per_class).astype(np.int32)
  pixels = random.integers(0, 120, (len(labels), *SHAPE))
  pixels.reshape(len(labels), -1)[np.arange(len(labels)), 2 * labels] += 130
  return TaskData(pixels.astype(np.uint8), labels, pixels[:0].astype(np.uint8), labels[:0])


def start(method, seed=0):
  begin = jax.jit(method.init)(jax.random.key(seed))
  zero = jnp.zeros((), jnp.int32)
  return LearnerState(zero, zero, *begin[:2], OPTIMISER.init(begin.params), begin.memory, ())


def step(method, count=1):
  """`(learner, pixels, labels) -> (learner, metrics)` on `count` devices."""
  axis_name = None if count == 1 else devices.AXIS
  run = training.make_step(
    method,
    OPTIMISER,
    lambda key, pixels: normalise(pixels),
    seed=0,
    steps_per_epoch=1,
    axis_name=axis_name,
  )
  one = functools.partial(run, first_step=0)
  if count == 1:
    return jax.jit(one)
  return devices.map_over_devices(
    one,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH),
    results=(devices.REPLICATED, devices.REPLICATED),
    devices=jax.devices()[:count],
  )


def end_task(method, learner, data):
  key = jax.random.key(int(learner.task), impl="rbg")
  learnt = int(learner.task) + 1
  ended = training.end_task(method, OPTIMISER, learner, data, learnt=learnt, key=key)
  # Steps count training alone here: the end of a task would shift the keys of all later steps.
  return ended.replace(step=learner.step)


def learn(method, tasks=TASKS, steps=40, batch=8):
  """Returns the learner after these tasks."""
  learner, advance = start(method), step(method)
  for task in range(tasks):
    data, random = images(task), np.random.default_rng(task)
    for _ in range(steps):
      index = random.integers(0, len(data.labels), batch)
      learner, _ = advance(learner, data.pixels[index], data.labels[index])
    learner = end_task(method, learner, data)
  return learner


def accuracies(method, learner, tasks=TASKS):
  """Returns `(aware, agnostic)` on held-out images, each a list over tasks."""

  predict = jax.jit(method.predict, static_argnums=3)

  def of_task(task):
    data = images(task, seed=1)
    p = predict(learner, normalise(jnp.asarray(data.pixels)), jnp.int32(task), tasks)
    return (
      np.mean(np.argmax(p.aware, 1) == data.labels - task * CLASSES),
      np.mean(np.argmax(p.agnostic, 1) == data.labels),
    )

  return tuple(zip(*(of_task(task) for task in range(tasks)), strict=True))


def at_device_axis(net):
  """The same network in a step over several devices."""
  return dataclasses.replace(net, problem=problem(devices.AXIS))
