"""Fixed-size batches that cover a set exactly once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gating_jax.data.sources import Images
from gating_jax.data.streaming import Stream


def cover(images: Images | Stream, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """Batches of `(pixels, labels, valid)` in order; the last is filled up with its own first image.

  Every image stands in exactly one batch among its first `valid` entries, whatever the sizes.
  """

  def read(start):
    index = np.arange(start, min(start + batch_size, len(images)))
    filled = np.concatenate([index, np.full(batch_size - len(index), start)])
    return *images.read(filled), len(index)

  return images.map(read, range(0, len(images), batch_size))
