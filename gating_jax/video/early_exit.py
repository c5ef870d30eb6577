"""Early exit in time: segments come one by one until the classifier is sure.

Their order is fixed. The functions work on logits computed once for every prefix, so that
thresholds and budgets are searched exactly.

Axes: M videos, T segments, step t has seen t + 1 of them.
Reference: Ghodrati et al., 2021 (FrameExit); the order is `ops.selection.frame_exit_order`.
"""

from __future__ import annotations

import numpy as np
from scipy import special

# A threshold above every probability: no video exits early.
NEVER = 2.0


def exit_steps(
  step_logits: np.ndarray, valid_counts: np.ndarray, *, threshold: float, multi_label: bool = False
) -> np.ndarray:
  """Counts the segments seen of each video, until its confidence reaches the threshold.

  A video that never reaches it is seen to its end. The confidence is the largest class probability,
  of the softmax, or of the sigmoids if multi-label: there nearly all classes are surely absent at
  any time, so their certainty says nothing.

  Args:
    step_logits: `[M, T, classes]` of the classifier after the first t + 1 segments in their order.
    valid_counts: `[M]` segments of each video, 1 .. T; later steps are ignored.
    threshold: a probability; above 1 (`NEVER`) all segments are seen.
    multi_label: whether a video may have several classes.
  Returns:
    `[M]` int64, 1 .. valid_counts.
  Raises:
    ValueError: wrong shapes, counts out of range, or logits that are not finite.

  >>> exit_steps(np.array([[[0.0, 0.0], [0.0, 3.0], [9.0, 0.0]]]), np.array([3]), threshold=0.9)
  array([2])
  """
  sure = _highest_so_far(step_logits, valid_counts, multi_label) >= threshold
  # `argmax` finds the first step that is sure.
  return np.where(sure.any(axis=1), np.argmax(sure, axis=1) + 1, valid_counts)


def threshold_for_budget(
  step_logits: np.ndarray, valid_counts: np.ndarray, *, share: float, multi_label: bool = False
) -> float:
  """Finds the highest threshold with a mean fraction of segments seen of at most `share`.

  Calibrate on validation videos. The fraction grows with the threshold and jumps only at a video's
  highest confidence so far, hence the search over these values is exact.

  Args:
    step_logits, valid_counts, multi_label: as of `exit_steps`.
    share: the budget: fraction of each video's own segments, mean over videos.
  Returns:
    The threshold; `NEVER` if all segments fit the budget.
  Raises:
    ValueError: one segment per video is already more.

  >>> step_logits = np.array([[[0.0, 0.0], [0.0, 3.0], [9.0, 0.0]]])
  >>> threshold = threshold_for_budget(step_logits, np.array([3]), share=0.9)
  >>> print(f"{threshold:.3f}")
  0.953
  """
  highest = _highest_so_far(step_logits, valid_counts, multi_label)
  # A video ends at its last segment anyway: only the confidences before it matter.
  before_last = np.arange(highest.shape[1]) < np.asarray(valid_counts)[:, None] - 1
  # A further segment of a video of n adds 1 / (n M) to the mean fraction.
  weights = np.broadcast_to(
    1 / (len(highest) * np.asarray(valid_counts, np.float64))[:, None], highest.shape
  )
  least = float(weights[:, 0].sum())
  # 1e-9: sums of fractions such as 1/3 are not exact.
  if least > share + 1e-9:
    raise ValueError(
      f"share must be at least {least:.4g}, that of one segment per video; got {share}"
    )
  levels, where = np.unique(highest[before_last], return_inverse=True)
  # Raising the threshold past a level costs the weights of all steps at this level.
  extra = np.bincount(where, weights[before_last], minlength=len(levels))
  shares = least + np.concatenate([[0.0], np.cumsum(extra)])
  return float(np.append(levels, NEVER)[np.flatnonzero(shares <= share + 1e-9)[-1]])


def _highest_so_far(
  step_logits: np.ndarray, valid_counts: np.ndarray, multi_label: bool
) -> np.ndarray:
  """Computes `[M, T]` confidence, the largest up to each step; -1 beyond a video's end."""
  logits, valid_counts = np.asarray(step_logits, np.float64), np.asarray(valid_counts)
  if logits.ndim != 3 or not logits.size:
    raise ValueError(f"step_logits must be [M, T, classes]; got shape {logits.shape}")
  if (
    valid_counts.shape != logits.shape[:1]
    or not np.isin(valid_counts, np.arange(1, logits.shape[1] + 1)).all()
  ):
    raise ValueError(f"valid_counts must be [M] in 1 .. {logits.shape[1]}; got {valid_counts}")
  seen = np.arange(logits.shape[1]) < valid_counts[:, None]
  # Padding may hold anything, and must not fail the check below.
  logits = np.where(seen[..., None], logits, 0.0)
  if len(bad := np.argwhere(~np.isfinite(logits).all(axis=2))):
    video, step = bad[0]
    raise ValueError(
      f"step_logits must be finite; got {logits[video, step]} for video {video}, step {step}"
    )
  probs = special.expit(logits) if multi_label else special.softmax(logits, axis=2)
  return np.where(seen, np.maximum.accumulate(probs.max(axis=2), axis=1), -1.0)
