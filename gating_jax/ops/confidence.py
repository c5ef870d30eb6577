"""Early exit: an example, or a video, leaves its network once that is sure of the class.

An image leaves at the first exit whose softmax has a low entropy, as a fraction of the largest
possible one: thresholds then do not depend on the number of classes. A video's segments come one by
one, in a fixed order, until the classifier gives one class a high probability.

Thresholds that meet a budget are found exactly: the cost jumps only at the confidences seen.

Axes: N examples, X exits before the last, K classes; M videos, T segments, step t has seen t + 1 of
them.
Reference: Teerapittayanon, McDanel and Kung, "BranchyNet: fast inference via early exiting from
  deep neural networks", 2016; Ghodrati et al., 2021 (FrameExit), whose order of segments is
  `ops.selection.frame_exit_order`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.names import former_keyword, former_positional
from gating_jax.ops import arguments
from gating_jax.types import Array

# Margin of entropies from 0 and 1, near which float32 resolves no more of them.
_EPS = 1e-6
# Sums of fractions such as 1/3 are not exact.
_ROUNDING = 1e-9
# A threshold above every probability: no video exits early.
NEVER = 2.0


def entropy_share(logits: Array) -> Array:
  """Computes the entropy of the softmax over the last axis, as a fraction of the largest.

      -sum_k p_k log p_k / log K, in [0, 1]

  Args:
    logits: `[..., K]`.
  Raises:
    ValueError: fewer than two classes.
    TypeError: `logits` is no array of real numbers.

  >>> entropy_share(jnp.array([[0.0, 0.0], [0.0, 9.0]])).round(4)
  Array([1.    , 0.0018], dtype=float32)
  """
  arguments.real_array("logits", logits)
  logits = jnp.asarray(logits)
  if logits.ndim < 1 or logits.shape[-1] < 2:
    raise ValueError(f"logits must have two classes or more; got shape {logits.shape}")
  log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1) / math.log(logits.shape[-1])


@former_positional("threshold")
def stay_logits(exits: Array, *, threshold: float) -> Array:
  """Computes how unsure all exits so far are, `[N, X]`; above 0 the network runs on.

      stay_i = min_(j <= i) logit(u_j) - logit(threshold),   u_j = entropy_share(exits_j)

  Another threshold adds a constant, so these values show the effect of any threshold; see
  `threshold_for_budget`.

  Args:
    exits: `[N, X, K]` logits of the exits before the last, in their order.
    threshold: fraction of the largest entropy, in (0, 1): an exit with less entropy is taken.
  Returns:
    `[N, X]` log-odds.
  Raises:
    ValueError, TypeError: exits of another shape, or a threshold out of range.

  >>> stay_logits(jnp.array([[[0.0, 1.0], [0.0, 9.0], [0.0, 0.0]]]), threshold=0.5).round(2)
  Array([[ 1.66, -6.33, -6.33]], dtype=float32)
  """
  arguments.real_array("exits", exits, "[N, X, K]")
  # The logits of 0 and 1 are infinite.
  fraction = jnp.clip(entropy_share(exits), _EPS, 1 - _EPS)
  # The running minimum: an example that has left does not come back at a later, unsure exit.
  return lax.cummin(jnp.log(fraction) - jnp.log1p(-fraction), axis=1) - _log_odds(threshold)


def first_sure(answers: Array, stay: Array) -> Array:
  """Returns the output of the exit at which each example leaves, `[N, K]`.

  Args:
    answers: `[N, X + 1, K]` of all exits; the last are the network's own outputs.
    stay: `[N, X]`, above 0 where the network runs on; once it is not, it stays so.
  Raises:
    ValueError: the shapes do not fit together.

  >>> answers = jnp.array([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.3, 0.7]]])
  >>> first_sure(answers, jnp.array([[-1.0], [1.0]]))
  Array([[0.9, 0.1],
         [0.3, 0.7]], dtype=float32)
  """
  arguments.real_array("answers", answers, "[N, X + 1, K]")
  arguments.real_array("stay", stay, "[N, X]")
  (n, exits), (videos, every) = jnp.shape(stay), jnp.shape(answers)[:2]
  if n != videos or every != exits + 1:
    raise ValueError(
      f"answers must be [N, X + 1, K] for stay [N, X]; got {jnp.shape(answers)}, {jnp.shape(stay)}"
    )
  # `stay` never rises, so the exits passed are counted, not searched.
  at = jnp.sum(stay > 0, axis=1)
  return jnp.take_along_axis(answers, at[:, None, None], axis=1)[:, 0]


@former_keyword("fixed", "always_macs")
@former_positional("always_macs", stacklevel=3)
def threshold_for_budget(
  stay: np.ndarray, macs: Sequence[int], *, always_macs: int, threshold: float, share: float
) -> float:
  """Finds the lowest exit threshold whose mean MACs stay within a fraction of all.

  The lowest threshold lets the most examples run on. Choose it on examples that were not trained
  on. The mean grows as the threshold falls, and jumps only where it passes an example's least
  entropy so far: the search over those values is exact.

  Args:
    stay: `[N, X]` of `stay_logits`.
    macs: X numbers, the MACs after each exit up to the next.
    always_macs: MACs that run for every example.
    threshold: the one that `stay` was made with.
    share: fraction in (0, 1] of `always_macs + sum(macs)`.
  Returns:
    The threshold, a number in (0, 1).
  Raises:
    ValueError: `always_macs` alone exceeds the budget, or the shapes do not fit together.

  >>> stay = np.array([[3.0, 2.0], [1.0, -1.0], [-2.0, -4.0]])
  >>> found = threshold_for_budget(stay, [10, 20], always_macs=10, threshold=0.5, share=0.5)
  >>> print(f"{found:.4f}")
  0.8176
  """
  arguments.real_array("stay", stay, "[N, X]")
  arguments.real_array("macs", macs, "[X]")
  arguments.number("always_macs", always_macs, ">= 0", holds=lambda v: v >= 0)
  arguments.number("share", share, "in (0, 1]", holds=lambda v: 0 < v <= 1)
  stay, costs = np.asarray(stay, np.float64), np.asarray(macs, np.float64)
  if not stay.size or costs.shape != stay.shape[1:]:
    raise ValueError(f"stay must be [N, X] for X macs; got shapes {stay.shape} and {costs.shape}")
  total = always_macs + costs.sum()
  if not always_macs <= share * total:
    least = always_macs / total
    raise ValueError(
      f"share must be at least {least:.4g}, the cost up to the first exit; got {share}"
    )
  # Passing a level saves the MACs after the exits that are as unsure as that.
  passed = _levels_passed(stay, np.broadcast_to(costs / len(stay), stay.shape))
  spent = total - passed.weight
  # The first that fits the budget.
  leave = int(np.argmax(spent <= share * total * (1 + _ROUNDING)))
  return float(1 / (1 + np.exp(-passed.threshold_above(leave) - _log_odds(threshold))))


def exit_steps(
  step_logits: np.ndarray, valid_counts: np.ndarray, *, threshold: float, multi_label: bool = False
) -> np.ndarray:
  """Counts the segments seen of each video, until its confidence reaches the threshold.

  A video that never reaches it is seen to its end. The confidence is the largest class probability,
  of the softmax, or of the sigmoids if multi-label: there nearly all classes are surely absent at
  any time, so their certainty means nothing.

  Args:
    step_logits: `[M, T, K]` of the classifier after the first t + 1 segments in their order.
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


def step_threshold_for_budget(
  step_logits: np.ndarray, valid_counts: np.ndarray, *, share: float, multi_label: bool = False
) -> float:
  """Finds the highest threshold with a mean fraction of segments seen of at most `share`.

  Calibrate on validation videos. The fraction grows with the threshold and jumps only at a video's
  highest confidence so far, hence the search over these values is exact.

  Args:
    step_logits, valid_counts, multi_label: as in `exit_steps`.
    share: the budget: fraction of each video's own segments, mean over videos.
  Returns:
    The threshold; `NEVER` if all segments fit the budget.
  Raises:
    ValueError: one segment per video is already more.

  >>> step_logits = np.array([[[0.0, 0.0], [0.0, 3.0], [9.0, 0.0]]])
  >>> threshold = step_threshold_for_budget(step_logits, np.array([3]), share=0.9)
  >>> print(f"{threshold:.3f}")
  0.953
  """
  highest = _highest_so_far(step_logits, valid_counts, multi_label)
  # A video ends at its last segment anyway: only the confidences before it matter.
  before_last = np.arange(highest.shape[1]) < np.asarray(valid_counts)[:, None] - 1
  weights, least = _segment_weights(np.asarray(valid_counts), highest.shape, share)
  # Raising the threshold past a level costs the segments after all steps at this level.
  passed = _levels_passed(highest[before_last], weights[before_last])
  last_fit = np.flatnonzero(least + passed.weight <= share + _ROUNDING)[-1]
  return float(np.append(passed.levels, NEVER)[last_fit])


def open_threshold_for_budget(scores: np.ndarray, valid: np.ndarray, *, share: float) -> float:
  """Finds the lowest threshold that opens at most a fraction `share` of segments.

  A segment opens if its score is above the threshold, or is the first of its video's highest ones.
  Calibrate on validation videos. The fraction jumps only at a score, hence the search over these
  values is exact.

  Args:
    scores: `[M, T]`, such as the log-odds of gates.
    valid: `[M, T]` bool, False for padding; at least one a video.
    share: the budget: fraction of each video's own segments, mean over videos.
  Returns:
    The threshold, halfway between two scores; 0 if no video has two segments.
  Raises:
    ValueError: wrong shapes, scores that are not finite, a video without a segment, or one segment
      per video is already more.

  >>> scores = np.array([[3.0, 1.0, -2.0, 0.0], [5.0, 4.0, 2.0, 0.0]])
  >>> open_threshold_for_budget(scores, np.ones((2, 4), bool), share=0.5)
  1.5
  """
  scores, valid = np.asarray(scores, np.float64), np.asarray(valid, bool)
  if scores.ndim != 2 or scores.shape != valid.shape or not scores.size:
    raise ValueError(
      f"scores and valid must both be [M, T]; got shapes {scores.shape} and {valid.shape}"
    )
  segments = valid.sum(axis=1)
  if not segments.all():
    raise ValueError(f"valid must be True for a segment of video {np.argmin(segments)}; got none")
  if len(bad := np.argwhere(~np.isfinite(scores) & valid)):
    video, segment = bad[0]
    raise ValueError(
      f"scores must be finite; got {scores[video, segment]} for video {video}, segment {segment}"
    )
  weights, least = _segment_weights(segments, scores.shape, share)
  # The best segment of every video is open at any threshold: only the others matter.
  others = valid.copy()
  others[np.arange(len(scores)), np.argmax(np.where(valid, scores, -np.inf), axis=1)] = False
  if not others.any():
    return 0.0
  # Raising the threshold past a level closes the segments at this level.
  passed = _levels_passed(scores[others], weights[others])
  fractions = least + passed.weight[-1] - passed.weight
  return passed.threshold_above(int(np.argmax(fractions <= share + _ROUNDING)))


def _segment_weights(
  segments: np.ndarray, shape: tuple[int, ...], share: float
) -> tuple[np.ndarray, float]:
  """Returns what each segment adds to the mean fraction of segments, and the least such fraction.

  Args:
    segments: `[M]`, of each video.
    shape: `(M, T)`.
    share: the budget.
  Returns:
    `[M, T]` weights, and the fraction with one segment of each video.
  Raises:
    ValueError: that fraction is above the budget.
  """
  # Small integers would overflow. A segment of a video of n adds 1 / (n M) to the mean fraction.
  segments = np.asarray(segments, np.float64)
  weights = np.broadcast_to(1 / (len(segments) * segments)[:, None], shape)
  least = float(weights[:, 0].sum())
  if least > share + _ROUNDING:
    raise ValueError(
      f"share must be at least {least:.4g}, that of one segment per video; got {share}"
    )
  return weights, least


class _LevelsPassed(NamedTuple):
  """The effect of a threshold that passes one level of confidence after the other.

  Attributes:
    levels: `[L]`, the different values, ascending.
    weight: `[L + 1]`; entry i is the weight of all values among the i lowest levels.
  """

  levels: np.ndarray
  weight: np.ndarray

  def threshold_above(self, count: int) -> float:
    """Returns a threshold above the `count` lowest levels and below the others."""
    padded = np.concatenate([[self.levels[0] - 2], self.levels, [self.levels[-1] + 2]])
    # Halfway between two levels, so that rounding puts neither on the wrong side.
    return float((padded[count] + padded[count + 1]) / 2)


def _levels_passed(values: np.ndarray, weights: np.ndarray) -> _LevelsPassed:
  """Sorts values into levels, and sums the weights of the values up to each of them."""
  levels, where = np.unique(values, return_inverse=True)
  of_level = np.bincount(where.ravel(), weights.ravel(), minlength=len(levels))
  return _LevelsPassed(levels, np.concatenate([[0.0], np.cumsum(of_level)]))


def _highest_so_far(
  step_logits: np.ndarray, valid_counts: np.ndarray, multi_label: bool
) -> np.ndarray:
  """Computes `[M, T]` confidence, the largest up to each step; -1 beyond a video's end."""
  # Imported here: it loads slowly.
  from scipy import special

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


def _log_odds(threshold: float) -> float:
  arguments.number(
    "threshold",
    threshold,
    "in (0, 1), a fraction of the largest entropy",
    holds=lambda v: 0 < v < 1,
  )
  return math.log(threshold) - math.log1p(-threshold)
