"""Sorting along an axis, with a backward pass that un-sorts.

Axes: N values along the sorted axis.

Tie rule: the forward pass is stable, so equal values keep their order and take successive ranks; the backward pass
gives every one of them the mean of the gradients that reached their places. Equal inputs thus get equal gradients, and
permuting the input permutes the gradient, ties or not.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from gating_jax.types import Array

# Longer networks take too long to compile: their size grows with the square of the logarithm.
_NETWORK_MAX_LENGTH = 2048


def sort_with_vjp(x: Array, axis: int = 0) -> Array:
  """Sorts ascending; the gradient of each sorted value returns to the element it came from.

  Args:
    x: real values, any shape. NaN sorts to no particular place and poisons nothing but its own column.
    axis: the axis to sort along.
  Returns:
    values in ascending order, same shape and dtype.
  Raises:
    ValueError: `axis` is not an axis of `x`, or `x` is not of a floating type.

  >>> sort_with_vjp(jnp.array([0.7, 0.1, 0.4]))
  Array([0.1, 0.4, 0.7], dtype=float32)
  >>> jax.grad(lambda x: sort_with_vjp(x) @ jnp.array([1.0, 2.0, 3.0]))(jnp.array([0.7, 0.1, 0.4]))
  Array([3., 1., 2.], dtype=float32)
  """
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be of a floating type, to have a gradient; got {x.dtype}")
  axis = check_axis(x, axis)
  return jnp.moveaxis(_sort_first_axis(jnp.moveaxis(x, axis, 0)), 0, axis)


def argsort(x: Array) -> tuple[Array, Array]:
  """Stable ascending sort of axis 0: `(sorted values, int32 source index of each)`.

  On CPU a compare-exchange network in plain array operations, which XLA vectorises over the other axes; elsewhere
  XLA's sort. Both give the same order for values without NaN.
  """
  if x.shape[0] > _NETWORK_MAX_LENGTH:
    return _library_argsort(x)
  return lax.platform_dependent(x, cpu=_network_argsort, default=_library_argsort)


def check_axis(x: Array, axis: int) -> int:
  """`axis` counted from the front; ValueError where `x` has no such axis."""
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"axis must name an axis of the input; got axis {axis}, shape {x.shape}")
  return axis % x.ndim


@jax.custom_vjp
def _sort_first_axis(x):
  return argsort(x)[0]


def _sort_first_axis_fwd(x):
  ordered, source = argsort(x)
  return ordered, (ordered, source)


# With P the 0/1 matrix of the sort, y = P x and P is constant between ties, so dL/dx = P^T dL/dy: the element that went
# to place i takes the cotangent of place i back, a scatter through `source`.
def _sort_first_axis_bwd(residuals, cotangent):
  ordered, source = residuals
  return (unsort(_mean_over_ties(ordered, cotangent), source),)


_sort_first_axis.defvjp(_sort_first_axis_fwd, _sort_first_axis_bwd)


def unsort(values: Array, source: Array) -> Array:
  """Puts `values`, in sorted order, back where `source` says they came from (axis 0)."""
  columns = jnp.indices(source.shape, sparse=True)[1:]
  return jnp.zeros_like(values).at[(source, *columns)].set(values, unique_indices=True)


def tie_bounds(ordered: Array) -> tuple[Array, Array]:
  """For values in order along axis 0: the first and the last place of the run of equal values each belongs to."""
  n = ordered.shape[0]
  place = lax.broadcasted_iota(jnp.int32, ordered.shape, 0)
  differs = ordered[1:] != ordered[:-1]
  edge = jnp.ones((1, *ordered.shape[1:]), bool)
  first = lax.cummax(jnp.where(jnp.concatenate([edge, differs]), place, 0), axis=0)
  last = lax.cummin(jnp.where(jnp.concatenate([differs, edge]), place, n - 1), axis=0, reverse=True)
  return first, last


def _mean_over_ties(ordered: Array, values: Array) -> Array:
  def averaged(values):
    first, last = tie_bounds(ordered)
    total = jnp.cumsum(values, axis=0)
    before = total - values
    mean = (jnp.take_along_axis(total, last, 0) - jnp.take_along_axis(before, first, 0)) / (last - first + 1)
    return jnp.where(first == last, values, mean.astype(values.dtype))

  return lax.cond(jnp.any(ordered[1:] == ordered[:-1]), averaged, lambda values: values, values)


def _library_argsort(x):
  place = lax.broadcasted_iota(jnp.int32, x.shape, 0)
  return tuple(lax.sort((x, place), dimension=0, is_stable=True, num_keys=1))


def _network_argsort(x):
  """Batcher's bitonic network, ordering pairs (value, index) so that equal values keep their order."""
  n = x.shape[0]
  size = 1 << max(n - 1, 0).bit_length()
  value = jnp.concatenate([x, jnp.full((size - n, *x.shape[1:]), jnp.inf, x.dtype)])
  index = lax.broadcasted_iota(jnp.int32, value.shape, 0)
  block = 2
  while block <= size:
    distance = block // 2
    while distance:
      value, index = _compare_exchange(value, index, block, distance)
      distance //= 2
    block *= 2
  return value[:n], index[:n]


def _compare_exchange(value, index, block, distance):
  """Orders elements `distance` apart, ascending in even blocks and descending in odd ones."""
  rest = value.shape[1:]
  split = functools.partial(jnp.reshape, shape=(value.shape[0] // (2 * distance), 2, distance, *rest))
  v, i = split(value), split(index)
  (va, vb), (ia, ib) = (v[:, 0], v[:, 1]), (i[:, 0], i[:, 1])
  start = jnp.arange(v.shape[0]) * (2 * distance)
  ascending = (start // block % 2 == 0).reshape(-1, *[1] * (va.ndim - 1))
  swap = ((va > vb) | ((va == vb) & (ia > ib))) == ascending
  v = jnp.stack([jnp.where(swap, vb, va), jnp.where(swap, va, vb)], axis=1)
  i = jnp.stack([jnp.where(swap, ib, ia), jnp.where(swap, ia, ib)], axis=1)
  return v.reshape(value.shape), i.reshape(index.shape)
