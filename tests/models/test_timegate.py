import functools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.inference.segments import opened_variables
from gating_jax.layers.gate import (
  GATE_NAME,
  GATE_RNG,
  ChannelGate,
  GatedChannels,
  GateSettings,
  is_gate_path,
)
from gating_jax.layers.segment_gate import SegmentGateSettings
from gating_jax.models.timegate import (
  POOLINGS,
  SELECTIONS,
  THRESHOLDS,
  Dropout,
  SegmentClassifier,
  SegmentNet,
  find_concepts,
  pool,
)
from gating_jax.models.video_backbones import FeaturePool
from gating_jax.ops import selection as choices
from tests.helpers import tiny

AXIS = "devices"
B, T, C, D, CLASSES = 4, 6, 5, 7, 3
LENGTHS = (6, 3, 1, 5)
SHARE = 0.4
GATE = SegmentGateSettings(concepts=4, hidden=4)


class Net(nn.Module):
  """A dense layer with channel gates."""

  units: int = 4
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train=False):
    gate = ChannelGate(
      (GatedChannels(self.units, D),),
      GateSettings(hidden=3, initial_open=0.5),
      self.axis_name,
      name=GATE_NAME,
    )
    records = gate(x, train)
    return nn.Dense(self.units, name="dense")(x) * records[0].gates, records


def net(selection="gate", *, light=FeaturePool(), heavy=None, axis_name=None, **settings):  # noqa: B008
  return SegmentNet(
    CLASSES,
    light,
    heavy or Net(axis_name=axis_name),
    selection,
    SHARE,
    gate=GATE,
    macs_per_segment=9,
    axis_name=axis_name,
    **settings,
  )


def videos(lengths=LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  shape = len(lengths), T
  return {
    "light": rng.normal(size=(*shape, C)).astype(np.float32),
    "relevant": rng.random(shape) < 0.3,
    "heavy": rng.normal(size=(*shape, D)).astype(np.float32),
    "valid": np.arange(T) < np.array(lengths)[:, None],
  }


@functools.cache
def variables(model):
  """Makes variables by numpy, since compiling `init` takes seconds; none of them is 0."""
  rng = np.random.default_rng(1)
  shapes = flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), videos()))
  return flax.traverse_util.unflatten_dict(
    {
      path: np.asarray(
        rng.uniform(0.5, 2, leaf.shape)
        if path[-1] in ("scale", "var")
        else rng.normal(0, 0.6, leaf.shape),
        np.float32,
      )
      for path, leaf in shapes.items()
    }
  )


@functools.partial(jax.jit, static_argnums=0)
def evaluate(model, inputs):
  return model.apply(variables(model), inputs)


@functools.partial(jax.jit, static_argnums=(0, 2))
def of(model, inputs, method, *args):
  return model.apply(variables(model), inputs, *args, method=method)


def dense(params, x):
  return x @ params["kernel"] + params["bias"]


def head_by_hand(model, pooled):
  p, stats = (variables(model)[group]["classifier"] for group in ("params", "batch_stats"))
  h = (dense(p["hidden"], pooled) - stats["norm"]["mean"]) / np.sqrt(stats["norm"]["var"] + 1e-5)
  h = h * p["norm"]["scale"] + p["norm"]["bias"]
  return dense(p["logits"], np.where(h > 0, h, 0.2 * h))


def test_logits_by_hand():
  for pooling in POOLINGS:
    model, inputs = net("uniform", light=None, heavy=FeaturePool(), pooling=pooling), videos()
    outputs, records = evaluate(model, inputs)
    pooled = []
    for x, gates in zip(inputs["heavy"], np.asarray(records[0].gates), strict=True):
      chosen = x[gates > 0]
      shares = np.ones(len(chosen)) / len(chosen)
      if pooling == "attention":
        shares = special.softmax(
          dense(variables(model)["params"]["classifier"]["scores"], chosen)[:, 0]
        )
      pooled.append(chosen.max(0) if pooling == "max" else shares @ chosen)
    assert outputs.keys() == {"logits"}
    np.testing.assert_allclose(
      outputs["logits"], head_by_hand(model, np.array(pooled)), rtol=1e-4, atol=1e-4
    )


def gates_by_policy(selection, inputs, outputs):
  valid = jnp.asarray(inputs["valid"])
  k = choices.budget_to_k(valid, share=SHARE)
  return {
    "all": lambda: valid,
    "uniform": lambda: choices.uniform_k(valid, k=k),
    "prefix": lambda: choices.first_k(valid, k=k),
    "random": lambda: choices.random_k(jax.random.key(0), valid, k=k),
    "oracle": lambda: choices.top_k(inputs["relevant"] * np.float32(1), valid, k=k),
    "confidence": lambda: choices.top_k(
      special.softmax(outputs["light_logits"], -1).max(-1), valid, k=k
    ),
  }[selection]()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_only_the_chosen_segments_are_classified(selection):
  inputs = videos()
  model = net(selection, light=FeaturePool() if selection in ("gate", "confidence") else None)
  outputs, (record, channels) = evaluate(model, inputs)
  gates = np.asarray(record.gates)
  assert (gates.sum(1) >= 1).all()
  if selection != "gate":
    np.testing.assert_array_equal(gates, gates_by_policy(selection, inputs, outputs))
  assert (record.macs_per_unit, gates.shape, channels.gates.shape) == (9, (B, T), (B * T, 4))
  assert ("light_logits" in outputs) == (selection == "confidence")
  closed = {**inputs, "heavy": np.where(gates[..., None] > 0, inputs["heavy"], 50)}
  np.testing.assert_allclose(evaluate(model, closed)[0]["logits"], outputs["logits"], atol=1e-5)
  opened = {**inputs, "heavy": np.where(gates[..., None] > 0, inputs["heavy"] + 5, inputs["heavy"])}
  assert (np.abs(evaluate(model, opened)[0]["logits"] - outputs["logits"]).max(1) > 1e-2).all()


def test_a_threshold_among_the_variables_chooses_segments_above_it_and_at_least_one():
  model, inputs = net("confidence"), videos()
  outputs, _ = evaluate(model, inputs)
  confidence = special.softmax(np.asarray(outputs["light_logits"], np.float64), -1).max(-1)
  known = np.where(inputs["valid"], confidence, -1)
  # Just above one of them: some videos have none above it, others several.
  least = np.median(known[inputs["valid"]]) + 1e-4
  given = {**variables(model), THRESHOLDS: {"confidence": np.float32(least)}}
  _, (record, _) = jax.jit(model.apply)(given, inputs)
  best = np.arange(T) == known.argmax(1)[:, None]
  np.testing.assert_array_equal(record.gates, (known > least) | best)
  assert 0 < np.sum(known > least) < inputs["valid"].sum()
  _, (everything, _) = jax.jit(model.clone(share=1.0).apply)(opened_variables(model, given), inputs)
  np.testing.assert_array_equal(everything.gates, inputs["valid"])


@pytest.mark.thin(3)
@pytest.mark.parametrize("selection", ["gate", "confidence", "uniform"])
def test_its_parts_make_the_whole(selection):
  model, inputs = net(selection, light_head=True, pooling="attention"), videos()
  outputs, records = evaluate(model, inputs)
  seen = {name: value for name, value in inputs.items() if name != "heavy"}
  record, light = of(model, seen, "choose")
  np.testing.assert_array_equal(record.gates, records[0].gates)
  np.testing.assert_allclose(light["light_logits"], outputs["light_logits"], rtol=1e-5)
  by_hand = dense(variables(model)["params"]["light_classifier"], inputs["light"])
  np.testing.assert_allclose(light["light_logits"], by_hand, rtol=1e-4, atol=1e-5)
  b, t = np.nonzero(record.gates)
  few, channels = of(model, inputs["heavy"][b, t], "encode")
  np.testing.assert_array_equal(
    channels[0].gates, np.asarray(records[1].gates).reshape(B, T, -1)[b, t]
  )
  features = np.zeros((B, T, few.shape[-1]), np.float32)
  features[b, t] = few
  np.testing.assert_allclose(
    of(model, features, "classify", record.gates), outputs["logits"], rtol=1e-4, atol=1e-5
  )


def test_a_video_has_the_same_logits_alone_and_in_a_batch_of_longer_ones():
  model, inputs = net(light_head=True), videos()
  together, records = evaluate(model, inputs)
  assert len({tuple(row) for row in np.asarray(records[0].gates)}) > 2
  for b, length in enumerate(LENGTHS[1:3], start=1):
    alone, _ = evaluate(model, {name: value[b : b + 1, :length] for name, value in inputs.items()})
    np.testing.assert_allclose(alone["logits"][0], together["logits"][b], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
      alone["light_logits"][0], together["light_logits"][b, :length], atol=1e-5
    )


def test_training_does_not_depend_on_the_number_of_devices():
  inputs = videos(lengths=[1, 2, 3, 4, 5, 6, 6, 6] * 2)
  alone, spread = (net(light_head=True, pooling="mean", axis_name=name) for name in (None, AXIS))
  run = lambda model, inputs, seed=0: model.apply(
    variables(alone),
    inputs,
    train=True,
    mutable=["batch_stats"],
    rngs={GATE_RNG: jax.random.key(seed), "dropout": jax.random.key(seed + 1)},
  )
  one = jax.jit(lambda inputs, seed: run(alone, inputs, seed))
  (outputs, records), statistics = one(inputs, 0)
  (other, drawn), _ = one(inputs, 1)
  assert np.mean(drawn[0].gates != records[0].gates) > 0.1
  assert np.abs(other["logits"] - outputs["logits"]).max() > 0.1
  shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), inputs)
  (spread_outputs, spread_records), spread_statistics = jax.pmap(
    lambda x: run(spread, x), axis_name=AXIS
  )(shards)
  for record, by_device in zip(records, spread_records, strict=True):
    np.testing.assert_array_equal(by_device.gates.reshape(record.gates.shape), record.gates)
  for name, value in outputs.items():
    np.testing.assert_allclose(
      spread_outputs[name].reshape(value.shape), value, rtol=1e-3, atol=1e-3
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[5], b, rtol=1e-4, atol=1e-4),
    spread_statistics,
    statistics,
  )


def test_the_segments_gate_is_a_gate_network_and_nothing_else_is():
  params = flax.traverse_util.flatten_dict(
    variables(net(light_head=True, heavy=FeaturePool()))["params"]
  )
  assert {path[0] for path in params if is_gate_path(path)} == {GATE_NAME}
  assert {path[0] for path in params if not is_gate_path(path)} == {
    "classifier",
    "light_classifier",
  }
  assert params[GATE_NAME, "concepts", "kernel"].shape == (C, 4)


def test_segments_are_classified_by_both_nets():
  model = SegmentClassifier(CLASSES, light=FeaturePool(), heavy=Net())
  inputs = {name: value[:, 0] for name, value in videos().items() if name != "valid"} | {
    "picked": np.arange(B)
  }
  weights = jax.jit(model.init)(jax.random.key(0), inputs)
  outputs, records = jax.jit(model.apply)(weights, inputs)
  np.testing.assert_allclose(
    outputs["light"], dense(weights["params"]["light_head"], inputs["light"]), rtol=1e-5
  )
  heavy, _ = jax.jit(Net().apply)(
    {"params": weights["params"]["heavy"], "batch_stats": weights["batch_stats"]["heavy"]},
    inputs["heavy"],
  )
  np.testing.assert_allclose(
    outputs["heavy"], dense(weights["params"]["heavy_head"], heavy), rtol=1e-5
  )
  np.testing.assert_array_equal(outputs["picked"], np.arange(B))
  assert records[0].gates.shape == (B, 4)


@pytest.mark.parametrize(
  ("model", "message"),
  [
    (
      lambda: net("gates"),
      f"selection must be one of {', '.join(sorted(SELECTIONS))}; got 'gates'. Did you mean",
    ),
    (
      lambda: net("gate", light=None),
      "light must be a net for selection 'gate' or with a light head; got None",
    ),
    (
      lambda: net("confidence", light=None),
      "light must be a net for selection 'confidence' or with a light",
    ),
    (
      lambda: net("all", light=None, light_head=True),
      "light must be a net for selection 'all' or with a light",
    ),
    (lambda: net(pooling="sum"), "pooling must be one of attention, max, mean; got 'sum'"),
  ],
)
def test_wrong_settings_are_named(model, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
    jax.eval_shape(model().init, jax.random.key(0), videos())


def test_the_oracle_needs_to_know():
  inputs = videos()
  del inputs["relevant"]
  with pytest.raises(ValueError, match=r"^relevant must be given for the oracle"):
    jax.eval_shape(net("oracle", light=None).init, jax.random.key(0), inputs)


class Plain(nn.Module):
  """Two layers that treat every clip separately."""

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(4, name="out")(nn.tanh(nn.Dense(5, name="hidden")(x))), ()


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("selection", "capacity"), [("uniform", 8), ("uniform", 11), ("gate", B * T)]
)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_heavy_nets_backward_may_run_on_the_chosen_segments_alone(selection, capacity, pooling):
  inputs = videos()

  def gradients(capacity):
    model = net(selection, heavy=Plain(), pooling=pooling, backward_capacity=capacity)
    of = variables(model)
    rngs = {name: jax.random.key(i) for i, name in enumerate((GATE_RNG, "dropout"))}

    def loss(params):
      (outputs, (record, *_)), _ = model.apply(
        {**of, "params": params}, inputs, True, mutable=["batch_stats"], rngs=rngs
      )
      return jnp.sum(jnp.cos(outputs["logits"])), jnp.sum(record.gates > 0)

    return jax.jit(jax.grad(loss, has_aux=True))(of["params"])

  (full, chosen), (skipped, _) = gradients(None), gradients(capacity)
  assert chosen == 8 or selection == "gate"
  assert np.linalg.norm(full["heavy"]["hidden"]["kernel"]) > 0.1
  for name, part in full.items():
    assert tiny.relative_gap(skipped[name], part) < 1e-5, name


def test_a_heavy_net_that_mixes_clips_has_the_backward_of_all():
  model = net("uniform", backward_capacity=8)
  with pytest.raises(
    ValueError,
    match=r"heavy must process each clip independently .* got a net with \['batch_stats'\]",
  ):
    model.apply(
      variables(model),
      videos(),
      True,
      mutable=["batch_stats"],
      rngs={GATE_RNG: jax.random.key(0), "dropout": jax.random.key(1)},
    )


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def padded(*lengths):
  return np.arange(T) < np.array(lengths)[:, None]


def pool_by_hand(features, gates, kind, scores):
  rows = []
  for f, g, s in zip(features, gates, scores, strict=True):
    chosen = np.flatnonzero(g)
    if kind == "max":
      rows.append(np.max([g[t] * f[t] for t in chosen], axis=0))
    else:
      share = np.array([g[t] * (np.exp(s[t]) if kind == "attention" else 1) for t in chosen])
      rows.append((share / share.sum()) @ f[chosen])
  return np.array(rows)


@pytest.mark.parametrize("kind", POOLINGS)
def test_pool_is_over_chosen_segments_alone(kind):
  features, scores, rng = normal(B, T, C) - 3, normal(B, T, seed=1), np.random.default_rng(2)
  for gates in (padded(*LENGTHS)[:, ::-1] * 1.0, rng.uniform(0.1, 1, (B, T)) * padded(*LENGTHS)):
    gates = gates.astype(np.float32)
    pooled = pool(features, gates, kind, scores)
    np.testing.assert_allclose(pooled, pool_by_hand(features, gates, kind, scores), rtol=1e-5)
    closed = gates == 0
    other = np.where(closed[..., None], 1e3, features), gates, kind, np.where(closed, 200, scores)
    np.testing.assert_array_equal(pool(*other), pooled)


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_a_closed_segments_gate_learns_what_opening_it_would_change(kind):
  features, gates = normal(1, 4, 2), np.array([[1, 0, 1, 0]], np.float32)
  scores = np.array([[0.5, -1, 0.1, -3]], np.float32)
  weights = np.array([1.0, -2.0])
  share = np.exp(scores[0]) if kind == "attention" else np.ones(4)
  value = pool_by_hand(features, gates, kind, scores)[0]
  by_hand = share * ((features[0] - value) @ weights) / (share * gates[0]).sum()
  slope = jax.grad(lambda gates: pool(features, gates, kind, scores)[0] @ weights)(gates)
  np.testing.assert_allclose(slope[0], by_hand, rtol=1e-5)
  huge = jax.grad(
    lambda gates: pool(features, gates, kind, np.where(gates > 0, scores, 500))[0] @ weights
  )(gates)
  assert np.isfinite(huge).all()


def test_the_scores_of_attention_have_its_gradient():
  features, gates = normal(1, 4, 2), np.array([[1, 0, 0.5, 1]], np.float32)
  f = lambda scores: pool(features, gates, "attention", scores)[0, 0]
  scores = np.array([[0.5, 2.0, -0.4, 0.5]], np.float32)  # a tie at the top
  share = gates[0] * np.exp(scores[0])
  share /= share.sum()
  by_hand = share * (features[0, :, 0] - share @ features[0, :, 0])
  np.testing.assert_allclose(jax.grad(f)(scores)[0], by_hand, rtol=1e-4, atol=1e-6)


def test_dropout_keeps_the_mean_and_does_not_depend_on_the_number_of_devices():
  x = np.ones((16, 400), np.float32)
  drop = lambda x, axis_name, seed=0: Dropout(0.25, axis_name).apply(
    {}, x, train=True, rngs={"dropout": jax.random.key(seed)}
  )
  dropped = np.asarray(drop(x, None))
  np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
  assert abs(dropped.mean() - 1) < 5 * np.sqrt(1 / 3 / x.size)
  assert len(np.unique(dropped, axis=0)) == 16
  assert (dropped != drop(x, None, 1)).any()
  spread = jax.pmap(lambda x: drop(x, AXIS), axis_name=AXIS)(x.reshape(8, 2, 400))
  np.testing.assert_array_equal(spread.reshape(x.shape), dropped)


def test_dropout_does_nothing_in_evaluation_or_at_rate_0():
  x = normal(3, 4)
  np.testing.assert_array_equal(Dropout(0.5).apply({}, x), x)
  np.testing.assert_array_equal(Dropout(0.0).apply({}, x, train=True), x)


CORNERS = np.array([[0, 0, 4], [5, 0, 0], [0, -6, 0], [7, 7, 7]], np.float32)


def test_concepts_are_the_means_of_clusters():
  rng = np.random.default_rng(0)
  rows = np.repeat(CORNERS, 40, axis=0) + rng.normal(0, 0.1, (160, 3)).astype(np.float32)
  found = find_concepts(rng.permutation(rows), k=4, seed=1)
  assert found.dtype == np.float32
  means = rows.reshape(4, 40, 3).mean(axis=1, dtype=np.float64)
  np.testing.assert_allclose(sorted(found.tolist()), sorted(means.tolist()), atol=1e-5)


def test_as_many_concepts_as_distinct_features_are_those_features():
  found = find_concepts(np.repeat(CORNERS, 3, axis=0), k=4, seed=0)
  np.testing.assert_allclose(sorted(found.tolist()), sorted(CORNERS.tolist()), atol=1e-6)


def test_one_concept_is_the_mean():
  np.testing.assert_allclose(
    find_concepts(CORNERS, k=1, seed=0), CORNERS.mean(axis=0, keepdims=True), rtol=1e-6
  )


def test_the_seed_alone_decides_the_concepts():
  rows = np.random.default_rng(0).normal(size=(300, 5))
  np.testing.assert_array_equal(find_concepts(rows, k=6, seed=3), find_concepts(rows, k=6, seed=3))
  assert (find_concepts(rows, k=6, seed=4) != find_concepts(rows, k=6, seed=3)).any()


@pytest.mark.parametrize(
  ("rows", "k", "message"),
  [
    (
      np.repeat(CORNERS, 3, axis=0),
      5,
      "k must be in 1 .. 4, the number of distinct features of 12; got 5",
    ),
    (CORNERS, 0, "k must be in 1 .. 4, the number of distinct features of 4; got 0"),
    (
      np.array([[0.0, 1.0], [np.nan, 1.0]]),
      1,
      r"features must be finite; got \[nan  1.\] in row 1 \(1 such rows\)",
    ),
    (
      np.array([[np.inf], [1.0], [np.inf]]),
      1,
      r"features must be finite; got \[inf\] in row 0 \(2 such rows\)",
    ),
    (np.zeros((4, 2, 2)), 1, r"features must be \[n, C\]; got shape \(4, 2, 2\)"),
  ],
)
def test_what_has_no_concepts_is_named(rows, k, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    find_concepts(rows, k=k, seed=0)
