import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.data.image_sets import Images, padded_batches, process_indices
from gating_jax.ops.macs import gated_macs
from gating_jax.training import devices, steps
from gating_jax.training.devices import BATCH, REPLICATED
from tests.helpers import tiny

OPTIMISER = optax.sgd(0.1, momentum=0.9, nesterov=True)
EXAMPLES, BATCH_SIZE = 40, 16
backends = pytest.mark.parametrize("backend", devices.BACKENDS)


@pytest.fixture
def compilations():
  """XLA's compilations since the start of the test, or since the list was cleared."""
  seen = []

  def listen(event, duration, **_):
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


@functools.cache
def dispatch(k, backend="pmap", gating="channel"):
  """`(state, at) -> (state, metrics)`: k steps on eight devices over resident images."""
  run = devices.map_over_devices(
    steps.resident_steps(tiny.train_step(OPTIMISER, gating=gating, axis_name=devices.AXIS)),
    args=(REPLICATED, REPLICATED, BATCH),
    results=(REPLICATED, REPLICATED),
    backend=backend,
  )
  images = devices.replicate(tiny.images(EXAMPLES))
  return lambda state, at: run(state, images, process_indices(0, at, k, BATCH_SIZE, EXAMPLES))


@functools.cache
def plain_step(seed=0):
  return jax.jit(tiny.train_step(OPTIMISER, seed=seed))


def after(state, first, last, k=1, **kwargs):
  """The state after some steps, and their metrics, one array per name."""
  history = []
  for at in range(first, last, k):
    state, metrics = dispatch(k, **kwargs)(state, at)
    history.append(jax.device_get(metrics))
  return state, {name: np.concatenate([m[name] for m in history]) for name in history[0]}


def start(gating="channel"):
  return devices.replicate(tiny.state(OPTIMISER, gating))


def test_batches_from_the_host_train_as_those_on_the_devices():
  pixels, labels = tiny.images(EXAMPLES)
  mapped = steps.MappedSteps(
    lambda model: tiny.train_step(OPTIMISER, axis_name=devices.AXIS), tiny.net(), None, "pmap"
  )

  def indices(step):
    """Returns the images of one step."""
    return process_indices(0, step, 1, BATCH_SIZE, EXAMPLES)

  batches = ((pixels[indices(step)], labels[indices(step)]) for step in range(2))
  sources = (mapped.on_stream(batches), mapped.on_resident((pixels, labels), indices))
  ended = []
  for advance in sources:
    state = start()
    for step in range(2):
      state, _ = advance(state, step)
    ended.append(state)
  assert tiny.bit_equal(*ended)


@pytest.mark.slow
def test_four_steps_in_one_dispatch_equal_four_single_ones():
  single, ones = after(start(), 0, 4)
  together, four = after(start(), 0, 4, k=4)
  assert int(single.step) == int(together.step) == 4
  assert tiny.relative_gap(start().params, single.params) > 1e-2
  assert tiny.relative_gap(together.params, single.params) < 1e-6
  assert tiny.relative_gap(together.batch_stats, single.batch_stats) < 1e-6
  assert ones.keys() == four.keys()
  assert len(set(ones["loss"])) == 4
  for name in ones:
    np.testing.assert_allclose(four[name], ones[name], rtol=1e-5, err_msg=name)


@pytest.mark.thin(2)
@backends
def test_nothing_compiles_after_the_first_step(backend, compilations):
  state, _ = after(start(), 0, 1, backend=backend)
  assert compilations
  jax.block_until_ready(state)
  compilations.clear()
  state, metrics = after(state, 1, 7, backend=backend)
  assert int(state.step) == 7
  assert len(set(metrics["loss"])) == 6
  assert compilations == []


def test_a_step_depends_on_seed_and_step_alone():
  state, data = tiny.state(OPTIMISER), tiny.images(BATCH_SIZE)
  at_three = state.replace(step=jnp.int32(3))
  first, _ = plain_step()(at_three, *data)
  again, _ = jax.jit(tiny.train_step(OPTIMISER))(at_three, *data)
  other_step, _ = plain_step()(state, *data)
  other_seed, _ = plain_step(seed=1)(at_three, *data)
  assert tiny.bit_equal(first, again)
  assert not tiny.bit_equal(first.params, other_step.params)
  assert not tiny.bit_equal(first.params, other_seed.params)


def test_an_ungated_net_trains_with_the_same_step():
  state, metrics = after(start("none"), 0, 1, gating="none")
  assert set(metrics) == {"loss", "cross_entropy", "accuracy", "gradient_norm", "state_norm"}
  np.testing.assert_array_equal(metrics["loss"], metrics["cross_entropy"])
  squares = [
    np.sum(np.square(leaf))
    for leaf in jax.tree.leaves(jax.device_get((state.params, state.batch_stats)))
  ]
  np.testing.assert_allclose(metrics["state_norm"], [np.sqrt(np.sum(squares))], rtol=1e-5)
  assert tiny.relative_gap(state.params, start("none").params) > 1e-3


def test_metrics_of_a_gated_net_are_over_the_whole_batch():
  _, metrics = after(start(), 0, 4)
  by_hand = metrics["cross_entropy"] + 0.75 * metrics["batch_shaping"] + 0.5 * metrics["l0"]
  np.testing.assert_allclose(metrics["loss"], by_hand, rtol=1e-6)
  open_gates = metrics["gate_rate/stage1_block1/conv1"] * BATCH_SIZE * 4
  np.testing.assert_allclose(open_gates, np.round(open_gates), atol=1e-4)
  assert np.all((open_gates > 0) & (open_gates < BATCH_SIZE * 4))
  share = metrics["gate_rate/stage1_block1/conv1"] * 6 * 6 * 9 * (4 + 4) * 4
  np.testing.assert_allclose(
    metrics["mac_ratio"], (100 + share) / (100 + 6 * 6 * 9 * (4 + 4) * 4), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics["accuracy"] * BATCH_SIZE, np.round(metrics["accuracy"] * BATCH_SIZE), atol=1e-5
  )


def test_a_fresh_state_depends_on_its_seed():
  assert tiny.bit_equal(tiny.state(OPTIMISER, seed=1), tiny.state(OPTIMISER, seed=1))
  assert not tiny.bit_equal(
    tiny.state(OPTIMISER, seed=1).params, tiny.state(OPTIMISER, seed=2).params
  )
  assert int(tiny.state(OPTIMISER).step) == 0


@pytest.mark.parametrize("k", [1, 3])
def test_steps_of_one_call_take_their_columns_in_order(k):
  step = lambda state, pixels, labels: (10 * state + jnp.sum(labels), {"seen": jnp.sum(pixels)})
  pixels, labels = np.arange(6, dtype=np.float32) / 8, np.arange(6, dtype=np.int32)
  indices = np.array([[1, 2, 5], [0, 0, 0]])[:, :k]
  state, metrics = steps.resident_steps(step)(
    jnp.int32(0), (jnp.asarray(pixels), jnp.asarray(labels)), indices
  )
  assert int(state) == {1: 1, 3: 125}[k]
  np.testing.assert_array_equal(metrics["seen"], pixels[indices].sum(axis=0))
  streamed, same = steps.streamed_steps(step)(jnp.int32(0), (pixels[indices], labels[indices]))
  assert int(streamed) == int(state)
  np.testing.assert_array_equal(same["seen"], metrics["seen"])


@functools.cache
def mixed_state():
  """A state, on the host, whose gates all open on some of 37 images."""
  random = np.random.default_rng(6)
  noisy = lambda tree: jax.tree.map(
    lambda x: np.asarray(x + random.normal(0, 0.5, x.shape), np.float32), tree
  )
  state = jax.device_get(tiny.state(OPTIMISER))
  state = state.replace(
    params=noisy(state.params), batch_stats=jax.tree.map(np.abs, noisy(state.batch_stats))
  )
  evaluate = jax.jit(steps.make_eval_step(tiny.net(), tiny.normalise))
  results = evaluate(state, *tiny.images(37, seed=5))
  state.params["stage1_block1"]["gate"]["head"]["logits"]["bias"] -= np.mean(
    results["gate_logits"], axis=0
  )
  return state


def evaluated(batch_size, used, backend="pmap"):
  """Results of 37 images, each once, in order."""
  run = devices.map_over_devices(
    steps.make_eval_step(tiny.net(axis_name=devices.AXIS), tiny.normalise),
    args=(REPLICATED, BATCH, BATCH),
    results=BATCH,
    backend=backend,
    devices=used,
  )
  state = devices.replicate(mixed_state(), used)
  images = Images(*tiny.images(37, seed=5), class_names=("a", "b", "c"))
  parts = [
    jax.tree.map(lambda x: np.asarray(x)[:valid], run(state, pixels, labels))  # noqa: B023
    for (pixels, labels), valid in padded_batches(images, batch_size)
  ]
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.thin(3)
@backends
@pytest.mark.parametrize("batch_size", [8, 24, 1000])
def test_evaluation_covers_every_image_once_whatever_the_batch_and_the_devices(batch_size, backend):
  eight, one = evaluated(batch_size, jax.devices(), backend), evaluated(7, jax.devices()[:1])
  assert (
    eight.keys()
    == one.keys()
    == {"predicted", "correct", "cross_entropy", "macs", "gates", "gate_logits"}
  )
  assert all(len(value) == 37 for value in eight.values())
  assert 0 < one["correct"].mean() < 1
  assert np.all((one["gates"].mean(axis=0) > 0) & (one["gates"].mean(axis=0) < 1))
  for name in ("correct", "gates", "macs"):
    np.testing.assert_array_equal(eight[name], one[name], err_msg=name)
  for name in ("cross_entropy", "gate_logits"):
    np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_evaluation_needs_no_key_and_gives_the_same_twice():
  step = jax.jit(steps.make_eval_step(tiny.net(), tiny.normalise))
  state, data = mixed_state(), tiny.images(12, seed=6)
  once, twice = step(state, *data), step(state, *data)
  assert tiny.bit_equal(once, twice)
  np.testing.assert_array_equal(once["gates"], np.asarray(once["gate_logits"]) > 0)
  alone = step(state, data[0][:1], data[1][:1])
  np.testing.assert_allclose(alone["gate_logits"][0], once["gate_logits"][0], rtol=1e-4, atol=1e-5)


def test_evaluation_counts_the_macs_of_open_gates():
  state, data = mixed_state(), tiny.images(12, seed=6)
  results = steps.make_eval_step(tiny.net(), tiny.normalise)(state, *data)
  per_gate = 6 * 6 * 9 * (4 + 4)
  np.testing.assert_array_equal(results["macs"], per_gate * np.sum(results["gates"], axis=-1))
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  _, records = tiny.net().apply(variables, tiny.normalise(data[0]))
  assert gated_macs(records) == 4 * per_gate


@pytest.mark.slow
def test_evaluation_of_an_ungated_net_has_no_gates():
  results = steps.make_eval_step(tiny.net("none"), tiny.normalise)(
    tiny.state(OPTIMISER, "none"), *tiny.images(5)
  )
  assert set(results) == {"predicted", "correct", "cross_entropy"}
  assert results["correct"].shape == results["cross_entropy"].shape == (5,)


def noisy(schedule, net=None):
  return jax.jit(
    steps.make_train_step(
      net or tiny.net(), OPTIMISER, tiny.objective(), tiny.prepare, seed=0, noise_scale=schedule
    )
  )


@pytest.mark.slow
def test_a_scheduled_noise_scale_equals_the_settings_and_compiles_once():
  state, batch = tiny.state(OPTIMISER), tiny.images(BATCH_SIZE)
  step, rates = noisy(optax.linear_schedule(4.0, 0.0, 2)), []
  for at in range(3):
    following, metrics = step(state, *batch)
    scale = 4.0 - 2 * at
    net = tiny.net().clone(gate=dataclasses.replace(tiny.net().gate, noise_scale=scale))
    expected, values = noisy(None, net)(state, *batch)
    assert float(metrics["gates/noise_scale"]) == scale
    rates.append(float(metrics["gate_rate/stage1_block1/conv1"]))
    assert rates[-1] == float(values["gate_rate/stage1_block1/conv1"])
    assert tiny.relative_gap(following.params, expected.params) < 1e-6
    assert "gates/noise_scale" not in values
    state = following
  assert len(set(rates)) > 1
  assert step._cache_size() == 1


@pytest.mark.slow
def test_the_schedule_goes_on_where_a_restart_finds_it():
  state, batch = tiny.state(OPTIMISER), tiny.images(BATCH_SIZE)
  step = noisy(optax.linear_schedule(4.0, 0.0, 4))
  halfway, _ = step(*[state, *batch])
  kept = jax.tree.map(np.array, halfway)
  end, _ = step(halfway, *batch)
  again, metrics = noisy(optax.linear_schedule(4.0, 0.0, 4))(kept, *batch)
  assert float(metrics["gates/noise_scale"]) == 3
  assert tiny.bit_equal(again, end)
