import dataclasses
import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.layers import segment_gate
from gating_jax.layers.gate import GATE_RNG, GateSettings
from gating_jax.layers.segment_gate import SEGMENT_CONTEXTS, SegmentGate, SegmentGateSettings
from gating_jax.models.timegate import POOLINGS, pool

AXIS = "devices"
B, T, C, K, HIDDEN = 6, 9, 5, 7, 4
LENGTHS = (9, 4, 1, 7, 2, 9)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padded(*lengths):
  return np.arange(T) < np.array(lengths)[:, None]


def gate(context="attention", relaxation="straight_through", axis_name=None, **settings):
  settings = SegmentGateSettings(K, context, relaxation, **{"hidden": HIDDEN, **settings})
  return SegmentGate(settings, macs_per_unit=10, axis_name=axis_name)


def init(module, *inputs):
  """Makes variables by numpy, since compiling `init` takes seconds; none of them is 0."""
  rng = np.random.default_rng(1)
  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *inputs))
  return flax.traverse_util.unflatten_dict(
    {
      path: jnp.asarray(
        rng.uniform(0.5, 2, leaf.shape)
        if path[-1] in ("scale", "var")
        else rng.normal(0, 0.6, leaf.shape),
        jnp.float32,
      )
      for path, leaf in shapes.items()
    }
  )


@functools.partial(jax.jit, static_argnums=0)
def evaluate(module, variables, x, valid):
  return module.apply(variables, x, valid)


@functools.partial(jax.jit, static_argnums=0)
def train(module, variables, x, valid, seed=0):
  return module.apply(
    variables, x, valid, train=True, rngs={GATE_RNG: jax.random.key(seed)}, mutable=["batch_stats"]
  )


def dense(params, x):
  return x @ params["kernel"] + params.get("bias", 0)


def standardised(x, eps, axis=-1):
  return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + eps)


def attention_by_hand(params, h):
  normed = standardised(h, 1e-6) * params["norm"]["scale"] + params["norm"]["bias"]
  query, key, value = (dense(params[name], normed) for name in ("query", "key", "value"))
  return dense(params["out"], special.softmax(query @ key.T / np.sqrt(HIDDEN), axis=-1) @ value)


def convolution_by_hand(params, h):
  around = np.pad(h, ((3, 3), (0, 0)))
  return params["bias"] + sum(
    params["kernel"][tap, 0] * around[tap : tap + len(h)] for tap in range(7)
  )


def logits_by_hand(context, variables, x):
  """Returns the result for one video without padding, `[T, C]`."""
  p, stats = jax.device_get((variables["params"], variables["batch_stats"]))
  h = (x @ p["concepts"]["kernel"] - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
  h = dense(p["project"], np.maximum(h * p["norm"]["scale"] + p["norm"]["bias"], 0))
  if context != "none":
    h = h + {"attention": attention_by_hand, "convolution": convolution_by_hand}[context](
      p["context"], h
    )
  return dense(p["logits"], np.maximum(dense(p["hidden"], h), 0))[:, 0]


@pytest.mark.parametrize("context", SEGMENT_CONTEXTS)
def test_logits_do_not_depend_on_padding_or_on_other_videos(context):
  x, valid, module = normal(B, T, C), padded(*LENGTHS), gate(context)
  variables = init(module, x, valid)
  record = evaluate(module, variables, x, valid)
  for b, length in enumerate(LENGTHS):
    np.testing.assert_allclose(
      record.logits[b, :length],
      logits_by_hand(context, variables, x[b, :length]),
      atol=1e-5,
      rtol=1e-5,
    )
  np.testing.assert_allclose(record.probs, special.expit(record.logits), rtol=1e-5)
  other = np.where(valid[..., None], x, 9 * normal(B, T, C, seed=2))
  order = np.array([3, 0, 5, 1, 4, 2])
  moved = evaluate(module, variables, other[order], valid[order])
  kept = valid[order]
  np.testing.assert_allclose(moved.logits[kept], record.logits[order][kept], atol=1e-5)
  np.testing.assert_array_equal(moved.gates, np.asarray(record.gates)[order])


@pytest.mark.parametrize(
  ("context", "reached"), [("none", [4]), ("convolution", range(1, 8)), ("attention", range(9))]
)
def test_a_gate_sees_its_context(context, reached):
  x, valid, module = normal(1, T, C), padded(T), gate(context)
  variables = init(module, x, valid)
  changed = x.copy()
  changed[0, 4] += 1
  before, after = (
    np.asarray(evaluate(module, variables, x, valid).logits[0]) for x in (x, changed)
  )
  np.testing.assert_array_equal(np.flatnonzero(np.abs(after - before) > 1e-6), reached)


def with_bias(variables, bias, scale=1.0):
  flat = flax.traverse_util.flatten_dict(variables)
  flat["params", "logits", "kernel"] *= scale
  flat["params", "logits", "bias"] = jnp.full(1, bias, jnp.float32)
  return flax.traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize("relaxation", segment_gate.SEGMENT_RELAXATIONS)
def test_a_video_always_has_a_segment_open_and_padding_never_is(relaxation):
  x, valid, module = normal(B, T, C), padded(*LENGTHS), gate("none", relaxation)
  variables = init(module, x, valid)
  for bias, opened in ((-300.0, np.ones(B)), (300.0, valid.sum(1))):
    shifted = with_bias(variables, bias)
    for record in (evaluate(module, shifted, x, valid), train(module, shifted, x, valid)[0]):
      assert not np.asarray(record.gates)[~valid].any()
      np.testing.assert_array_equal(np.asarray(record.gates).sum(1), opened)
      if bias < 0:
        likeliest = np.argmax(np.where(valid, record.logits, -np.inf), axis=1)
        np.testing.assert_array_equal(np.argmax(record.gates, axis=1), likeliest)


def test_evaluation_needs_no_key_and_opens_what_has_a_positive_logit():
  x, valid, module = normal(B, T, C), padded(*[T] * B), gate()
  variables = init(module, x, valid)
  record = evaluate(module, variables, x, valid)
  assert 0 < record.gates.mean() < 1
  some = np.asarray(record.logits > 0).any(1)
  np.testing.assert_array_equal(record.gates[some], np.asarray(record.logits > 0)[some])
  assert record.macs_per_unit == 10
  with pytest.raises(flax.errors.InvalidRngError):
    module.apply(variables, x, valid, train=True, mutable=["batch_stats"])


def test_training_draws_each_relaxation_from_its_key():
  x, valid = normal(B, T, C), np.ones((B, T), bool)
  variables = with_bias(init(gate("none"), x, valid), 1.0, scale=0.0)  # logits of 1
  draw = lambda relaxation, seed: np.asarray(
    train(gate("none", relaxation), variables, x, valid, seed)[0].gates
  )
  hard, soft = draw("straight_through", 0), draw("soft", 0)
  assert set(np.unique(hard)) == {0.0, 1.0}
  assert abs(hard.mean() - special.expit(1)) < 4 * np.sqrt(0.2 / hard.size)
  np.testing.assert_array_equal(soft > 0.5, hard > 0)
  assert ((soft > 0) & (soft < 1)).all()
  assert (draw("straight_through", 1) != hard).any()
  np.testing.assert_allclose(draw("clipped_sigmoid", 0), 0.75, rtol=1e-6)


def test_the_noise_and_the_statistics_do_not_depend_on_the_number_of_devices():
  x = normal(16, T, C)
  valid = padded(*range(1, 9), *[9] * 8)
  alone, spread = gate(), gate(axis_name=AXIS)
  variables = init(alone, x, valid)
  expected, statistics = train(alone, variables, x, valid)
  shards = x.reshape(8, 2, T, C), valid.reshape(8, 2, T)
  record, spread_statistics = jax.pmap(
    lambda x, valid: train(spread, variables, x, valid), axis_name=AXIS
  )(*shards)
  np.testing.assert_array_equal(record.gates.reshape(16, T), expected.gates)
  np.testing.assert_allclose(record.logits.reshape(16, T), expected.logits, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[3], b, atol=1e-6), spread_statistics, statistics
  )
  unaware, _ = train(alone, variables, x[8:], valid[8:])
  assert np.mean(unaware.gates != expected.gates[8:]) > 0.1


@pytest.mark.parametrize("context", SEGMENT_CONTEXTS)
def test_the_pooled_value_teaches_every_parameter_of_the_gate(context):
  x, valid, module = normal(B, T, C), padded(*LENGTHS), gate(context)
  variables = init(module, x, valid)
  features, scores, weights = normal(B, T, 3, seed=2), normal(B, T, seed=3), normal(B, 3, seed=4)

  @jax.jit
  def slopes(params):
    gates, backward = jax.vjp(
      lambda params: train(module, {**variables, "params": params}, x, valid)[0].gates, params
    )
    value = lambda gates, kind: jnp.sum(weights * pool(features, gates, kind, scores))
    return {kind: backward(jax.grad(value)(gates, kind))[0] for kind in POOLINGS}

  for path, slope in flax.traverse_util.flatten_dict(slopes(variables["params"])).items():
    if path[1:] != ("context", "key", "bias"):  # adds the same to the scores of all keys
      assert np.abs(slope).max() > 1e-5, path


def test_the_last_bias_starts_at_the_initial_open_rate():
  module = gate("none", initial_open=0.3)
  variables = jax.jit(module.init)(jax.random.key(0), normal(1, 2, C), np.ones((1, 2), bool))
  np.testing.assert_allclose(special.expit(variables["params"]["logits"]["bias"]), [0.3], rtol=1e-6)


def test_gate_settings_for_the_fields_they_have_are_taken_with_a_warning():
  gate = GateSettings(hidden=4, initial_open=0.3, temperature=0.5, noise_scale=0.25)
  with pytest.warns(DeprecationWarning, match="gate is now given by its fields hidden"):
    settings = SegmentGateSettings(K, gate=gate)
  today = SegmentGateSettings(K, hidden=4, initial_open=0.3, temperature=0.5, noise_scale=0.25)
  assert settings == today
  assert dataclasses.replace(settings, concepts=3).hidden == 4


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: SegmentGateSettings(context="atention"),
      "gate context must be one of attention, convolution, none; got",
    ),
    (
      lambda: SegmentGateSettings(relaxation="hard"),
      "gate relaxation must be one of clipped_sigmoid, soft, straight_",
    ),
    (lambda: SegmentGateSettings(concepts=0), "gate concepts must be >= 1; got 0"),
    (
      lambda: pool(normal(1, 2, 3), np.ones((1, 2)), "sum"),
      "pooling must be one of attention, max, mean; got 'sum'",
    ),
  ],
)
def test_bad_settings_are_named(call, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
    call()
