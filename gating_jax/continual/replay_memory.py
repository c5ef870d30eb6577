"""The replay memory: images of earlier tasks in a class-balanced memory of fixed size.

It is the state of the methods ER, DER++, A-GEM and iCaRL, and of the rehearsal `episodic`.

Within a class the images keep the order in which they were offered, and the last are dropped when
the class loses slots. So a shuffled class stays a uniform sample, and a ranked class keeps its best
images.

Axes: S slots of the memory, M images offered, B examples on this device, R replayed on this device.
Reference: Rebuffi et al., 2017 (iCaRL); Chaudhry et al., "On tiny episodic memories in continual
learning", 2019.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from gating_jax.continual.method import Batch, Problem
from gating_jax.types import Array

# Label of an empty slot.
EMPTY = -1


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
  """Settings of the replay memory.

  Attributes:
    images: size of the memory, >= 1.
    batch_size: images replayed in each step, over all devices, >= 1.
  """

  images: int
  batch_size: int

  def __post_init__(self):
    for name in ("images", "batch_size"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be >= 1; got {getattr(self, name)}")


# Not a `MemoryNode`: that sorts values by name, and checksums of earlier checkpoints cover this
# order.
class ReplayMemory(struct.PyTreeNode):
  """A memory of labelled images.

  Attributes:
    pixels: `[S, H, W, D]` uint8.
    labels: `[S]`, `EMPTY` for empty slots, which all come last.
    extra: a tree of `[S, ...]` arrays that a method keeps with each image.
  """

  pixels: Array
  labels: Array
  extra: Any = ()


def empty(slots: int, shape: tuple[int, ...], extra: Any = ()) -> ReplayMemory:
  """Creates an empty memory.

  Args:
    slots: S, >= 1.
    shape: of an image.
    extra: a tree of initial `[S, ...]` arrays.
  Raises:
    ValueError: no slot.
  """
  if slots < 1:
    raise ValueError(f"the size of the replay memory must be >= 1; got {slots}")
  return ReplayMemory(
    jnp.zeros((slots, *shape), jnp.uint8), jnp.full(slots, EMPTY, jnp.int32), extra
  )


def add_task(
  memory: ReplayMemory, pixels: Any, labels: Any, key: Array, extra: Any = ()
) -> ReplayMemory:
  """Adds a finished task; every class has the same number of slots, to within one.

  The images of each class are chosen at random.

  Args:
    memory: with the earlier tasks.
    pixels, labels: `[M, ...]` of the task, with classes that are new to the memory.
    key: PRNG key of the choice.
    extra: a tree of `[M, ...]` arrays, as in the memory.
  """
  # `keep_first` keeps the first images of a class: shuffled, these are a uniform sample.
  seed = np.asarray(jax.random.key_data(key))
  order = np.random.default_rng(seed).permutation(len(labels))
  shuffled = jax.tree.map(lambda x: np.asarray(x)[order], ReplayMemory(pixels, labels, extra))
  return keep_first(memory, shuffled.pixels, shuffled.labels, extra=shuffled.extra)


def keep_first(memory: ReplayMemory, pixels: Any, labels: Any, extra: Any = ()) -> ReplayMemory:
  """Adds a finished task as `add_task` does, with the first images of every class.

  Args:
    memory: with the earlier tasks.
    pixels, labels: `[M, ...]` of the task, each class in the order of preference.
    extra: a tree of `[M, ...]` arrays, as in the memory.
  """
  slots, is_filled = len(memory.labels), np.asarray(memory.labels) != EMPTY

  def join(held, new):
    """Joins one array of earlier tasks and of this one."""
    # Earlier images come first: each class stays in the order in which it was offered.
    return np.concatenate([np.asarray(held)[is_filled], np.asarray(new, held.dtype)])

  offered = jax.tree.map(join, memory, ReplayMemory(pixels, labels, extra))
  chosen = even_choice(offered.labels, slots)

  def fill(x):
    """Returns the chosen entries of one array, and zeros in free slots: shapes never change."""
    free = np.zeros((slots - len(chosen), *x.shape[1:]), x.dtype)
    return jnp.asarray(np.concatenate([x[chosen], free]))

  kept = jax.tree.map(fill, offered)
  # Label 0 is a class: `EMPTY` marks slots without an image.
  return kept.replace(labels=jnp.where(jnp.arange(slots) < len(chosen), kept.labels, EMPTY))


def even_choice(labels: np.ndarray, count: int) -> np.ndarray:
  """Returns the positions of the first labels of every class, evenly chosen.

  At most `count` in all, and the same number of each class to within one, where there are enough.

  >>> even_choice(np.array([7, 7, 7, 7, 2, 2]), 4).tolist()
  [0, 1, 4, 5]
  """
  # The rank of a label among those of its class.
  rank = np.zeros(len(labels), int)
  for c in np.unique(labels):
    rank[labels == c] = np.arange(np.sum(labels == c))
  # Sorted by rank, then class: the first of every class before the second of any.
  return np.sort(np.lexsort((labels, rank))[:count])


def draw_entries(
  memory: ReplayMemory, key: Array, count: int, *, axis_name: Hashable | None = None
) -> tuple[ReplayMemory, Array]:
  """Draws entries with replacement, every filled slot with the same probability.

  Which entries are drawn does not depend on the number of devices.

  Args:
    memory: to draw from.
    key: PRNG key of the draw, the same on all devices.
    count: entries over all devices, a multiple of their number.
    axis_name: mapped device axis, if any.
  Returns:
    this device's entries, a `ReplayMemory` of `[R, ...]`, and whether the memory holds any; if not,
      the entries are empty slots.
  Raises:
    ValueError: `count` is not a multiple of the number of devices.
  """
  here, devices = 0, 1
  if axis_name is not None:
    here, devices = lax.axis_index(axis_name), lax.axis_size(axis_name)
  if count % devices:
    raise ValueError(f"replayed images must be a multiple of the {devices} devices; got {count}")
  filled = jnp.sum(memory.labels != EMPTY)
  # Filled slots come first. Every device draws all places, then takes its part.
  places = jax.random.randint(key, (count,), 0, jnp.maximum(filled, 1))
  places = lax.dynamic_slice_in_dim(places, here * (count // devices), count // devices)
  return jax.tree.map(lambda x: x[places], memory), filled > 0


def mix(new: Array, replayed: Array) -> Array:
  """Mixes `[B, ...]` and `[R, ...]` evenly to `[B + R, ...]`.

  The position of an example in the whole batch then does not depend on the number of devices.

  >>> mix(jnp.array([1, 2, 3, 4]), jnp.array([8, 9]))
  Array([1, 2, 8, 3, 4, 9], dtype=int32)
  """
  groups = math.gcd(len(new), len(replayed))
  # Each of the groups has B / groups new examples, then R / groups replayed ones.
  parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (new, replayed)]
  return jnp.concatenate(parts, axis=1).reshape(-1, *new.shape[1:])


def unmix(tree: Any, new: int, replayed: int) -> tuple[Any, Any]:
  """Separates what `mix` mixed, in each array of a tree.

  Args:
    tree: arrays `[B + R, ...]`.
    new, replayed: B and R.
  Returns:
    two trees, of arrays `[B, ...]` and `[R, ...]`.
  """
  groups = math.gcd(new, replayed)

  def separate(x):
    """Separates one array."""
    # Each group begins with its new examples, as in `mix`.
    parts = jnp.split(x.reshape(groups, -1, *x.shape[1:]), [new // groups], axis=1)
    return [part.reshape(-1, *x.shape[1:]) for part in parts]

  pairs = jax.tree.map(separate, tree)
  of_pair = jax.tree.structure([0, 0])
  return tuple(jax.tree.transpose(jax.tree.structure(tree), of_pair, pairs))


class Drawn(NamedTuple):
  """Entries drawn from a memory.

  Attributes:
    x: `[R, H, W, D]` network input.
    labels: `[R]`.
    extra: a tree of `[R, ...]` arrays, as in the memory.
    filled: whether the memory holds any images, a scalar.
  """

  x: Array
  labels: Array
  extra: Any
  filled: Array


def draw_inputs(
  memory: ReplayMemory, *, key: Array, batch: Batch, problem: Problem, count: int
) -> Drawn:
  """Draws entries as network input, augmented as in training.

  While the memory is empty, evenly chosen examples of the batch replace them, so that BatchNorm
  never sees a blank image. The choice does not depend on the number of devices.

  Args:
    memory: to draw from.
    key: PRNG key of the draw and the augmentation.
    batch: of the step.
    problem: the learning problem.
    count: entries over all devices.
  """
  places, changes = jax.random.split(key)
  entries, filled = draw_entries(memory, places, count, axis_name=problem.axis_name)
  here = len(entries.labels)
  stand_ins = jnp.arange(here) * len(batch.x) // here
  # Both cases are computed: whether the memory holds anything is known only at run time.
  x = jnp.where(filled, problem.prepare(changes, entries.pixels), batch.x[stand_ins])
  labels = jnp.where(filled, entries.labels, batch.labels[stand_ins])
  return Drawn(x, labels, extra=entries.extra, filled=filled)
