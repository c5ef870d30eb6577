"""Gates that close for all examples: how many of a batch, and the warning of a training that loses them.

A gate that never opens hardly learns: what it switches no longer reaches the loss, and a penalty alone never opens it.

Axes: N examples, C gates of one layer, G gates of the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import jax.numpy as jnp

from gating_jax.ops import arguments, collectives
from gating_jax.ops.macs import checked_records
from gating_jax.types import Array, Records

CLOSED = "gates/closed"  # the metric that training logs
SEGMENTS_CLOSED = (
  "gates/segments_closed"  # metric: 1 where the gate opens no segment by itself, else 0
)
_LASTING = 20  # steps
LEAST_RATE = 0.01  # of examples for which a gate is open
_LEAST_PROB = 0.1  # a gate that may well be drawn open in the next batch is not closed


def closed_share(
  records: Records, *, axis_name: Hashable | None = None, of: Array | None = None
) -> Array:
  """Fraction of a network's gates that are closed for (nearly) all examples of a batch.

  A gate counts as closed where it is open for < 1 % of the batch, with an open probability of < 0.1 on average. In
  training and evaluation alike; watch it in a training loop of your own.

  Args:
    records: of one forward pass, one or more, each with `[N, C]` gates and probabilities.
    axis_name: as in `batch_shaping_loss`.
    of: `[G]` booleans, the gates that count; all by default.
  Returns:
    a scalar in [0, 1].
  Raises:
    ValueError: no records, records of no example or of several batches, or another number of gates in `of`.
    TypeError: `records` is no list of `GateRecord`.

  >>> from gating_jax.types import GateRecord
  >>> gates = jnp.array([[0.0, 1.0], [0.0, 0.0]])
  >>> closed_share([GateRecord(None, jnp.array([[0.01, 0.9], [0.02, 0.1]]), gates)])
  Array(0.5, dtype=float32)
  """
  records = checked_records(records, "gates", "probs", with_examples=True)
  closed = []
  for record in records:
    rates = collectives.batch_mean(record.gates.astype(jnp.float32), axis_name)
    probs = collectives.batch_mean(record.probs.astype(jnp.float32), axis_name)
    closed.append((rates < LEAST_RATE) & (probs < _LEAST_PROB))
  closed = jnp.concatenate(closed).astype(jnp.float32)
  if of is None:
    return jnp.mean(closed)
  arguments.real_array("of", of)
  of = jnp.asarray(of, jnp.float32)
  if of.shape != closed.shape:
    raise ValueError(
      f"of must be [G], a truth value for each of the {closed.size} gates; got shape {of.shape}"
    )
  return jnp.sum(closed * of) / jnp.maximum(jnp.sum(of), 1)


@dataclasses.dataclass(frozen=True)
class Limit:
  """How many gates may close before a training says so.

  Attributes:
    metric: of training, a fraction of gates.
    most: the largest fraction that is no fault.
    advice: what to change, in the words of the config.
    subject: the gates meant, for the message.
  """

  metric: str
  most: float
  advice: str
  subject: str = "gates"


class ClosingWatch:
  """Warns, once for each limit, while a network trains, that its gates close for good.

  Called at each log line, with the means over the steps since the last one. Over twenty steps more gates than a limit
  allows must be closed on average: gates that close for a moment open again. Where a training is resumed, it is shown
  the earlier lines again, and goes on as if the training had never stopped.
  """

  def __init__(self, limits: Sequence[Limit]):
    self._limits = limits
    self._since = {}  # of a limit that is exceeded, the step from which on
    self._last_step = 0
    self._warned = set()

  def __call__(self, step: int, means: Mapping[str, float]) -> list[str]:
    """The warnings that a line gives rise to; none where it was shown before."""
    if step <= self._last_step:
      return []
    warnings = []
    for limit in self._limits:
      closed = means.get(limit.metric, 0.0)
      if closed <= limit.most:
        self._since.pop(limit, None)
      elif step - self._since.setdefault(limit, self._last_step) >= _LASTING:
        if limit not in self._warned:
          warnings.append(_warning(limit, closed))
        self._warned.add(limit)
    self._last_step = step
    return warnings


def _warning(limit: Limit, closed: float) -> str:
  return (
    f"warning: {closed:.0%} of the {limit.subject} are closed for all examples, and closed gates hardly learn. "
    f"If this is not wanted: {limit.advice}. See docs/gate_your_model.md."
  )
