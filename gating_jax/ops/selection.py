"""Selection of a video's segments: fixed policies, and the repair of a gate's choice.

Every choice is `[B, T]`, exactly 0.0 or 1.0, and never a segment that is not valid. It does not
depend on the other videos or on the length of the padding. A video without a valid segment has none
chosen.

Axes: B videos, T segments; `valid` `[B, T]` is False in the padding of a shorter video.
Reference: Hussein et al., 2020 (TimeGate); Korbar et al., 2019 (SCSampler, top k); Ghodrati et al.,
  2021 (FrameExit).
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.checks import shown
from gating_jax.names import former_positional
from gating_jax.ops import arguments
from gating_jax.ops.arguments import as_float, float_dtype
from gating_jax.ops.collectives import example_keys
from gating_jax.types import AnyArray, Array


def ensure_one_open(gates: Array, logits: Array, valid: Array) -> Array:
  """Closes padding, and opens the most likely segment where no valid gate is open.

  The gradient is that of `gates` on valid segments; the repair changes only the value.

  Args:
    gates: `[B, T]`, 0/1 or relaxed; open above 0.
    logits: `[B, T]`; of equal ones the earliest is best, and NaN is worse than any number.
    valid: `[B, T]` bool.
  Returns:
    `[B, T]`, dtype of `gates`; float32 for whole numbers and truth values.
  Raises:
    ValueError, TypeError: arrays of other or unlike shapes, or that are no real numbers.

  >>> logits, valid = jnp.array([[-2.0, -1.0, 5.0]]), jnp.array([[True, True, False]])
  >>> ensure_one_open(jnp.zeros((1, 3)), logits, valid)
  Array([[0., 1., 0.]], dtype=float32)
  """
  gates, logits, valid = arguments.one_shape("[B, T]", gates=gates, logits=logits, valid=valid)
  gates = jnp.where(valid, gates.astype(float_dtype(gates)), 0)
  nothing = ~jnp.any(gates > 0, axis=1, keepdims=True)
  # Added and not assigned: the gates' gradient stays, and `top_k` has none.
  return gates + jnp.where(nothing, top_k(logits, valid, k=1), 0).astype(gates.dtype)


@former_positional("k")
def top_k(scores: AnyArray, valid: AnyArray, *, k: int | AnyArray) -> Array:
  """Selects the k highest scores of each video; no gradient.

  Args:
    scores: `[B, T]`; of equal ones the earlier are taken first. NaN ranks below every number, also
      below `-inf`: it is chosen only if nothing else is left.
    valid: `[B, T]` bool.
    k: segments per video, a number or `[B]`; a video with no more than k has all chosen.
  Returns:
    `[B, T]` float32, 1 where a segment is selected, else 0.
  Raises:
    ValueError, TypeError: arrays of other or unlike shapes, or a k that is no whole number >= 1.

  >>> top_k(jnp.array([[0.1, 0.9, 0.5, 2.0]]), jnp.array([[True, True, True, False]]), k=2)
  Array([[0., 1., 1., 0.]], dtype=float32)
  """
  scores, valid = arguments.one_shape("[B, T]", scores=scores, valid=valid)
  valid = valid.astype(bool)
  # Sorts by the last key first: valid segments before padding, then falling scores.
  order = jnp.lexsort((-jax.lax.stop_gradient(as_float(scores)), ~valid), axis=1)
  # The inverse permutation of the order is each segment's rank.
  rank = jnp.argsort(order, axis=1).astype(jnp.int32)
  return (valid & (rank < _column(k, valid.shape[0]))).astype(jnp.float32)


@former_positional("k")
def uniform_k(valid: Array, *, k: int | Array) -> Array:
  """Selects k segments at the centres of k equal parts of each video's valid length n.

      floor((i + 1/2) n / k)

  Args:
    valid: `[B, T]` bool.
    k: segments per video, a number or `[B]`.
  Returns:
    `[B, T]`, 0.0 or 1.0.
  Raises:
    ValueError, TypeError: another shape, or a k that is no whole number >= 1.

  >>> uniform_k(jnp.array([[True] * 8, [True] * 3 + [False] * 5]), k=2)
  Array([[0., 0., 1., 0., 0., 0., 1., 0.],
         [1., 0., 1., 0., 0., 0., 0., 0.]], dtype=float32)
  """
  valid = _checked_valid(valid)
  # At least 1, since it divides; a video without a valid segment has none chosen below.
  length = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True, dtype=jnp.int32), 1)
  k = jnp.minimum(_column(k, valid.shape[0]), length)
  place = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1

  def centres_before(x):
    """Counts the centres below x: (i + 1/2) n / k < x for ceil(k x / n - 1/2) numbers i >= 0."""
    return -((length - 2 * k * x) // (2 * length))

  # A segment is chosen where that number grows.
  return (valid & (centres_before(place + 1) > centres_before(place))).astype(jnp.float32)


@former_positional("k")
def random_k(
  key: Array, valid: Array, *, k: int | Array, axis_name: Hashable | None = None
) -> Array:
  """Selects k different segments of each video, every set of k equally likely.

  The draw depends on the video's place in the whole batch, not on how the batch is spread over the
  devices of `axis_name`.

  Args:
    key: a PRNG key.
    valid: `[B, T]` bool.
    k: segments per video, a number or `[B]`.
    axis_name: mapped device axis of the batch.
  Returns:
    `[B, T]` float32, 1 where a segment is selected, else 0.
  Raises:
    ValueError, TypeError: arrays of other or unlike shapes, or a k that is no whole number >= 1.

  >>> valid = jnp.array([[True] * 4, [True, False, False, False]])
  >>> random_k(jax.random.key(0), valid, k=2).sum(axis=1)
  Array([2., 1.], dtype=float32)
  """
  arguments.prng_key("key", key)
  batch, segments = _checked_valid(valid).shape
  keys = example_keys(key, batch, axis_name)
  scores = jax.vmap(lambda key: jax.random.uniform(key, (segments,), jnp.float32))(keys)
  # The k largest of independent uniform numbers are a uniform random set.
  return top_k(scores, valid, k=k)


@former_positional("k")
def first_k(valid: AnyArray, *, k: int | AnyArray) -> Array:
  """Selects the first k segments in the `frame_exit_order` of each video's valid length.

  Args:
    valid: `[B, T]` bool.
    k: segments per video, a number or `[B]`.
  Returns:
    `[B, T]`, 0.0 or 1.0.
  Raises:
    ValueError, TypeError: another shape, or a k that is no whole number >= 1.

  >>> first_k(jnp.array([[True] * 5, [True] * 3 + [False] * 2]), k=2)
  Array([[1., 0., 1., 0., 0.],
         [1., 1., 0., 0., 0.]], dtype=float32)
  """
  valid = _checked_valid(valid)
  segments = _known_segments(valid)
  # The rank of each place, for every length: lengths are traced, so all are tabulated.
  ranks = np.zeros((segments + 1, segments), np.float32)
  for length in range(1, segments + 1):
    ranks[length, frame_exit_order(length)] = np.arange(length)
  length, place = jnp.sum(valid, axis=1, keepdims=True), jnp.cumsum(valid, axis=1) - 1
  rank = jnp.asarray(ranks)[length, jnp.maximum(place, 0)]
  # The lowest ranks have the highest scores.
  return top_k(-rank, valid, k=k)


@former_positional("share")
def budget_to_k(valid: AnyArray, *, share: float) -> Array:
  """Computes the number of segments per video that a budget allows.

  It is `ceil(share * n)` of the n valid ones, at least 1.

  Args:
    valid: `[B, T]` bool.
    share: a fraction of the valid segments, in (0, 1], if a float; a number of segments if an int.
  Returns:
    `[B]` int32, at most n.
  Raises:
    ValueError: `share` is out of range, or T is not known yet, as in `jax.export`.
    TypeError: `share` is no number.

  >>> budget_to_k(jnp.array([[True] * 5, [True] * 2 + [False] * 3]), share=0.3)
  Array([2, 1], dtype=int32)
  >>> budget_to_k(jnp.ones((1, 5), bool), share=3)
  Array([3], dtype=int32)
  """
  if isinstance(share, bool) or not isinstance(share, numbers.Real):
    raise TypeError(f"share must be in (0, 1], or an int number of segments; got {shown(share)}")
  valid = _checked_valid(valid)
  # A table for every length, made on the host in float64.
  lengths = np.arange(_known_segments(valid) + 1)
  if isinstance(share, numbers.Integral):
    counts = np.full(len(lengths), _checked(share))
  elif 0 < share <= 1:
    # In floating point 0.07 * 100 is slightly above 7, and would round up to 8.
    counts = np.ceil(np.round(share * lengths, 9))
  else:
    raise ValueError(f"share must be in (0, 1], or an int number of segments; got {share}")
  # At least 1 and at most all; a video without a valid segment has none.
  of_length = np.clip(counts, 1, np.maximum(lengths, 1)) * (lengths > 0)
  return jnp.asarray(of_length, jnp.int32)[jnp.sum(valid, axis=1)]


def keep_best(gates: Array, logits: Array, valid: Array) -> Array:
  """Calls `ensure_one_open`, its name of today, and warns."""
  warnings.warn("keep_best is now called ensure_one_open", DeprecationWarning, stacklevel=2)
  return ensure_one_open(gates, logits, valid)


def k_for(valid: Array, share: float) -> Array:
  """Calls `budget_to_k`, its name of today, and warns."""
  warnings.warn("k_for is now called budget_to_k", DeprecationWarning, stacklevel=2)
  return budget_to_k(valid, share=share)


def frame_exit_order(segments: int) -> np.ndarray:
  """Returns a fixed order of segments from coarse to fine.

  The middle comes first, then the ends, then the middles of the gaps between, breadth first.

  Returns:
    `[segments]` int32, each of `0 .. segments - 1` once, on the host.

  >>> frame_exit_order(9)
  array([4, 0, 8, 2, 6, 1, 3, 5, 7], dtype=int32)
  """
  last, middle = _checked(segments, "segments") - 1, segments // 2
  # With one or two segments, some of these are the same.
  order = list(dict.fromkeys((middle, 0, last)))
  gaps = [(0, middle), (middle, last)]
  # The list grows while it is read: a queue, hence breadth first.
  for low, high in gaps:
    if high - low > 1:
      centre = (low + high) // 2
      order.append(centre)
      gaps += [(low, centre), (centre, high)]
  return np.array(order, np.int32)


def _column(k: int | AnyArray, videos: int) -> Array:
  """Returns k as `[B, 1]`, or as `[1, 1]` if it is one number for all videos."""
  if isinstance(k, numbers.Real):
    _checked(k)
  arguments.real_array("k", k)
  k = jnp.asarray(k)
  if not jnp.issubdtype(k.dtype, jnp.integer):
    raise TypeError(f"k must be a whole number, or an array [B] of them; got {shown(k)}")
  if k.shape not in ((), (videos,)):
    raise ValueError(
      f"k must be a whole number, or [B] of them, for {videos} videos; got shape {k.shape}"
    )
  return jnp.reshape(k.astype(jnp.int32), (-1, 1))


def _checked_valid(valid: AnyArray) -> Array:
  arguments.real_array("valid", valid, "[B, T]")
  return jnp.asarray(valid).astype(bool)


def _known_segments(valid: Array) -> int:
  """Returns T, from which a table is made.

  It cannot be a size that is not known yet, as in `jax.export`.
  """
  segments = valid.shape[1]
  if not isinstance(segments, int):
    raise ValueError(f"valid must have a static number of segments; got shape {valid.shape}")
  return segments


def _checked(number: Any, name: str = "k") -> int:
  arguments.whole_number(name, number)
  return number
