"""Two tasks that need the same few units, and a net so small that it learns them in a second."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gating_jax.continual import training
from gating_jax.continual.method import LearnerState, Network, Problem, TaskData, TaskTable

TASKS, CLASSES, SHAPE = 2, 2, (2, 2, 1)


class Toy(nn.Module):
  """`[N, 2, 2, 1]` to `([N, 4] logits, ())` by a few units, with BatchNorm if wanted."""

  norm: bool = False
  axis_name: str | None = None
  units: int = 2

  @nn.compact
  def __call__(self, x, train=False):
    h = nn.Dense(self.units, name="hidden")(x.reshape(len(x), -1))
    if self.norm:
      h = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name, name="norm")(h)
    return nn.Dense(TASKS * CLASSES, name="heads")(nn.tanh(h)), ()


def network(norm=False, axis_name=None, scope="own"):
  normalise = lambda pixels: jnp.asarray(pixels, jnp.float32) / 127.5 - 1
  return Network(
    Toy(norm, axis_name),
    Problem(TASKS, CLASSES, SHAPE, normalise, axis_name, batch_size=64),
    1,
    scope,
  )


def task(number, count=64, seed=0):
  """Task 0 asks for the sign of the sum of two pixels, task 1 for that of their difference."""
  pixels = np.random.default_rng([seed, number]).integers(0, 256, (count, *SHAPE)).astype(np.uint8)
  x = (pixels.astype(np.float64) / 127.5 - 1).reshape(count, -1)
  labels = x[:, 0] + (-1) ** number * x[:, 1] > 0
  return TaskData(
    pixels, (labels + CLASSES * number).astype(np.int32), pixels, labels.astype(np.int32)
  )


def learner(method, optimiser, seed=0):
  start = jax.jit(method.init)(jax.random.key(seed))
  zero = jnp.zeros((), jnp.int32)
  return LearnerState(
    zero, zero, *start[:2], optimiser.init(start.params), start.memory, TaskTable(*[()] * 5)
  )


def step(method, net, optimiser):
  """`(learner, pixels, labels, first_step) -> (learner, metrics)`."""
  return training.make_step(
    method,
    optimiser,
    lambda key, pixels: net.problem.normalise(pixels),
    seed=0,
    steps_per_epoch=1,
    axis_name=net.problem.axis_name,
  )


def learn(method, net, *, count=300, rate=0.1, seed=1):
  """Learns both tasks on whole batches.

  Returns the learner after each, and `[2, 2]` accuracies with the task known.
  """
  optimiser = optax.sgd(rate, momentum=0.9)
  state, states, accuracies = learner(method, optimiser, seed), [], np.full((2, 2), np.nan)
  one = step(method, net, optimiser)
  for t in range(TASKS):
    data = task(t)
    run = jax.jit(lambda s, p, y: jax.lax.fori_loop(0, count, lambda i, s: one(s, p, y, 0.0)[0], s))
    state = method.end_task(run(state, data.pixels, data.labels), data, jax.random.key(t))
    state = state.replace(task=state.task + 1, opt_state=optimiser.init(state.params))
    states.append(state)
    for j in range(t + 1):
      old = task(j, 256, seed=1)
      aware = method.predict(state, net.problem.normalise(old.pixels), j, t + 1).aware
      accuracies[t, j] = np.mean(np.argmax(aware, -1) == old.labels - CLASSES * j)
  return states, accuracies
