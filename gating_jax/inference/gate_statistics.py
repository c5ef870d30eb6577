"""Gates and opening statistics of a folded network on images.

Axes: M images, N of a batch, U units of a group, G groups of the network in the order of its gates.
Reference: Bejnordi et al., 2020, section 5 (always open, always closed, conditional).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.analysis.statistics import GateCounter, GateStatistics
from gating_jax.inference import folded
from gating_jax.inference.compiled import check_finite, check_images
from gating_jax.inference.folded import FoldedNet, Group
from gating_jax.ops.relaxations import threshold_gate

# Images that a network takes at a time.
BATCH_SIZE = 128


class Observation(NamedTuple):
  """A batch of images, and what a network made of it.

  Attributes:
    images: `[N, H, W, D]`.
    outputs: `[N, ...]`.
    logits: `[N, U]` of each group.
  """

  images: np.ndarray
  outputs: np.ndarray
  logits: tuple[np.ndarray, ...]


class Place(NamedTuple):
  """The place of a group of units in a network.

  Attributes:
    part, index: the index of the network's part, and of the group within it.
    group: the group.
    layer_gate: whether its one unit is the branch of a block, and not channels.
  """

  part: int
  index: int
  group: Group
  layer_gate: bool


@dataclasses.dataclass(frozen=True)
class GroupStatistics(GateStatistics):
  """Opening statistics of one group of a network's units; the other fields are of its `Place`."""

  part: int
  index: int
  group: Group
  layer_gate: bool


def observed(net: FoldedNet, images: Any) -> Iterator[Observation]:
  """Yields batches of images, with the network's outputs and the logits of all groups.

  Args:
    net: the network.
    images: `[M, H, W, D]` float32 network inputs, or an iterable of such batches.
  Yields:
    an `Observation` of `BATCH_SIZE` images, last one of the rest.
  Raises:
    ValueError: no images, or images of another rank, of unlike shapes, in integers, or not finite.
  """
  for x in batches(images):
    folded.check_channels(net, x.shape[3])
    # A last batch that is nearly full is padded, so that it runs in the same program.
    spare = -len(x) % BATCH_SIZE if len(x) > BATCH_SIZE // 2 else 0
    padded = np.pad(x, [(0, spare), (0, 0), (0, 0), (0, 0)])
    outputs, logits = jax.device_get(_run(net, jnp.asarray(padded)))
    yield Observation(x, outputs[: len(x)], tuple(z[: len(x)] for z in logits))


def gates_of(net: FoldedNet, images: Any) -> tuple[np.ndarray, ...]:
  """Computes the gates of every group on images, `[M, U]` of 0 and 1; arguments as `observed`."""
  # Logits only: outputs of all images could fill the memory.
  pieces = [observation.logits for observation in observed(net, images)]
  gates = []
  for of_group in zip(*pieces, strict=True):
    gates.append(np.asarray(threshold_gate(np.concatenate(of_group))))
  return tuple(gates)


def batches(images: Any) -> Iterator[np.ndarray]:
  """Yields `BATCH_SIZE` images at a time, then the rest, whatever the batches of an iterable."""
  pieces, waiting = _pieces(images), None
  for x in pieces:
    x = check_finite("images", check_images("images", x))
    if waiting is not None and x.shape[1:] != waiting.shape[1:]:
      raise ValueError(f"images must be of one shape, {waiting.shape[1:]}; got {x.shape[1:]}")
    if not len(x):
      raise ValueError("images must be at least one image; got none")
    # Batches are made up across pieces, so that all but the last have one shape and program.
    waiting = x if waiting is None or not len(waiting) else np.concatenate([waiting, x])
    while len(waiting) >= BATCH_SIZE:
      yield waiting[:BATCH_SIZE]
      waiting = waiting[BATCH_SIZE:]
  if waiting is not None and len(waiting):
    yield waiting


def _pieces(images: Any) -> Iterator[Any]:
  """Iterates over the batches of an iterable, or over parts of an array."""
  if not hasattr(images, "shape"):
    yield from images
    return
  # At least one piece, so that an empty array is found to be empty.
  for start in range(0, max(len(images), 1), BATCH_SIZE):
    yield images[start : start + BATCH_SIZE]


class NetCounter:
  """Sums over batches for the `GroupStatistics` of all groups of a network."""

  def __init__(self, net: FoldedNet):
    self._places = places(net)
    self._counters = [GateCounter(place.group.gates) for place in self._places]
    self._images = 0

  def add(self, logits: tuple[np.ndarray, ...], images: int) -> None:
    """Adds the logits of a batch of N images, `[N, U]` for each group."""
    self._images += images
    for counter, of_group in zip(self._counters, logits, strict=True):
      counter.add(of_group)

  def result(self) -> tuple[GroupStatistics, ...]:
    """Returns the statistics of each group.

    Raises:
      ValueError: nothing was added.
    """
    # A network without gates has no counter that knows.
    if not self._images:
      raise ValueError("calibration must have at least one image; got none")
    found = []
    for place, counter in zip(self._places, self._counters, strict=True):
      found.append(GroupStatistics(**vars(counter.result()), **place._asdict()))
    return tuple(found)


def places(net: FoldedNet) -> list[Place]:
  """Lists the place of every group, in the order of its gates."""
  found = []
  for i, part in enumerate(net.parts):
    for j, group in enumerate(part.groups):
      found.append(Place(part=i, index=j, group=group, layer_gate=part.layer_gate))
  return found


# One compiled function for all calls: networks of the same shapes share a program.
_run = jax.jit(folded.run)
