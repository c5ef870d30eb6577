"""Sorting along an axis, with a backward pass that un-sorts.

Axes: N values along the sorted axis.

Tie rule: the forward pass is stable, so equal values keep their order and take successive ranks.
The backward pass gives each of them the mean of the gradients that reached their places. Equal
inputs thus get equal gradients, and permuting the input permutes the gradient, ties or not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.checks import shown
from gating_jax.names import former_positional
from gating_jax.ops import arguments, collectives
from gating_jax.ops.arguments import as_float
from gating_jax.types import Array

# Longer networks take too long to compile: their size grows with the square of the logarithm.
_NETWORK_MAX_LENGTH = 2048
# Columns in a core's cache at a time.
_BLOCK = 64
# Steps that the compiler fuses into one pass over memory.
_STEPS_AT_A_TIME = 2

_P = ParamSpec("_P")
_R = TypeVar("_R")


def reverse_mode_only(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """Wraps a function that has a `custom_vjp` inside, with a clear error for forward mode.

  The error names the functions to use instead.
  """

  @functools.wraps(function)
  def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Calls the function and raises a clearer error for forward-mode derivatives."""
    try:
      return function(*args, **kwargs)
    except TypeError as error:
      # JAX raises a plain TypeError, which only its text distinguishes from others.
      if "custom_vjp" not in str(error):
        raise
      raise TypeError(
        f"{function.__name__} has a reverse-mode rule only: use jax.grad, jax.vjp or jax.jacrev, "
        "not jax.jvp or jax.jacfwd; for second derivatives use jax.hessian = jacfwd(jacrev(f))"
      ) from error

  return run


@former_positional("axis")
@reverse_mode_only
def sort_with_vjp(x: Array, *, axis: int = 0) -> Array:
  """Sorts in ascending order; each sorted value's gradient returns to the element it came from.

  The losses of `ops/ecdf.py` have their own rule instead: they need the places of values, not the
  sorted values.

  Args:
    x: real values, any shape. NaN sorts to no particular place, and affects no other column.
    axis: the axis to sort along.
  Returns:
    values in ascending order, same shape and dtype.
  Raises:
    ValueError: `axis` is not an axis of `x`, or `x` holds 2**31 values or more.
    TypeError: `x` is not of a floating type; or forward-mode differentiation, for which there is no
      rule.

  >>> sort_with_vjp(jnp.array([0.7, 0.1, 0.4]))
  Array([0.1, 0.4, 0.7], dtype=float32)
  >>> jax.grad(lambda x: sort_with_vjp(x) @ jnp.array([1.0, 2.0, 3.0]))(jnp.array([0.7, 0.1, 0.4]))
  Array([3., 1., 2.], dtype=float32)
  """
  arguments.real_array("x", x)
  x = jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"x must be of a floating type, to have a gradient; got {x.dtype}")
  axis = check_axis(x, axis)
  x = collectives.whole_batch(x)
  return jnp.moveaxis(_sort_first_axis(jnp.moveaxis(x, axis, 0)), 0, axis)


def argsort(x: Array) -> tuple[Array, Array]:
  """Sorts axis 0 in ascending order, stably; returns where the values come from.

  On a CPU this is a compare-exchange network in plain array operations, which XLA vectorises over
  the other axes: its own sort there takes one column after the other. Elsewhere it is XLA's sort,
  which is native to GPU and TPU, where each pass of the network would go through main memory. Both
  give the same order for values without NaN. XLA's sort is also used where a size is not known yet,
  as in `jax.export` with symbolic shapes.

  Args:
    x: `[N, ...]` of a floating type.
  Returns:
    `(source, tied)`: the int32 index from which each place takes its value, `[N, ...]`, and whether
    that value is equal to the next place's, `[N - 1, ...]`.
  Raises:
    ValueError: 2**31 values or more, beyond the reach of 32-bit indices.
  """
  arguments.within_reach("the ranked values over all devices", x.shape)
  if not all(isinstance(size, int) for size in x.shape):
    return _library_argsort(x)
  # The network packs 32 bits of a value and its index into 64: float64 does not fit.
  if not 0 < x.size <= _NETWORK_MAX_LENGTH * math.prod(x.shape[1:]) or jnp.finfo(x.dtype).bits > 32:
    return _library_argsort(x)
  return lax.platform_dependent(x, cpu=_network_argsort, default=_library_argsort)


def check_axis(x: Array, axis: int) -> int:
  """Returns `axis` counted from the front.

  Raises:
    TypeError: `axis` is no whole number.
    ValueError: `x` has no such axis.
  """
  is_whole = isinstance(axis, (int, np.integer)) and not isinstance(axis, bool)
  if not is_whole:
    raise TypeError(f"axis must be a whole number; got {shown(axis)}")
  if not -x.ndim <= axis < x.ndim:
    raise ValueError(f"axis must name an axis of the input; got axis {axis}, shape {x.shape}")
  return axis % x.ndim


def take(values: Array, source: Array) -> Array:
  """Puts `values` in the order `source` (axis 0)."""
  return values.at[(source, *_columns(source))].get(unique_indices=True, mode="promise_in_bounds")


def unsort(values: Array, source: Array) -> Array:
  """Puts sorted `values` back where `source` says they came from (axis 0).

  It is the transpose of `take`.
  """
  n, *columns = source.shape
  # Column after column, which keeps the scatter's writes near each other.
  first = jnp.asarray(n, source.dtype) * jnp.arange(math.prod(columns), dtype=source.dtype)
  index = source.reshape(n, -1).T + first[:, None]
  by_column = values.reshape(n, -1).T
  flat = jnp.zeros(values.size, values.dtype)
  flat = flat.at[index.ravel()].set(
    by_column.ravel(), unique_indices=True, mode="promise_in_bounds"
  )
  return flat.reshape(-1, n).T.reshape(values.shape)


def tie_bounds(tied: Array) -> tuple[Array, Array]:
  """Returns the first and the last place of each place's run of equal values.

  Args:
    tied: as returned by `argsort`.
  Returns:
    two int32 arrays `[N, ...]`.
  """
  n = tied.shape[0] + 1
  place = lax.broadcasted_iota(jnp.int32, (n, *tied.shape[1:]), 0)
  edge = jnp.zeros((1, *tied.shape[1:]), bool)
  # A run begins where the place before is not tied to this one; the running maximum spreads its
  # start over the run. The end likewise, from the other side.
  first = lax.cummax(jnp.where(jnp.concatenate([edge, tied]), 0, place), axis=0)
  last = lax.cummin(jnp.where(jnp.concatenate([tied, edge]), n - 1, place), axis=0, reverse=True)
  return first, last


def mean_over_ties(values: Array, tied: Array) -> Array:
  """Replaces each value by the mean over its run of equal values."""
  first, last = tie_bounds(tied)
  run = (first, *_columns(first))
  # Sums within each run: differences of running sums would lose small values behind large ones.
  wide = as_float(values)
  total = jnp.zeros_like(wide).at[run].add(wide)
  return (total[run] / (last - first + 1).astype(wide.dtype)).astype(values.dtype)


def _columns(source):
  """Returns indices of all axes but the first, which broadcast to those of the first.

  Sizes may be symbolic.
  """
  indices = []
  for axis in range(1, source.ndim):
    shape = [1] * source.ndim
    shape[axis] = source.shape[axis]
    indices.append(lax.broadcasted_iota(source.dtype, shape, axis))
  return indices


@jax.custom_vjp
def _sort_first_axis(x):
  return take(x, argsort(x)[0])


def _sort_first_axis_fwd(x):
  source, tied = argsort(lax.stop_gradient(x))
  return take(x, source), (source, tied)


# With P the 0/1 matrix of the sort, y = P x and P is constant between ties, so dL/dx = P^T dL/dy:
# the element that went to place i takes the cotangent of place i back, a scatter through `source`.
def _sort_first_axis_bwd(residuals, cotangent):
  source, tied = residuals
  # The mean over ties is skipped at run time where there are none.
  shared = lax.cond(jnp.any(tied), mean_over_ties, lambda values, _: values, cotangent, tied)
  return (unsort(shared, source),)


_sort_first_axis.defvjp(_sort_first_axis_fwd, _sort_first_axis_bwd)


def _library_argsort(x):
  place = lax.broadcasted_iota(jnp.int32, x.shape, 0)
  ordered, source = lax.sort((x, place), dimension=0, is_stable=True, num_keys=1)
  return source, ordered[1:] == ordered[:-1]


def _network_argsort(x):
  """Runs `_argsort_block` on a few columns at a time, which stay in a core's cache."""
  n, *columns = x.shape
  by_column = x.astype(jnp.float32).reshape(n, -1)
  count = by_column.shape[1]
  blocks = jnp.pad(by_column, ((0, 0), (0, -count % _BLOCK))).reshape(n, -1, _BLOCK)
  # The network works on 64-bit integers, which JAX has only in this mode.
  with jax.enable_x64(True):
    source, tied = lax.map(_argsort_block, jnp.swapaxes(blocks, 0, 1))

  def join(parts):
    """Joins blocks `[blocks, n, _BLOCK]` to `[n, *columns]`, without the padding."""
    rows = parts.shape[1]
    joined = jnp.swapaxes(parts, 0, 1).reshape(rows, blocks.shape[1] * _BLOCK)
    return joined[:, :count].reshape(rows, *columns)

  return join(source), join(tied)


def _argsort_block(x):
  """Sorts with Batcher's bitonic network, on 64-bit integers of the value's bits and its index.

  Minima and maxima of these order by value, and equal values by index.
  """
  n, columns = x.shape
  # The largest integer pads the length to a power of two; it sorts last and is cut off.
  last = jnp.full(((1 << (n - 1).bit_length()) - n, columns), np.iinfo(np.int64).max)
  keys = _network(jnp.concatenate([_pack(x), last]))[:n]
  value = keys >> 32
  return (keys & 0xFFFFFFFF).astype(jnp.int32), value[1:] == value[:-1]


def _pack(x):
  """Converts float32 `[N, ...]` to int64, ordered by value and then by index.

  Zeros of either sign are equal. Bits are compared, not values: XLA's CPU threads take every
  subnormal number for a zero.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  # The smallest integer has the bits of -0.0.
  bits = jnp.where(bits == np.iinfo(np.int32).min, 0, bits)
  # Negative floats have rising bits for falling values; flipping all but the sign reverses it.
  rising = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
  return (rising.astype(jnp.int64) << 32) | lax.broadcasted_iota(jnp.int64, x.shape, 0)


def _network(x):
  """Sorts axis 0, whose length is a power of two.

  It merges ever longer sorted blocks, the second of each two reversed.
  """
  block = 2
  while block <= x.shape[0]:
    distance, mirrored = block // 2, True
    while distance:
      steps = min(_STEPS_AT_A_TIME, distance.bit_length())
      x = _compare_exchange(x, distance, steps=steps, mirrored=mirrored)
      distance, mirrored = distance >> steps, False
    block *= 2
  return x


def _compare_exchange(x, distance, *, steps, mirrored):
  """Orders elements `distance` apart, then half that, and so on for `steps` steps.

  With `mirrored` the first step orders elements that mirror each other in a block of twice the
  distance.
  """
  # In these steps an element meets only those in the same (or mirrored) place of the other parts of
  # its block, so the `rows` parts are separate arrays.
  rows = 1 << steps
  apart = x.reshape(-1, rows, 2 * distance // rows, *x.shape[1:])
  row = [apart[:, i] for i in range(rows)]
  half = rows // 2
  while half:
    for i in range(rows):
      # Each pair once, from its lower part.
      if i & half:
        continue
      if mirrored:
        # The partner lies in the mirrored part, in reverse order.
        partner = rows - 1 - i
        low, high = row[i], row[partner][:, ::-1]
        row[i], row[partner] = jnp.minimum(low, high), jnp.maximum(low, high)[:, ::-1]
      else:
        partner = i + half
        low, high = row[i], row[partner]
        row[i], row[partner] = jnp.minimum(low, high), jnp.maximum(low, high)
    half, mirrored = half // 2, False
  return jnp.stack(row, axis=1).reshape(x.shape)
