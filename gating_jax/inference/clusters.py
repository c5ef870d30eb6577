"""Clusters of examples, and the few sets of channels that each of them opens.

An example can run with any set that holds all the channels it opens.

Axes: M examples of the calibration, U gates of a group, C channels of a group.
Reference: Lloyd, 1982 (k-means).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gating_jax.inference.folded import Group

# Sets are filled up to multiples of this, what a row of registers holds.
CHANNELS = 16


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
  masks = [
    np.asarray(group.expand(jnp.asarray(g))) > 0 for group, g in zip(groups, gates, strict=True)
  ]
  # Examples are clustered by the open channels of all groups at once.
  joint = np.concatenate(masks, axis=1).astype(np.float32)
  ends = np.cumsum([mask.shape[1] for mask in masks])[:-1]
  # Stable, so that the same data always give the same sets.
  rank = [np.argsort(-mask.mean(0), kind="stable") for mask in masks]
  sets = {}
  for of_cluster in _clusters(joint, count):
    kept = []
    for union, order in zip(np.split(joint[of_cluster].max(0) > 0, ends), rank, strict=True):
      # Rounded up to a multiple of CHANNELS, at least one multiple and at most all channels.
      size = min(union.size, max(CHANNELS, -(-union.sum() // CHANNELS) * CHANNELS))
      # The union first, then the fillers; sorted, so that equal sets are equal keys below.
      kept.append(np.sort(np.concatenate([order[union[order]], order[~union[order]]])[:size]))
    # A set of all channels saves nothing.
    if sum(map(len, kept)) < joint.shape[1]:
      sets[tuple(map(tuple, kept))] = kept
  return sorted(sets.values(), key=lambda kept: sum(map(len, kept)))


def covered(masks: Sequence[Any], kept: Sequence[np.ndarray]) -> Any:
  """Tests which examples, `[N]` bool, open only the channels kept, from 0/1 masks `[N, C]`."""
  # A set holds all open channels if the mask sums to the same on it as on all.
  return jnp.all(
    jnp.stack(
      [
        jnp.sum(mask[:, index], 1) == jnp.sum(mask, 1)
        for mask, index in zip(masks, kept, strict=True)
      ]
    ),
    axis=0,
  )


def _clusters(joint: np.ndarray, count: int) -> list[np.ndarray]:
  """Runs k-means from the farthest points; returns the examples of each cluster, `[M]` bool."""
  if count < 1:
    return []
  # Each centre is the example farthest from those before it and from the mean, which is dropped.
  centres = [joint.mean(0)]
  for _ in range(count):
    distance = np.min([((joint - centre) ** 2).sum(1) for centre in centres], axis=0)
    centres.append(joint[np.argmax(distance)])
  centres = np.stack(centres[1:])
  # Lloyd's iteration, a fixed number of times.
  for _ in range(10):
    nearest = np.argmin(((joint[:, None] - centres) ** 2).sum(-1), axis=1)
    centres = np.stack(
      [
        joint[nearest == i].mean(0) if (nearest == i).any() else centre
        for i, centre in enumerate(centres)
      ]
    )
  return [nearest == i for i in np.unique(nearest)]
