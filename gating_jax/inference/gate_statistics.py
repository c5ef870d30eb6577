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

from gating_jax.analysis.outcomes import ALWAYS_CLOSED, ALWAYS_OPEN
from gating_jax.inference import folded
from gating_jax.inference.compiled import check_finite, check_images
from gating_jax.inference.folded import Block, FoldedNet, Group

BATCH = 128


@dataclasses.dataclass(frozen=True)
class Openings:
  """Opening statistics of one group of units.

  Attributes:
    part, index: the index of the network's part, and of the group within it.
    group: the group.
    layer_gate: whether its one unit is the branch of a block, and not channels.
    images: M.
    opened: `[U]` number of images on which each unit is open.
    together: `[U, U]` number of images on which both units are open.
    highest, lowest: `[U]` the largest and the smallest logit seen.
  """

  part: int
  index: int
  group: Group
  layer_gate: bool
  images: int
  opened: np.ndarray
  together: np.ndarray
  highest: np.ndarray
  lowest: np.ndarray

  @property
  def open_rates(self) -> np.ndarray:
    """Returns the fraction of images on which each unit is open, `[U]`."""
    return self.opened / self.images

  @property
  def always_open(self) -> np.ndarray:
    """Marks units that are open on more than 99 % of images, `[U]`."""
    return self.open_rates > ALWAYS_OPEN

  @property
  def always_closed(self) -> np.ndarray:
    """Marks units that are open on less than 1 % of images, `[U]`."""
    return self.open_rates < ALWAYS_CLOSED

  @property
  def conditional(self) -> np.ndarray:
    """Marks units that are neither always open nor always closed, `[U]`."""
    return ~(self.always_open | self.always_closed)

  @property
  def correlation(self) -> np.ndarray:
    """Computes Pearson's correlation `[U, U]` of open and closed as 1 and 0.

        (P(both) - P(i) P(j)) / sqrt(P(i) (1 - P(i)) P(j) (1 - P(j)))

    It is 0 where a unit never changes.
    """
    rates = self.open_rates
    deviation = np.sqrt(rates * (1 - rates))
    scale = deviation[:, None] * deviation
    covariance = self.together / self.images - rates[:, None] * rates
    # A unit that never changes has no deviation: no division by 0.
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)


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


class Counter:
  """A sum of `Openings` over batches."""

  def __init__(self, net: FoldedNet):
    self._places = places(net)
    self._images = 0
    units = [group.gates for _, _, group, _ in self._places]
    self._opened = [np.zeros(u, np.int64) for u in units]
    self._together = [np.zeros((u, u), np.int64) for u in units]
    self._highest = [np.full(u, -np.inf, np.float32) for u in units]
    self._lowest = [np.full(u, np.inf, np.float32) for u in units]

  def add(self, logits: tuple[np.ndarray, ...], images: int) -> None:
    """Adds the logits of a batch of N images, `[N, U]` for each group."""
    self._images += images
    for i, z in enumerate(logits):
      # float32 makes the product fast; it is exact up to 2**24 images a batch.
      gates = (z > 0).astype(np.float32)
      self._opened[i] += gates.sum(axis=0).astype(np.int64)
      # P(both) needs the counts of pairs: a product of 0/1 gates over the batch.
      self._together[i] += (gates.T @ gates).astype(np.int64)
      # `prune` keeps pruned units that came nearest to opening, which the highest logit tells.
      self._highest[i] = np.maximum(self._highest[i], z.max(axis=0))
      self._lowest[i] = np.minimum(self._lowest[i], z.min(axis=0))

  def result(self) -> tuple[Openings, ...]:
    """Returns the `Openings` of each group.

    Raises:
      ValueError: nothing was added.
    """
    if not self._images:
      raise ValueError("calibration must have at least one image; got none")
    return tuple(
      Openings(*place, self._images, *sums)
      for place, *sums in zip(
        self._places, self._opened, self._together, self._highest, self._lowest, strict=True
      )
    )


def places(net: FoldedNet) -> list[tuple[int, int, Group, bool]]:
  """Lists `(part, index, group, layer_gate)` of every group, in the order of its gates."""
  return [
    (i, j, group, isinstance(part, Block) and part.layer_gate)
    for i, part in enumerate(net.parts)
    if part.head is not None
    for j, group in enumerate(part.head.groups)
  ]


def count(net: FoldedNet, images: Iterable[Any] | Any) -> tuple[Openings, ...]:
  """Computes the `Openings` of every group on `images`, as in `observed`."""
  counter = Counter(net)
  for x, _, logits in observed(net, images):
    counter.add(logits, len(x))
  return counter.result()


# One compiled function for all calls: networks of the same shapes share a program.
_run = jax.jit(folded.run)
