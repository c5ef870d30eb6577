"""Penalties that ask for fewer open gates, or for gates that are open and closed.

`closed_share` is no penalty but a metric to watch: penalties may close gates permanently.

Arrays and records are given by position, all else by keyword. A layer is an `[N, C]` array or a
`GateRecord`, whose `probs` or `gates` are taken. A penalty that needs both, or costs, finds them in
its records; with arrays of probabilities it takes `gates` and `macs_per_unit` next to them.

Axes: N examples, at least 1, C gates of one layer, G gates of the network. All penalties are
dimensionless scalars, differentiable in the probabilities. All raise a ValueError if no layer is
given or a layer has no example, and a TypeError if the argument is no list of layers.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import entr

from gating_jax.checks import is_array
from gating_jax.names import former_keyword, former_positional
from gating_jax.ops import arguments, collectives
from gating_jax.ops.arguments import as_float, one_dtype
from gating_jax.ops.macs import checked_records, executed_macs, expected_macs, mac_fraction
from gating_jax.types import AnyArray, Array, GateRecord, Records

Layers = Sequence[AnyArray | GateRecord]
# For `closed_share`, a gate counts as open from this fraction of examples on.
LEAST_RATE = 0.01
# A gate of this open probability may well be drawn open in the next batch: it is not closed.
_LEAST_PROB = 0.1


def l0_loss(probs: Layers) -> Array:
  """Computes the mean open probability over all gates of all layers.

  It is the expected fraction of open gates.

  Args:
    probs: one `[N, C]` array or record per layer. For hard concrete gates pass
      `hard_concrete_open_prob`.
  Returns:
    A scalar in [0, 1].
  Raises:
    ValueError: no layers given.

  >>> l0_loss([jnp.array([[0.5, 1.0]]), jnp.array([[0.0]])])
  Array(0.5, dtype=float32)

  Reference: Louizos et al., 2018; Bejnordi et al., 2020.
  """
  gates, expected_open = 0, []
  for layer in _checked_layers("probs", probs, "probs"):
    # Every gate counts once, so large layers count more.
    gates += layer.shape[-1]
    expected_open.append(jnp.sum(collectives.batch_mean(layer, None)))
  return functools.reduce(operator.add, expected_open) / gates


@former_positional("target")
def target_rate_loss(
  gates: Layers, *, target: float | Array, axis_name: Hashable | None = None
) -> Array:
  """Computes the squared gap between each gate's batch mean and a target rate, as a sum.

      loss = sum_c (mean_n g_nc - target)^2

  The sum is over gates and layers.

  Args:
    gates: one `[N, C]` array per layer, sampled gates or probabilities; or one record, whose gates
      as drawn are taken.
    target: a rate in [0, 1].
    axis_name: as in `batch_shaping_loss`; the mean is over the whole batch.
  Returns:
    A scalar.
  Raises:
    ValueError: no layer, a layer without examples, or a target out of range.
    TypeError: no list of layers.

  >>> target_rate_loss([jnp.array([[1.0], [0.0]])], target=0.6)
  Array(0.01, dtype=float32)

  Reference: Veit and Belongie, 2018 (ConvNet-AIG).
  """
  target = arguments.parameter("target", target, "in [0, 1]", holds=lambda v: (v >= 0) & (v <= 1))
  gaps = []
  for layer in _checked_layers("gates", gates, "gates"):
    rate = collectives.batch_mean(unweighted(layer), axis_name)
    gaps.append(jnp.sum(jnp.square(rate - jnp.asarray(target, rate.dtype))))
  return functools.reduce(operator.add, gaps)


def unweighted(gates: AnyArray) -> Array:
  """Returns gates as fractions of open units: at most 1, with a gradient.

      g / max(g, 1),   the divisor without a gradient

  A weighted gate counts its open unit more than once, a penalty on open units once. Gates up to 1
  stay as they are, to the bit.

  >>> unweighted(jnp.array([0.0, 0.25, 1.0, 1.5]))
  Array([0.  , 0.25, 1.  , 1.  ], dtype=float32)
  """
  arguments.real_array("gates", gates)
  gates = as_float(gates)
  return gates / lax.stop_gradient(jnp.maximum(gates, jnp.ones_like(gates)))


def entropy_loss(probs: Layers, *, axis_name: Hashable | None = None) -> Array:
  """Computes how far the entropy of each gate's mean probability is below 1 bit, on average.

      loss = mean_c (1 - H(mean_n p_nc)),   H(p) = -p log2 p - (1 - p) log2(1 - p)

  The average is over all gates of all layers. It is 0 if every gate is open for half of the inputs,
  and also if it is open for each with probability 1/2: the loss does not distinguish these.

  Args:
    probs: one `[N, C]` array or record per layer.
    axis_name: as in `batch_shaping_loss`; the mean is over the whole batch.
  Returns:
    A scalar in [0, 1].
  Raises:
    ValueError: no layer, or a layer without examples.
    TypeError: no list of layers.

  >>> print(f"{entropy_loss([jnp.array([[0.0, 1.0], [1.0, 1.0]])]):.4f}")
  0.5000
  """
  layers = _checked_layers("probs", probs, "probs")
  return _certainty(jnp.concatenate([collectives.batch_mean(p, axis_name) for p in layers]))


def decision_entropy_loss(probs: Layers) -> Array:
  """Computes how far the entropy of each single decision is below 1 bit, on average.

      loss = mean_nc (1 - H(p_nc))

  The average is over examples and all gates. It is 0 if every gate is open with probability 1/2 for
  every input: then it carries no information about them.

  Args:
    probs: one `[N, C]` array of open probabilities, or one record, per layer.
  Returns:
    A scalar in [0, 1], in bits.
  Raises:
    ValueError: no layer, or a layer without examples.
    TypeError: no list of layers.

  >>> print(f"{decision_entropy_loss([jnp.array([[0.0, 0.5], [1.0, 0.5]])]):.4f}")
  0.5000
  """
  return _certainty(jnp.concatenate(_checked_layers("probs", probs, "probs"), axis=-1))


def _certainty(probs: Array) -> Array:
  """Computes the mean of `1 - H(p)`, in bits."""
  # The slope of the entropy is infinite at 0 and 1.
  eps = jnp.finfo(probs.dtype).eps
  probs = jnp.clip(probs, eps, 1 - eps)
  return 1 - jnp.mean(entr(probs) + entr(1 - probs)) / jnp.log(2.0)


def indecision_loss(probs: Layers) -> Array:
  """Computes how near probabilities are to 1/2, as the mean of `4 p (1 - p)`.

  The mean is over examples and all gates of all layers.

  Args:
    probs: one `[N, C]` array or record per layer.
  Returns:
    A scalar in [0, 1].
  Raises:
    ValueError: no layer, or a layer without examples.
    TypeError: no list of layers.

  >>> indecision_loss([jnp.array([[0.5, 1.0]]), jnp.array([[0.0, 0.5]])])
  Array(0.5, dtype=float32)
  """
  return l0_loss([4 * p * (1 - p) for p in _checked_layers("probs", probs, "probs")])


def balance_loss(
  records: Layers,
  *,
  gates: Sequence[AnyArray] | None = None,
  axis_name: Hashable | None = None,
) -> Array:
  """Computes how unevenly examples are spread over experts, summed over records.

      loss = C sum_c f_c P_c,   f_c = fraction of the open gates that are c's, P_c = mean_n p_nc

  A record contributes 1 if they are spread evenly, and C at most. Only the P have a gradient.

  Args:
    records: one record, or one `[N, C]` array of probabilities, per layer. Probabilities add up to
      1 over the C units.
    gates: with arrays, one `[N, C]` array per layer, above 0 where an expert runs.
    axis_name: as in `batch_shaping_loss`; means are over the whole batch.
  Returns:
    A scalar.
  Raises:
    ValueError, TypeError: records as in `executed_macs`, or without examples; arrays without
      `gates`.

  >>> probs, gates = jnp.array([[0.5, 0.5], [0.75, 0.25]]), jnp.array([[0.5, 0.0], [0.75, 0.0]])
  >>> balance_loss([probs], gates=[gates])
  Array(1.25, dtype=float32)
  >>> balance_loss([GateRecord(logits=probs, probs=probs, gates=gates)])
  Array(1.25, dtype=float32)

  Reference: Fedus et al., 2022, section 2.2.
  """
  terms = []
  records = _as_records(records, gates=gates)
  for record in checked_records(records, "gates", "probs", with_examples=True):
    # f_c of the equation, up to its sum; a step function, so without a gradient.
    is_open = (record.gates.astype(record.probs.dtype) > 0).astype(record.probs.dtype)
    fraction = collectives.batch_mean(is_open, axis_name)
    probs = collectives.batch_mean(record.probs, axis_name)
    # C sum_c f_c P_c of the equation.
    terms.append(probs.shape[-1] * jnp.sum(fraction / jnp.sum(fraction) * probs))
  return functools.reduce(operator.add, one_dtype(*terms))


def mac_loss(records: Layers, *, macs_per_unit: Sequence[int] | None = None) -> Array:
  """Computes the expected fraction of the gated multiply-accumulates.

  It is `l0_loss` with every gate weighted by its cost. Products of two layers' gates are taken at
  the product of their probabilities.

  Args:
    records: of one forward pass, one record, or one `[N, C]` array of probabilities, per layer.
    macs_per_unit: with arrays, the MACs per example of one open unit, a number for each layer.
  Returns:
    A scalar in [0, 1].
  Raises:
    ValueError, TypeError: records as in `executed_macs`, or without examples; arrays without
      `macs_per_unit`.

  >>> probs = jnp.array([[0.5, 0.25]])
  >>> mac_loss([probs], macs_per_unit=[8])
  Array(0.375, dtype=float32)
  >>> mac_loss([GateRecord(probs, probs, probs, macs_per_unit=8)])
  Array(0.375, dtype=float32)
  """
  records = _as_records(records, macs_per_unit=macs_per_unit)
  records = checked_records(records, "probs", with_examples=True)
  # One ratio for the network, not one per layer: layers count by their cost.
  mean = jnp.mean(expected_macs(records))
  return mac_fraction(records, mean, never_gated_macs=0)


@former_keyword("fixed_macs", "never_gated_macs")
@former_positional("never_gated_macs", "budget", stacklevel=3)
def mac_budget_loss(
  records: Layers,
  *,
  never_gated_macs: int,
  budget: float | Array,
  gates: Sequence[AnyArray] | None = None,
  macs_per_unit: Sequence[int] | None = None,
  axis_name: Hashable | None = None,
) -> Array:
  """Computes the squared difference between the MACs that the gates use and a budget.

      loss = ((never gated + mean_n executed) / (never gated + all gated) - budget)^2

  Both are fractions of the MACs with every gate open. Below the budget the loss opens gates: units
  that closed too much early in training would stay closed otherwise.

  The value is of the gates as drawn; the gradient is of the expected MACs, as if the two were
  equal. On average they are equal for noise of scale 1; with another scale, a gate is not drawn
  with its unit's probability. For gates that are never closed, such as those of `sigmoid`,
  the value counts all MACs.

  Args:
    records: of one forward pass, one record, or one `[N, C]` array of probabilities, per layer.
    never_gated_macs: MACs per example of everything that is never gated, without gate networks.
    budget: fraction in (0, 1].
    gates: with arrays, one `[N, C]` array of gates as drawn per layer.
    macs_per_unit: with arrays, the MACs per example of one open unit, a number for each layer.
    axis_name: as in `batch_shaping_loss`; the mean is over the whole batch.
  Returns:
    a scalar in [0, 1).
  Raises:
    ValueError: a number out of range, or records as in `executed_macs`.
    TypeError: no list of layers, or arrays without `gates` or `macs_per_unit`.

  >>> probs, gates = jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])
  >>> record = GateRecord(probs, probs, gates, macs_per_unit=8)
  >>> print(f"{mac_budget_loss([record], never_gated_macs=4, budget=0.5):.4f}")
  0.0100
  >>> given = {"gates": [gates], "macs_per_unit": [8]}
  >>> print(f"{mac_budget_loss([probs], never_gated_macs=4, budget=0.5, **given):.4f}")
  0.0100
  """
  arguments.number("never_gated_macs", never_gated_macs, ">= 0", holds=lambda v: v >= 0)
  budget = arguments.parameter("budget", budget, "in (0, 1]", holds=lambda v: (v > 0) & (v <= 1))
  records = _as_records(records, gates=gates, macs_per_unit=macs_per_unit)
  records = checked_records(records, "gates", "probs", with_examples=True)
  expected = collectives.batch_mean(expected_macs(records), axis_name)
  executed = collectives.batch_mean(executed_macs(records), axis_name)
  # Probabilities and gates may differ in type.
  expected, executed = one_dtype(expected, executed)
  # The value of `executed`, with the gradient of `expected`.
  mean = expected + lax.stop_gradient(executed - expected)
  fraction = mac_fraction(records, mean, never_gated_macs=never_gated_macs)
  budget = jnp.asarray(budget, fraction.dtype)
  return jnp.square(fraction - budget)


def closed_share(
  records: Layers,
  *,
  gates: Sequence[AnyArray] | None = None,
  axis_name: Hashable | None = None,
  of: Array | None = None,
) -> Array:
  """Computes the fraction of gates that are closed for (nearly) all examples of a batch.

  A gate counts as closed where it is open for < 1 % of the batch, with an open probability of < 0.1
  on average. It applies in training and evaluation alike; watch it in a training loop of your own.

  Args:
    records: of one forward pass, one record, or one `[N, C]` array of probabilities, per layer.
    gates: with arrays, one `[N, C]` array of gates per layer.
    axis_name: as in `batch_shaping_loss`.
    of: `[G]` booleans, the gates that count; all by default.
  Returns:
    a scalar in [0, 1].
  Raises:
    ValueError: no records, records of no example or of several batches, or another number of gates
      in `of`.
    TypeError: `records` is no list of layers, or arrays without `gates`.

  >>> probs, gates = jnp.array([[0.01, 0.9], [0.02, 0.1]]), jnp.array([[0.0, 1.0], [0.0, 0.0]])
  >>> closed_share([probs], gates=[gates])
  Array(0.5, dtype=float32)
  >>> closed_share([GateRecord(logits=probs, probs=probs, gates=gates)])
  Array(0.5, dtype=float32)
  """
  records = _as_records(records, gates=gates)
  records = checked_records(records, "gates", "probs", with_examples=True)
  closed = []
  for record in records:
    # Means over the whole batch: a gate may be closed on one device and open on another.
    rates = collectives.batch_mean(unweighted(record.gates.astype(jnp.float32)), axis_name)
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


def _as_records(layers: Layers, **given: Sequence[Any] | None) -> Records:
  """Returns layers as records, for `checked_records`; arrays are probabilities.

  Args:
    layers: records or arrays.
    given: by the name of a field, its value for each layer; None with records, which have it.
  """
  layers = arguments.items("records", layers, "one GateRecord per gated layer")
  # Without layers, none is the error.
  if not layers:
    return ()
  are_arrays = all(map(is_array, layers))
  for name, values in given.items():
    if are_arrays and values is None:
      raise TypeError(f"{name} must be given with arrays, one for each layer; got None")
    if not are_arrays and values is not None:
      raise TypeError(f"{name} must be None with records, which have their own")
    if values is None:
      continue
    # Costs, one number a layer, may be in an array of their own.
    if getattr(values, "ndim", None) != 1:
      given[name] = values = arguments.items(name, values, "one item per layer")
    if len(values) != len(layers):
      raise ValueError(
        f"{name} must have one item for each of the {len(layers)} layers; got {len(values)}"
      )
  if not are_arrays:
    return layers
  # No penalty reads logits, nor gates or costs that it does not ask for.
  probs = tuple(map(as_float, layers))
  gates, macs = given.get("gates"), given.get("macs_per_unit")
  for i, drawn in enumerate(gates or ()):
    if np.shape(drawn) != probs[i].shape:
      raise ValueError(
        f"gates[{i}] must have the shape of its layer, {probs[i].shape}; got {np.shape(drawn)}"
      )
  records = []
  for i, p in enumerate(probs):
    drawn = p if gates is None else as_float(gates[i])
    cost = 0 if macs is None else macs[i]
    records.append(GateRecord(logits=p, probs=p, gates=drawn, macs_per_unit=cost))
  return tuple(records)


def _checked_layers(name: str, layers: Layers, field: str) -> tuple[Array, ...]:
  """Returns the layers as a tuple of arrays `[N, C]`, which are that field of records.

  They have one floating type of at least 32 bits, for sums over layers.
  """
  layers = arguments.items(name, layers, "one [N, C] array per layer")
  if not layers:
    raise ValueError(f"{name} must hold at least one layer; got none: is the model ungated?")
  layers = tuple(arguments.of_record(layer, field) for layer in layers)
  for i, layer in enumerate(layers):
    arguments.real_array(f"{name}[{i}]", layer)
    if np.ndim(layer) < 2 or np.shape(layer)[0] == 0:
      raise ValueError(f"{name}[{i}] must be [N, C] with N >= 1; got shape {np.shape(layer)}")
  return one_dtype(*map(as_float, layers))
