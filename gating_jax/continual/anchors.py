"""A quadratic penalty on the distance to earlier parameters, with one weight per parameter.

    total = cross-entropy + penalty,   penalty = strength sum_i w_i (theta_i - theta*_i)^2

Methods differ in the weights w. The 1/2 of some methods belongs to their strength.

Reference: Kirkpatrick et al., 2017, equation 3; Zenke, Poole and Ganguli, 2017, equation 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gating_jax.continual.method import Batch, Learner, Network
from gating_jax.types import Array


def weighted_distance(params: Any, anchor: Any, weight: Any) -> Array:
  """Computes sum_i w_i (theta_i - theta*_i)^2 over three trees.

  Args:
    params: theta.
    anchor, weight: theta* and w, like `params`; a leading axis of several anchors is summed over.
  Returns:
    a scalar.

  >>> params, anchor = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([0.0, 5.0])}
  >>> float(weighted_distance(params, anchor, {"a": jnp.array([4.0, 2.0])}))
  22.0
  """
  return optax.tree.sum(
    # A leading axis of anchors broadcasts against the parameters.
    jax.tree.map(lambda p, a, w: jnp.sum(w * (p - a) ** 2), params, anchor, weight)
  )


def anchored_loss(
  network: Network, penalty: Callable[[Any, Any], Array]
) -> Callable[..., tuple[Array, Any]]:
  """Makes the `loss` of a method: the network's cross-entropy plus a penalty.

  Args:
    network: to train.
    penalty: `(params, memory) -> scalar`.
  """

  def loss(
    params: Any, learner: Learner, batch: Batch
  ) -> tuple[Array, tuple[Mapping[str, Array], Any]]:
    """Computes the cross-entropy plus the penalty, a scalar."""
    cross_entropy, (terms, batch_stats) = network.loss(params, learner, batch)
    # total = cross-entropy + penalty
    held = penalty(params, learner.memory)
    return cross_entropy + held, ({**terms, "penalty": held}, batch_stats)

  return loss
