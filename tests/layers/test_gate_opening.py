"""Gates that are normalised, opened by a quantile, weighted or assigned; and scales."""

import dataclasses
import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.layers.gate import (
  GATE_RNG,
  NOISE,
  SHUT,
  ChannelGate,
  GatedChannels,
  GateSettings,
  gate_controls,
  shift_thresholds,
)
from gating_jax.ops.macs import executed_macs
from gating_jax.ops.penalties import closed_share, target_rate_loss, unweighted
from gating_jax.ops.quantiles import open_threshold

AXIS = "devices"
QUANTILE = dict(noise_scale=0.0, threshold="quantile", share=0.3)
RECIPE = GateSettings(hidden=4, normalise=2.0, weighted=True, **QUANTILE)
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2, 2, 5)), jnp.float32)


def gate(settings=RECIPE, axis_name=None):
  return ChannelGate((GatedChannels(3, 10), GatedChannels(5, 20, 7)), settings, axis_name)


def init(module, x=X):
  keys = {"params": jax.random.key(0), GATE_RNG: jax.random.key(1)}
  return module.init(keys, x)


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(module, variables, x, controls, train):
  return module.apply(
    {**variables, NOISE: controls},
    x,
    train=train,
    rngs={GATE_RNG: jax.random.key(7)},
    mutable=["batch_stats"],
  )


def train(module, variables, x=X, controls=None):
  return run(module, variables, x, controls or {}, True)


def joined(records, name):
  return np.concatenate([getattr(record, name) for record in records], axis=-1)


def test_a_quantile_opens_its_share_of_a_layer_in_every_batch():
  module = gate(GateSettings(hidden=4, **QUANTILE))
  records, _ = train(module, init(module))
  gates, logits = joined(records, "gates"), joined(records, "logits")
  assert set(np.unique(gates)) == {0.0, 1.0}
  assert gates.sum() == round(0.3 * gates.size)
  np.testing.assert_array_equal(gates, logits > 0)
  np.testing.assert_allclose(joined(records, "probs"), special.expit(logits), rtol=1e-5)


def test_logits_are_those_of_zero_thresholds_less_the_threshold():
  plain, shifted = (
    gate(GateSettings(hidden=4, **fields)) for fields in ({"noise_scale": 0.0}, QUANTILE)
  )
  variables = init(shifted)
  before = joined(train(plain, {"params": variables["params"]})[0], "logits")
  after = joined(train(shifted, variables)[0], "logits")
  np.testing.assert_allclose(before - after, open_threshold(before, share=0.3), rtol=1e-6)


def test_evaluation_uses_a_running_mean_of_thresholds():
  module = gate()
  variables = init(module)
  assert variables["batch_stats"]["threshold"] == 0
  _, updated = train(module, variables)
  once = updated["batch_stats"]["threshold"]
  _, updated = train(module, {**variables, **updated})
  np.testing.assert_allclose(updated["batch_stats"]["threshold"], 1.9 * once, rtol=1e-5)
  after = {**variables, **updated}
  zero = {**after, "batch_stats": {**after["batch_stats"], "threshold": jnp.float32(0)}}
  moved = joined(module.apply(zero, X), "logits") - joined(module.apply(after, X), "logits")
  np.testing.assert_allclose(moved, 1.9 * once, rtol=1e-4)


def test_normalised_logits_have_the_scale_as_their_deviation():
  module = gate(GateSettings(hidden=4, normalise=3.0, noise_scale=0.0))
  variables = init(module)
  flat = flax.traverse_util.flatten_dict(variables)
  flat["params", "head", "logits", "kernel"] *= np.linspace(1, 50, 8, dtype=np.float32)[None]
  logits = joined(train(module, flax.traverse_util.unflatten_dict(flat))[0], "logits")
  np.testing.assert_allclose(logits.mean(0), 0, atol=1e-4)
  np.testing.assert_allclose(logits.std(0), 3, rtol=1e-3)


def test_an_open_gate_has_its_weight_and_a_closed_one_is_zero():
  records, _ = train(gate(), init(gate()))
  gates, logits = joined(records, "gates"), joined(records, "logits")
  is_open = logits > 0
  assert 0 < is_open.mean() < 1
  assert (gates[~is_open] == 0).all()
  np.testing.assert_allclose(gates[is_open], 2 * special.expit(logits[is_open]), rtol=1e-6)
  assert gates[is_open].min() >= 1
  np.testing.assert_array_equal(
    executed_macs(records),
    10 * is_open[:, :3].sum(1) + (20 + 7 * is_open[:, :3].sum(1)) * is_open[:, 3:].sum(1),
  )


def test_the_gradient_through_the_weight_is_exact_where_a_gate_is_open():
  settings = GateSettings(weighted=True, noise_scale=0.0, temperature=0.5, context="none")
  module = ChannelGate((GatedChannels(2, 1),), settings)
  logits = jnp.array([1.5, -1.5])
  of = lambda z: jnp.sum(train(module, {"params": {"logits": z}}, X[:1])[0][0].gates)
  p, hard = special.expit(logits), special.expit(np.asarray(logits) / 0.5)
  decision = hard * (1 - hard) / 0.5 * 2 * p
  weight = np.array([1, 0]) * 2 * p * (1 - p)
  np.testing.assert_allclose(jax.grad(of)(logits), decision + weight, rtol=1e-5)


def test_penalties_count_an_open_weighted_gate_once():
  records, _ = train(gate(), init(gate()))
  gates = joined(records, "gates")
  np.testing.assert_array_equal(unweighted(gates), gates > 0)
  rates = np.mean(gates > 0, axis=0)
  np.testing.assert_allclose(
    target_rate_loss([gates], target=0.3), np.sum((rates - 0.3) ** 2), rtol=1e-5
  )
  assert closed_share(records) <= 1 / 8


def test_the_share_of_a_pass_comes_from_its_collection():
  class Net(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, train=False):
      return ChannelGate((GatedChannels(8, 1),), RECIPE, name="gate")(x, train)

  variables = init(Net())
  for share, count in ((1.0, 128), (0.5, 64), (0.3, 38)):
    controls = gate_controls(variables["params"], share=jnp.float32(share))
    assert jax.tree.structure(controls) == jax.tree.structure({"gate": {"share": 0}})
    records, _ = train(Net(), variables, controls=controls)
    assert (records[0].gates > 0).sum() == count
  both = gate_controls(variables["params"], noise_scale=0.5, share=0.25)
  assert both == {"gate": {"scale": 0.5, "share": 0.25}}


def test_gates_that_are_shut_stay_so_and_leave_the_share_to_the_others():
  module = gate()
  flat = flax.traverse_util.flatten_dict(init(module))
  shut = np.arange(8) < 4
  flat["params", "head", "logits", "kernel"] = jnp.where(
    shut, 0, flat["params", "head", "logits", "kernel"]
  )
  flat["params", "head", "logits", "bias"] = jnp.where(shut, SHUT, 0.0)
  variables = flax.traverse_util.unflatten_dict(flat)
  records, updated = train(module, variables)
  for found in (records, module.apply({**variables, **updated}, 1e3 * X)):
    assert (joined(found, "gates")[:, shut] == 0).all()
  assert (joined(records, "gates") > 0).sum() == round(0.3 * 4 * 16)
  loss = lambda params: sum(
    jnp.sum(r.gates) for r in train(module, {**variables, "params": params})[0]
  )
  slope = jax.grad(loss)(variables["params"])["head"]["logits"]["bias"]
  np.testing.assert_array_equal(slope[shut], 0)


def test_eight_devices_open_the_gates_of_one():
  variables = init(gate())
  records, statistics = train(gate(), variables)
  spread = jax.pmap(lambda x: train(gate(axis_name=AXIS), variables, x), axis_name=AXIS)
  on_eight, of_eight = spread(X.reshape(8, 2, *X.shape[1:]))
  for record, one in zip(on_eight, records, strict=True):
    np.testing.assert_allclose(record.gates.reshape(one.gates.shape), one.gates, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[3], b, rtol=1e-4, atol=1e-6), of_eight, statistics
  )


def test_gates_of_bfloat16_features_are_float32():
  records, _ = train(gate(), init(gate()), X.astype(jnp.bfloat16))
  assert {record.gates.dtype for record in records} == {jnp.dtype("float32")}


def test_a_nan_is_not_hidden_by_the_threshold():
  variables = init(gate())
  spoilt = X.at[3, 0, 0, 0].set(jnp.nan)
  records, updated = train(gate(), variables, spoilt)
  assert np.isnan(joined(records, "logits")).all()
  assert np.isnan(updated["batch_stats"]["threshold"])
  evaluated = gate().apply(variables, spoilt)
  assert np.isnan(joined(evaluated, "logits")[3]).all()
  assert np.isfinite(np.delete(joined(evaluated, "logits"), 3, axis=0)).all()


def test_a_shift_of_the_thresholds_opens_or_closes_gates_and_changes_nothing_else():
  module = gate()
  variables = init(module)
  # Until the running statistics are those of the batch.
  for _ in range(40):
    variables = {**variables, **train(module, variables)[1]}
  gated = lambda v: {"params": {"gate": v["params"]}, "batch_stats": {"gate": v["batch_stats"]}}
  trained, rates = joined(module.apply(variables, X), "logits"), []
  for shift in (-1.0, 0.0, 1.0):
    moved = shift_thresholds(gated(variables), shift=shift)
    own = {name: tree["gate"] for name, tree in moved.items()}
    jax.tree.map(np.testing.assert_array_equal, own["params"], variables["params"])
    records = module.apply(own, X)
    gates, logits = joined(records, "gates"), joined(records, "logits")
    np.testing.assert_allclose(logits, trained - shift, rtol=1e-5, atol=1e-5)
    # The weight is that of training, whatever is open.
    np.testing.assert_allclose(gates, (logits > 0) * 2 * special.expit(trained), rtol=1e-5)
    rates.append(np.mean(gates > 0))
    twice = shift_thresholds(shift_thresholds(gated(variables), shift=shift), shift=0.5)
    assert twice["batch_stats"]["gate"]["shift"] == shift + 0.5
    # Training takes no notice, and keeps it.
    kept = train(module, own)[1]["batch_stats"]
    assert kept.pop("shift") == shift
    jax.tree.map(np.testing.assert_array_equal, kept, train(module, variables)[1]["batch_stats"])
  assert rates[0] > rates[1] > rates[2]
  with pytest.raises(ValueError, match="^variables must have thresholds of gates"):
    shift_thresholds({"params": {}, "batch_stats": {"norm": {"mean": jnp.zeros(2)}}}, shift=1.0)


def test_scales_multiply_and_decide_nothing():
  settings = GateSettings(hidden=4, relaxation="scale")
  assert not settings.decides
  assert settings.drawn_noise_scale == 0
  variables = init(gate(settings))
  flat = flax.traverse_util.flatten_dict(variables)
  flat["params", "head", "logits", "kernel"] *= 0
  fresh = gate(settings).apply(flax.traverse_util.unflatten_dict(flat), X)
  np.testing.assert_array_equal(joined(fresh, "gates"), 1)
  records, _ = train(gate(settings), variables)
  gates = joined(records, "gates")
  np.testing.assert_allclose(gates, 2 * special.expit(joined(records, "logits")), rtol=1e-6)
  assert ((gates > 0) & (gates < 2)).all()


@pytest.mark.slow
def test_a_gain_of_0_leaves_the_prior_and_learns():
  module = gate(dataclasses.replace(RECIPE, prior=True))
  variables = init(module)
  prior = np.linspace(-2, 2, 8, dtype=np.float32)
  variables["params"] |= {"prior": jnp.asarray(prior)}
  np.testing.assert_array_equal(variables["params"]["gain"], 0)

  def loss(params):
    records, _ = run(module, {**variables, "params": params}, X, {}, True)
    gates = jnp.concatenate([record.gates for record in records], axis=-1)
    # A gate pays where the first feature is large.
    return jnp.sum(gates * jnp.mean(X, axis=(1, 2))[:, :1]), gates

  (_, gates), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  # 0.3 of 8 units are 2.4; all that tie are open.
  np.testing.assert_array_equal(gates, np.tile(prior >= prior[-3], (16, 1)))
  assert (np.asarray(slopes["gain"]) != 0).all()
  # Gate networks begin to learn with the second step.
  assert not np.any(slopes["head"]["logits"]["kernel"])


def test_assigned_gates_are_those_of_the_source():
  settings = GateSettings(context="assigned", share=0.5)
  told = jax.nn.one_hot(np.array([0, 1, 2, 0, 1, 2]), 3)
  x = jnp.ones((6, 4, 4, 5))
  (record,) = ChannelGate((GatedChannels(8, 1),), settings, name="gate").apply(
    {}, x, shared={"told": told}
  )
  np.testing.assert_array_equal(record.gates.sum(1), 4)
  np.testing.assert_array_equal(record.gates[:3], record.gates[3:])
  assert len(np.unique(record.gates, axis=0)) == 3


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"normalise": -1.0}, "gate normalise must be >= 0; got -1.0"),
    ({"share": 0.0}, "gate share must be in (0, 1]; got 0.0"),
    ({"share": 0.5}, "gate share must be 1 unless threshold is quantile or context is assigned"),
    ({"context": "pooled+none"}, "gate context must be one of glance, grid, moments, pooled, told"),
    ({"context": "pooled+pooled"}, "gate context must name each part once; got 'pooled+pooled'"),
    ({"context": "none", "normalise": 2.0}, "gate normalise must be 0 if context is none"),
    ({"context": "random", "weighted": True}, "gate weighted must be False if context is random"),
    (
      {"relaxation": "hard_concrete", "threshold": "quantile"},
      "gate threshold must be zero if relaxation is hard_concrete; got 'quantile'",
    ),
    ({"relaxation": "sigmoid", "weighted": True}, "gate weighted must be False if relaxation is"),
    ({"relaxation": "scale", "context": "none"}, "gate context must be a sum of parts such as"),
    (
      {"relaxation": "sigmoid", "context": "assigned"},
      "gate relaxation must be straight_through if context is assigned; got 'sigmoid'",
    ),
  ],
)
def test_settings_that_do_not_go_together_are_named(fields, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
    GateSettings(**fields)


def test_a_weight_is_a_truth_value():
  with pytest.raises(TypeError, match="^gate weighted must be True or False; got 1$"):
    GateSettings(weighted=1)
