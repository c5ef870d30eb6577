"""Early exit: an example leaves a network at the first exit that is sure of its class.

An exit is sure if its softmax has a low entropy, as a fraction of the largest possible one.
Thresholds then do not depend on the number of classes.

Axes: N examples, X exits before the last, K classes.
Reference: Teerapittayanon, McDanel and Kung, "BranchyNet: fast inference via early exiting from
  deep neural networks", 2016.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gating_jax.ops import arguments
from gating_jax.types import Array

# Margin of entropies from 0 and 1, near which float32 resolves no more of them.
_EPS = 1e-6


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


def stay_logits(exits: Array, threshold: float) -> Array:
  """Computes how unsure all exits so far are, `[N, X]`; above 0 the network runs on.

      stay_i = min_(j <= i) logit(u_j) - logit(threshold),   u_j = entropy_share(exits_j)

  Another threshold adds a constant, so these values show the effect of any threshold; see
  `threshold_for_budget`.

  Args:
    exits: `[N, X, K]` logits of the exits before the last, in their order.
    threshold: fraction of the largest entropy, in (0, 1): an exit with less entropy is taken.

  >>> stay_logits(jnp.array([[[0.0, 1.0], [0.0, 9.0], [0.0, 0.0]]]), 0.5).round(2)
  Array([[ 1.66, -6.33, -6.33]], dtype=float32)
  """
  arguments.real_array("exits", exits, "[N, X, K]")
  # The logits of 0 and 1 are infinite.
  share = jnp.clip(entropy_share(exits), _EPS, 1 - _EPS)
  # The running minimum: an example that has left does not come back at a later, unsure exit.
  return lax.cummin(jnp.log(share) - jnp.log1p(-share), axis=1) - _log_odds(threshold)


def first_sure(answers: Array, stay: Array) -> Array:
  """Returns the output of the exit at which each example leaves, `[N, K]`.

  Args:
    answers: `[N, X + 1, K]` of all exits; the last are the network's own outputs.
    stay: `[N, X]`, above 0 where the network runs on; once it is not, it stays so.
  Raises:
    ValueError: the shapes do not fit together.
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


def threshold_for_budget(
  stay: np.ndarray, macs: Sequence[int], fixed: int, *, threshold: float, share: float
) -> float:
  """Finds the lowest exit threshold whose mean MACs stay within a fraction of all.

  The lowest threshold lets the most examples run on. Choose it on examples that were not trained
  on. The mean grows as the threshold falls, and jumps only where it passes an example's least
  entropy so far: the search over those values is exact.

  Args:
    stay: `[N, X]` of `stay_logits`.
    macs: X numbers, the MACs after each exit up to the next.
    fixed: MACs that run for every example.
    threshold: the one that `stay` was made with.
    share: fraction in (0, 1] of `fixed + sum(macs)`.
  Raises:
    ValueError: `fixed` alone exceeds the budget, or the shapes do not fit together.

  >>> stay = np.array([[3.0, 2.0], [1.0, -1.0], [-2.0, -4.0]])
  >>> print(f"{threshold_for_budget(stay, [10, 20], 10, threshold=0.5, share=0.5):.4f}")
  0.8176
  """
  arguments.real_array("stay", stay, "[N, X]")
  arguments.real_array("macs", macs, "[X]")
  arguments.number("fixed", fixed, ">= 0", lambda v: v >= 0)
  arguments.number("share", share, "in (0, 1]", lambda v: 0 < v <= 1)
  stay, macs = np.asarray(stay, np.float64), np.asarray(macs, np.float64)
  if not stay.size or macs.shape != stay.shape[1:]:
    raise ValueError(f"stay must be [N, X] for X macs; got shapes {stay.shape} and {macs.shape}")
  total = fixed + macs.sum()
  if not fixed <= share * total:
    raise ValueError(
      f"share must be at least {fixed / total:.4g}, the cost up to the first exit; got {share}"
    )
  # `saved` holds, for each level, the mean MACs saved once the threshold has passed it.
  levels, where = np.unique(stay, return_inverse=True)
  saved = np.bincount(where.ravel(), np.broadcast_to(macs / len(stay), stay.shape).ravel())
  # Entry i is the mean cost if examples leave at the i lowest levels.
  spent = total - np.concatenate([[0.0], np.cumsum(saved)])
  # The first that fits the budget, up to the rounding of the sums.
  leave = int(np.argmax(spent <= share * total * (1 + 1e-9)))
  padded = np.concatenate([[levels[0] - 2], levels, [levels[-1] + 2]])
  # Halfway between two levels, so that rounding puts neither on the wrong side.
  between = (padded[leave] + padded[leave + 1]) / 2
  return float(1 / (1 + np.exp(-between - _log_odds(threshold))))


def _log_odds(threshold: float) -> float:
  arguments.number(
    "threshold", threshold, "in (0, 1), a fraction of the largest entropy", lambda v: 0 < v < 1
  )
  return math.log(threshold) - math.log1p(-threshold)
