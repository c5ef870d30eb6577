"""A memory of images of earlier tasks, of fixed size, with the same share for every class, and how it is rehearsed.

Within a class the images stand in the order in which they were offered, and when their share shrinks the last go: so a
shuffled class stays a uniform sample, and a ranked one keeps its best.

Axes: S slots of the memory, M images offered, B examples on this device, R replayed on this device.
Reference: Rebuffi et al., 2017 (iCaRL); Chaudhry et al., "On tiny episodic memories in continual learning", 2019.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gating_jax.continual.method import Batch, Problem
from gating_jax.types import Array

EMPTY = -1


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
  """Attributes: images: how many the memory holds; batch_size: how many each step replays, over all devices."""

  images: int
  batch_size: int

  def __post_init__(self):
    for name in ("images", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")


class Memory(struct.PyTreeNode):
  """Attributes: pixels: `[S, H, W, D]` uint8; labels: `[S]`, `EMPTY` for a slot that holds nothing, all such last;
  extra: a tree of `[S, ...]` arrays that a method keeps with each image."""

  pixels: Array
  labels: Array
  extra: Any = ()


def empty(slots: int, shape: tuple[int, ...], extra: Any = ()) -> Memory:
  """A memory for `slots` images of this shape; `extra` is a tree of arrays `[S, ...]` to begin with."""
  if slots < 1:
    raise ValueError(f"the size of the replay memory must be >= 1; got {slots}")
  return Memory(jnp.zeros((slots, *shape), jnp.uint8), jnp.full(slots, EMPTY, jnp.int32), extra)


def share(memory: Memory, pixels: Any, labels: Any, key: Array, extra: Any = ()) -> Memory:
  """Takes up a finished task: every class has the same number of slots, to within one, its images chosen at random.

  Args:
    pixels, labels: `[M, ...]` of the task, its classes new to the memory.
    key: of the choice.
    extra: a tree of `[M, ...]` arrays, as in the memory.
  """
  order = np.random.default_rng(np.asarray(jax.random.key_data(key))).permutation(len(labels))
  return keep_first(memory, *jax.tree.map(lambda x: np.asarray(x)[order], (pixels, labels, extra)))


def keep_first(memory: Memory, pixels: Any, labels: Any, extra: Any = ()) -> Memory:
  """`share` with the first images of every class, instead of images chosen at random."""
  slots, old = len(memory.labels), np.asarray(memory.labels) != EMPTY
  join = lambda held, new: np.concatenate([np.asarray(held)[old], np.asarray(new, held.dtype)])
  offered = jax.tree.map(
    join, (memory.pixels, memory.labels, memory.extra), (pixels, labels, extra)
  )
  chosen = even_choice(offered[1], slots)
  free = slots - len(chosen)
  fill = lambda x, value: jnp.asarray(
    np.concatenate([x[chosen], np.full((free, *x.shape[1:]), value, x.dtype)])
  )
  pixels, labels, extra = offered
  return Memory(fill(pixels, 0), fill(labels, EMPTY), jax.tree.map(lambda x: fill(x, 0), extra))


def even_choice(labels: np.ndarray, count: int) -> np.ndarray:
  """Places of the first labels of every class, at most `count` in all, as many of each class as of any other to within
  one, where there are enough.

  >>> even_choice(np.array([7, 7, 7, 7, 2, 2]), 4).tolist()
  [0, 1, 4, 5]
  """
  rank = np.zeros(len(labels), int)
  for c in np.unique(labels):
    rank[labels == c] = np.arange(np.sum(labels == c))
  return np.sort(
    np.lexsort((labels, rank))[:count]
  )  # the first of every class before the second of any


def draw(
  memory: Memory, key: Array, count: int, *, axis_name: Hashable | None = None
) -> tuple[Memory, Array]:
  """`count` entries with replacement, every filled slot as likely as any other.

  Args:
    count: over all devices, a multiple of their number R; which entries are drawn does not depend on that number.
  Returns:
    This device's entries, a `Memory` of `[R, ...]`, and whether the memory holds any; if not, they are empty slots.
  """
  here, devices = (
    (0, 1) if axis_name is None else (lax.axis_index(axis_name), lax.axis_size(axis_name))
  )
  if count % devices:
    raise ValueError(f"the replayed batch must be a multiple of the {devices} devices; got {count}")
  filled = jnp.sum(memory.labels != EMPTY)
  places = jax.random.randint(key, (count,), 0, jnp.maximum(filled, 1))
  places = lax.dynamic_slice_in_dim(places, here * (count // devices), count // devices)
  return jax.tree.map(lambda x: x[places], memory), filled > 0


def mix(new: Array, replayed: Array) -> Array:
  """`[B, ...]` and `[R, ...]` to `[B + R, ...]`, evenly, so that the place of an example in the whole batch does not
  depend on the devices it is spread over.

  >>> mix(jnp.array([1, 2, 3, 4]), jnp.array([8, 9]))
  Array([1, 2, 8, 3, 4, 9], dtype=int32)
  """
  groups = math.gcd(len(new), len(replayed))
  parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (new, replayed)]
  return jnp.concatenate(parts, axis=1).reshape(-1, *new.shape[1:])


def part(tree: Any, new: int, replayed: int) -> tuple[Any, Any]:
  """What `mix` made one of, in each array of a tree, from the numbers B and R."""
  groups = math.gcd(new, replayed)
  split = lambda x: jnp.split(x.reshape(groups, -1, *x.shape[1:]), [new // groups], axis=1)
  pick = lambda i: jax.tree.map(lambda x: split(x)[i].reshape(-1, *x.shape[1:]), tree)
  return pick(0), pick(1)


def draw_inputs(
  memory: Memory, key: Array, batch: Batch, problem: Problem, count: int
) -> tuple[Array, Array, Any, Array]:
  """`(x [R, H, W, D], labels [R], extra, filled)`: a draw as network input, augmented as in training.

  As long as the memory is empty, examples of the batch stand in for it, so that BatchNorm never sees a blank image:
  evenly chosen, so that they do not depend on how the batch is spread over devices.
  """
  places, changes = jax.random.split(key)
  entries, filled = draw(memory, places, count, axis_name=problem.axis_name)
  stand_in = lambda x, held: jnp.where(filled, held, x[jnp.arange(len(held)) * len(x) // len(held)])
  return (
    stand_in(batch.x, problem.prepare(changes, entries.pixels)),
    stand_in(batch.labels, entries.labels),
    entries.extra,
    filled,
  )
