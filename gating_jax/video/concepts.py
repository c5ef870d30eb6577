"""Concepts: typical features that the gate compares every segment with, found before training.

Axes: n features, C channels, K concepts.
Reference: Hussein et al., 2020 (TimeGate); Arthur and Vassilvitskii, 2007 (k-means++).
"""

from __future__ import annotations

import numpy as np

from gating_jax.ops import arguments


def find_concepts(features: np.ndarray, k: int, *, seed: int) -> np.ndarray:
  """Computes the centroids of k clusters of features (k-means from one k-means++ start).

  They are means of features as given. Normalise the features first if only directions matter.

  Args:
    features: `[n, C]`, one row per segment of the training videos, from a trained network.
    k: number of concepts; at most the number of distinct rows.
    seed: seed of the start; the answer is a function of the features and the seed.
  Returns:
    `[k, C]` float32.
  Raises:
    ValueError: too few distinct rows, or a row that is not finite, with its index.
    TypeError: features that are no numbers, or k that is no whole one.

  >>> rows = np.array([[0.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
  >>> sorted(find_concepts(rows, 2, seed=0).tolist())
  [[0.0, 1.0], [9.0, 9.0]]
  """
  # Imported here, as it imports slowly.
  from sklearn.cluster import KMeans

  features = np.asarray(features)
  arguments.real_array("features", features)
  arguments.whole_number("k", k, 0)
  arguments.whole_number("seed", seed, 0)
  # float64: the order in which threads add does not change the float32 answer.
  features = features.astype(np.float64)
  if features.ndim != 2:
    raise ValueError(f"features must be [n, C]; got shape {features.shape}")
  if len(bad := np.flatnonzero(~np.isfinite(features).all(axis=1))):
    raise ValueError(
      f"features must be finite; got {features[bad[0]]} in row {bad[0]} ({len(bad)} such rows)"
    )
  distinct = len(np.unique(features, axis=0))
  if not 1 <= k <= distinct:
    raise ValueError(
      f"k must be in 1 .. {distinct}, the number of distinct features of {len(features)}; got {k}"
    )
  # One seeded start: the same features give the same concepts.
  return KMeans(k, random_state=seed, n_init=1).fit(features).cluster_centers_.astype(np.float32)
