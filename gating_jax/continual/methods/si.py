"""Synaptic intelligence: parameters are held by what their way through the task brought its loss down.

    total    = cross-entropy + c sum_i Omega_i (theta_i - theta*_i)^2, without 1/2
    omega_i <- omega_i - g_i dtheta_i                                                     at every step
    Omega_i <- Omega_i + max(omega_i, 0) / ((theta_i - theta*_i)^2 + xi), omega_i <- 0    after every task

g is the gradient of the cross-entropy alone, dtheta the whole step that the optimiser makes, and theta* the parameters
at the end of the task before; in small steps sum_i omega_i is the drop of the cross-entropy. A parameter whose way made
the loss larger counts as unimportant to that task.

Reference: Zenke, Poole and Ganguli, "Continual learning through synaptic intelligence", 2017.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gating_jax.continual.anchors import anchored_loss, weighted_distance
from gating_jax.continual.method import Method, Network, Start


def si(network: Network, *, strength: float, damping: float) -> Method:
  """The method. Its memory: `path` omega, `importance` Omega, `anchor` theta*.

  Args:
    network: what it trains.
    strength: c.
    damping: xi, the square of a way below which importance no longer grows as the way gets shorter.
  Raises:
    ValueError: a setting breaks its rule.
  """
  if not strength >= 0:
    raise ValueError(f"strength must be >= 0; got {strength}")
  if not damping > 0:
    raise ValueError(f"damping must be > 0; got {damping}")

  def init(key):
    params, batch_stats = network.init(key)
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    anchor = jax.tree.map(jnp.copy, params)
    return Start(params, batch_stats, {"path": zeros(), "importance": zeros(), "anchor": anchor})

  def penalty(params, memory):
    return strength * weighted_distance(params, memory["anchor"], memory["importance"])

  def update(updates, grads, learner):
    memory = learner.memory
    held = jax.grad(penalty)(learner.params, memory)
    path = jax.tree.map(
      lambda path, g, h, u: path - (g - h) * u, memory["path"], grads, held, updates
    )
    return updates, {**memory, "path": path}

  def end_task(learner, data, key):
    memory, params = learner.memory, learner.params
    importance = jax.tree.map(
      lambda old, path, p, a: old + jnp.maximum(path, 0) / ((p - a) ** 2 + damping),
      memory["importance"],
      memory["path"],
      params,
      memory["anchor"],
    )
    path = jax.tree.map(jnp.zeros_like, memory["path"])
    return learner.replace(
      memory={"path": path, "importance": importance, "anchor": jax.tree.map(jnp.copy, params)}
    )

  return Method(init, anchored_loss(network, penalty), end_task, network.predict, update=update)
