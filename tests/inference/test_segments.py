import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.inference.segments import compile_segments
from gating_jax.layers.gate import GATE_NAME, GateSettings
from gating_jax.layers.segment_gate import SegmentGateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.models.timegate import SegmentNet

SEGMENTS, CLIP = 4, (2, 4, 4, 1)
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


RECIPE = GateSettings(
  hidden=4,
  noise_scale=0.0,
  context="glance+pooled",
  normalise=1.0,
  threshold="quantile",
  share=0.5,
  weighted=True,
)


GATE = GateSettings(hidden=4, initial_open=0.6)


def resnet(gate=GATE, **settings):
  return ResNet(classes=None, blocks=(1,), features=4, gate=gate, **settings)


def net(selection="gate", channels="none", light=True, heavy=None, **settings):
  return SegmentNet(
    3,
    resnet() if light else None,
    resnet(gating=channels, **(heavy or {})),
    selection,
    share=0.5,
    macs_per_segment=7,
    gate=SegmentGateSettings(concepts=5, hidden=4, initial_open=0.85),
    **settings,
  )


def prepare(inputs):
  clips = inputs["clips"]
  centre = clips[:, :, clips.shape[2] // 2]
  return {**inputs, "light": centre / 64 - 2, "heavy": clips / 64 - 2}


def batch(lengths, seed=0):
  """Makes videos of these lengths, with padding filled by repetition."""
  rng = np.random.default_rng(seed)
  clips = rng.integers(0, 256, (len(lengths), SEGMENTS, *CLIP))
  clips = clips * rng.uniform(0, 1, (len(lengths), SEGMENTS, 1, 1, 1, 1))
  valid = np.arange(SEGMENTS) < np.array(lengths)[:, None]
  for video, length in zip(clips, lengths, strict=True):
    video[:] = video[np.arange(SEGMENTS) % length]
  return {
    "clips": clips.astype(np.uint8),
    "valid": valid,
    "relevant": valid & (rng.random(valid.shape) < 0.5),
  }


@functools.cache
def variables(model):
  """Makes random variables with which the gate opens for half of `batch([4, 4, 4])`.

  None of them has its initial value.
  """
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    values = rng.normal(0, 1 / np.sqrt(np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
    return 1 + values**2 if path[-1].key in ("var", "scale") else values

  values = jax.tree_util.tree_map_with_path(
    draw, jax.eval_shape(model.init, jax.random.key(0), prepare(batch([SEGMENTS])))
  )
  if model.selection != "gate":
    return values
  values = with_bias(values, 0.0)
  _, (record, *_) = plain(model)(values, batch([4, 4, 4]))
  return with_bias(values, -np.median(record.logits))


def with_bias(values, bias):
  values = jax.tree.map(lambda x: x, values)
  values["params"][GATE_NAME]["logits"]["bias"] = np.full((1,), bias, np.float32)
  return values


@functools.cache
def plain(model):
  return jax.jit(lambda values, inputs: model.apply(values, prepare(inputs)))


@functools.cache
def skipping(model, capacities=(2, 4)):
  return compile_segments(model, variables(model), capacities=capacities, prepare=prepare)


def assert_same(model, result, inputs, values=None):
  """The result is that of the network without skipping.

  Only the heavy net's records of closed segments differ: they are zeros.
  """
  outputs, records = plain(model)(values or variables(model), inputs)
  assert outputs.keys() == result.outputs.keys()
  jax.tree.map(CLOSE, result.outputs, outputs)
  jax.tree.map(CLOSE, result.records[0], records[0])
  seen = np.asarray(records[0].gates > 0).reshape(-1, 1)
  zeroed = jax.tree.map(lambda x: np.where(seen, x, 0), records[1:])
  jax.tree.map(CLOSE, result.records[1:], zeroed)
  assert result.chosen == seen.sum() <= result.computed


MODELS = {
  "gate": net(),
  "gate, channels gated": net(channels="channel"),
  "gate, channels weighted": net(channels="channel", heavy={"gate": RECIPE}),
  "gate, mean": net(pooling="mean", light_head=True),
  "gate, attention": net(pooling="attention"),
  "confidence": net("confidence"),
  "uniform, channels gated": net("uniform", channels="channel", light=False),
  "uniform": net("uniform", light=False),
  "oracle": net("oracle", light=False),
  "all": net("all", light=False),
}


@pytest.mark.thin(10)
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("lengths", [(4,), (1,), (3, 4, 1)])
def test_skipping_gives_what_the_whole_network_gives(name, lengths):
  inputs = batch(lengths)
  assert_same(MODELS[name], skipping(MODELS[name])(inputs), inputs)


def test_here_the_gate_chooses_some_segments_and_channels_close():
  _, records = plain(MODELS["gate, channels gated"])(
    variables(MODELS["gate, channels gated"]), batch([4, 4, 4])
  )
  assert [0 < np.mean(record.gates) < 1 for record in records] == [True, True]
  assert np.ptp(np.sum(records[0].gates, axis=1)) > 0


@given(st.lists(st.integers(1, SEGMENTS), min_size=1, max_size=3), st.integers(0, 10**6))
def test_any_batch_with_any_choice(lengths, seed):
  inputs = batch(lengths, seed)
  assert_same(MODELS["gate"], skipping(MODELS["gate"])(inputs), inputs)


@pytest.mark.parametrize(("bias", "chosen"), [(-100.0, 3), (100.0, 8)])
def test_all_closed_leaves_one_a_video_and_all_open_the_valid_ones(bias, chosen):
  model, inputs = MODELS["gate"], batch([3, 4, 1])
  values = with_bias(variables(model), bias)
  result = compile_segments(model, values, capacities=(3, 12), prepare=prepare)(inputs)
  assert result.chosen == chosen
  assert_same(model, result, inputs, values)


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", ["gate", "confidence", "uniform"])
def test_a_video_alone_and_in_any_order_is_as_in_its_batch(name):
  inputs, run = batch([3, 4, 1]), skipping(MODELS[name])
  together = run(inputs).outputs["logits"]
  assert np.ptp(together, axis=0).min() > 1e-3
  order = [2, 0, 1]
  CLOSE(
    run({key: x[order] for key, x in inputs.items()}).outputs["logits"], together[jnp.array(order)]
  )
  for i, length in enumerate([3, 4, 1]):
    CLOSE(run({key: x[i : i + 1] for key, x in inputs.items()}).outputs["logits"][0], together[i])
    CLOSE(
      run({key: x[i : i + 1, :length] for key, x in inputs.items()}).outputs["logits"][0],
      together[i],
    )


def test_the_heavy_net_is_given_chosen_clips_only_as_pixels_and_once_per_capacity():
  traced = []

  def noted(inputs):
    traced.append((inputs["clips"].shape[:2], inputs["clips"].dtype))
    return prepare(inputs)

  model = net("uniform", light=False)
  run = compile_segments(model, variables(model), capacities=(2, 4, 12), prepare=noted)
  inputs = batch([4, 3])
  assert [run(inputs).computed for _ in range(3)] == [4] * 3
  assert traced == [((2, SEGMENTS), np.uint8), ((4, 1), np.uint8)]
  run.warm_up(inputs)
  assert [shape for shape, _ in traced[2:]] == [(2, 1), (8, 1)]
  run({**inputs, "valid": np.ones((2, SEGMENTS), bool)})
  assert len(traced) == 4


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("capacities", "expected"),
  [
    ((12,), 8),
    ((8,), 8),
    ((100, 3), 8),
    ((5, 100), 5),
    ((1, 4, 5, 6, 9), 4),
    ((3,), 6),
    ((1,), 4),
    ((3, 1), 4),
  ],
)
def test_chosen_segments_are_made_up_of_any_capacities(capacities, expected):
  model, inputs = MODELS["uniform, channels gated"], batch([4, 4])
  result = compile_segments(model, variables(model), capacities=capacities, prepare=prepare)(inputs)
  assert (result.chosen, result.computed) == (4, expected)
  assert_same(model, result, inputs)


def test_closed_segments_do_not_matter_even_if_not_finite():
  """The first segment is closed and fills the bucket's padding."""
  model, inputs = MODELS["uniform"], prepare(batch([4, 3]))
  run = compile_segments(model, variables(model), capacities=(8,))
  result = run(inputs)
  chosen = np.asarray(result.records[0].gates) > 0
  assert not chosen[0, 0]
  assert result.chosen < result.computed
  spoilt = np.where(chosen[..., None, None, None, None], inputs["heavy"], np.nan)
  np.testing.assert_array_equal(
    run({**inputs, "heavy": spoilt}).outputs["logits"], result.outputs["logits"]
  )


def test_jax_arrays_will_do():
  model, inputs = MODELS["gate"], batch([3, 4, 1])
  assert_same(model, skipping(model)(jax.tree.map(jnp.asarray, inputs)), inputs)


@pytest.mark.parametrize(
  ("capacities", "message"),
  [
    ((), r"capacities must be numbers >= 1, at least one; got \(\)"),
    ((0, 8), r"capacities must be numbers >= 1, at least one; got \(0, 8\)"),
  ],
)
def test_capacities_that_cannot_be(capacities, message):
  model = MODELS["uniform"]
  with pytest.raises(ValueError, match=message):
    compile_segments(model, variables(model), capacities=capacities, prepare=prepare)


def test_arrays_that_are_not_of_segments_are_refused():
  inputs = {**batch([4, 4]), "label": np.zeros(2, np.int32)}
  with pytest.raises(
    ValueError, match=r"inputs must all be \[B, T, ...\] like valid, 2 x 4; got {'label': \(2,\)}"
  ):
    skipping(MODELS["uniform"])(inputs)


def test_other_variables_are_loaded_and_those_of_another_model_refused():
  model, inputs = MODELS["uniform"], batch([4, 3])
  run = compile_segments(model, variables(model), capacities=(4,), prepare=prepare)
  other = jax.tree.map(lambda x: 2 * x, variables(model))
  run.load(other)
  assert_same(model, run(inputs), inputs, other)
  assert run.report() == ()
  with pytest.raises(ValueError, match="net must have the parts and settings"):
    run.load(variables(MODELS["gate"]))


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["gate", "uniform, channels gated"])
def test_the_faster_of_both_ways_is_taken_and_all_times_are_reported(name):
  model, inputs, done = MODELS[name], batch([4, 3]), []
  run = compile_segments(
    model,
    variables(model),
    capacities=(2, 4),
    prepare=prepare,
    strategy="auto",
    calibration=inputs,
    repeats=1,
    progress=lambda *pieces: done.append(pieces),
  )
  rows = run.report()
  assert [row.strategy for row in rows] == ["segments", "masked", "ungated"]
  assert [row.strategy for row in rows if row.chosen] == [run.strategy]
  assert rows[0].mac_ratio == rows[1].mac_ratio <= rows[0].computed_ratio * 1.0001
  assert rows[0].computed_ratio <= rows[1].computed_ratio
  assert done == [(i, 7) for i in range(1, 8)]
  expected, _ = plain(model)(variables(model), inputs)
  jax.tree.map(CLOSE, run(inputs).outputs, expected)


def test_masked_runs_the_heavy_net_on_every_segment():
  model, inputs = MODELS["uniform, channels gated"], batch([4, 4])
  run = compile_segments(
    model, variables(model), capacities=(4,), prepare=prepare, strategy="masked"
  )
  run.warm_up(inputs)
  result, (outputs, records) = run(inputs), plain(model)(variables(model), inputs)
  jax.tree.map(CLOSE, (result.outputs, result.records), (outputs, records))
  assert (result.chosen, result.computed) == (4, 8)
  assert run.report() == ()


@pytest.mark.parametrize(
  ("how", "message"),
  [
    (dict(strategy="auto"), "calibration must be given for strategy 'auto'; got None"),
    (dict(strategy="segment"), "strategy must be one of .*; got 'segment'. Did you mean"),
    (dict(repeats=0), "repeats must be"),
  ],
)
def test_wrong_ways_to_compile_are_refused(how, message):
  model = MODELS["uniform"]
  with pytest.raises(ValueError, match=message):
    compile_segments(model, variables(model), capacities=(4,), prepare=prepare, **how)
