"""Collectives for a loss over a whole batch that is spread over devices.

The convention is pmap's: every device computes the global loss, and gradients are averaged over
devices afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gating_jax.ops import arguments
from gating_jax.ops.arguments import float_dtype
from gating_jax.types import AnyArray, Array


def gather_batch(x: Array, axis_name: Hashable | None) -> Array:
  """Returns every device's examples in device order: `[N, ...]` here, `[devices * N, ...]` back.

  The backward pass sums the cotangents of all devices and returns this device's slice of the sum,
  since each device's copy of the loss depends on these examples. Averaging the parameter gradients
  then gives that of one loss over the whole batch. (That sum is the transpose of `all_gather`;
  without it the term would be 1 / devices too weak.)
  """
  if axis_name is None:
    return x
  return lax.all_gather(x, axis_name, axis=0, tiled=True)


def whole_batch(x: Array) -> Array:
  """Returns `x` on every device, if it is sharded over Explicit mesh axes.

  Operations on such arrays do not gather on their own.
  """
  sharding = jax.typeof(x).sharding
  if sharding.is_fully_replicated:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def whole_weights(weights: AnyArray, x: Array, *, name: str, axis: int = 0) -> Array:
  """Returns the weight of each value of a whole batch, without a gradient; negative ones are NaN.

  Args:
    weights: of the shape of `x`, or `[N]`, one per example.
    x: the batch, with N examples along `axis`.
    name: the name of the argument `x`, for messages.
    axis: the axis of examples, counted from the front.
  Returns:
    an array of the shape and type of `x`.
  Raises:
    TypeError: weights are no array of real numbers.
    ValueError: weights are of another shape.
  """
  arguments.real_array("weights", weights)
  weights = whole_batch(lax.stop_gradient(jnp.asarray(weights, x.dtype)))
  # `(N,)`; without any axis for a batch that is a single number.
  one_each = x.shape[axis : axis + 1]
  if weights.shape == one_each:
    weights = lax.broadcast_in_dim(weights, x.shape, range(axis, axis + weights.ndim))
  if weights.shape != x.shape:
    raise ValueError(
      f"weights must be of shape {one_each}, one per example, or of the shape of {name}, "
      f"{x.shape}; got {weights.shape}"
    )
  return jnp.where(weights < 0, jnp.nan, weights)


def exchange_columns(x: Array, axis_name: Hashable) -> Array:
  """Returns all examples of this device's part of the columns.

  `[N, C]` here, `[devices * N, C / devices]` back; columns of zeros round C up to a multiple of the
  devices. Its transpose is the way back.
  """
  # `all_to_all` needs equal parts.
  spare = -x.shape[1] % lax.axis_size(axis_name)
  return lax.all_to_all(
    jnp.pad(x, ((0, 0), (0, spare))), axis_name, split_axis=1, concat_axis=0, tiled=True
  )


def batch_mean(x: AnyArray, axis_name: Hashable | None) -> Array:
  """Computes the mean over axis 0 of the whole batch, whose shards have equal size."""
  x = jnp.asarray(x)
  # Integers and truth values have a mean in float32.
  mean = jnp.mean(x.astype(float_dtype(x)), axis=0)
  return mean if axis_name is None else lax.pmean(mean, axis_name)


def mean_over_devices(tree: Any, axis_name: Hashable | None) -> Any:
  """Averages every array over devices, such as each device's gradients and metrics."""
  return tree if axis_name is None else lax.pmean(tree, axis_name)


def example_keys(key: Array, n: int, axis_name: Hashable | None) -> Array:
  """Returns one key per example, `[n]`.

  A key depends on the example's place in the whole batch, not on how the batch is spread.
  """
  # Devices hold equal, consecutive parts of the batch.
  first = 0 if axis_name is None else lax.axis_index(axis_name) * n
  place = first + jnp.arange(n, dtype=jnp.int32)
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, place)
