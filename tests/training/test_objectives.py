import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from gating_jax.ops.priors import beta
from gating_jax.training import objectives
from gating_jax.training.objectives import ImageObjective, fit_exits
from gating_jax.types import GateRecord

N, CLASSES, UNITS = 6, 3, (2, 4)
PER_UNIT, FIXED, TARGET = (100, 30), 500, 0.4
STEP = 7
RANDOM = np.random.default_rng(0)
LOGITS, LABELS = RANDOM.normal(size=(N, CLASSES)).astype(np.float32), np.array([0, 1, 2, 0, 1, 1])
GATE_LOGITS = [RANDOM.normal(0.5, 1, size=(N, units)).astype(np.float32) for units in UNITS]
GATES = [
  (logits + RANDOM.normal(size=logits.shape) > 0).astype(np.float32) for logits in GATE_LOGITS
]
PROBS = [special.expit(logits.astype(np.float64)) for logits in GATE_LOGITS]


def records():
  return tuple(
    GateRecord(jnp.asarray(logits), jnp.asarray(probs, jnp.float32), jnp.asarray(gates), macs)
    for logits, probs, gates, macs in zip(GATE_LOGITS, PROBS, GATES, PER_UNIT, strict=True)
  )


def objective(reduction="layer_mean", sparsity="l0", **regulariser):
  return ImageObjective(
    prior=beta(0.6, 0.4),
    reduction=reduction,
    sparsity=sparsity,
    target=TARGET,
    never_gated_macs=FIXED,
    batch_shaping_coefficient=optax.linear_schedule(0.8, 0.0, 10),
    sparsity_coefficient=optax.linear_schedule(0.0, 2.0, 10),
    **regulariser,
  )


def cross_entropy_by_hand():
  return -np.mean(special.log_softmax(LOGITS.astype(np.float64), axis=-1)[np.arange(N), LABELS])


def shaping_by_hand(reduction):
  level = np.arange(1, N + 1)[:, None] / (N + 1)
  layers = [
    np.mean((stats.beta(0.6, 0.4).cdf(np.sort(probs, axis=0)) - level) ** 2, axis=0)
    for probs in PROBS
  ]
  return {
    "layer_mean": sum(layer.mean() for layer in layers),
    "mean": np.concatenate(layers).mean(),
    "sum": np.concatenate(layers).sum(),
  }[reduction]


def watched_by_hand():
  macs = FIXED + 100 * GATES[0].sum(axis=1) + 30 * GATES[1].sum(axis=1)
  return {
    "mac_ratio": macs.mean() / (FIXED + 2 * 100 + 4 * 30),
    "gates/batch_shaping_mean": shaping_by_hand("mean"),
    "gates/closed": 0.0,
    "gates/batch_shaping_floor": 1 / (6 * (N + 1)),
  }


def sparsity_by_hand(kind):
  open_probs = [probs.mean(axis=0).sum() for probs in PROBS]
  rates = np.concatenate([gates.mean(axis=0) for gates in GATES])
  gated = 2 * 100 + 4 * 30
  expected = 100 * open_probs[0] + 30 * open_probs[1]
  return {
    "l0": sum(open_probs) / 6,
    "macs": expected / gated,
    "budget": (watched_by_hand()["mac_ratio"] - TARGET) ** 2,
    "target_rate": np.sum((rates - TARGET) ** 2),
  }[kind]


@pytest.mark.thin(2)
@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
@pytest.mark.parametrize("sparsity", objectives.SPARSITIES)
def test_total_is_cross_entropy_and_weighted_terms(reduction, sparsity):
  total, terms = objective(reduction, sparsity)(LOGITS, LABELS, records(), jnp.int32(STEP))
  cross_entropy, shaping, price = (
    cross_entropy_by_hand(),
    shaping_by_hand(reduction),
    sparsity_by_hand(sparsity),
  )
  assert shaping > 0.01
  assert price > 0.01
  expected = {
    "cross_entropy": cross_entropy,
    "accuracy": np.mean(LOGITS.argmax(-1) == LABELS),
    "batch_shaping": shaping,
    sparsity: price,
    "batch_shaping_coefficient": 0.24,
    f"{sparsity}_coefficient": 1.4,
    **watched_by_hand(),
  }
  assert terms.keys() == expected.keys()
  for name, value in expected.items():
    assert float(terms[name]) == pytest.approx(value, rel=2e-5), name
  assert float(total) == pytest.approx(cross_entropy + 0.24 * shaping + 1.4 * price, rel=2e-5)


def test_reductions_and_kinds_differ_from_each_other():
  assert len({round(shaping_by_hand(reduction), 4) for reduction in objectives.REDUCTIONS}) == 3
  assert len({round(sparsity_by_hand(kind), 4) for kind in objectives.SPARSITIES}) == 4


def entropy_by_hand():
  means = np.concatenate([probs.mean(axis=0) for probs in PROBS])
  return np.mean([1 - stats.entropy([p, 1 - p], base=2) for p in means])


def balance_by_hand():
  layers = zip(GATES, PROBS, strict=True)
  return sum(
    probs.shape[1] * np.sum(gates.mean(axis=0) / gates.mean(axis=0).sum() * probs.mean(axis=0))
    for gates, probs in layers
  )


@pytest.mark.parametrize(
  ("regulariser", "values"),
  [
    ("none", {}),
    ("sparsity", {"l0": (1.4, sparsity_by_hand("l0"))}),
    ("entropy", {"entropy": (0.3, entropy_by_hand())}),
    (
      "decision_entropy",
      {
        "decision_entropy": (
          0.3,
          np.mean([1 - stats.entropy([p, 1 - p], base=2) for p in np.hstack(PROBS).ravel()]),
        )
      },
    ),
    ("balance", {"balance": (0.3, balance_by_hand())}),
    (
      "away_from_half",
      {"away_from_half": (0.3, np.mean(4 * np.hstack(PROBS) * (1 - np.hstack(PROBS))))},
    ),
  ],
)
def test_other_regularisers_stand_alone(regulariser, values):
  total, terms = objective(regulariser=regulariser, coefficient=0.3)(
    LOGITS, LABELS, records(), jnp.int32(STEP)
  )
  watched = watched_by_hand()
  assert set(terms) == {
    "cross_entropy",
    "accuracy",
    *values,
    *(f"{name}_coefficient" for name in values),
    *watched,
  }
  for name, value in watched.items():
    assert float(terms[name]) == pytest.approx(value, rel=2e-5)
  for name, (coefficient, value) in values.items():
    assert value > 0.01
    assert float(terms[name]) == pytest.approx(value, rel=2e-5)
    assert float(terms[f"{name}_coefficient"]) == pytest.approx(coefficient)
  added = sum(coefficient * value for coefficient, value in values.values())
  assert float(total) == pytest.approx(cross_entropy_by_hand() + added, rel=2e-5)


def test_what_is_watched_is_over_all_devices():
  shared = lambda local: objective().gate_terms(local, jnp.int32(STEP), "devices")[1]
  spread = jax.tree.map(lambda x: x.reshape(2, N // 2, -1), records())
  terms = jax.pmap(shared, axis_name="devices", devices=jax.devices()[:2])(spread)
  ratios = [
    (FIXED + 100 * a.sum() / 3 + 30 * b.sum() / 3) / 820
    for a, b in zip(*(np.split(g, 2) for g in GATES), strict=True)
  ]
  assert abs(ratios[0] - ratios[1]) > 0.01
  for name, value in watched_by_hand().items():
    np.testing.assert_allclose(terms[name], [value] * 2, rtol=2e-5)


@pytest.mark.slow
def test_the_floor_is_the_mean_for_draws_from_the_prior():
  logits = special.logit(
    np.random.default_rng(3).beta(0.6, 0.4, (32, 4000)).clip(1e-6, 1 - 1e-6)
  ).astype(np.float32)
  drawn = (
    GateRecord(jnp.asarray(logits), jnp.asarray(special.expit(logits)), jnp.asarray(logits > 0), 1),
  )
  _, terms = objective(regulariser="none").gate_terms(drawn, jnp.int32(STEP))
  assert float(terms["gates/batch_shaping_floor"]) == pytest.approx(1 / 198)
  assert float(terms["gates/batch_shaping_mean"]) == pytest.approx(1 / 198, rel=0.05)


@pytest.mark.parametrize(("step", "gamma", "rho"), [(0, 0.8, 0.0), (10, 0.0, 2.0), (100, 0.0, 2.0)])
def test_coefficients_follow_the_step(step, gamma, rho):
  total, terms = objective()(LOGITS, LABELS, records(), jnp.int32(step))
  assert float(terms["batch_shaping_coefficient"]) == pytest.approx(gamma, abs=1e-7)
  assert float(terms["l0_coefficient"]) == pytest.approx(rho)
  by_hand = (
    cross_entropy_by_hand() + gamma * shaping_by_hand("layer_mean") + rho * sparsity_by_hand("l0")
  )
  assert float(total) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.thin(6)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.75])
@pytest.mark.parametrize(("gain", "bias"), [(0.05, 3.0), (-0.05, -3.0)])
def test_gates_that_would_rather_be_open_or_closed_end_at_the_budget(gain, bias, budget):
  budgeted = ImageObjective(
    prior=beta(0.6, 0.4),
    reduction="mean",
    sparsity="budget",
    target=budget,
    never_gated_macs=32,
    regulariser="sparsity",
    batch_shaping_coefficient=optax.constant_schedule(0.0),
    sparsity_coefficient=optax.constant_schedule(50.0),
  )
  seen, optimiser = np.random.default_rng(1).normal(size=(2, 256, 1)), optax.adam(0.05)

  def gated(biases):
    logits = [4 * x + bias for x, bias in zip(seen, biases, strict=True)]
    return tuple(
      GateRecord(z, jax.nn.sigmoid(z), jnp.where(z > 0, 1.0, 0.0), macs)
      for z, macs in zip(logits, PER_UNIT, strict=True)
    )

  def loss(biases):
    records = gated(biases)
    return budgeted.gate_terms(records, 0)[0] - gain * sum(jnp.mean(r.probs) for r in records)

  def step(carry, _):
    biases, moments = carry
    updates, moments = optimiser.update(jax.grad(loss)(biases), moments)
    return (optax.apply_updates(biases, updates), moments), None

  start = [jnp.full(units, bias) for units in UNITS]
  (biases, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=600)
  share = lambda biases: float(budgeted.gate_terms(gated(biases), 0)[1]["mac_ratio"])
  assert share(start) > 0.77 if gain > 0 else share(start) < 0.29
  assert share(biases) == pytest.approx(budget, abs=0.02)


def test_an_ungated_net_has_the_cross_entropy_alone():
  total, terms = objective()(LOGITS, LABELS, (), jnp.int32(STEP))
  assert set(terms) == {"cross_entropy", "accuracy"}
  assert (
    float(total)
    == float(terms["cross_entropy"])
    == pytest.approx(cross_entropy_by_hand(), rel=1e-5)
  )


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      dict(reduction="layer-mean"),
      "reduction must be one of .*; got 'layer-mean'. Did you mean 'layer_mean'",
    ),
    (
      dict(sparsity="buget"),
      "sparsity must be one of budget, l0, macs, target_rate; .* Did you mean 'budget'",
    ),
    (dict(regulariser="l0"), "regulariser must be one of .*; got 'l0'"),
    (dict(sparsity="entropy"), "sparsity must be one of .*; got 'entropy'$"),
  ],
)
def test_wrong_names_are_refused_with_near_matches(settings, message):
  with pytest.raises(ValueError, match=message):
    objective(**settings)


@pytest.mark.thin(2)
@pytest.mark.parametrize("weights", [(0.25,), (0.25, 2.0)])
def test_all_exits_are_fitted_at_once_with_their_weights(weights):
  answers = RANDOM.normal(size=(N, 3, CLASSES)).astype(np.float32)
  plain = objective(regulariser="none")
  fitted = dataclasses.replace(plain, fit=functools.partial(fit_exits, exit_weights=weights))
  each = [plain(answers[:, i], LABELS, (), STEP)[1] for i in range(3)]
  total, terms = fitted(answers, LABELS, records(), STEP)
  expected = [float(e["cross_entropy"]) for e in each] @ np.array([weights[0], weights[-1], 1.0])
  assert float(total) == pytest.approx(expected, rel=1e-6)
  assert terms["accuracy"] == each[2]["accuracy"]
  assert [terms["exits/accuracy1"], terms["exits/accuracy2"]] == [e["accuracy"] for e in each[:2]]
  assert float(terms["mac_ratio"]) == pytest.approx(watched_by_hand()["mac_ratio"], rel=1e-6)
  with pytest.raises(
    ValueError, match="exit_weights must hold 1 number, or one for each of 1 exits before the last"
  ):
    fit_exits(answers[:, 1:], LABELS, exit_weights=(1.0, 1.0))


def test_a_teacher_shares_the_loss_with_the_labels():
  taught = RANDOM.normal(size=LOGITS.shape).astype(np.float32)
  with_teacher = objective(distillation=objectives.Distillation(0.3, 2.0))
  total, terms = jax.jit(with_teacher)(LOGITS, LABELS, (), STEP, taught=taught)
  target, softened = (special.log_softmax(z.astype(np.float64) / 2, -1) for z in (taught, LOGITS))
  divergence = 4 * np.mean(np.sum(np.exp(target) * (target - softened), axis=-1))
  assert float(terms["distillation"]) == pytest.approx(divergence, rel=1e-5)
  expected = 0.7 * cross_entropy_by_hand() + 0.3 * divergence
  assert float(total) == pytest.approx(expected, rel=1e-5)
  assert float(terms["cross_entropy"]) == pytest.approx(cross_entropy_by_hand(), rel=1e-5)
