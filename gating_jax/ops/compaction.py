"""Compaction: the open units of an axis gathered into a slice of static size, and put back.

What follows the gates then runs dense on the slice, so that closed units cost nothing; shapes stay static, since the
slice has one of a few sizes chosen on the host. The axis may be examples, segments of videos, or channels.

Axes: N units, K = `capacity` of the slice.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Riquelme et al., 2021 (experts' static capacity).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from gating_jax.checks import shown
from gating_jax.ops import arguments
from gating_jax.ops.precision import as_float
from gating_jax.types import Array


def open_indices(gates: Array, capacity: int) -> tuple[Array, Array]:
  """Where the open units are, in order, padded to a static number.

  Args:
    gates: `[N]`; a unit is open where its gate is above 0.
    capacity: length of the answer. With more open units than that the last ones are left out, as a traced program
      cannot raise: choose it by `capacity_for`, which does.
  Returns:
    `(index, taken)`: `[capacity]` int32 positions in the unit axis, 0 in the padding, so that gathering by them is
    always safe, and `[capacity]` bool, False in the padding.

  >>> open_indices(jnp.array([0.0, 1.0, 0.0, 1.0]), 3)
  (Array([1, 3, 0], dtype=int32), Array([ True,  True, False], dtype=bool))
  """
  arguments.real_array("gates", gates)
  if jnp.ndim(gates) != 1 or not jnp.size(gates):
    raise ValueError(f"gates must be [N] with N >= 1; got shape {jnp.shape(gates)}")
  arguments.within_reach("gates", jnp.shape(gates))
  arguments.whole_number("capacity", capacity)
  is_open = as_float(gates) > 0
  (index,) = jnp.nonzero(is_open, size=capacity, fill_value=0)
  return index.astype(jnp.int32), jnp.arange(capacity) < jnp.sum(is_open)


def put_back(values: Array, index: Array, taken: Array, size: int) -> Array:
  """Computed slices in their units' places, zeros elsewhere; the transpose of gathering by `index`.

      y[index[i]] = values[i] where taken[i]

  Args:
    values: `[capacity, ...]`; what stands in the padding is dropped, in both directions, even if it is not finite.
    index, taken: of `open_indices`.
    size: N.
  Returns:
    `[size, ...]`, dtype of `values`.

  >>> put_back(jnp.array([5.0, 7.0, 9.0]), jnp.array([1, 3, 0]), jnp.array([True, True, False]), 4)
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
  taken = taken.astype(bool)
  return (
    jnp.zeros((size, *values.shape[1:]), values.dtype)
    .at[jnp.where(taken, index, size)]
    .add(values, mode="drop")
  )


def capacity_for(count: int, sizes: Sequence[int]) -> int:
  """The smallest of some static sizes that holds `count` units; on the host, with numbers.

  >>> capacity_for(5, (2, 4, 6, 8))
  6
  """
  arguments.whole_number("count", count, 0)
  sizes = _checked_sizes(sizes)
  if count > max(sizes):
    raise ValueError(f"count must be at most the largest of sizes, {max(sizes)}; got {count}")
  return min(size for size in sizes if size >= count)


def pieces_for(count: int, sizes: Sequence[int]) -> tuple[int, ...]:
  """Static sizes that hold `count` units together: the largest as often as it is filled, the smallest for the rest.

  At least one, also for no units, so that what is computed has a shape.

  >>> pieces_for(21, (2, 4, 8)), pieces_for(16, (4, 8)), pieces_for(0, (4, 8))
  ((8, 8, 8), (8, 8), (4,))
  >>> pieces_for(19, (2, 4, 8))
  (8, 8, 4)
  """
  arguments.whole_number("count", count, 0)
  sizes = _checked_sizes(sizes)
  filled, rest = divmod(count, max(sizes))
  return (max(sizes),) * filled + ((capacity_for(rest, sizes),) if rest or not filled else ())


def bucket_sizes(total: int, buckets: int, *, multiple: int = 1) -> tuple[int, ...]:
  """Evenly spaced capacities: a program is compiled for each, and at most `total / buckets` (+ `multiple`) is padding.

  Args:
    total: units at most; the last size holds them.
    buckets: how many sizes at most; fewer where they coincide.
    multiple: sizes are rounded up to multiples of this, e.g. the number of devices.

  >>> bucket_sizes(10, 4), bucket_sizes(10, 4, multiple=4)
  ((3, 5, 8, 10), (4, 8, 12))
  """
  for name, value in (("total", total), ("buckets", buckets), ("multiple", multiple)):
    arguments.whole_number(name, value)
  shares = (-(-total * i // buckets) for i in range(1, buckets + 1))
  return tuple(sorted({-(-share // multiple) * multiple for share in shares}))


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
  sizes = arguments.items("sizes", sizes, "whole numbers >= 1")
  if not sizes:
    raise ValueError("sizes must hold at least one number; got none")
  for size in sizes:
    arguments.whole_number("each of sizes", size)
  return sizes
