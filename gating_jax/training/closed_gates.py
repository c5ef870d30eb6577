"""Warnings in training of gates that close for all examples.

A gate that never opens hardly learns: what it switches no longer reaches the loss, and a penalty
alone never opens it. Each kind of run has limits of its own, and advice in the words of its config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ml_collections

# Metrics of training: the fraction of closed gates, as `closed_share` computes it; and 1 where a
# gate of segments opens no segment on its own, else 0.
CLOSED = "gates/closed"
SEGMENTS_CLOSED = "gates/segments_closed"
# Steps over which too many gates must be closed before a warning.
_LASTING = 20
# The largest fraction of closed gates that is no fault: half; nearly all where closed units are
# wanted, as in pruning.
_MOST, _NOTHING_LEFT = 0.5, 0.995
# Regularisers with one strength, and its setting.
_REGULARISERS = {
  "entropy": "loss.entropy.coefficient",
  "decision_entropy": "loss.decision_entropy.coefficient",
  "away_from_half": "loss.away_from_half.coefficient",
}


@dataclasses.dataclass(frozen=True)
class Limit:
  """The largest fraction of closed gates that a training accepts without a warning.

  Attributes:
    metric: metric of training, a fraction of gates.
    most: the largest fraction that is no fault.
    advice: the settings to change, in the words of the config.
    subject: the gates meant, for the message.
  """

  metric: str
  most: float
  advice: str
  subject: str = "gates"


class ClosingWatch:
  """A watch over training that warns, once for each limit, of gates that close permanently.

  It is called at each log line, with the means over the steps since the last one. It warns when
  more gates than a limit allows have been closed for twenty steps: gates that close for a moment
  open again. Where a training resumes, the watch is shown the earlier lines again, and continues as
  if the training had never stopped.
  """

  def __init__(self, limits: Sequence[Limit]):
    self._limits = limits
    # For each limit that is exceeded, the step at which that began.
    self._since = {}
    self._last_step = 0
    self._warned = set()

  def __call__(self, step: int, means: Mapping[str, float]) -> list[str]:
    """Returns the warnings due at a log line; none where the line was shown before.

    Args:
      step: the step of the line.
      means: the line's metrics, means over the steps since the last line.
    """
    if step <= self._last_step:
      return []
    warnings = []
    for limit in self._limits:
      closed = means.get(limit.metric, 0.0)
      if closed <= limit.most:
        self._since.pop(limit, None)
      # The means are over the steps since the last line, so the excess began there.
      elif step - self._since.setdefault(limit, self._last_step) >= _LASTING:
        if limit not in self._warned:
          warnings.append(_warning(limit, closed))
        self._warned.add(limit)
    self._last_step = step
    return warnings


def _warning(limit: Limit, closed: float) -> str:
  return (
    f"warning: {closed:.0%} of the {limit.subject} are closed for all examples, and closed gates "
    f"hardly learn. If this is unintended: {limit.advice}. See docs/gate_your_model.md."
  )


def watch_images(config: ml_collections.ConfigDict) -> ClosingWatch:
  """Returns the watch over classifiers and segmentation."""
  gating, gate, loss = config.model.gating, config.model.gate, config.loss
  # An exit that no image passes is not a closed gate; random gates learn nothing.
  # Scales and biases close nothing.
  if gating in ("none", "scale", "bias", "exits") or gate.context in ("random", "assigned"):
    return ClosingWatch(())
  if gating == "experts":
    advice = "raise loss.balance.coefficient, with loss.regulariser=balance"
    return ClosingWatch([Limit(CLOSED, _MOST, advice, subject="experts")])
  if loss.regulariser in _REGULARISERS:
    advice = f"lower {_REGULARISERS[loss.regulariser]}, or use loss.regulariser=batch_shaping"
  elif loss.regulariser == "none":
    advice = (
      "lower optim.learning_rate or optim.gate_lr_multiplier, or use loss.regulariser=batch_shaping"
    )
  else:
    advice = _advice("loss", loss, shaped=loss.regulariser == "batch_shaping")
  # Gates that see no input prune: they are meant to close for all examples.
  most = _NOTHING_LEFT if gate.context == "none" else _most(loss.sparsity)
  return ClosingWatch([Limit(CLOSED, most, advice)])


def watch_tasks() -> ClosingWatch:
  """Returns the watch over task gates: filters that a task closes are left for the next tasks."""
  advice = (
    "lower gates.sparsity, or raise gates.patience, the number of epochs that a task first learns "
    "without it"
  )
  return ClosingWatch([Limit(CLOSED, _NOTHING_LEFT, advice)])


def watch_videos(config: ml_collections.ConfigDict) -> ClosingWatch:
  """Returns the watch over the gate of segments and the channel gates of the heavy net."""
  limits, loss = [], config.loss
  if config.model.selection == "gate":
    advice = (
      f"{_lower('loss', loss.sparsity)} or loss.sparsity.kind=target, or raise "
      f"loss.batch_shaping.coefficient (now {loss.batch_shaping.coefficient:g})"
    )
    limits.append(Limit(SEGMENTS_CLOSED, _MOST, advice, subject="segments"))
  if config.model.heavy.gating != "none":
    advice = _advice("loss.channels", loss.channels, shaped=True)
    most, subject = _most(loss.channels.sparsity), "heavy net's channel gates"
    limits.append(Limit(f"channels_{CLOSED}", most, advice, subject=subject))
  return ClosingWatch(limits)


def _most(sparsity: ml_collections.ConfigDict) -> float:
  """Returns the accepted fraction of closed gates: half, or more where the budget asks for it."""
  # A budget of 20 % of the MACs closes about 80 % of the gates.
  return max(_MOST, 1 - sparsity.target) if sparsity.kind == "budget" else _MOST


def _advice(section: str, loss: ml_collections.ConfigDict, *, shaped: bool) -> str:
  lower = _lower(section, loss.sparsity)
  if not shaped:
    return (
      f"{lower} or start it later ({section}.sparsity.ramp_start), or use "
      f"{section}.regulariser=batch_shaping"
    )
  shaping = loss.batch_shaping
  return (
    f"{lower}, or raise {section}.batch_shaping.coefficient (now {shaping.coefficient:g}) or "
    f"{section}.batch_shaping.fade_end (now {shaping.fade_end:g}, the fraction of training at "
    "which it ends)"
  )


def _lower(section: str, sparsity: ml_collections.ConfigDict) -> str:
  return f"lower {section}.sparsity.coefficient (now {sparsity.coefficient:g})"
