"""Synaptic intelligence: importance from each parameter's path through earlier tasks.

    total    = cross-entropy + c sum_i Omega_i (theta_i - theta*_i)^2, without 1/2
    omega_i <- omega_i - g_i dtheta_i                                        at every step
    Omega_i <- Omega_i + max(omega_i, 0) / ((theta_i - theta*_i)^2 + xi),
    omega_i <- 0                                                             after every task

The importance is each parameter's part in the decrease of the loss along its path. g is the
gradient of the cross-entropy alone, dtheta the whole step of the optimiser, and theta* the
parameters at the end of the last task; for small steps sum_i omega_i is the decrease of the
cross-entropy. A parameter whose path increased the loss counts as unimportant for that task.

Reference: Zenke, Poole and Ganguli, "Continual learning through synaptic intelligence", 2017.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gating_jax.continual.method import InitialState, MemoryNode, Method, Network
from gating_jax.continual.methods.ewc import anchored_loss, weighted_distance


class SiMemory(MemoryNode):
  """The memory of the method; each field is a tree like the parameters.

  Attributes:
    path: omega, the path integral of the current task so far.
    importance: Omega.
    anchor: theta*.
  """

  path: Any
  importance: Any
  anchor: Any


def si(network: Network, *, strength: float, damping: float) -> Method:
  """Makes the method.

  Args:
    network: to train.
    strength: c, >= 0.
    damping: xi > 0, the squared distance below which a shorter path no longer gives more
      importance.
  Raises:
    ValueError: a setting breaks its rule.
  """
  if not strength >= 0:
    raise ValueError(f"strength must be >= 0; got {strength}")
  if not damping > 0:
    raise ValueError(f"damping must be > 0; got {damping}")

  def init(key):
    """Initialises the network, with a path and importance of 0."""
    params, batch_stats = network.init(key)
    # A step donates its buffers: no two of these may be one buffer.
    memory = SiMemory(
      path=jax.tree.map(jnp.zeros_like, params),
      importance=jax.tree.map(jnp.zeros_like, params),
      anchor=jax.tree.map(jnp.copy, params),
    )
    return InitialState(params, batch_stats, memory)

  def penalty(params, memory):
    """Computes the penalty on the distance to the anchor, a scalar."""
    return strength * weighted_distance(params, memory.anchor, memory.importance)

  def update(updates, grads, learner):
    """Adds the step to the path; the updates stay the same."""
    memory = learner.memory
    of_penalty = jax.grad(penalty)(learner.params, memory)

    def extend(path, grad, of_penalty, update):
      """Adds the step of one array: omega_i <- omega_i - g_i dtheta_i."""
      # g is the gradient of the cross-entropy alone: that of the penalty is subtracted.
      return path - (grad - of_penalty) * update

    path = jax.tree.map(extend, memory.path, grads, of_penalty, updates)
    return updates, memory.replace(path=path)

  def end_task(learner, data, key):
    """Adds the task's path to the importance and moves the anchor."""
    memory, params = learner.memory, learner.params

    def add(importance, path, p, anchor):
      """Adds the path of one array."""
      # Omega_i <- Omega_i + max(omega_i, 0) / ((theta_i - theta*_i)^2 + xi)
      return importance + jnp.maximum(path, 0) / ((p - anchor) ** 2 + damping)

    memory = SiMemory(
      path=jax.tree.map(jnp.zeros_like, memory.path),
      importance=jax.tree.map(add, memory.importance, memory.path, params, memory.anchor),
      anchor=jax.tree.map(jnp.copy, params),
    )
    return learner.replace(memory=memory)

  return Method(init, anchored_loss(network, penalty), end_task, network.predict, update=update)
