"""The whole training set on the device: the host sends indices, the step gathers and augments.

Axes: M images in the set, B images in the global batch, H and W pixels, D channels.
A batch depends on (seed, step) alone, so a restart needs no state.
"""

from __future__ import annotations

import functools

import numpy as np


def batch_indices(seed: int, step: int, batch_size: int, examples: int) -> np.ndarray:
  """Which images step `step` sees: epochs of fresh permutations, the incomplete last batch of each left out.

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


@functools.lru_cache(maxsize=16)  # an epoch of each set that is read in turns
def _epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
  order = np.random.default_rng((seed, epoch)).permutation(examples).astype(np.int32)
  order.flags.writeable = False
  return order


def indices(
  seed: int, step: int, k: int, batch_size: int, examples: int, process: tuple[int, int] = (0, 1)
) -> np.ndarray:
  """The share of process `(index, count)` in `k` batches from `step` on: `[batch_size / count, k]`."""
  whole = np.stack([batch_indices(seed, step + i, batch_size, examples) for i in range(k)], axis=1)
  return np.split(whole, process[1])[process[0]]
