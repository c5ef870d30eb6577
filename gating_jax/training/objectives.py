"""Objectives of gated classifiers: cross-entropy, batch-shaping and a penalty on open gates.

Axes: N examples, C gates of one layer.
Reference: Bejnordi et al., 2020, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

from gating_jax.checks import one_of
from gating_jax.ops import collectives, penalties
from gating_jax.ops.closed_share import closed_share
from gating_jax.ops.ecdf import batch_shaping_loss, noise_floor
from gating_jax.ops.macs import executed_macs, gated_macs
from gating_jax.ops.priors import Prior, beta
from gating_jax.training import optim
from gating_jax.training.closed_gates import CLOSED
from gating_jax.types import Array, Records

REDUCTIONS = ("layer_mean", "mean", "sum")
SPARSITIES = ("l0", "macs", "budget", "target_rate")
# Regularisers with a sparsity term.
WITH_SPARSITY = ("batch_shaping", "sparsity")
REGULARISERS = (
  "batch_shaping",
  "sparsity",
  "entropy",
  "decision_entropy",
  "away_from_half",
  "balance",
  "none",
)


@dataclasses.dataclass(frozen=True)
class ImageObjective:
  """Training objective of a gated classifier.

      total = CE + gamma_t * batch-shaping + rho_t * sparsity

  or CE with another regulariser, from earlier work, in place of the two terms.

  Attributes:
    prior: the distribution that each gate's open probability should follow over the batch.
    reduction: how the batch-shaping loss is reduced over gates: `layer_mean`, mean over a layer's
      gates and sum over layers; `mean` or `sum` over all gates of the network.
    sparsity: `l0`, mean open probability; `macs`, the same weighted by cost; `budget`, squared gap
      of the MAC fraction to `target`; `target_rate`, squared gap of each gate's rate to `target`.
    target: fraction in (0, 1], for `budget` and `target_rate`.
    batch_shaping_coefficient, sparsity_coefficient: gamma_t and rho_t, from step to number.
    never_gated_macs: MACs per example of everything that is never gated, without gate networks, for
      `budget`; set once the network is counted.
    regulariser: `batch_shaping`, with sparsity; `sparsity` alone; `entropy`, which asks that gates
      be open for half of the examples; `decision_entropy`, that each be open with probability 1/2;
      `away_from_half`, that probabilities differ from that; `balance`, that examples are spread
      evenly over experts; `none`.
    coefficient: strength of any regulariser but the first two, the same at every step.
  """

  prior: Prior
  reduction: str
  sparsity: str
  target: float
  batch_shaping_coefficient: Callable[[Array], Array]
  sparsity_coefficient: Callable[[Array], Array]
  never_gated_macs: int = 0
  regulariser: str = "batch_shaping"
  coefficient: float = 0.0

  @classmethod
  def from_config(
    cls, loss: ml_collections.ConfigDict, total_steps: int, **fields: Any
  ) -> ImageObjective:
    """Returns the objective that a section of a config describes.

    Args:
      loss: a section with `batch_shaping`, `sparsity` and, where there is a choice, `regulariser`.
      total_steps: steps of the training, for the schedules.
      fields: further fields of the objective.
    Raises:
      ValueError: a field is out of its range.
    """
    shaping, sparsity = loss.batch_shaping, loss.sparsity
    regulariser = loss.get("regulariser", "batch_shaping")
    return cls(
      prior=beta(shaping.a, shaping.b),
      reduction=shaping.reduction,
      sparsity=sparsity.kind,
      target=sparsity.target,
      batch_shaping_coefficient=optim.fade_out(shaping.coefficient, shaping.fade_end, total_steps),
      sparsity_coefficient=optim.fade_in(
        sparsity.coefficient,
        ramp_start=sparsity.ramp_start,
        ramp_end=sparsity.ramp_end,
        total_steps=total_steps,
      ),
      regulariser=regulariser,
      # Each regulariser with one strength has a section of its own name.
      coefficient=loss[regulariser].coefficient if regulariser in loss else 0.0,
      **fields,
    )

  def __post_init__(self):
    one_of("reduction", self.reduction, REDUCTIONS)
    one_of("sparsity", self.sparsity, SPARSITIES)
    one_of("regulariser", self.regulariser, REGULARISERS)

  def __call__(
    self,
    logits: Array,
    labels: Array,
    records: Records,
    step: Array,
    axis_name: Hashable | None = None,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Computes `(total, terms)`; the terms are before their coefficients.

    Args:
      logits: `[N, classes]`.
      labels: `[N]` integers.
      records: records of the same forward pass; `()` for an ungated net, which has the
        cross-entropy alone.
      step: the step of the schedules.
      axis_name: as in `batch_shaping_loss`.
    """
    cross_entropy, accuracy = self.fit(logits, labels, axis_name)
    # Terms are logged without coefficients, so that runs with different ones can be compared.
    terms = {"cross_entropy": cross_entropy, "accuracy": accuracy}
    regulariser, gate_terms = self.gate_terms(records, step, axis_name)
    return cross_entropy + regulariser, {**terms, **gate_terms}

  def fit(
    self, logits: Array, labels: Array, axis_name: Hashable | None = None
  ) -> tuple[Array, Array]:
    """Computes the cross-entropy, the loss before the gates' terms, and the accuracy.

    Args:
      logits: `[N, classes]`.
      labels: `[N]` integers.
      axis_name: unused here; for objectives whose means weight their examples.
    """
    # The mean of this device's examples; `value_and_grad_over_devices` averages over devices.
    cross_entropy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    return cross_entropy, jnp.mean(jnp.argmax(logits, -1) == labels)

  def gate_terms(
    self, records: Records, step: Array, axis_name: Hashable | None = None
  ) -> tuple[Array | float, Mapping[str, Array]]:
    """Computes the gates' part of the loss, and its terms before their coefficients.

    Without gates they are 0 and none. With any regulariser the terms include:

    - `mac_ratio`: executed MACs as a fraction of the ungated ones, without gate networks;
    - `gates/closed`: see `closed_share`;
    - `gates/batch_shaping_mean`: the batch-shaping loss, mean over all gates;
    - `gates/batch_shaping_floor`: its expectation for independent draws from the prior.

    Args:
      records: records of one forward pass.
      step: the step of the schedules.
      axis_name: as in `batch_shaping_loss`.
    """
    if not records:
      return 0.0, {}
    total, terms, per_gate = 0.0, {}, _shaping_per_gate(records, self.prior, axis_name)
    # Equation of the class: the sum of the terms times their coefficients gamma_t, rho_t.
    for name, coefficient, term in self._terms(records, per_gate, step, axis_name):
      total += coefficient * term
      terms |= {name: term, f"{name}_coefficient": coefficient}
    # The floor depends on the whole batch, N examples on each device.
    examples = records[0].logits.shape[0]
    if axis_name is not None:
      examples *= lax.axis_size(axis_name)
    # In floats: MACs of a large network exceed int32.
    executed = collectives.batch_mean(executed_macs(records), axis_name)
    macs = float(self.never_gated_macs) + executed
    return total, {
      **terms,
      "mac_ratio": macs / float(self.never_gated_macs + gated_macs(records)),
      CLOSED: closed_share(records, axis_name=axis_name),
      "gates/batch_shaping_mean": jnp.mean(per_gate),
      # The expectation of the loss for that many independent draws from the prior.
      "gates/batch_shaping_floor": jnp.asarray(noise_floor(examples)),
    }

  def _terms(
    self, records: Records, per_gate: Array, step: Array, axis_name
  ) -> Iterator[tuple[str, Array | float, Array]]:
    """Yields name, coefficient and value of each term of the regulariser.

    Args:
      records: records of one forward pass.
      per_gate: the batch-shaping loss of each gate.
      step: the step of the schedules.
      axis_name: as in `batch_shaping_loss`.
    """
    probs = [r.probs for r in records]
    if self.regulariser == "entropy":
      yield "entropy", self.coefficient, penalties.entropy_loss(probs, axis_name=axis_name)
    if self.regulariser == "decision_entropy":
      yield "decision_entropy", self.coefficient, penalties.decision_entropy_loss(probs)
    if self.regulariser == "away_from_half":
      yield "away_from_half", self.coefficient, penalties.indecision_loss(probs)
    if self.regulariser == "balance":
      yield "balance", self.coefficient, penalties.balance_loss(records, axis_name=axis_name)
    if self.regulariser == "batch_shaping":
      yield (
        "batch_shaping",
        self.batch_shaping_coefficient(step),
        _reduced(per_gate, records, self.reduction),
      )
    # rho_t * sparsity, with batch-shaping or alone.
    if self.regulariser in WITH_SPARSITY:
      yield self.sparsity, self.sparsity_coefficient(step), self._sparsity_term(records, axis_name)

  @property
  def has_budget(self) -> bool:
    """Returns whether `target` is a budget."""
    return self.sparsity == "budget" and self.regulariser in WITH_SPARSITY

  def _sparsity_term(self, records: Records, axis_name) -> Array:
    if self.sparsity == "l0":
      return penalties.l0_loss([r.probs for r in records])
    if self.sparsity == "macs":
      return penalties.mac_loss(records)
    if self.sparsity == "budget":
      return penalties.mac_budget_loss(
        records, self.never_gated_macs, self.target, axis_name=axis_name
      )
    # The rate counts the gates as drawn, not their probabilities.
    return penalties.target_rate_loss([r.gates for r in records], self.target, axis_name=axis_name)


@dataclasses.dataclass(frozen=True)
class ExitObjective(ImageObjective):
  """`ImageObjective` of the logits of all exits, `[N, X + 1, classes]`.

      CE = sum_x weight_x * CE_x

  Attributes:
    exit_weights: weights of the exits before the last, whose own is 1; one number is for all.

  Reference: Teerapittayanon et al., 2016 (BranchyNet), section 3.
  """

  exit_weights: tuple[float, ...] = (1.0,)

  @classmethod
  def from_config(
    cls, loss: ml_collections.ConfigDict, total_steps: int, **fields: Any
  ) -> ExitObjective:
    """Returns the objective that a section of a config describes, as `ImageObjective` does.

    Args:
      loss: as in `ImageObjective.from_config`, with `exit_weights`.
      total_steps, fields: as in `ImageObjective.from_config`.
    """
    return super().from_config(loss, total_steps, exit_weights=loss.exit_weights, **fields)

  def __call__(
    self,
    logits: Array,
    labels: Array,
    records: Records,
    step: Array,
    axis_name: Hashable | None = None,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Computes `(total, terms)`, with the accuracy of each exit before the last.

    Args:
      logits: `[N, X + 1, classes]`.
      labels, records, step, axis_name: as in `ImageObjective`.
    """
    total, terms = super().__call__(logits, labels, records, step, axis_name)
    accuracies = jnp.mean(jnp.argmax(logits, -1) == labels[:, None], axis=0)
    of_exits = {}
    # The accuracy of the last exit is `accuracy`.
    for i, accuracy in enumerate(accuracies[:-1], start=1):
      of_exits[f"exits/accuracy{i}"] = accuracy
    return total, {**terms, **of_exits}

  def fit(
    self, logits: Array, labels: Array, axis_name: Hashable | None = None
  ) -> tuple[Array, Array]:
    """Computes the weighted sum of cross-entropies, and the accuracy of the last exit.

    Args:
      logits: `[N, X + 1, classes]`.
      labels: `[N]` integers.
      axis_name: as in `ImageObjective.fit`.
    Raises:
      ValueError: the weights do not fit the number of exits.
    """
    exits = logits.shape[1] - 1
    if len(self.exit_weights) not in (1, exits):
      raise ValueError(
        f"exit_weights must hold 1 number, or one for each of {exits} exits before the last; "
        f"got {self.exit_weights}"
      )
    # Equation of the class; the last exit, the network itself, has the weight 1.
    weights = jnp.append(jnp.broadcast_to(jnp.asarray(self.exit_weights), exits), 1.0)
    labels = jnp.broadcast_to(labels[:, None], logits.shape[:2])
    cross_entropy = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, labels), axis=0
    )
    right = jnp.argmax(logits[:, -1], -1) == labels[:, -1]
    return jnp.sum(weights * cross_entropy), jnp.mean(right)


def batch_shaping_term(
  records: Records,
  prior: Prior,
  reduction: str = "layer_mean",
  *,
  axis_name: Hashable | None = None,
) -> Array:
  """Computes the batch-shaping loss of every gate of a network, reduced to a scalar.

  One sort serves all layers together.

  Args:
    records: records of one forward pass, each with `[N, C]` logits.
    prior: the distribution of each gate's open probability over the batch.
    reduction: as in `ImageObjective`.
    axis_name: as in `batch_shaping_loss`.
  Returns:
    a scalar.
  """
  return _reduced(_shaping_per_gate(records, prior, axis_name), records, reduction)


def _shaping_per_gate(records: Records, prior: Prior, axis_name: Hashable | None) -> Array:
  logits = jnp.concatenate([record.logits for record in records], axis=-1)
  return batch_shaping_loss(logits, prior, axis_name=axis_name)


def _reduced(per_gate: Array, records: Records, reduction: str) -> Array:
  if reduction == "sum":
    return jnp.sum(per_gate)
  if reduction == "mean":
    return jnp.mean(per_gate)
  # layer_mean: every gate weighs 1 / C of its own layer.
  weights = []
  for record in records:
    gates = record.logits.shape[-1]
    weights.append(jnp.full(gates, 1 / gates))
  return jnp.sum(per_gate * jnp.concatenate(weights))


def weighted_mean(values: Array, weights: Array, axis_name: Hashable | None = None) -> Array:
  """Computes the weighted mean over the whole batch, on one device or over those of `axis_name`.

  It is 0 where nothing has weight.

  Args:
    values: values of any shape.
    weights: weights of the same shape.
    axis_name: as in `batch_shaping_loss`.

  >>> weighted_mean(jnp.array([1.0, 3.0, 8.0]), jnp.array([1.0, 1.0, 0.0]))
  Array(2., dtype=float32)
  """
  # Numerator and denominator are means over all devices: their weights may differ in number.
  total = collectives.batch_mean(weights.ravel(), axis_name)
  weighted = collectives.batch_mean((values * weights).ravel(), axis_name)
  return weighted / jnp.where(total > 0, total, 1)
