"""A few sets of channels that calibration data open together, each with which an example can run that opens no others.

Axes: M examples of the calibration, U gates of a group, C channels of a group.
Reference: Lloyd, 1982 (k-means).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gating_jax.inference.folded import Group

CHANNELS = 16  # sets are filled up to multiples of this, what a row of registers holds


def unions(
  groups: Sequence[Group], gates: Sequence[np.ndarray], count: int
) -> list[list[np.ndarray]]:
  """The channels of each group that each of at most `count` clusters of the examples opens, fewest first.

  Each is filled up to a multiple of `CHANNELS` with those most often open. Sets that are no smaller than all, and
  those that come twice, are left out.

  Args:
    groups: of the gates.
    gates: `[M, U]` of each.
    count: clusters at most.
  """
  masks = [
    np.asarray(group.expand(jnp.asarray(g))) > 0 for group, g in zip(groups, gates, strict=True)
  ]
  joint = np.concatenate(masks, axis=1).astype(np.float32)
  ends = np.cumsum([mask.shape[1] for mask in masks])[:-1]
  rank = [np.argsort(-mask.mean(0), kind="stable") for mask in masks]
  sets = {}
  for of_cluster in _clusters(joint, count):
    kept = []
    for union, order in zip(np.split(joint[of_cluster].max(0) > 0, ends), rank, strict=True):
      size = min(union.size, max(CHANNELS, -(-union.sum() // CHANNELS) * CHANNELS))
      kept.append(np.sort(np.concatenate([order[union[order]], order[~union[order]]])[:size]))
    if sum(map(len, kept)) < joint.shape[1]:
      sets[tuple(map(tuple, kept))] = kept
  return sorted(sets.values(), key=lambda kept: sum(map(len, kept)))


def covered(masks: Sequence[Any], kept: Sequence[np.ndarray]) -> Any:
  """`[N]` bool: whether the channels kept of each group hold all that is open in `[N, C]` masks of 0 and 1."""
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
  """k-means from the farthest points: which examples belong to each cluster."""
  if count < 1:
    return []
  centres = [joint.mean(0)]
  for _ in range(count):
    distance = np.min([((joint - centre) ** 2).sum(1) for centre in centres], axis=0)
    centres.append(joint[np.argmax(distance)])
  centres = np.stack(centres[1:])
  for _ in range(10):
    nearest = np.argmin(((joint[:, None] - centres) ** 2).sum(-1), axis=1)
    centres = np.stack(
      [
        joint[nearest == i].mean(0) if (nearest == i).any() else centre
        for i, centre in enumerate(centres)
      ]
    )
  return [nearest == i for i in np.unique(nearest)]
