"""Thresholds that open a given fraction of a layer's gates.

    theta = the (1 - share) quantile of the logits over the batch and the gates of a layer

A penalty asks for a rate of open gates, and waits for it; a quantile sets it, in every batch.

Axes: N examples (the whole batch, over all devices), C gates of one layer.
"""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.names import former_positional
from gating_jax.ops import arguments, collectives
from gating_jax.ops.arguments import as_float
from gating_jax.types import Array


@former_positional("share")
def open_threshold(
  logits: Array,
  *,
  share: float | Array,
  axis_name: Hashable | None = None,
  weights: Array | None = None,
) -> Array:
  """Computes the threshold above which a fraction of all logits lies, without a gradient.

      k = share * N C, rounded, at least 1
      theta = (z_(k) + z_(k + 1)) / 2,   z_(k) the k-th largest of the N C logits

  The k largest logits are above it. Where z_(k) and z_(k + 1) tie, or all logits are to be open,
  theta is just below z_(k), so that all that tie with it are open: a gate that is closed learns
  less than one that is open. Two logits tie where they differ by less than the rounding of the
  larger one, or of 1. theta is finite where logits are infinite: inf is open, -inf closed.

  The k-th largest value is found by bisection over the bits of floating-point numbers, counting
  values at each step: no sorting, and devices exchange counts in place of logits.

  Args:
    logits: `[N, C]` log-odds, or any shape, in float32; or in float64 if they are.
    share: fraction in (0, 1], which may be traced; a traced one above 1 counts as 1.
    axis_name: as in `batch_shaping_loss`; the threshold is that of the whole batch, the same on
      all devices.
    weights: `[N]`, or of the logits' shape, non-negative. A logit of weight w counts as w of them;
      one of weight 0 is left out, NaN too.
  Returns:
    a scalar: NaN where a logit that counts is NaN or a weight is negative, 0 where no logit counts.
  Raises:
    ValueError: `share` is known and out of range, no logits, or weights of another shape.
    TypeError: an argument that holds no real numbers.

  >>> print(open_threshold(jnp.array([[3.0, -1.0], [0.0, 2.0]]), share=0.5))
  1.0
  """
  arguments.real_array("logits", logits)
  share = arguments.parameter("share", share, "in (0, 1]", holds=lambda v: (v > 0) & (v <= 1))
  z = lax.stop_gradient(collectives.whole_batch(as_float(logits)))
  if z.size == 0:
    raise ValueError(f"logits must hold at least one value; got shape {z.shape}")
  if weights is None:
    weights = jnp.ones_like(z)
  else:
    weights = collectives.whole_weights(weights, z, name="logits")
  share = lax.stop_gradient(jnp.asarray(share, z.dtype))
  counts = weights != 0
  total = _sum(weights, axis_name)
  # Half a unit less than the fraction of the whole rounds to the nearest number of whole units.
  half, limits = jnp.asarray(0.5, z.dtype), jnp.finfo(z.dtype)
  # A schedule that starts at 1 may exceed it in rounding, and no more than the whole can be open.
  needed = jnp.minimum(share * total - half, total)
  # Above 0, so that the largest logit is open.
  needed = jnp.maximum(needed, jnp.asarray(limits.tiny, z.dtype))
  # z_(k) and z_(k + 1) of the equation. With an infinite one, theta would be infinite or NaN.
  kth = jnp.clip(_largest_with(z, weights, needed, axis_name=axis_name), limits.min, limits.max)
  below = _maximum(jnp.where(counts & (z < kth), z, -jnp.inf), axis_name)
  below = jnp.where(jnp.isneginf(below), kth, below)
  # Large enough to be lost in rounding neither here nor in the difference of logits and theta.
  step = limits.eps * jnp.maximum(jnp.abs(kth), jnp.ones_like(kth))
  theta = jnp.minimum(half * kth + half * below, kth - step)
  theta = jnp.maximum(theta, jnp.asarray(limits.min, z.dtype))
  wrong = (counts & jnp.isnan(z)) | jnp.isnan(weights)
  # The largest is 1 if any device has a wrong value.
  is_wrong = _maximum(wrong.astype(z.dtype), axis_name) > 0
  return jnp.where(is_wrong, jnp.nan, jnp.where(total == 0, jnp.zeros_like(theta), theta))


def _largest_with(z: Array, weights: Array, needed: Array, *, axis_name: Hashable | None) -> Array:
  """Returns the largest value for which the logits at or above it weigh `needed` or more."""
  keys = _ordered(z)
  limits = jnp.iinfo(keys.dtype)
  one = jnp.ones((), keys.dtype)

  def halve(_, bounds):
    """Halves the range `[low, high]` of keys in which the answer lies."""
    low, high = bounds
    # The upper middle, which reaches high: half the sum would exceed the range of integers.
    middle = (low & high) + ((low ^ high) >> one) + ((low ^ high) & one)
    enough = _sum(jnp.where(keys >= middle, weights, 0), axis_name) >= needed
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - one)

  bounds = jnp.asarray(limits.min, keys.dtype), jnp.asarray(limits.max, keys.dtype)
  low, _ = lax.fori_loop(0, limits.bits, halve, bounds)
  return lax.bitcast_convert_type(_flip_negative(low), z.dtype)


def _ordered(z: Array) -> Array:
  """Returns integers in the order of the floating-point values; zeros of either sign are equal."""
  integer = {32: jnp.int32, 64: jnp.int64}[jnp.finfo(z.dtype).bits]
  bits = lax.bitcast_convert_type(z, integer)
  # The smallest integer has the bits of -0.0.
  return _flip_negative(jnp.where(bits == np.iinfo(bits.dtype).min, 0, bits))


def _flip_negative(bits: Array) -> Array:
  """Maps bits of floats to ordered integers, and back: it is its own inverse.

  Negative floats have rising bits for falling values; flipping all but the sign reverses that.
  """
  return jnp.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def _sum(x: Array, axis_name: Hashable | None) -> Array:
  """Computes the sum over all values of all devices."""
  total = jnp.sum(x)
  return total if axis_name is None else lax.psum(total, axis_name)


def _maximum(x: Array, axis_name: Hashable | None) -> Array:
  """Computes the largest value of all devices."""
  largest = jnp.max(x)
  return largest if axis_name is None else lax.pmax(largest, axis_name)
