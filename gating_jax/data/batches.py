"""Fixed-size batches that cover a set exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


def cover(examples: Any, batch_size: int) -> Iterator[tuple[Any, int]]:
  """Yields batches that cover a set once, each with its number of valid examples, in order.

  The last batch is padded with its own first example. Every example is among the valid entries of
  exactly one batch, whatever the sizes.

  Args:
    examples: a set with `len`, `read(index)`, which returns the batch, and `map(fn, items)`.
    batch_size: number of examples of every batch.
  """

  def read(start):
    """Returns the batch of examples from `start` and how many of them are not padding."""
    index = np.arange(start, min(start + batch_size, len(examples)))
    # All batches have one size, so that a compiled step is compiled once.
    filled = np.concatenate([index, np.full(batch_size - len(index), start)])
    return examples.read(filled), len(index)

  return examples.map(read, range(0, len(examples), batch_size))
