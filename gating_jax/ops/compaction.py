"""Compaction: the open units of an axis gathered into a slice of static size, and scattered back.

The layers after the gates run dense on the slice, so closed units cost nothing. Shapes stay static,
since the slice has one of a few sizes chosen on the host. The axis may be examples, segments of
videos, or channels.

Axes: N units, K = `capacity` of the slice.
Reference: Verelst and Tuytelaars, 2020 (gather, compute, scatter); Riquelme et al., 2021 (experts'
  static capacity).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from gating_jax.checks import shown
from gating_jax.ops import arguments
from gating_jax.ops.precision import as_float
from gating_jax.types import Array


def open_indices(gates: Array, capacity: int) -> tuple[Array, Array]:
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

  >>> open_indices(jnp.array([0.0, 1.0, 0.0, 1.0]), 3)
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


def scatter_back(values: Array, index: Array, taken: Array, size: int) -> Array:
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

  >>> scatter_back(jnp.array([5.0, 7.0, 9.0]), jnp.array([1, 3, 0]), jnp.array([True, True, False]), 4)
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
  taken = taken.astype(bool)
  return (
    jnp.zeros((size, *values.shape[1:]), values.dtype)
    .at[jnp.where(taken, index, size)]
    .add(values, mode="drop")
  )


def capacity_for(count: int, sizes: Sequence[int]) -> int:
  """Returns the smallest of some static sizes that holds `count` units; on the host, with numbers.

  Raises:
    ValueError: `count` is more than the largest size.

  >>> capacity_for(5, (2, 4, 6, 8))
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
  return (max(sizes),) * filled + ((capacity_for(rest, sizes),) if rest or not filled else ())


def bucket_sizes(total: int, buckets: int, *, multiple: int = 1) -> tuple[int, ...]:
  """Returns evenly spaced capacities, for each of which a program is compiled.

  At most `total / buckets` (+ `multiple`) of a slice is padding.

  Args:
    total: largest number of units; the last size holds them.
    buckets: largest number of sizes; fewer if they coincide.
    multiple: sizes are rounded up to multiples of this, e.g. the number of devices.

  >>> bucket_sizes(10, 4), bucket_sizes(10, 4, multiple=4)
  ((3, 5, 8, 10), (4, 8, 12))
  """
  for name, value in (("total", total), ("buckets", buckets), ("multiple", multiple)):
    arguments.whole_number(name, value)
  # Rounded up, in whole numbers: the last one is exactly `total`.
  shares = (-(-total * i // buckets) for i in range(1, buckets + 1))
  # A set, since rounding up can make sizes equal.
  return tuple(sorted({-(-share // multiple) * multiple for share in shares}))


def _checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
  sizes = arguments.items("sizes", sizes, "whole numbers >= 1")
  if not sizes:
    raise ValueError("sizes must hold at least one number; got none")
  for size in sizes:
    arguments.whole_number("each of sizes", size)
  return sizes
