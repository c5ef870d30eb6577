"""Closed gates in training: the limits of each kind of run, and the advice of its warnings."""

from __future__ import annotations

import ml_collections

from gating_jax.training.closing import CLOSED, SEGMENTS_CLOSED, ClosingWatch, Limit

_MOST = 0.5
# The limit where closed units are wanted, as in pruning: a warning only where hardly any is left.
_NOTHING_LEFT = 0.995
# Regularisers with one strength, and its setting.
_REGULARISERS = {
  "entropy": "loss.entropy.coefficient",
  "decision_entropy": "loss.decision_entropy.coefficient",
  "away_from_half": "loss.away_from_half.coefficient",
}


def of_images(config: ml_collections.ConfigDict) -> ClosingWatch:
  """Returns the watch over classifiers and segmentation."""
  gating, gate, loss = config.model.gating, config.model.gate, config.loss
  # An exit that no image passes is not a closed gate; random gates learn nothing.
  if gating in ("none", "exits") or gate.context == "random":
    return ClosingWatch(())
  if gating == "experts":
    advice = "raise loss.balance.coefficient, with loss.regulariser=balance"
    return ClosingWatch([Limit(CLOSED, _MOST, advice, "experts")])
  if loss.regulariser in _REGULARISERS:
    advice = f"lower {_REGULARISERS[loss.regulariser]}, or use loss.regulariser=batch_shaping"
  elif loss.regulariser == "none":
    advice = (
      "lower optim.learning_rate or optim.gate_lr_multiplier, or use loss.regulariser=batch_shaping"
    )
  else:
    advice = _advice("loss", loss, shaped=loss.regulariser == "batch_shaping")
  # Gates that see no input prune: they are meant to close for all examples.
  static = gate.context == "none"
  return ClosingWatch([Limit(CLOSED, _NOTHING_LEFT if static else _most(loss.sparsity), advice)])


def of_tasks() -> ClosingWatch:
  """Returns the watch over task gates: filters that a task closes are left for the next tasks."""
  advice = (
    "lower gates.sparsity, or raise gates.patience, the number of epochs that a task first learns "
    "without it"
  )
  return ClosingWatch([Limit(CLOSED, _NOTHING_LEFT, advice)])


def of_videos(config: ml_collections.ConfigDict) -> ClosingWatch:
  """Returns the watch over the gate of segments and the channel gates of the heavy net."""
  limits, loss = [], config.loss
  if config.model.selection == "gate":
    advice = (
      f"{_lower('loss', loss.sparsity)} or loss.sparsity.kind=target, or raise "
      f"loss.batch_shaping.coefficient (now {loss.batch_shaping.coefficient:g})"
    )
    limits.append(Limit(SEGMENTS_CLOSED, _MOST, advice, "segments"))
  if config.model.heavy.gating != "none":
    advice = _advice("loss.channels", loss.channels, shaped=True)
    limits.append(
      Limit(
        f"channels_{CLOSED}", _most(loss.channels.sparsity), advice, "heavy net's channel gates"
      )
    )
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
    f"{section}.batch_shaping.fade_end (now {shaping.fade_end:g}, the fraction of training at which it ends)"
  )


def _lower(section: str, sparsity: ml_collections.ConfigDict) -> str:
  return f"lower {section}.sparsity.coefficient (now {sparsity.coefficient:g})"
