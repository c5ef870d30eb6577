"""Fixed-size batches that cover a set exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def cover(examples: Any, batch_size: int) -> Iterator[tuple[Any, int]]:
  """Pairs of a batch and its number of valid examples, in order; the last is filled up with its own first example.

  Every example stands in exactly one batch among its first valid entries, whatever the sizes.

  Args:
    examples: a set with `len`, `read(index)`, which makes the batch, and `map(fn, items)`.
    batch_size: examples of every batch.
  """

  def read(start):
    index = np.arange(start, min(start + batch_size, len(examples)))
    filled = np.concatenate([index, np.full(batch_size - len(index), start)])
    return examples.read(filled), len(index)

  return examples.map(read, range(0, len(examples), batch_size))
