"""Scores of a whole split of videos: mean average precision, and what the segment gate chose.

Everything is computed once from all videos, never averaged over batches; videos that could not be read are left out by
the caller.

Axes: M videos, T segments.
Reference: scikit-learn's `average_precision_score`; Sigurdsson et al., 2016 (Charades, mAP over 157 classes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class AveragePrecision(NamedTuple):
  """`mean` over classes that have a positive; `per_class` `[classes]`, NaN for the others; `left_out`, their names."""

  mean: float
  per_class: np.ndarray
  left_out: tuple[str, ...]


def mean_average_precision(
  scores: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str] | None = None
) -> AveragePrecision:
  """Mean over classes of the area under the precision-recall curve, without interpolation.

  Args:
    scores: `[M, classes]`, higher is likelier; only their order within a class matters.
    labels: `[M, classes]` 0/1. A class without a positive has no average precision, is left out and named.
    class_names: of the classes left out; their indices if None.
  Returns:
    an `AveragePrecision`; the mean is NaN where no class has a positive.
  Raises:
    ValueError: shapes differ, a label is not 0 or 1, or a score is not finite, with the video's index.

  >>> scores, labels = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), np.array([[1, 0], [0, 0], [1, 0]])
  >>> mean_average_precision(scores, labels, class_names=("walk", "run"))
  AveragePrecision(mean=0.8333333333333333, per_class=array([0.83333333,        nan]), left_out=('run',))
  """
  from sklearn.metrics import average_precision_score  # imports slowly

  scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
  if scores.ndim != 2 or scores.shape != labels.shape or not scores.size:
    raise ValueError(
      f"scores and labels must both be [M, classes]; got {scores.shape} and {labels.shape}"
    )
  if len(bad := np.flatnonzero(~np.isfinite(scores).all(axis=1))):
    raise ValueError(
      f"scores must be finite; got {scores[bad[0]]} for video {bad[0]} ({len(bad)} such videos)"
    )
  if len(bad := np.flatnonzero(((labels != 0) & (labels != 1)).any(axis=1))):
    raise ValueError(f"labels must be 0 or 1; got {labels[bad[0]]} for video {bad[0]}")
  known = labels.any(axis=0)
  per_class = np.full(len(known), np.nan)
  for c in np.flatnonzero(known):
    per_class[c] = average_precision_score(labels[:, c], scores[:, c])
  mean = float(np.mean(per_class[known])) if known.any() else float("nan")
  names = _names(class_names, len(known))
  return AveragePrecision(mean, per_class, tuple(names[c] for c in np.flatnonzero(~known)))


@dataclasses.dataclass(frozen=True)
class SegmentReport:
  """What a segment gate chose on a split; shares are of each video's own valid segments.

  Attributes:
    share: mean over videos of the share chosen.
    share_std, share_p10, share_p90: its spread over videos.
    share_per_class: mean over each class's videos, for classes that have any.
    precision: mean over videos of the share of chosen segments that are relevant; None where the truth is not known.
    recall: mean over videos of the share of relevant segments that are chosen.
    relevant_share: mean over videos of the share that is relevant: the precision of a choice by chance.
    without_relevant: videos without a relevant segment, which these three leave out.
  """

  share: float
  share_std: float
  share_p10: float
  share_p90: float
  share_per_class: dict[str, float]
  precision: float | None = None
  recall: float | None = None
  relevant_share: float | None = None
  without_relevant: int | None = None


def segment_report(
  gates: np.ndarray,
  valid: np.ndarray,
  labels: np.ndarray,
  *,
  relevant: np.ndarray | None = None,
  class_names: Sequence[str] | None = None,
) -> SegmentReport:
  """Summarises the choice on a whole split.

  Args:
    gates: `[M, T]`; a segment is chosen where its gate is above 0. Padding does not count.
    valid: `[M, T]` bool, at least one a video.
    labels: `[M]` class indices, or `[M, classes]` 0/1: a video counts for each of its classes.
    relevant: `[M, T]` bool, where the truth is known.
    class_names: of `share_per_class`; the indices if None.
  Raises:
    ValueError: shapes differ, or a video has no valid segment.
  """
  valid, labels = np.asarray(valid, bool), np.asarray(labels)
  chosen = _like(valid, "gates", np.asarray(gates) > 0) & valid
  if not len(valid) or len(labels) != len(valid):
    raise ValueError(
      f"labels must have one row for each of M >= 1 videos; got {len(labels)}, {len(valid)} videos"
    )
  if not valid.any(axis=1).all():
    raise ValueError(
      f"every video must have a valid segment; got none for video {np.argmin(valid.any(axis=1))}"
    )
  share = chosen.sum(axis=1) / valid.sum(axis=1)
  p10, p90 = np.percentile(share, (10, 90))
  return SegmentReport(
    share=float(share.mean()),
    share_std=float(share.std()),
    share_p10=float(p10),
    share_p90=float(p90),
    share_per_class=_share_per_class(share, labels, class_names),
    **(
      {}
      if relevant is None
      else _agreement(chosen, valid, _like(valid, "relevant", relevant) & valid)
    ),
  )


def _share_per_class(
  share: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None
) -> dict[str, float]:
  if labels.ndim == 1:
    labels = labels[:, None] == np.arange(
      len(class_names) if class_names is not None else labels.max() + 1
    )
  videos = labels.sum(axis=0)
  names = _names(class_names, len(videos))
  return {names[c]: float(share @ labels[:, c] / videos[c]) for c in np.flatnonzero(videos)}


def _agreement(
  chosen: np.ndarray, valid: np.ndarray, relevant: np.ndarray
) -> dict[str, float | int | None]:
  known = relevant.any(axis=1)
  without = {"without_relevant": int(np.sum(~known))}
  if not known.any():
    return without
  both, valid, relevant, chosen = (
    m[known].sum(axis=1) for m in (chosen & relevant, valid, relevant, chosen)
  )
  shares = {
    "precision": both / np.maximum(chosen, 1),
    "recall": both / relevant,
    "relevant_share": relevant / valid,
  }
  return {name: float(values.mean()) for name, values in shares.items()} | without


def _like(valid: np.ndarray, name: str, values: np.ndarray) -> np.ndarray:
  values = np.asarray(values, bool)
  if valid.ndim != 2 or values.shape != valid.shape:
    raise ValueError(f"{name} and valid must both be [M, T]; got {values.shape} and {valid.shape}")
  return values


def _names(class_names: Sequence[str] | None, classes: int) -> Sequence[str]:
  if class_names is None:
    return [str(c) for c in range(classes)]
  if len(class_names) != classes:
    raise ValueError(
      f"class_names must name each of {classes} classes; got {len(class_names)} names"
    )
  return class_names
