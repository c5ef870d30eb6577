"""Clusters of examples, and the set of channels that each cluster opens.

An example can run with any set that holds all the channels it opens.

Axes: M examples of the calibration, U gates of a group, C channels of a group.
Reference: Lloyd, 1982 (k-means).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gating_jax.inference.folded import Group, expand_groups

# Sets are filled up to multiples of this, what a row of registers holds.
CHANNELS = 16
# Lloyd's iteration runs a fixed number of times.
_ITERATIONS = 10


def unions(
  groups: Sequence[Group], gates: Sequence[np.ndarray], count: int
) -> list[list[np.ndarray]]:
  """Returns the channels of each group that at most `count` clusters open, fewest first.

  Each set is filled up to a multiple of `CHANNELS` with the channels open most often. Sets as large
  as all channels are left out, and so are duplicates.

  Args:
    groups: the groups of the gates.
    gates: `[M, U]` of each group.
    count: largest number of clusters.
  Returns:
    A list of sets; each set has an index array, `[K]`, for every group.
  """
  usages = []
  for factors in expand_groups(groups, list(map(jnp.asarray, gates))):
    mask = np.asarray(factors) > 0
    # Stable, so that the same data always give the same sets.
    usages.append(_Usage(mask, np.argsort(-mask.mean(0), kind="stable")))
  # Examples are clustered by the open channels of all groups at once.
  joint = np.concatenate([usage.mask for usage in usages], axis=1).astype(np.float32)
  sets = {}
  for members in _clusters(joint, count):
    kept = []
    for usage in usages:
      kept.append(_filled_up(usage.mask[members].any(axis=0), usage.order))
    # A set of all channels saves nothing; equal sets have equal keys.
    if _size(kept) < joint.shape[1]:
      sets[tuple(map(tuple, kept))] = kept
  return sorted(sets.values(), key=_size)


class _Usage(NamedTuple):
  """The use of a group's channels.

  Attributes:
    mask: `[M, C]` bool, the open channels of each example.
    order: `[C]` indices of the channels, those open most often first.
  """

  mask: np.ndarray
  order: np.ndarray


def _filled_up(union: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Returns the indices of a union, `[C]` bool, and of fillers to a multiple of `CHANNELS`."""
  # At least one multiple and at most all channels.
  size = min(union.size, max(CHANNELS, -(-union.sum() // CHANNELS) * CHANNELS))
  # The union first, then the fillers.
  wanted = np.concatenate([order[union[order]], order[~union[order]]])
  return np.sort(wanted[:size])


def _size(kept: Sequence[np.ndarray]) -> int:
  """Returns the number of channels of a set, over all groups."""
  return sum(map(len, kept))


def select_channels(masks: Sequence[Any], kept: Sequence[np.ndarray]) -> list[Any]:
  """Restricts masks `[N, C]` of every group to the channels kept, `[N, K]`."""
  return [mask[:, index] for mask, index in zip(masks, kept, strict=True)]


def are_covered(masks: Sequence[Any], kept_masks: Sequence[Any]) -> Any:
  """Tests which examples, `[N]` bool, open only channels that are kept, from masks >= 0."""
  # A set holds all open channels if as many are open in it as in all.
  return _count_open(kept_masks) == _count_open(masks)


def _count_open(masks: Sequence[Any]) -> Any:
  """Counts the open channels of each example, `[N]`, over all groups."""
  return sum(jnp.sum(mask > 0, axis=1) for mask in masks)


def _clusters(joint: np.ndarray, count: int) -> list[np.ndarray]:
  """Runs k-means from the farthest points; returns the examples of each cluster, `[M]` bool."""
  if count < 1:
    return []
  # Each centre is the example farthest from those before it and from the mean, which is dropped.
  centres = joint.mean(0)[None]
  for _ in range(count):
    nearest = _squared_distances(joint, centres).min(axis=1)
    centres = np.concatenate([centres, joint[np.argmax(nearest)][None]])
  centres = centres[1:]
  for _ in range(_ITERATIONS):
    nearest = np.argmin(_squared_distances(joint, centres), axis=1)
    # A centre without examples stays where it is.
    for i in np.unique(nearest):
      centres[i] = joint[nearest == i].mean(0)
  return [nearest == i for i in np.unique(nearest)]


def _squared_distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """Computes the squared distance of every point to every centre."""
  return ((points[:, None] - centres) ** 2).sum(-1)
