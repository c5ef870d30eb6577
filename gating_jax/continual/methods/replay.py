"""Methods whose steps also see images from a replay memory: ER, DER++ and A-GEM.

Experience replay: every step also sees images of earlier tasks.

    L = mean of CE over the batch and the draw together

Both go through the network as one batch, so that BatchNorm normalises new and old images alike, in
training and in the test. With one pass for each, its running statistics would fit neither.

DER++: replay with a penalty on the change of stored logits.

    L = mean of CE over the batch + alpha mean of |z - z*|^2 over one draw
        + beta mean of CE over another

Here z* are the logits stored with each image. The mean square is over the classes that had been
seen when z* was stored: the logits of later classes were not trained then. The paper stores z*
during the task, when images enter its reservoir; here it is at the end of the image's own task,
when the memory is filled. All three parts go through the network as one batch, as in ER.

A-GEM: steps that do not increase the loss on the memory, to first order.

    g <- g - (g.r / r.r) r   where g.r < 0

Here g is the gradient on the batch and r that on images drawn from the memory.

Axes: S slots, R replayed examples, K classes.
Reference: Chaudhry et al., "On tiny episodic memories in continual learning", 2019; Buzzega et al.,
"Dark experience for general continual learning", 2020; Chaudhry et al., "Efficient lifelong
learning with A-GEM", 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gating_jax.continual import replay_memory
from gating_jax.continual.method import (
  Batch,
  InitialState,
  LearnerState,
  Method,
  Network,
  StepLoss,
  TaskData,
)
from gating_jax.training.devices import value_and_grad_over_devices
from gating_jax.types import Array


def er(network: Network, replay: replay_memory.ReplaySettings) -> Method:
  """Makes experience replay; its memory is a `replay_memory.ReplayMemory`.

  Args:
    network: to train.
    replay: sizes of the memory and of each draw.
  """
  problem = network.problem

  def loss(params: Any, learner: LearnerState, batch: Batch) -> StepLoss:
    """Computes the mean cross-entropy over the batch and the replayed images."""
    noise, drawing = jax.random.split(batch.key)
    # Before the first task ends these are examples of the batch itself.
    drawn = replay_memory.draw_inputs(
      learner.memory, key=drawing, batch=batch, problem=problem, count=replay.batch_size
    )
    # One batch, for BatchNorm.
    x = jnp.concatenate([batch.x, drawn.x])
    labels = jnp.concatenate([batch.labels, drawn.labels])
    logits, batch_stats = network.train_logits(params, learner.batch_stats, x, key=noise)
    each = network.cross_entropy(logits, labels, learner.task)
    new, old = jnp.split(each, [len(batch.x)])
    # The loss is a mean over all images; the two means are metrics.
    terms = {"cross_entropy": jnp.mean(new), "replay": jnp.mean(old)}
    return jnp.mean(each), (terms, batch_stats)

  return Method(_make_init(network, replay), loss, _end_task, predict=network.predict)


def derpp(
  network: Network, replay: replay_memory.ReplaySettings, *, alpha: float, beta: float
) -> Method:
  """Makes DER++; its memory is a `replay_memory.ReplayMemory` with logits `[S, K]`.

  Args:
    network: to train.
    replay: sizes of the memory and of each of the two draws.
    alpha, beta: weights of the stored logits and of the labels, >= 0.
  Raises:
    ValueError: a negative weight.
  """
  for name, value in (("alpha", alpha), ("beta", beta)):
    if not value >= 0:
      raise ValueError(f"{name} must be >= 0; got {value}")
  return _DarkReplay(network, replay, alpha=alpha, beta=beta).method()


@dataclasses.dataclass(frozen=True)
class _DarkReplay:
  """The functions of DER++."""

  network: Network
  replay: replay_memory.ReplaySettings
  alpha: float
  beta: float

  def method(self) -> Method:
    """Returns the functions as a `Method`."""
    return Method(
      init=self.init,
      loss=self.loss,
      end_task=self.end_task,
      predict=self.network.predict,
    )

  def init(self, key: Array) -> InitialState:
    """Initialises the network and an empty memory with logits `[S, K]`."""
    problem = self.network.problem
    logits = jnp.zeros((self.replay.images, problem.all_classes))
    memory = replay_memory.empty(self.replay.images, problem.shape, logits)
    return InitialState(*self.network.init(key), memory)

  def loss(self, params: Any, learner: LearnerState, batch: Batch) -> StepLoss:
    """Returns the loss of a step, a scalar, with its terms and the new statistics."""
    network = self.network
    noise, first_key, second_key = jax.random.split(batch.key, 3)
    # A draw for each of the two terms: in the paper they are independent.
    first, second = self._draw(learner, batch, first_key), self._draw(learner, batch, second_key)
    # One pass, so that BatchNorm normalises all three parts alike.
    x = jnp.concatenate([batch.x, first.x, second.x])
    logits, batch_stats = network.train_logits(params, learner.batch_stats, x, key=noise)
    ends = [len(batch.x), len(batch.x) + len(first.x)]
    of_batch, of_first, of_second = jnp.split(logits, ends)
    change = squared_gap(of_first, first.extra, network.seen_with(first.labels))
    replayed = jnp.mean(network.cross_entropy(of_second, second.labels, learner.task))
    terms = {
      "cross_entropy": jnp.mean(network.cross_entropy(of_batch, batch.labels, learner.task)),
      # Before the first task ends there are no stored logits and nothing to replay.
      "logits": jnp.where(first.filled, change, 0.0),
      "replay": jnp.where(first.filled, replayed, 0.0),
    }
    total = terms["cross_entropy"] + self.alpha * terms["logits"] + self.beta * terms["replay"]
    return total, (terms, batch_stats)

  def end_task(self, learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
    """Adds the task's images and their logits to the memory."""
    # z* of every image, before it is known which the memory keeps.
    logits = self.network.problem.in_batches(self.network.logits_of, learner, data.pixels)
    memory = replay_memory.add_task(learner.memory, data.pixels, data.labels, key=key, extra=logits)
    return learner.replace(memory=memory)

  def _draw(self, learner: LearnerState, batch: Batch, key: Array) -> replay_memory.Drawn:
    """Draws images for one of the two terms."""
    return replay_memory.draw_inputs(
      learner.memory,
      key=key,
      batch=batch,
      problem=self.network.problem,
      count=self.replay.batch_size,
    )


def squared_gap(logits: Array, stored: Array, counted: Array) -> Array:
  """Averages the mean square over each example's counted classes.

  Args:
    logits, stored: `[R, K]`.
    counted: `[R, K]` bool.
  Returns:
    a scalar, the mean over the R examples.
  """
  return jnp.mean(jnp.mean(jnp.square(logits - stored), axis=-1, where=counted))


def agem(network: Network, replay: replay_memory.ReplaySettings) -> Method:
  """Makes A-GEM; its memory is a `replay_memory.ReplayMemory`.

  Args:
    network: to train.
    replay: sizes of the memory and of each draw.
  """
  problem = network.problem

  def gradient(grads: Any, learner: LearnerState, batch: Batch) -> Any:
    """Removes the part of the gradient that would increase the loss on the memory."""
    noise, drawing = jax.random.split(batch.key)
    drawn = replay_memory.draw_inputs(
      learner.memory, key=drawing, batch=batch, problem=problem, count=replay.batch_size
    )
    remembered = batch._replace(x=drawn.x, labels=drawn.labels, key=noise)

    def loss(params):
      """Returns the loss on the memory, a scalar."""
      return network.loss(params, learner, remembered)[0]

    # r: the gradient on the memory, over all devices as g is.
    _, reference = value_and_grad_over_devices(loss, axis_name=problem.axis_name)(learner.params)
    projected = project(grads, reference)
    # An empty memory constrains nothing.
    return jax.tree.map(lambda g, p: jnp.where(drawn.filled, p, g), grads, projected)

  init = _make_init(network, replay)
  return Method(init, network.loss, _end_task, predict=network.predict, gradient=gradient)


def project(gradient: Any, reference: Any) -> Any:
  """Removes from a gradient its part against a reference.

  A gradient without such a part is returned unchanged.

  Args:
    gradient, reference: trees of the same arrays.

  >>> project(jnp.array([1.0, -2.0]), jnp.array([0.0, 3.0])).tolist()
  [1.0, 0.0]
  """
  # g <- g - (g.r / r.r) r where g.r < 0; a reference of 0 changes nothing.
  along = jnp.asarray(optax.tree.vdot(gradient, reference))
  square = jnp.asarray(optax.tree.vdot(reference, reference))
  share = jnp.where(along < 0, along / jnp.where(square > 0, square, 1.0), 0.0)
  return jax.tree.map(lambda g, r: g - share * r, gradient, reference)


def _make_init(
  network: Network, replay: replay_memory.ReplaySettings
) -> Callable[[Array], InitialState]:
  """Makes the `init` of a method whose memory is of images alone."""

  def init(key: Array) -> InitialState:
    """Initialises the network and an empty memory."""
    memory = replay_memory.empty(replay.images, network.problem.shape)
    return InitialState(*network.init(key), memory)

  return init


def _end_task(learner: LearnerState, data: TaskData, key: Array) -> LearnerState:
  """Adds the task's images to a memory of images alone."""
  memory = replay_memory.add_task(learner.memory, data.pixels, data.labels, key=key)
  return learner.replace(memory=memory)
