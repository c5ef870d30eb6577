"""Videos as arrays in memory, as frames or as features of networks.

Axes: M videos, T segments, F frames, H and W pixels, D channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class VideoArrays:
  """Split of a set of videos, whole, on the host.

  Attributes:
    arrays: by name, `[M, ...]`. Inputs: `clips` `[M, T, F, H, W, D]` uint8, or the features `light`
      and `heavy` `[M, T, ...]`. `valid` `[M, T]` bool: False where a shorter video was padded.
      `label` `[M]` int32, or `[M, classes]` of 0 and 1. `weight` `[M]`: 0 for videos that could not
      be read. Where known, `units` `[M, T]`: the unit action of each segment or -1; and `relevant`
      `[M, T]`: whether the segment belongs to the video's activity.
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
    """Returns whether a video may have several classes."""
    # Single-label sets have one class number per video.
    return self.arrays["label"].ndim == 2

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a batch's arrays, without the batch axis."""
    return {name: values.shape[1:] for name, values in self.arrays.items()}

  def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the videos at `index`, as one batch."""
    # Every array begins with the axis of videos.
    return {name: values[index] for name, values in self.arrays.items()}

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Computes `fn` of each item, in order."""
    return map(fn, items)
