"""Warnings in training of gates that close for all examples.

A gate that never opens hardly learns: what it switches no longer reaches the loss, and a penalty
alone never opens it. Each programme has limits of its own, and advice in the words of its config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from gating_jax.config_files import Config

# Metrics of training: the fraction of closed gates, as `closed_share` computes it; and 1 where a
# gate of segments opens no segment on its own, else 0.
CLOSED = "gates/closed"
SEGMENTS_CLOSED = "gates/segments_closed"
# Steps over which too many gates must be closed before a warning.
_LASTING = 20
# The largest fraction of closed gates that is no fault: half; nearly all where closed units are
# wanted, as in pruning.
MOST_CLOSED, NOTHING_LEFT = 0.5, 0.995


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


def accepted_fraction(sparsity: Config) -> float:
  """Returns the accepted fraction of closed gates: half, or more where the budget asks for it."""
  # A budget of 20 % of the MACs closes about 80 % of the gates.
  return max(MOST_CLOSED, 1 - sparsity.target) if sparsity.kind == "budget" else MOST_CLOSED


def advise_on_loss(section: str, loss: Config, *, shaped: bool) -> str:
  """Returns the settings of a loss's section to change so that fewer gates close.

  Args:
    section: the name of the section.
    loss: the section, with a sparsity and `batch_shaping`.
    shaped: whether the batch-shaping loss is on.
  """
  lower = advise_lower(section, loss.sparsity)
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


def advise_lower(section: str, sparsity: Config) -> str:
  """Returns the setting of a section that makes its sparsity weaker."""
  return f"lower {section}.sparsity.coefficient (now {sparsity.coefficient:g})"
