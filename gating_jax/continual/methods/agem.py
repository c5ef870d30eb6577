"""A-GEM: a step may not raise the loss on what is remembered, as far as its first-order change tells.

    g <- g - (g.r / r.r) r   where g.r < 0

with g the gradient on the batch and r that on images drawn from an episodic memory.

Reference: Chaudhry et al., "Efficient lifelong learning with A-GEM", 2019.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gating_jax.continual import memory
from gating_jax.continual.method import Batch, Learner, Method, Network, Start, TaskData
from gating_jax.training.devices import value_and_grad_over_devices
from gating_jax.types import Array


def agem(network: Network, rehearsal: memory.ReplaySettings) -> Method:
  """The method; its memory is a `replay.Memory`."""
  problem = network.problem

  def init(key: Array) -> Start:
    return Start(*network.init(key), memory.empty(rehearsal.images, problem.shape))

  def gradient(grads: Any, learner: Learner, batch: Batch) -> Any:
    noise, drawing = jax.random.split(batch.key)
    x, labels, _, filled = memory.draw_inputs(
      learner.memory, drawing, batch, problem, rehearsal.batch_size
    )
    remembered = batch._replace(x=x, labels=labels, key=noise)
    loss = lambda params: network.loss(params, learner, remembered)[0]
    _, reference = value_and_grad_over_devices(loss, problem.axis_name)(learner.params)
    return jax.tree.map(lambda g, p: jnp.where(filled, p, g), grads, project(grads, reference))

  def end_task(learner: Learner, data: TaskData, key: Array) -> Learner:
    return learner.replace(memory=memory.share(learner.memory, data.pixels, data.labels, key))

  return Method(init, network.loss, end_task, network.predict, gradient=gradient)


def project(gradient: Any, reference: Any) -> Any:
  """`gradient` without its part against `reference`, trees of the same arrays; as it is where it has none.

  >>> project(jnp.array([1.0, -2.0]), jnp.array([0.0, 3.0])).tolist()
  [1.0, 0.0]
  """
  along = optax.tree.vdot(gradient, reference)
  square = optax.tree.vdot(reference, reference)
  share = jnp.where(along < 0, along / jnp.where(square > 0, square, 1.0), 0.0)
  return jax.tree.map(lambda g, r: g - share * r, gradient, reference)
