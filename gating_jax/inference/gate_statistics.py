"""Opening statistics of the units of a network, alone and in pairs, as sums over batches.

Memory is that of one batch and of `[U, U]` counts for each group, whatever the number of images.

Axes: M images, N of a batch, U units of a group, G groups of the network in the order of its gates.
Reference: Bejnordi et al., 2020, section 5 (always open, always closed, conditional).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gating_jax.analysis.statistics import GateCounter, GateStatistics
from gating_jax.inference import folded
from gating_jax.inference.compiled import check_finite, check_images
from gating_jax.inference.folded import Block, FoldedNet, Group

BATCH = 128


@dataclasses.dataclass(frozen=True)
class GroupStatistics(GateStatistics):
  """Opening statistics of one group of a network's units, and its place there.

  Attributes:
    part, index: the index of the network's part, and of the group within it.
    group: the group.
    layer_gate: whether its one unit is the branch of a block, and not channels.
  """

  part: int
  index: int
  group: Group
  layer_gate: bool


def observed(
  net: FoldedNet, images: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]]:
  """Yields batches of images, with the network's outputs and the logits of all groups.

  Args:
    net: the network.
    images: `[M, H, W, D]` float32 network inputs, or an iterable of such batches.
  Yields:
    `([N, H, W, D], [N, ...], ([N, U], ...))`.
  Raises:
    ValueError: no images, or images of another rank, of unlike shapes, in integers, or not finite.
  """
  for x in batches(images):
    folded.check_channels(net, x.shape[3])
    # A last batch that is nearly full is padded, so that it runs in the same program.
    spare = -len(x) % BATCH if len(x) > BATCH // 2 else 0
    padded = np.concatenate([x, np.zeros((spare, *x.shape[1:]), x.dtype)]) if spare else x
    outputs, logits = _run(net, jnp.asarray(padded))
    yield x, np.asarray(outputs)[: len(x)], tuple(np.asarray(z)[: len(x)] for z in logits)


def batches(images: Any) -> Iterator[np.ndarray]:
  """Yields `BATCH` images at a time, then the rest, whatever the batches of an iterable."""
  pieces, waiting = images, None
  if hasattr(images, "shape"):
    # At least one piece, so that an empty array raises the error below.
    pieces = (images[start : start + BATCH] for start in range(0, max(len(images), 1), BATCH))
  for x in pieces:
    x = check_finite("images", check_images("images", x))
    if waiting is not None and x.shape[1:] != waiting.shape[1:]:
      raise ValueError(f"images must be of one shape, {waiting.shape[1:]}; got {x.shape[1:]}")
    if not len(x):
      raise ValueError("images must be at least one image; got none")
    # Batches are made up across pieces, so that all but the last have one shape and program.
    waiting = x if waiting is None or not len(waiting) else np.concatenate([waiting, x])
    while len(waiting) >= BATCH:
      yield waiting[:BATCH]
      waiting = waiting[BATCH:]
  if waiting is not None and len(waiting):
    yield waiting


class NetCounter:
  """Sums over batches for the `GroupStatistics` of all groups of a network."""

  def __init__(self, net: FoldedNet):
    self._places = places(net)
    self._counters = [GateCounter(group.gates) for _, _, group, _ in self._places]
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
    for (part, index, group, layer_gate), counter in zip(self._places, self._counters, strict=True):
      sums = vars(counter.result())
      found.append(
        GroupStatistics(**sums, part=part, index=index, group=group, layer_gate=layer_gate)
      )
    return tuple(found)


def places(net: FoldedNet) -> list[tuple[int, int, Group, bool]]:
  """Lists `(part, index, group, layer_gate)` of every group, in the order of its gates."""
  return [
    (i, j, group, isinstance(part, Block) and part.layer_gate)
    for i, part in enumerate(net.parts)
    if part.head is not None
    for j, group in enumerate(part.head.groups)
  ]


def count(net: FoldedNet, images: Iterable[Any] | Any) -> tuple[GroupStatistics, ...]:
  """Computes the `GroupStatistics` of every group on `images`, as in `observed`."""
  counter = NetCounter(net)
  for x, _, logits in observed(net, images):
    counter.add(logits, len(x))
  return counter.result()


# One compiled function for all calls: networks of the same shapes share a program.
_run = jax.jit(folded.run)
