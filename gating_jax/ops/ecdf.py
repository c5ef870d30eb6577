"""The empirical CDF of a batch, and losses that pull it onto a prior's CDF.

Axes: N examples (the whole batch, over all devices), C independent features or gates.
Rank convention: the i-th smallest of N values stands at i / (N + 1), i from 1; for ties see `ops/ranking.py`.
Reference: Bejnordi et al., 2020, section 3; Cramér (1928), von Mises.
"""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp

from gating_jax.ops import collectives, ranking
from gating_jax.ops.priors import Prior
from gating_jax.types import Array


def empirical_cdf(x: Array, axis: int = 0) -> Array:
  """Each value's place in its column: `rank / (N + 1)`, tied values sharing their mean rank. No gradient.

  Args:
    x: real values, any shape.
    axis: the axis over which values are ranked.
  Returns:
    float, in (0, 1), same shape, original order.

  >>> empirical_cdf(jnp.array([0.7, 0.1, 0.4, 0.1]))
  Array([0.8, 0.3, 0.6, 0.3], dtype=float32)
  """
  x = jnp.asarray(x)
  x = x.astype(jnp.result_type(x, jnp.float32))
  axis = ranking.check_axis(x, axis)
  ordered, source = ranking.argsort(jnp.moveaxis(x, axis, 0))
  first, last = ranking.tie_bounds(ordered)
  place = ((first + last) / 2 + 1).astype(x.dtype) / (ordered.shape[0] + 1)
  return jnp.moveaxis(ranking.unsort(place, source), 0, axis)


def batch_shaping_loss(
    logits: Array, prior: Prior, *, axis: int = 0, axis_name: Hashable | None = None
) -> Array:
  """Squared gap between each column's empirical CDF and a prior's CDF, for gates given by their log-odds.

      loss = mean_i (F(p_(i)) - i / (N + 1))^2,   p = sigmoid(logits), p_(i) the i-th smallest

  The gradient is finite for every finite logit. N i.i.d. samples of the prior itself have the expected loss
  `noise_floor(N)`.

  Args:
    logits: `[N, C]` gate log-odds, or any shape; columns along `axis` are independent gates.
    prior: a `Prior` on [0, 1].
    axis: the batch axis.
    axis_name: the mapped device axis, or axes, over which the batch is spread; the loss and its gradient are those of
      the whole batch, provided gradients are averaged over devices like those of the other terms.
  Returns:
    `[C]`, dimensionless: `logits`' shape without `axis`. Times N it is the sum form.
  Raises:
    ValueError: the prior has no logit axis, `axis` is not an axis of `logits`, or N is 0.

  >>> from gating_jax.ops.priors import beta
  >>> p = jnp.array([0.7, 0.1, 0.95, 0.4])
  >>> print(f"{4 * batch_shaping_loss(jnp.log(p / (1 - p)), beta(0.6, 0.4)):.5f}")
  0.01893

  Reference: Bejnordi et al., 2020, section 3.
  """
  if prior.logit_cdf is None:
    raise ValueError(f"prior must have a logit axis, that is, live on [0, 1]; got {prior.name}; use cdf_matching_loss")
  return _gap(logits, prior.logit_cdf, "logits", axis, axis_name)


def cdf_matching_loss(x: Array, prior: Prior, *, axis: int = 0, axis_name: Hashable | None = None) -> Array:
  """`batch_shaping_loss` on the natural axis: for probabilities, or any real-valued feature.

      loss = mean_i (F(x_(i)) - i / (N + 1))^2

  For gates prefer `batch_shaping_loss`: a probability that has rounded to 0 or 1 has lost the logit's digits.
  Arguments, result and errors are as there.

  >>> from gating_jax.ops.priors import uniform
  >>> print(f"{4 * cdf_matching_loss(jnp.array([0.7, 0.1, 0.95, 0.4]), uniform()):.4f}")
  0.0425
  """
  return _gap(x, prior.cdf, "x", axis, axis_name)


def noise_floor(n: int) -> float:
  """Expected mean-form loss of n i.i.d. samples of the prior itself: 1 / (6 (n + 1)).

  >>> round(noise_floor(256), 6)
  0.000649
  """
  return 1 / (6 * (n + 1))


def _gap(x, cdf, name, axis, axis_name):
  x = jnp.asarray(x)
  x = x.astype(jnp.result_type(x, jnp.float32))
  axis = ranking.check_axis(x, axis)
  x = collectives.gather_batch(jnp.moveaxis(x, axis, 0), axis_name)
  n = x.shape[0]
  if n == 0:
    raise ValueError(f"{name} must hold at least one example along axis {axis}; got shape {x.shape}")
  expected = (jnp.arange(1, n + 1, dtype=x.dtype) / (n + 1)).reshape(n, *[1] * (x.ndim - 1))
  return jnp.mean(jnp.square(cdf(ranking.sort_with_vjp(x)) - expected), axis=0)
