import functools
import math
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.layers.gate import (
  GATE_RNG,
  ChannelGate,
  GatedChannels,
  GateHead,
  GateSettings,
  apply_gates,
  is_gate_path,
)

AXIS = "devices"


def features(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def init(module, x):
  """Replaces the module's `init` by kernels from numpy, since compiling `init` takes seconds."""
  rng = np.random.default_rng(1)
  fresh = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}
  fill = lambda path, leaf: (
    jnp.full(leaf.shape, fresh[path[-1]], jnp.float32)
    if path[-1] in fresh
    else jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32)
  )
  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), x))
  return flax.traverse_util.unflatten_dict(
    {path: fill(path, leaf) for path, leaf in shapes.items()}
  )


def two_groups(**settings):
  return ChannelGate((GatedChannels(3, 10), GatedChannels(2, 20, 7)), **settings)


def with_last_layer(variables, kernel_scale, bias):
  flat = flax.traverse_util.flatten_dict(variables)
  flat["params", "head", "logits", "kernel"] *= kernel_scale
  flat["params", "head", "logits", "bias"] = jnp.asarray(bias, jnp.float32)
  return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("shape", [(4, 8, 6, 5), (4, 5), (4, 9, 5)])
def test_a_head_gives_one_float32_logit_per_unit_from_any_number_of_pixels(shape):
  head = GateHead(7, GateSettings(hidden=11))
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  logits, variables = jax.eval_shape(lambda x: head.init_with_output(jax.random.key(0), x), x)
  assert (logits.shape, logits.dtype) == ((4, 7), jnp.float32)
  sizes = {
    "/".join(k): v.shape for k, v in flax.traverse_util.flatten_dict(variables["params"]).items()
  }
  assert sizes == {
    "hidden/kernel": (5, 11),
    "norm/scale": (11,),
    "norm/bias": (11,),
    "logits/kernel": (11, 7),
    "logits/bias": (7,),
  }


def test_a_head_is_pool_dense_norm_relu_dense():
  head = GateHead(2, GateSettings(hidden=3))
  x = features(4, 2, 2, 5)
  variables = init(head, x)
  p = jax.tree.map(np.asarray, variables["params"])
  stats = {
    "norm": {
      "mean": np.array([0.1, 0, -0.2], np.float32),
      "var": np.array([1.0, 2.0, 0.5], np.float32),
    }
  }
  logits = head.apply({"params": p, "batch_stats": stats}, x)
  hidden = np.mean(np.asarray(x), (1, 2)) @ p["hidden"]["kernel"]
  hidden = np.maximum((hidden - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5), 0)
  assert 0 < np.mean(hidden == 0) < 1
  np.testing.assert_allclose(
    logits, hidden @ p["logits"]["kernel"] + p["logits"]["bias"], rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  ("settings", "rate"), [(GateSettings(), 0.85), (GateSettings(initial_open=0.3), 0.3)]
)
def test_the_last_bias_starts_at_the_initial_open_rate(settings, rate):
  variables = GateHead(4, settings).init(jax.random.key(0), features(2, 5))
  np.testing.assert_allclose(
    special.expit(variables["params"]["logits"]["bias"]), [rate] * 4, rtol=1e-6
  )


def test_a_channel_gate_splits_its_logits_into_records():
  gate = two_groups()
  x = features(6, 4, 4, 5)
  variables = init(gate, x)
  logits = np.linspace(-2, 2, 5)
  first, second = gate.apply(with_last_layer(variables, 0, logits), x)
  for record, expected in ((first, logits[:3]), (second, logits[3:])):
    expected = np.broadcast_to(expected, (6, len(expected)))
    np.testing.assert_allclose(record.logits, expected, atol=1e-6)
    np.testing.assert_allclose(record.probs, special.expit(expected), rtol=1e-5)
    np.testing.assert_array_equal(record.gates, expected > 0)
  assert (first.macs_per_unit, first.macs_per_pair) == (10, 0)
  assert (second.macs_per_unit, second.macs_per_pair) == (20, 7)


def test_evaluation_needs_no_key_and_opens_what_has_a_positive_logit():
  gate = two_groups()
  x = features(16, 4, 4, 5)
  variables = with_last_layer(init(gate, x), 10, np.zeros(5))
  records = gate.apply(variables, x)
  for record in records:
    assert 0 < np.mean(record.gates) < 1
    np.testing.assert_array_equal(record.gates, np.asarray(record.logits) > 0)
  for seed in (1, 2):
    again = gate.apply(variables, x, rngs={GATE_RNG: jax.random.key(seed)})
    jax.tree.map(np.testing.assert_array_equal, again, records)


@functools.partial(jax.jit, static_argnums=0)
def train(gate, variables, x, seed):
  return gate.apply(
    variables, x, train=True, rngs={GATE_RNG: jax.random.key(seed)}, mutable=["batch_stats"]
  )[0]


def test_training_draws_gates_from_its_key():
  gate = two_groups()
  x = features(500, 5)
  variables = with_last_layer(init(gate, x), 0, [-2, -1, 0, 1, 2])
  draws = [
    np.concatenate([r.gates for r in train(gate, variables, x, seed)], -1) for seed in range(2)
  ]
  assert np.mean(draws[0] != draws[1]) > 0.2
  for gates in draws:
    assert set(np.unique(gates)) == {0.0, 1.0}
    probs = special.expit([-2, -1, 0, 1, 2])
    assert (np.abs(gates.mean(0) - probs) < 5 * np.sqrt(probs * (1 - probs) / 500)).all()
  with pytest.raises(flax.errors.InvalidRngError):
    gate.apply(variables, x, train=True, mutable=["batch_stats"])


def test_a_gate_that_sees_nothing_is_a_parameter_per_unit_for_all_examples():
  gate = two_groups(settings=GateSettings(initial_open=0.3, context="none"))
  x = features(6, 4, 4, 5)
  fresh = gate.init(jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, fresh) == {"params": {"logits": (5,)}}
  np.testing.assert_allclose(special.expit(fresh["params"]["logits"]), [0.3] * 5, rtol=1e-6)
  first, second = gate.apply({"params": {"logits": jnp.array([-1.0, 2, 0, 3, -4])}}, x)
  assert first.logits.tolist() == [[-1, 2, 0]] * 6
  assert (first.gates.tolist(), second.gates.tolist()) == ([[0, 1, 0]] * 6, [[1, 0]] * 6)
  drawn, _ = train(gate, fresh, features(500, 5), 0)
  assert 0 < np.mean(drawn.gates) < 1
  assert len(np.unique(drawn.gates, axis=0)) == 8


def test_a_sigmoid_gate_is_its_probability_in_training_and_evaluation_without_a_key():
  gate = two_groups(settings=GateSettings(relaxation="sigmoid"))
  x = features(6, 4, 4, 5)
  variables = with_last_layer(init(gate, x), 0, np.linspace(-2, 2, 5))
  for records in (
    gate.apply(variables, x),
    gate.apply(variables, x, train=True, mutable=["batch_stats"])[0],
  ):
    gates = np.concatenate([r.gates for r in records], axis=-1)
    np.testing.assert_allclose(
      gates, np.broadcast_to(special.expit(np.linspace(-2, 2, 5)), (6, 5)), rtol=1e-5
    )


def test_hard_concrete_gates_close_permanently_and_open_at_their_probability():
  settings = GateSettings(context="none", relaxation="hard_concrete", initial_open=0.3)
  gate, x = two_groups(settings=settings), features(500, 5)
  fresh = gate.init(jax.random.key(0), x)["params"]["logits"]
  np.testing.assert_allclose(special.expit(fresh), [0.3] * 5, rtol=1e-6)
  logits = np.array([-3.0, 0.0, 9.0, -1.0, 2.0], np.float32)
  variables = {"params": {"logits": logits}}
  rested = np.concatenate([r.gates for r in gate.apply(variables, x)], axis=-1)
  expected = np.clip(-0.1 + 1.2 * special.expit(logits + 2 / 3 * np.log(0.1 / 1.1)), 0, 1)
  assert (expected[0], expected[2]) == (0, 1)
  assert ((expected > 0) & (expected < 1)).sum() == 2
  np.testing.assert_allclose(rested, np.broadcast_to(expected, (500, 5)), rtol=1e-5, atol=1e-6)
  drawn = train(gate, variables, x, 0)
  probs = np.concatenate([r.probs for r in drawn], axis=-1)[0]
  np.testing.assert_allclose(probs, special.expit(logits), rtol=1e-5)
  rates = np.mean(np.concatenate([r.gates for r in drawn], axis=-1) > 0, axis=0)
  assert (np.abs(rates - probs) < 5 * np.sqrt(probs * (1 - probs) / 500) + 1e-3).all()


def test_random_gates_learn_nothing_and_keep_their_rate_in_training_and_evaluation():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return [
        ChannelGate((GatedChannels(10, 1),), settings, name=name)(x, train)[0].gates
        for name in ("gate", "next")
      ]

  settings, x = GateSettings(context="random", initial_open=0.3), features(400, 5)
  assert Net().init({"params": jax.random.key(0)}, x) == {}
  trained = Net().apply({}, x, train=True, rngs={GATE_RNG: jax.random.key(0)})
  evaluated = Net().apply({}, x)
  for gates in (*trained, *evaluated):
    assert set(np.unique(gates)) == {0.0, 1.0}
    assert abs(np.mean(gates) - 0.3) < 5 * math.sqrt(0.21 / 4000)
  for one, other in (trained, evaluated, (trained[0], evaluated[0])):
    assert abs(np.mean(one != other) - 2 * 0.21) < 0.05
  for again, gates in zip(Net().apply({}, x), evaluated, strict=True):
    np.testing.assert_array_equal(again, gates)
  with pytest.raises(
    ValueError, match="relaxation must be straight_through if context is random; got 'sigmoid'"
  ):
    GateSettings(context="random", relaxation="sigmoid")


def test_without_noise_training_opens_what_has_a_positive_logit():
  x = features(50, 5)
  drawn, sure = (two_groups(settings=GateSettings(noise_scale=scale)) for scale in (1.0, 0.0))
  variables = with_last_layer(init(sure, x), 1, np.zeros(5))
  for record in train(sure, variables, x, 0):
    np.testing.assert_array_equal(record.gates, np.asarray(record.logits) > 0)
  assert any(
    np.any(np.asarray(r.gates) != (np.asarray(r.logits) > 0)) for r in train(drawn, variables, x, 0)
  )


def test_gates_pass_gradients_to_the_head_scaled_by_the_temperature():
  x = features(8, 5)
  slopes = []
  for temperature in (0.5, 1.0):
    gate = two_groups(settings=GateSettings(temperature=temperature, noise_scale=0.0))
    variables = with_last_layer(init(gate, x), 0, np.zeros(5))
    loss = lambda v, g=gate: sum(jnp.sum(r.gates) for r in train(g, v, x, 0))
    slopes.append(jax.grad(loss)(variables)["params"]["head"]["logits"]["bias"])
  np.testing.assert_allclose(slopes, [[8 * 0.25 / 0.5] * 5, [8 * 0.25] * 5], rtol=1e-5)


def test_the_noise_and_the_statistics_do_not_depend_on_the_number_of_devices():
  x = features(16, 2, 2, 5)
  alone, spread = (
    ChannelGate((GatedChannels(40, 1),)),
    ChannelGate((GatedChannels(40, 1),), axis_name=AXIS),
  )
  variables = with_last_layer(init(alone, x), 1, np.zeros(40))
  run = lambda gate, x: gate.apply(
    variables, x, train=True, rngs={GATE_RNG: jax.random.key(7)}, mutable=["batch_stats"]
  )
  (expected,), statistics = run(alone, x)
  on_devices = lambda gate: jax.pmap(lambda x: run(gate, x), axis_name=AXIS)(
    x.reshape(8, 2, 2, 2, 5)
  )
  (record,), spread_statistics = on_devices(spread)
  np.testing.assert_array_equal(record.gates.reshape(16, 40), expected.gates)
  np.testing.assert_allclose(record.logits.reshape(16, 40), expected.logits, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[3], b, atol=1e-6), spread_statistics, statistics
  )
  (unaware,), _ = on_devices(alone)
  assert np.mean(unaware.gates.reshape(16, 40) != expected.gates) > 0.1


def test_apply_gates_switches_channels_per_example():
  x = features(2, 3, 3, 4)
  gates = np.array([[1, 0, 1, 1], [0, 0, 0.5, 1]], np.float32)
  switched = apply_gates(x, gates)
  for n in range(2):
    for c in range(4):
      np.testing.assert_allclose(switched[n, :, :, c], x[n, :, :, c] * gates[n, c], rtol=1e-6)
  assert apply_gates(x.astype(jnp.bfloat16), gates).dtype == jnp.bfloat16
  np.testing.assert_array_equal(apply_gates(jnp.ones((2, 4)), gates), gates)
  whole = apply_gates(jnp.full((1, 2), 3), np.array([[0.5, 0.0]], np.float32))
  assert whole.dtype == jnp.float32
  np.testing.assert_array_equal(whole, [[1.5, 0]])
  np.testing.assert_array_equal(
    apply_gates(jnp.ones((1, 6)), np.array([[1.0, 0.5]])), [[1, 1, 1, 0.5, 0.5, 0.5]]
  )


def test_the_gate_of_a_block_costs_what_its_channels_cost():
  groups = (GatedChannels(6, 10, 3), GatedChannels(12, 20, 7))
  shapes = lambda block, inputs: [
    (r.logits.shape, r.gates.shape, r.macs_per_unit, r.macs_per_pair)
    for r in jax.eval_shape(
      lambda x: ChannelGate(groups, GateSettings(block=block)).init_with_output(
        jax.random.key(0), x
      )[0],
      jax.ShapeDtypeStruct((5, 2, 2, inputs), jnp.float32),
    )
  ]
  assert shapes(3, 9) == [((5, 2), (5, 2), 30, 27), ((5, 4), (5, 4), 60, 63)]
  assert shapes(6, 2) == [((5, 1), (5, 1), 60, 36), ((5, 2), (5, 2), 120, 252)]
  assert shapes(64, 2) == [((5, 1), (5, 1), 60, 36), ((5, 1), (5, 1), 240, 504)]
  with pytest.raises(
    ValueError, match="^gate block must divide a layer's channels or exceed them; got 4 for 6"
  ):
    shapes(4, 8)


@pytest.mark.parametrize(
  ("x", "gates"),
  [
    ((2, 3, 3, 4), (2, 5)),
    ((2, 3, 3, 4), (1, 4)),
    ((2, 3, 3, 4), (4,)),
    ((4,), (4,)),
    ((2, 3, 3, 4), (2, 1, 1, 4)),
  ],
)
def test_gates_that_do_not_belong_to_the_features_are_named(x, gates):
  message = (
    "gates must be [N, C / b] for x's N examples and C channels, b of them to a gate; got "
    f"gates {gates}, x {x}"
  )
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    apply_gates(jnp.zeros(x), jnp.zeros(gates))


@pytest.mark.parametrize(
  ("setting", "rule"),
  [
    ({"hidden": 0}, ">= 1; got 0"),
    ({"initial_open": 1.0}, "in (0, 1); got 1.0"),
    ({"initial_open": 0}, "in (0, 1); got 0"),
    ({"temperature": 0.0}, "> 0; got 0.0"),
    ({"temperature": float("nan")}, "> 0; got nan"),
    ({"noise_scale": -0.1}, ">= 0; got -0.1"),
    ({"block": 0}, ">= 1; got 0"),
  ],
)
def test_bad_settings_are_named(setting, rule):
  with pytest.raises(ValueError, match=f"^gate {next(iter(setting))} must be {re.escape(rule)}$"):
    GateSettings(**setting)


@pytest.mark.parametrize(
  ("field", "choices"),
  [
    ("context", "assigned, glance, grid, moments, none, pooled, random, told"),
    ("relaxation", "hard_concrete, scale, sigmoid, straight_through"),
    ("threshold", "quantile, zero"),
  ],
)
def test_unknown_choices_are_named(field, choices):
  with pytest.raises(ValueError, match=f"^gate {field} must be one of {choices}; got 'input'"):
    GateSettings(**{field: "input"})


def test_gate_paths_are_those_below_a_gate_module():
  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      ChannelGate((GatedChannels(2, 1),), name="gate")(x)
      return nn.Dense(3, name="delegate")(x)

  params = flax.traverse_util.flatten_dict(init(Net(), features(2, 3))["params"])
  assert sum(is_gate_path(path) for path in params) == 5
  assert not is_gate_path(("delegate", "kernel"))
