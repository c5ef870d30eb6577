"""Fraction of gates that are closed for a whole batch: a metric to watch, not a penalty.

Axes: N examples, C gates of one layer, G gates of the network.
"""

from __future__ import annotations

from collections.abc import Hashable

import jax.numpy as jnp

from gating_jax.ops import arguments, collectives
from gating_jax.ops.macs import checked_records
from gating_jax.types import Array, Records

# A gate counts as open from this fraction of examples on.
LEAST_RATE = 0.01
# A gate of this open probability may well be drawn open in the next batch: it is not closed.
_LEAST_PROB = 0.1


def closed_share(
  records: Records, *, axis_name: Hashable | None = None, of: Array | None = None
) -> Array:
  """Computes the fraction of gates that are closed for (nearly) all examples of a batch.

  A gate counts as closed where it is open for < 1 % of the batch, with an open probability of < 0.1
  on average. It applies in training and evaluation alike; watch it in a training loop of your own.

  Args:
    records: records of one forward pass, one or more, each with `[N, C]` gates and probabilities.
    axis_name: as in `batch_shaping_loss`.
    of: `[G]` booleans, the gates that count; all by default.
  Returns:
    a scalar in [0, 1].
  Raises:
    ValueError: no records, records of no example or of several batches, or another number of gates
      in `of`.
    TypeError: `records` is no list of `GateRecord`.

  >>> from gating_jax.types import GateRecord
  >>> gates = jnp.array([[0.0, 1.0], [0.0, 0.0]])
  >>> closed_share([GateRecord(None, jnp.array([[0.01, 0.9], [0.02, 0.1]]), gates)])
  Array(0.5, dtype=float32)
  """
  records = checked_records(records, "gates", "probs", with_examples=True)
  closed = []
  for record in records:
    # Means over the whole batch: a gate may be closed on one device and open on another.
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
  # Without any gate in `of`, none is closed: 0.
  return jnp.sum(closed * of) / jnp.maximum(jnp.sum(of), 1)
