"""Batches of any set: their order in training, and padded ones that cover a test set.

The host sends indices; the step gathers and augments the images. A batch depends on (seed, step)
alone, so a restart needs no state.

Axes: M images in the set, B images in the global batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np


def batch_indices(seed: int, step: int, batch_size: int, examples: int) -> np.ndarray:
  """Returns the indices of the images of step `step`.

  Epochs are fresh permutations; the incomplete last batch of each is left out.

  Args:
    seed: of the order.
    step: from 0.
    batch_size: B, at most `examples`.
    examples: M.
  Returns:
    `[B]` int32.
  Raises:
    ValueError: the batch is larger than the set.
  """
  if not 0 < batch_size <= examples:
    raise ValueError(
      f"batch_size must be in [1, {examples}], the number of training images; got {batch_size}"
    )
  epoch, position = divmod(step, examples // batch_size)
  return _epoch_order(seed, epoch, examples)[position * batch_size : (position + 1) * batch_size]


# Several sets may be read in turns, each in an epoch of its own.
@functools.lru_cache(maxsize=16)
def _epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
  order = np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)
  # The cached array is shared by all callers.
  order.flags.writeable = False
  return order


def indices(
  seed: int, step: int, k: int, batch_size: int, examples: int, process: tuple[int, int] = (0, 1)
) -> np.ndarray:
  """Returns the indices that a process sees in `k` steps from `step` on.

  Args:
    seed, step, batch_size, examples: as in `batch_indices`.
    k: number of steps.
    process: index of the process and number of processes, which divides `batch_size`.
  Returns:
    `[batch_size / count, k]` int32.
  """
  by_step = []
  for at in range(step, step + k):
    by_step.append(batch_indices(seed, at, batch_size=batch_size, examples=examples))
  whole = np.stack(by_step, axis=1)
  # A process has the same rows of the batch in every step.
  return np.split(whole, process[1])[process[0]]


def padded_batches(examples: Any, batch_size: int) -> Iterator[tuple[Any, int]]:
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
