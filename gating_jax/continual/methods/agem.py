"""A-GEM: steps that do not increase the loss on the memory, to first order.

    g <- g - (g.r / r.r) r   where g.r < 0

Here g is the gradient on the batch and r that on images drawn from an episodic memory.

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
  """Makes the method; its memory is a `memory.Memory`.

  Args:
    network: to train.
    rehearsal: sizes of the memory and of each draw.
  """
  problem = network.problem

  def init(key: Array) -> Start:
    """Initialises the network and an empty memory."""
    return Start(*network.init(key), memory.empty(rehearsal.images, problem.shape))

  def gradient(grads: Any, learner: Learner, batch: Batch) -> Any:
    """Removes the part of the gradient that would increase the loss on the memory."""
    noise, drawing = jax.random.split(batch.key)
    x, labels, _, filled = memory.draw_inputs(
      learner.memory, drawing, batch, problem, rehearsal.batch_size
    )
    remembered = batch._replace(x=x, labels=labels, key=noise)
    loss = lambda params: network.loss(params, learner, remembered)[0]
    # r: the gradient on the memory, over all devices as g is.
    _, reference = value_and_grad_over_devices(loss, problem.axis_name)(learner.params)
    # An empty memory constrains nothing.
    return jax.tree.map(lambda g, p: jnp.where(filled, p, g), grads, project(grads, reference))

  def end_task(learner: Learner, data: TaskData, key: Array) -> Learner:
    """Adds the task's images to the memory."""
    return learner.replace(memory=memory.share(learner.memory, data.pixels, data.labels, key))

  return Method(init, network.loss, end_task, network.predict, gradient=gradient)


def project(gradient: Any, reference: Any) -> Any:
  """Removes from a gradient its part against a reference.

  A gradient without such a part is returned unchanged.

  Args:
    gradient, reference: trees of the same arrays.

  >>> project(jnp.array([1.0, -2.0]), jnp.array([0.0, 3.0])).tolist()
  [1.0, 0.0]
  """
  # g <- g - (g.r / r.r) r where g.r < 0; a reference of 0 changes nothing.
  along = optax.tree.vdot(gradient, reference)
  square = optax.tree.vdot(reference, reference)
  share = jnp.where(along < 0, along / jnp.where(square > 0, square, 1.0), 0.0)
  return jax.tree.map(lambda g, r: g - share * r, gradient, reference)
