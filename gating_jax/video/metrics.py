"""Scores of a whole split of videos: mean average precision, and the segments chosen.

Everything is computed once from all videos, never averaged over batches. The caller leaves out
videos that could not be read.

Axes: M videos, T segments.
Reference: scikit-learn's `average_precision_score`; Sigurdsson et al., 2016 (Charades, mAP over 157
classes).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class AveragePrecision(NamedTuple):
  """Average precision of a split.

  Attributes:
    mean: over classes that have a positive.
    per_class: `[classes]`, NaN for classes without a positive.
    left_out: names of the classes without a positive.
  """

  mean: float
  per_class: np.ndarray
  left_out: tuple[str, ...]


def mean_average_precision(
  scores: np.ndarray, labels: np.ndarray, *, class_names: Sequence[str] | None = None
) -> AveragePrecision:
  """Computes the mean over classes of the area under the precision-recall curve.

  The curve is not interpolated.

  Args:
    scores: `[M, classes]`, higher is likelier; only their order within a class matters.
    labels: `[M, classes]` 0/1. A class without a positive has no average precision, is left out and
      named.
    class_names: names of the classes; their indices if None.
  Returns:
    An `AveragePrecision`; the mean is NaN where no class has a positive.
  Raises:
    ValueError: shapes differ, a label is not 0 or 1, or a score is not finite, with the video's
      index.

  >>> scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
  >>> labels = np.array([[1, 0], [0, 0], [1, 0]])
  >>> score = mean_average_precision(scores, labels, class_names=("walk", "run"))
  >>> print(f"{score.mean:.4f}", score.per_class.round(4), score.left_out)
  0.8333 [0.8333    nan] ('run',)
  """
  # Imported here, as it imports slowly.
  from sklearn.metrics import average_precision_score

  scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
  if scores.ndim != 2 or scores.shape != labels.shape or not scores.size:
    raise ValueError(
      f"scores and labels must both be [M, classes]; got {scores.shape} and {labels.shape}"
    )
  # scikit-learn's own errors do not say which video is wrong.
  if len(bad := np.flatnonzero(~np.isfinite(scores).all(axis=1))):
    raise ValueError(
      f"scores must be finite; got {scores[bad[0]]} for video {bad[0]} ({len(bad)} such videos)"
    )
  if len(bad := np.flatnonzero(((labels != 0) & (labels != 1)).any(axis=1))):
    raise ValueError(f"labels must be 0 or 1; got {labels[bad[0]]} for video {bad[0]}")
  # Average precision is not defined for a class without a positive.
  known = np.asarray(labels.any(axis=0))
  per_class = np.full(len(known), np.nan)
  for c in np.flatnonzero(known):
    per_class[c] = average_precision_score(labels[:, c], scores[:, c])
  # NaN, not 0: no class could be scored.
  mean = float(np.mean(per_class[known])) if known.any() else float("nan")
  names = np.array(_names(class_names, len(known)), object)
  return AveragePrecision(mean, per_class, left_out=tuple(names[~known]))


@dataclasses.dataclass(frozen=True)
class SegmentReport:
  """Statistics of the segments chosen on a split.

  Fractions are of each video's own valid segments.

  Attributes:
    share: mean over videos of the fraction chosen.
    share_std, share_p10, share_p90: its standard deviation, 10th and 90th percentile over videos.
    share_per_class: mean over each class's videos, for classes that have any.
    precision: mean over videos of the fraction of chosen segments that are relevant; None without
      ground truth.
    recall: mean over videos of the fraction of relevant segments that are chosen.
    relevant_share: mean over videos of the fraction that is relevant: the precision of a random
      choice.
    without_relevant: number of videos without a relevant segment, which these three leave out.
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
    gates: `[M, T]`; a segment is chosen where its gate is above 0. Padding is ignored.
    valid: `[M, T]` bool, at least one a video.
    labels: `[M]` class indices, or `[M, classes]` 0/1: a video counts for each of its classes.
    relevant: `[M, T]` bool, if there is ground truth.
    class_names: names in `share_per_class`; the indices if None.
  Returns:
    A `SegmentReport`.
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
  # Per video first: a long video weighs no more than a short one.
  share = chosen.sum(axis=1) / valid.sum(axis=1)
  p10, p90 = np.percentile(share, (10, 90))
  agreement = {}
  if relevant is not None:
    agreement = _agreement(chosen, valid, _like(valid, "relevant", relevant) & valid)
  return SegmentReport(
    share=float(share.mean()),
    share_std=float(share.std()),
    share_p10=float(p10),
    share_p90=float(p90),
    share_per_class=_share_per_class(share, labels, class_names),
    **agreement,
  )


def _share_per_class(
  share: np.ndarray, labels: np.ndarray, class_names: Sequence[str] | None
) -> dict[str, float]:
  if labels.ndim == 1:
    # One-hot, so that both kinds of labels count the same way.
    classes = labels.max() + 1 if class_names is None else len(class_names)
    labels = labels[:, None] == np.arange(classes)
  videos = labels.sum(axis=0)
  names, means = _names(class_names, len(videos)), {}
  # A class without videos has no mean, and is left out.
  for c in np.flatnonzero(videos).tolist():
    means[names[c]] = float(share @ labels[:, c] / videos[c])
  return means


def _agreement(chosen: np.ndarray, valid: np.ndarray, relevant: np.ndarray) -> dict[str, Any]:
  """Computes the precision and recall of the choice, all arguments `[M, T]` bool."""
  # Recall is not defined for a video without a relevant segment.
  known = relevant.any(axis=1)
  without = int(np.sum(~known))
  if not known.any():
    return {"without_relevant": without}
  # Segments of each video: true positives, predicted ones, and those of the ground truth.
  both = np.sum((chosen & relevant)[known], axis=1)
  chosen, relevant = np.sum(chosen[known], axis=1), np.sum(relevant[known], axis=1)
  # No segment chosen: precision 0.
  precision = both / np.maximum(chosen, 1)
  return {
    "precision": float(np.mean(precision)),
    "recall": float(np.mean(both / relevant)),
    "relevant_share": float(np.mean(relevant / np.sum(valid[known], axis=1))),
    "without_relevant": without,
  }


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
