"""The empirical distribution of samples, as a prior.

Axes: M samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.ops import collectives
from gating_jax.ops.arguments import as_float, real_array, within_reach
from gating_jax.ops.priors import Prior
from gating_jax.types import Array


def empirical(samples: Array, *, axis_name: Hashable | None = None) -> Prior:
  """Returns the distribution of reference samples, or of another batch, as a prior.

      F(s_(j)) = j / (M + 1) at the j-th smallest of M samples,
      linear in between, exponential beyond both ends

  With it `cdf_matching_loss` is a two-sample criterion. The tails, of mass 1 / (M + 1) each, fall
  off over a quarter of the samples' range: values outside are drawn back, unless they lie tens of
  ranges away. Equal samples make a step, with their mean level at the step itself. Gradients reach
  the samples too, though not through the width of the tails. The symmetric two-sample Cramér-von
  Mises form of x and y is the mean of `cdf_matching_loss(x, empirical(y))` and
  `cdf_matching_loss(y, empirical(x))`.

  Args:
    samples: `[M]`, one reference for all columns, or `[M, ...]`, one for each; real values.
    axis_name: the mapped device axis, or axes, over which the samples are spread.
  Raises:
    ValueError: there is no sample, or 2**31 of them or more on all devices together.
    TypeError: samples that are no real numbers.
  Reference: Anderson, 1962 (the two-sample criterion).

  >>> print(empirical(jnp.array([3.0, 1.0, 2.0])).cdf(jnp.array([1.0, 1.5, 3.0])))
  [0.25  0.375 0.75 ]
  """
  real_array("samples", samples)
  samples = as_float(samples)
  if samples.ndim == 0 or samples.shape[0] == 0:
    raise ValueError(
      f"samples must hold at least one value along axis 0; got shape {samples.shape}"
    )
  samples = (
    collectives.whole_batch(samples)
    if axis_name is None
    else collectives.gather_batch(samples, axis_name)
  )
  within_reach("samples of a column over all devices", samples.shape[:1])
  # Sorted once here, not at every call of the CDF.
  family = _Empirical(jnp.sort(samples, axis=0))
  m, *columns = samples.shape
  return Prior(f"empirical({m} samples)", family.cdf, family.pdf, shape=tuple(columns))


@dataclasses.dataclass(frozen=True, eq=False)
class _Empirical:
  """The distribution of sorted samples, `[M, ...]`.

  Unlike a closure, it can be pickled.
  """

  ordered: Array

  def cdf(self, x):
    """Computes x -> F(x)."""
    x = as_float(x)
    m, *columns = self.ordered.shape
    shape = jnp.broadcast_shapes(x.shape, tuple(columns))
    # Samples that serve all columns make a single one: the search runs over all values at once.
    by_column = jnp.broadcast_to(x, shape).reshape(-1, math.prod(columns))
    samples = self.ordered.astype(x.dtype).reshape(m, -1)
    return jax.vmap(_interpolated_level, in_axes=1, out_axes=1)(samples, by_column).reshape(shape)

  def pdf(self, x):
    """Computes x -> f(x)."""
    x = as_float(x)
    return jax.jvp(self.cdf, (x,), (jnp.ones_like(x),))[1]


def _interpolated_level(ordered: Array, x: Array) -> Array:
  """Computes the interpolated empirical CDF of sorted samples `[M]`, at x `[R]`."""
  m, tiny = ordered.shape[0], jnp.finfo(x.dtype).tiny
  if isinstance(m, int):
    upto = jnp.searchsorted(ordered, x, side="right")
    below = jnp.searchsorted(ordered, x, side="left")
  else:
    # M is not known yet, as in `jax.export`, and a search takes as many steps as M has bits.
    upto = jnp.sum(ordered[:, None] <= x[None], axis=0, dtype=jnp.int32)
    below = jnp.sum(ordered[:, None] < x[None], axis=0, dtype=jnp.int32)
  left, right = ordered[jnp.maximum(upto - 1, 0)], ordered[jnp.minimum(upto, m - 1)]
  inside = (upto > 0) & (upto < m)
  # Halved, the difference of two finite values does not overflow.
  above_left = jnp.where(inside, x / 2 - left / 2, 0)
  between = above_left / jnp.where(inside, jnp.maximum(right / 2 - left / 2, tiny), 1)
  # At a step of t equal samples, F is the mean of their levels: (t - 1) / 2 below the last one's.
  on_step = jnp.maximum(upto - below - 1, 0).astype(x.dtype) / 2
  # A quarter of the range, halved like the distances below.
  scale = lax.stop_gradient(jnp.maximum(ordered[-1] / 8 - ordered[0] / 8, tiny))

  def tail(distance):
    """Returns the mass beyond a point at half this distance outside, times M + 1."""
    return jnp.exp(-jnp.maximum(distance / scale, 0.0))

  lower = tail(ordered[0] / 2 - x / 2)
  inner = upto.astype(x.dtype) + between - on_step
  upper = m + 1 - tail(x / 2 - ordered[-1] / 2) - on_step
  level = jnp.where(upto == 0, lower, jnp.where(upto == m, upper, inner))
  # NaN sorts last, so the last sample shows whether there is one.
  return jnp.where(jnp.isnan(ordered[-1]), jnp.nan, level / (m + 1))
