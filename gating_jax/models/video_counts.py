"""Multiply-accumulates of a network for long videos, part by part.

Axes: M videos, T segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from gating_jax.models.summary import ModelCounts, count
from gating_jax.models.timegate import SegmentNet
from gating_jax.ops import arguments

# Counts of a light net that is not there.
NOTHING = ModelCounts(params=0, gate_params=0, gates=0, macs=0, gate_macs=0, gated=0)


@dataclasses.dataclass(frozen=True)
class VideoCounts:
  """Sizes of a `SegmentNet`.

  Attributes:
    segments: T.
    light, heavy: sizes of the two nets, for one segment.
    selector: MACs of the segment gate and of the light net's head, for a video of T segments.
    classifier: MACs of the classifier for a video.
  """

  segments: int
  light: ModelCounts
  heavy: ModelCounts
  selector: int
  classifier: int

  @property
  def all_segments(self) -> int:
    """Returns the MACs without gating: the heavy net on all T segments and the classifier.

    Every channel is open. Gating is compared with this number.
    """
    return self.segments * self.heavy.macs + self.classifier

  def all_valid(self, valid: np.ndarray) -> float:
    """Returns the mean over videos of the MACs without gating on the valid segments, `[M, T]`.

    As `all_segments`, but the padding of shorter videos costs nothing.
    """
    return float(np.mean(np.sum(valid, axis=1))) * self.heavy.macs + self.classifier

  def per_video(self, gates: np.ndarray, valid: np.ndarray, heavy_macs: np.ndarray) -> np.ndarray:
    """Computes the MACs of each video, `[M]`.

    The light net and the selector run on all segments of a video, the heavy net on the chosen ones,
    and the classifier once.

    Args:
      gates: `[M, T]`; a segment is chosen where its gate is above 0.
      valid: `[M, T]` bool.
      heavy_macs: `[M, T]`, MACs of the heavy net on each segment.
    Raises:
      ValueError: gates or masks of another number of segments.
    """
    if np.shape(gates) != np.shape(valid) or np.shape(valid)[1:] != (self.segments,):
      raise ValueError(
        f"gates and valid must be [M, {self.segments}]; got {np.shape(gates)} and {np.shape(valid)}"
      )
    # The selector is counted for T segments; a shorter video pays for its own ones only.
    share = np.sum(valid, axis=1) / self.segments
    heavy = np.sum(np.where(gates > 0, heavy_macs, 0.0), axis=1)
    return share * (self.segments * self.light.macs + self.selector) + heavy + self.classifier


def count_video(
  model: SegmentNet,
  shapes: Mapping[str, tuple[int, ...]],
  *,
  made_elsewhere: tuple[int, int] = (0, 0),
) -> VideoCounts:
  """Counts the MACs and parameters of a network for long videos.

  Args:
    model: a network whose nets return `(features, records)`.
    shapes: shapes of a video's inputs: `heavy` `(T, ...)`, `valid` `(T,)` and, where there is a
      light net, `light`.
    made_elsewhere: MACs per segment that the inputs of the light and of the heavy net cost, where
      they are precomputed features.
  Raises:
    TypeError: another network, or a shape that is missing.
  """
  arguments.instance("model", model, SegmentNet, "a SegmentNet")
  arguments.instance("shapes", shapes, Mapping, "a mapping of names to shapes")
  for name in ("heavy", "valid", *(("light",) if model.light is not None else ())):
    arguments.instance(f"shapes[{name!r}]", shapes.get(name), tuple, "a tuple of whole numbers")
  segments = shapes["valid"][0]
  heavy = count(model.heavy.clone(parent=None), shapes["heavy"][1:])
  light = (
    NOTHING if model.light is None else count(model.light.clone(parent=None), shapes["light"][1:])
  )
  # A count is per entry of the first axis: per segment for both nets, per video for all else.
  whole = count(model, dict(shapes))
  # The rest after the heavy net of a model without light net and selector is the classifier.
  classifier = (
    count(model.clone(selection="all", light=None, light_head=False), dict(shapes)).macs
    - heavy.macs
  )
  selector = whole.gate_macs - heavy.gate_macs + whole.macs - light.macs - heavy.macs - classifier
  if model.selection == "gate" and model.gate.context == "attention":
    # Products without a kernel: queries with keys, and weights with values.
    selector += 2 * segments**2 * model.gate.gate.hidden
  light, heavy = (
    dataclasses.replace(net, macs=net.macs + macs)
    for net, macs in zip((light, heavy), made_elsewhere, strict=True)
  )
  return VideoCounts(segments, light, heavy, selector, classifier)
