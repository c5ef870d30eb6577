"""Objectives of gated classifiers: cross-entropy, batch-shaping and a penalty on open gates.

Axes: N examples, C gates of one layer, X exits before the last.
Reference: Bejnordi et al., 2020, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gating_jax.checks import one_of
from gating_jax.config_files import Config
from gating_jax.models.summary import ModelCounts
from gating_jax.ops import collectives, penalties
from gating_jax.ops.ecdf import batch_shaping_loss, noise_floor
from gating_jax.ops.macs import executed_macs, mac_fraction
from gating_jax.ops.priors import Prior, beta
from gating_jax.training import optim
from gating_jax.training.closed_gates import CLOSED
from gating_jax.types import AnyArray, Array, Records

REDUCTIONS = ("layer_mean", "mean", "sum")
# Classes that compete in the cross-entropy: all, or those of an example's own source.
SCOPES = ("all", "source")
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
# Logit of a class that does not compete.
_EXCLUDED = -1e9


class Fit(NamedTuple):
  """The part of an objective that compares outputs with labels.

  Attributes:
    cross_entropy: scalar, the loss before the gates' terms.
    accuracy: scalar.
    further: other metrics, by name.
  """

  cross_entropy: Array
  accuracy: Array
  further: Mapping[str, Array] = MappingProxyType({})


# `(logits, labels, axis_name) -> Fit`; `axis_name` as in `batch_shaping_loss`.
FitLabels = Callable[[Array, Array, Hashable | None], Fit]


def fit_classes(logits: Array, labels: Array, axis_name: Hashable | None = None) -> Fit:
  """Computes the cross-entropy and the accuracy of one class for each example.

  Args:
    logits: `[N, classes]`.
    labels: `[N]` integers.
    axis_name: unused here; for fits whose means weight their examples.
  """
  del axis_name
  # The mean of this device's examples; `value_and_grad_over_devices` averages over devices.
  cross_entropy = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
  return Fit(cross_entropy, jnp.mean(jnp.argmax(logits, -1) == labels))


def logits_of_source(logits: Array, labels: Array, class_sources: np.ndarray) -> Array:
  """Returns logits in which only the classes of an example's own source compete.

  With these, one head over the classes of several sources is a head for each, and the source of an
  example is known: it is that of its label.

  Args:
    logits: `[N, K]`.
    labels: `[N]` integers.
    class_sources: `[K]` number of the source of each class.
  Returns:
    `[N, K]`: the logits, and a very low number for classes of other sources.

  >>> logits_of_source(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([1]), np.array([0, 0, 1])) > 0
  Array([[ True,  True, False]], dtype=bool)
  """
  sources = jnp.asarray(class_sources)
  own = sources == sources[labels][:, None]
  return jnp.where(own, logits, jnp.asarray(_EXCLUDED, logits.dtype))


def fit_sources(
  logits: Array,
  labels: Array,
  axis_name: Hashable | None = None,
  *,
  class_sources: tuple[int, ...],
) -> Fit:
  """Computes `fit_classes` among the classes of each example's own source.

  Args:
    logits, labels, axis_name: as in `fit_classes`.
    class_sources: as in `logits_of_source`.
  """
  own = logits_of_source(logits, labels, np.asarray(class_sources))
  return fit_classes(own, labels, axis_name)


def fit_exits(
  logits: Array,
  labels: Array,
  axis_name: Hashable | None = None,
  *,
  exit_weights: tuple[float, ...],
) -> Fit:
  """Computes the weighted cross-entropies of all exits, and the accuracy of the last.

      CE = sum_x weight_x * CE_x

  The accuracies of the exits before it are further metrics.

  Args:
    logits: `[N, X + 1, classes]`.
    labels: `[N]` integers.
    axis_name: as in `fit_classes`.
    exit_weights: weights of the exits before the last, whose own is 1; one number is for all.
  Raises:
    ValueError: the weights do not fit the number of exits.

  Reference: Teerapittayanon et al., 2016 (BranchyNet), section 3.
  """
  del axis_name
  exits = logits.shape[1] - 1
  if len(exit_weights) not in (1, exits):
    raise ValueError(
      f"exit_weights must hold 1 number, or one for each of {exits} exits before the last; "
      f"got {exit_weights}"
    )
  # The equation above; the last exit, the network itself, has the weight 1.
  weights = jnp.append(jnp.broadcast_to(jnp.asarray(exit_weights), exits), 1.0)
  of_exits = jnp.broadcast_to(labels[:, None], logits.shape[:2])
  cross_entropy = jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, of_exits), axis=0
  )
  right = jnp.argmax(logits[:, -1], -1) == labels
  accuracies = jnp.mean(jnp.argmax(logits, -1) == labels[:, None], axis=0)
  further = {}
  # The accuracy of the last exit is `accuracy`.
  for i, accuracy in enumerate(accuracies[:-1], start=1):
    further[f"exits/accuracy{i}"] = accuracy
  return Fit(jnp.sum(weights * cross_entropy), jnp.mean(right), further)


class Distillation(NamedTuple):
  """Settings of a loss that compares a network's outputs with those of a trained one, its teacher.

  Attributes:
    coefficient: c, in (0, 1]; the labels have the rest.
    temperature: T, > 0.
  """

  coefficient: float
  temperature: float


def distillation_loss(logits: Array, taught: Array, temperature: float) -> Array:
  """Computes the mean divergence of a network's softened predictions from those of its teacher.

      T^2 mean over n of KL(softmax(t_n / T) || softmax(z_n / T))

  T^2 keeps the gradient's scale about the same at all temperatures.

  Args:
    logits: z, `[N, classes]`.
    taught: t, the teacher's, of the same shape; no gradient reaches them.
    temperature: T, > 0.
  Returns:
    a scalar.

  Reference: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.

  >>> logits = jnp.array([[0.0, 2.0]])
  >>> same, other = (distillation_loss(logits, taught, 4.0) for taught in (logits, -logits))
  >>> print(same, round(float(other), 3))
  0.0 1.959
  """
  softened = jax.nn.log_softmax(logits / temperature)
  targets = jax.nn.log_softmax(lax.stop_gradient(taught) / temperature)
  each = optax.losses.kl_divergence_with_log_targets(softened, targets)
  return temperature**2 * jnp.mean(each)


class GatePenalties(NamedTuple):
  """Settings of batch-shaping and sparsity, the same for gates of channels and of segments.

  Attributes:
    prior: the distribution that open probabilities should follow.
    target: fraction in (0, 1] that some kinds of sparsity aim at.
    batch_shaping_coefficient, sparsity_coefficient: gamma_t and rho_t, from step to number.
  """

  prior: Prior
  target: float
  batch_shaping_coefficient: optax.Schedule
  sparsity_coefficient: optax.Schedule

  @classmethod
  def from_config(cls, loss: Config, total_steps: int) -> GatePenalties:
    """Returns the settings in a section of a config with `batch_shaping` and `sparsity`.

    Args:
      loss: the section.
      total_steps: steps of the training, for the schedules.
    Raises:
      ValueError: a field is out of its range.
    """
    shaping, sparsity = loss.batch_shaping, loss.sparsity
    return cls(
      prior=beta(shaping.a, shaping.b),
      target=sparsity.target,
      batch_shaping_coefficient=optim.fade_out(shaping.coefficient, shaping.fade_end, total_steps),
      sparsity_coefficient=optim.fade_in(
        sparsity.coefficient,
        ramp_start=sparsity.ramp_start,
        ramp_end=sparsity.ramp_end,
        total_steps=total_steps,
      ),
    )


def check_budget(name: str, sparsity: Config, counts: ModelCounts) -> None:
  """Raises a ValueError where closing every gate would not meet the budget.

  Args:
    name: of the section in the config, such as `loss.sparsity`.
    sparsity: the section; only the kind `budget` is checked.
    counts: the network, for a training example.
  """
  if sparsity.kind != "budget":
    return
  # `mac_budget_loss` measures the MACs without gate networks, and so does this check: a budget
  # between the two fractions can be met.
  least = counts.never_gated_fraction
  if sparsity.target <= least:
    raise ValueError(
      f"{name}.target must be above {least:.3f}, the fraction of the ungated MACs that always "
      f"runs; got {sparsity.target}"
    )


@dataclasses.dataclass(frozen=True)
class ImageObjective:
  """Training objective of a gated classifier.

      total = CE + gamma_t * batch-shaping + rho_t * sparsity

  or CE with another regulariser, from earlier work, in place of the two terms. With a teacher,
  (1 - c) CE + c * distillation takes the place of CE.

  Attributes:
    prior: the distribution that each gate's open probability should follow over the batch.
    reduction: how the batch-shaping loss is reduced over gates: `layer_mean`, mean over a layer's
      gates and sum over layers; `mean` or `sum` over all gates of the network.
    sparsity: `l0`, mean open probability; `macs`, the same weighted by cost; `budget`, squared gap
      of the MAC fraction to `target`; `target_rate`, squared gap of each gate's rate to `target`.
    target: fraction in (0, 1], for `budget` and `target_rate`.
    batch_shaping_coefficient, sparsity_coefficient: gamma_t and rho_t, from step to number.
    never_gated_macs: MACs per example of everything that is never gated, without gate networks, for
      `budget` and `mac_ratio`.
    regulariser: `batch_shaping`, with sparsity; `sparsity` alone; `entropy`, which asks that gates
      be open for half of the examples; `decision_entropy`, that each be open with probability 1/2;
      `away_from_half`, that probabilities differ from that; `balance`, that examples are spread
      evenly over experts; `none`.
    coefficient: strength of any regulariser but the first two, the same at every step.
    fit: computes CE and the accuracy from outputs and labels.
    distillation: settings of the term of a teacher; None without one.
  """

  prior: Prior
  reduction: str
  sparsity: str
  target: float
  batch_shaping_coefficient: Callable[[Array], Array]
  sparsity_coefficient: Callable[[Array], Array]
  never_gated_macs: int
  regulariser: str = "batch_shaping"
  coefficient: float = 0.0
  fit: FitLabels = fit_classes
  distillation: Distillation | None = None

  @classmethod
  def from_config(
    cls,
    loss: Config,
    gate_penalties: GatePenalties,
    *,
    never_gated_macs: int,
    fit: FitLabels = fit_classes,
    distillation: Distillation | None = None,
  ) -> ImageObjective:
    """Returns the objective that a section of a config describes.

    Args:
      loss: a section with `batch_shaping`, `sparsity` and, where there is a choice, `regulariser`.
      gate_penalties: those of the section.
      never_gated_macs, fit, distillation: as in the class.
    Raises:
      ValueError: a field is out of its range.
    """
    regulariser = loss.get("regulariser", "batch_shaping")
    return cls(
      **gate_penalties._asdict(),
      reduction=loss.batch_shaping.reduction,
      sparsity=loss.sparsity.kind,
      never_gated_macs=never_gated_macs,
      regulariser=regulariser,
      # Each regulariser with one strength has a section of its own name.
      coefficient=loss[regulariser].coefficient if regulariser in loss else 0.0,
      fit=fit,
      distillation=distillation,
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
    taught: Array | None = None,
  ) -> tuple[Array, Mapping[str, Array]]:
    """Computes `(total, terms)`; the terms are before their coefficients.

    Args:
      logits, labels: what `fit` compares; `[N, classes]` and `[N]` integers for `fit_classes`.
      records: records of the same forward pass; `()` for an ungated net, which has the
        cross-entropy alone.
      step: the step of the schedules.
      axis_name: as in `batch_shaping_loss`.
      taught: outputs of the teacher for the same examples, where `distillation` is set.
    """
    cross_entropy, accuracy, further = self.fit(logits, labels, axis_name)
    # Terms are logged without coefficients, so that runs with different ones can be compared.
    terms, fitted = {"cross_entropy": cross_entropy, "accuracy": accuracy}, cross_entropy
    if self.distillation is not None and taught is not None:
      c, temperature = self.distillation
      terms["distillation"] = distillation_loss(logits, taught, temperature)
      fitted = (1 - c) * cross_entropy + c * terms["distillation"]
    regulariser, gate_terms = self.gate_terms(records, step, axis_name)
    return fitted + regulariser, {**terms, **gate_terms, **further}

  def gate_terms(
    self, records: Records, step: Array, axis_name: Hashable | None = None
  ) -> tuple[Array | float, Mapping[str, Array]]:
    """Computes the gates' part of the loss, and its terms before their coefficients.

    Without gates they are 0 and none. With any regulariser the terms include:

    - `mac_ratio`: executed MACs as a fraction of the ungated ones, without gate networks, as
      `budget` counts them; the `mac_ratio` of a test includes the gate networks;
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
    for name, coefficient, term in self._terms(records, per_gate, step, axis_name=axis_name):
      total += coefficient * term
      terms |= {name: term, f"{name}_coefficient": coefficient}
    # The floor depends on the whole batch, N examples on each device.
    examples = records[0].logits.shape[0]
    if axis_name is not None:
      examples *= lax.axis_size(axis_name)
    executed = collectives.batch_mean(executed_macs(records), axis_name)
    return total, {
      **terms,
      "mac_ratio": mac_fraction(records, executed, never_gated_macs=self.never_gated_macs),
      CLOSED: penalties.closed_share(records, axis_name=axis_name),
      "gates/batch_shaping_mean": jnp.mean(per_gate),
      # The expectation of the loss for that many independent draws from the prior.
      "gates/batch_shaping_floor": jnp.asarray(noise_floor(examples)),
    }

  def _terms(
    self, records: Records, per_gate: Array, step: Array, *, axis_name
  ) -> Iterator[tuple[str, Array | float, Array]]:
    """Yields name, coefficient and value of each term of the regulariser.

    Args:
      records: records of one forward pass.
      per_gate: the batch-shaping loss of each gate.
      step: the step of the schedules.
      axis_name: as in `batch_shaping_loss`.
    """
    if self.regulariser == "entropy":
      yield "entropy", self.coefficient, penalties.entropy_loss(records, axis_name=axis_name)
    if self.regulariser == "decision_entropy":
      yield "decision_entropy", self.coefficient, penalties.decision_entropy_loss(records)
    if self.regulariser == "away_from_half":
      yield "away_from_half", self.coefficient, penalties.indecision_loss(records)
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
      return penalties.l0_loss(records)
    if self.sparsity == "macs":
      return penalties.mac_loss(records)
    if self.sparsity == "budget":
      return penalties.mac_budget_loss(
        records,
        never_gated_macs=self.never_gated_macs,
        budget=self.target,
        axis_name=axis_name,
      )
    # The rate counts the gates as drawn, not their probabilities.
    return penalties.target_rate_loss(records, target=self.target, axis_name=axis_name)


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


def weighted_mean(values: AnyArray, weights: Array, axis_name: Hashable | None = None) -> Array:
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
