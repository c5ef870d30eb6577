"""Compaction: the open units of an axis gathered into a slice of static size, and scattered back.

The layers after the gates run dense on the slice, so closed units cost nothing. Shapes stay static,
since the slice has one of a few sizes chosen on the host. The axis may be examples, segments of
videos, or channels. `open_backward` compacts the backward pass alone: an example that a closed gate
multiplies by 0 gets no gradient, so none has to be computed.

Axes: N units, K = `capacity` of the slice.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Riquelme et al., 2021 (experts'
  static capacity); Chen et al., "Training deep nets with sublinear memory cost", 2016 (the forward
  pass again, in the backward pass).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gating_jax.checks import shown
from gating_jax.names import former_positional
from gating_jax.ops import arguments
from gating_jax.ops.arguments import as_float
from gating_jax.types import AnyArray, Array


@former_positional("capacity")
def open_indices(gates: Array, *, capacity: int) -> tuple[Array, Array]:
  """Returns the positions of the open units, in order, padded to a static number.

  Args:
    gates: `[N]`; a unit is open where its gate is above 0.
    capacity: length of the result. If more units are open, the last ones are left out, since a
      traced program cannot raise. Choose it by `capacity_for`, which does.
  Returns:
    `(index, taken)`: `[capacity]` int32 positions in the unit axis, 0 in the padding, with which
    gathering is always safe, and `[capacity]` bool, False in the padding.
  Raises:
    ValueError: `gates` is not `[N]` with 1 <= N < 2**31, or `capacity` is below 1.
    TypeError: an argument of another kind.

  >>> open_indices(jnp.array([0.0, 1.0, 0.0, 1.0]), capacity=3)
  (Array([1, 3, 0], dtype=int32), Array([ True,  True, False], dtype=bool))
  """
  arguments.real_array("gates", gates)
  if jnp.ndim(gates) != 1 or not jnp.size(gates):
    raise ValueError(f"gates must be [N] with N >= 1; got shape {jnp.shape(gates)}")
  arguments.within_reach("gates", jnp.shape(gates))
  arguments.whole_number("capacity", capacity)
  is_open = as_float(gates) > 0
  # JAX's indices are 64-bit with `jax_enable_x64`; the result is int32 in any case.
  (index,) = jnp.nonzero(is_open, size=capacity, fill_value=0)
  return index.astype(jnp.int32), jnp.arange(capacity) < jnp.sum(is_open)


@former_positional("size")
def scatter_back(values: Array, index: Array, taken: Array, *, size: int) -> Array:
  """Scatters computed slices back to their units, with zeros elsewhere.

      y[index[i]] = values[i] where taken[i]

  It is the transpose of gathering by `index`.

  Args:
    values: `[capacity, ...]`; the padding is dropped in both directions, even if it is not finite.
    index, taken: as returned by `open_indices`.
    size: N.
  Returns:
    `[size, ...]`, dtype of `values`.
  Raises:
    ValueError: the shapes do not fit together.
    TypeError: an array of another kind, such as an `index` that is not of whole numbers.

  >>> index, taken = open_indices(jnp.array([0.0, 1.0, 0.0, 1.0]), capacity=3)
  >>> scatter_back(jnp.array([5.0, 7.0, 9.0]), index, taken, size=4)
  Array([0., 5., 0., 7.], dtype=float32)
  """
  for name, array in (("values", values), ("index", index), ("taken", taken)):
    arguments.real_array(name, array)
  arguments.whole_number("size", size, 0)
  values, index, taken = map(jnp.asarray, (values, index, taken))
  if not values.shape[:1] == index.shape == taken.shape:
    raise ValueError(
      "values must be [capacity, ...] with index and taken [capacity]; "
      f"got {values.shape}, {index.shape}, {taken.shape}"
    )
  if not jnp.issubdtype(index.dtype, jnp.integer):
    raise TypeError(f"index must be whole numbers; got {shown(index)}")
  # Padding is sent to the place `size`, out of range, where `drop` ignores it: multiplying it by 0
  # instead would let NaN through.
  place = jnp.where(taken.astype(bool), index, size)
  zeros = jnp.zeros((size, *values.shape[1:]), values.dtype)
  return zeros.at[place].add(values, mode="drop")


@former_positional("sizes")
def capacity_for(count: int, *, sizes: Sequence[int]) -> int:
  """Returns the smallest of some static sizes that holds `count` units; on the host, with numbers.

  Args:
    count: number of units.
    sizes: whole numbers, such as those of `bucket_sizes`.
  Raises:
    ValueError: `count` is more than the largest size.

  >>> capacity_for(5, sizes=(2, 4, 6, 8))
  6
  """
  arguments.whole_number("count", count, 0)
  sizes = _checked_sizes(sizes)
  if count > max(sizes):
    raise ValueError(f"count must be at most the largest of sizes, {max(sizes)}; got {count}")
  return min(size for size in sizes if size >= count)


def pieces_for(count: int, sizes: Sequence[int]) -> tuple[int, ...]:
  """Returns static sizes that together hold `count` units.

  The largest is used as often as it is filled, then the smallest that holds the rest. At least one
  is returned, also for no units, so that the computation has a shape.

  >>> pieces_for(21, (2, 4, 8)), pieces_for(16, (4, 8)), pieces_for(0, (4, 8))
  ((8, 8, 8), (8, 8), (4,))
  >>> pieces_for(19, (2, 4, 8))
  (8, 8, 4)
  """
  arguments.whole_number("count", count, 0)
  sizes = _checked_sizes(sizes)
  filled, rest = divmod(count, max(sizes))
  pieces = (max(sizes),) * filled
  return (*pieces, capacity_for(rest, sizes=sizes)) if rest or not filled else pieces


@former_positional("buckets")
def bucket_sizes(total: int, *, buckets: int, multiple: int = 1) -> tuple[int, ...]:
  """Returns evenly spaced capacities, for each of which a program is compiled.

  At most `total / buckets` (+ `multiple`) of a slice is padding.

  Args:
    total: largest number of units; the last size holds them.
    buckets: largest number of sizes; fewer if they coincide.
    multiple: sizes are rounded up to multiples of this, e.g. the number of devices.
  Raises:
    ValueError, TypeError: an argument that is no whole number >= 1.

  >>> bucket_sizes(10, buckets=4), bucket_sizes(10, buckets=4, multiple=4)
  ((3, 5, 8, 10), (4, 8, 12))
  """
  for name, value in (("total", total), ("buckets", buckets), ("multiple", multiple)):
    arguments.whole_number(name, value)
  # A set, since rounding up can make sizes equal.
  sizes = set()
  for i in range(1, buckets + 1):
    # Both divisions round up, in whole numbers: the last size is exactly `total`.
    size = -(-total * i // buckets)
    sizes.add(-(-size // multiple) * multiple)
  return tuple(sorted(sizes))


def example_sizes(total: int, buckets: int) -> tuple[int, ...]:
  """Returns the numbers of examples, out of `total`, that programs take: none, a few, all.

  Args:
    total: number of examples.
    buckets: as in `bucket_sizes`.

  >>> example_sizes(10, 4), example_sizes(1, 4)
  ((0, 3, 5, 8, 10), (0, 1))
  """
  return (0, *bucket_sizes(total, buckets=buckets)) if total > 1 else (0, 1)


def open_backward(
  f: Callable[[Any, Array], Array], variables: Any, x: Array, gates: AnyArray, *, capacity: int
) -> Array:
  """Computes `f(variables, x)`, with a backward pass on the open examples only.

  The value is that of all examples, since a gate's straight-through gradient needs the output that
  a closed example would have had. The gradients of `variables` and `x` are those of `f` where

      f treats every example independently (GroupNorm, or BatchNorm with running statistics), and
      the loss has no derivative in the output of a closed example, as when gates multiply it.

  With F the cost of a forward pass and 2F that of a backward pass, s N = `capacity` of N examples
  cost F (1 + 3 s) in place of 3F, since the backward pass computes the forward pass of the open
  ones again: a gain below s = 2/3.

  Args:
    f: `(variables, x [K, ...]) -> [K, ...]`, for any K.
    variables: a tree of floating-point arrays.
    x: `[N, ...]`.
    gates: `[N]`; an example is open where its gate is above 0. Their gradient here is 0.
    capacity: K, from 1 to N, not below the number of open examples, such as `capacity_for(count,
      sizes=sizes)`. A traced program cannot raise: if more examples are open, all gradients are
      NaN, never silently wrong.
  Returns:
    `[N, ...]`.
  Raises:
    ValueError: gates that do not fit x, or a capacity out of range.
    TypeError: an argument of another kind.

  >>> half = lambda w: jnp.sum(jnp.array([1.0, 0.0]) * open_backward(
  ...     lambda w, x: jnp.sin(w * x), w, jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0]), capacity=1))
  >>> jax.grad(half)(0.0)
  Array(1., dtype=float32, weak_type=True)
  """
  arguments.function("f", f)
  arguments.real_array("x", x)
  arguments.real_array("gates", gates)
  arguments.whole_number("capacity", capacity, 0)
  if jnp.ndim(x) < 1 or jnp.shape(gates) != jnp.shape(x)[:1]:
    raise ValueError(
      f"gates must be [N] for x's N examples; got gates {jnp.shape(gates)}, x {jnp.shape(x)}"
    )
  if not 1 <= capacity <= len(x):
    raise ValueError(f"capacity must be from 1 to the {len(x)} examples of x; got {capacity}")
  return _open_backward(f, capacity, variables, x=jnp.asarray(x), gates=jnp.asarray(gates))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _open_backward(f, capacity, variables, x, gates):
  return f(variables, x)


def _open_backward_fwd(f, capacity, variables, x, gates):
  return f(variables, x), (variables, x, gates)


# With y_n = f(v, x_n) and dL/dy_n = 0 for closed n: dL/dx_n = 0 for these, and dL/dv = sum over
# open n of dL/dy_n dy_n/dv.
def _open_backward_bwd(f, capacity, residuals, ct):
  variables, x, gates = residuals
  index, taken = open_indices(gates, capacity=capacity)
  # Runs the forward pass of the open examples again, since none of it was kept.
  _, pull = jax.vjp(f, variables, x[index])
  # Padding repeats example 0, whose cotangent must not count twice.
  taken_rows = taken.reshape(-1, *[1] * (ct.ndim - 1))
  of_variables, of_open = pull(jnp.where(taken_rows, ct[index], 0))
  of_x = scatter_back(of_open, index, taken, size=len(x))
  # Gradients of examples left out would be silently missing, so all become NaN.
  fits = jnp.sum(as_float(gates) > 0) <= capacity
  of_variables, of_x = jax.tree.map(lambda g: jnp.where(fits, g, jnp.nan), (of_variables, of_x))
  return of_variables, of_x, jnp.zeros_like(gates)


_open_backward.defvjp(_open_backward_fwd, _open_backward_bwd)


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
  sizes = arguments.items("sizes", sizes, "whole numbers >= 1")
  if not sizes:
    raise ValueError("sizes must hold at least one number; got none")
  for size in sizes:
    arguments.whole_number("each of sizes", size)
  return sizes
