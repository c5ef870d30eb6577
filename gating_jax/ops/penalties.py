"""Terms that ask for fewer open gates.

Axes: N examples, C gates of one layer. All are dimensionless scalars, differentiable in the probabilities.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax.numpy as jnp

from gating_jax.ops import collectives
from gating_jax.ops.macs import expected_macs, gated_macs
from gating_jax.types import Array, Records


def l0_loss(probs: Sequence[Array]) -> Array:
  """Mean open probability over all gates of all layers: the expected share of open gates.

  Args:
    probs: one `[N, C]` array per layer. For hard concrete gates pass `hard_concrete_open_prob`.
  Raises:
    ValueError: no layers given.

  >>> l0_loss([jnp.array([[0.5, 1.0]]), jnp.array([[0.0]])])
  Array(0.5, dtype=float32)

  Reference: Louizos et al., 2018; Bejnordi et al., 2020.
  """
  gates = sum(p.shape[-1] for p in _nonempty(probs))
  return sum(jnp.sum(jnp.mean(p, axis=0)) for p in probs) / gates


def target_rate_loss(gates: Sequence[Array], target: float | Array, *, axis_name: Hashable | None = None) -> Array:
  """Squared gap between each gate's batch mean and a target rate, summed over gates and layers.

      loss = sum_c (mean_n g_nc - target)^2

  Args:
    gates: one `[N, C]` array per layer: sampled gates or probabilities.
    target: a rate in [0, 1].
    axis_name: as in `batch_shaping_loss`; the mean is over the whole batch.

  >>> target_rate_loss([jnp.array([[1.0], [0.0]])], 0.6)
  Array(0.01, dtype=float32)

  Reference: Veit and Belongie, 2018 (ConvNet-AIG).
  """
  return sum(jnp.sum(jnp.square(collectives.batch_mean(g, axis_name) - target)) for g in _nonempty(gates))


def mac_loss(records: Records) -> Array:
  """Expected share of the gated multiply-accumulates: `l0_loss` with every gate weighted by what it costs.

  Products of two layers' gates are taken at the product of their probabilities.
  """
  return jnp.mean(expected_macs(_nonempty(records))) / float(gated_macs(records))


def mac_budget_loss(
    records: Records, fixed_macs: int, budget: float | Array, *, axis_name: Hashable | None = None
) -> Array:
  """Squared excess of the expected MACs over a budget, both as a share of the ungated MACs; 0 below the budget.

      loss = max(0, (fixed + mean_n E[gated MACs]) / (fixed + all gated MACs) - budget)^2

  Args:
    records: the records of one forward pass.
    fixed_macs: MACs per example of what is never gated, gate networks left out.
    budget: share in (0, 1].
    axis_name: as in `batch_shaping_loss`; the mean is over the whole batch.
  """
  mean = collectives.batch_mean(expected_macs(_nonempty(records)), axis_name)
  share = (float(fixed_macs) + mean) / float(fixed_macs + gated_macs(records))
  return jnp.square(jnp.maximum(share - budget, 0))


def _nonempty(layers: Sequence) -> Sequence:
  if not layers:
    raise ValueError("a gate penalty needs at least one gated layer; got none: is the model ungated?")
  return layers
