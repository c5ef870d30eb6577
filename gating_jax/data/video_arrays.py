"""Videos as arrays in memory, whole or as features of networks.

Axes: M videos, T segments, F frames, H and W pixels, D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class VideoArrays:
  """One split, whole, on the host.

  Attributes:
    arrays: by name, `[M, ...]`: the inputs `clips` `[M, T, F, H, W, D]` uint8, or the features `light` and `heavy`
      `[M, T, ...]`; `valid` `[M, T]` bool, False where a shorter video was filled up; `label` `[M]` int32, or
      `[M, classes]` of 0 and 1; `weight` `[M]`, 0 for videos that could not be read; and where known `units` `[M, T]`,
      the unit action of each segment or -1, and `relevant` `[M, T]`, whether it belongs to the video's activity.
    class_names: one per class.
    names: one per video.
    unit_names: one per unit action.
  """

  arrays: dict[str, np.ndarray]
  class_names: tuple[str, ...]
  names: tuple[str, ...]
  unit_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.names)

  @property
  def multi_label(self) -> bool:
    """Whether a video may have several classes."""
    return self.arrays["label"].ndim == 2

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of a batch's arrays, without the batch axis."""
    return {name: values.shape[1:] for name, values in self.arrays.items()}

  def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """The videos at `index`, as one batch."""
    return {name: values[index] for name, values in self.arrays.items()}

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`fn` of each item, in order."""
    return map(fn, items)
