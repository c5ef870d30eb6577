import dataclasses
import functools
import math
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.continual import shared_net
from gating_jax.continual.method import Batch
from gating_jax.continual.methods import hat
from gating_jax.layers.gate import GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import VGG
from tests.helpers import tiny_tasks as toys

S_MAX, PRICE = 400.0, 0.75
MASKS = GateSettings(context="none", relaxation="sigmoid")
EMBEDDINGS = [("own", "net", layer, "gate", "logits") for layer in ("layer1", "layer2")]


def net(norm=True, axis_name=None, chain=(4, 6)):
  return VGG(
    classes=None, chain=chain, norm=norm, gating="channel", gate=MASKS, axis_name=axis_name
  )


@functools.cache
def method(norm=True, axis_name=None, steepness=S_MAX, sparsity=PRICE, chain=(4, 6)):
  model = net(norm, axis_name, chain)
  return hat.hat(
    model,
    toys.problem(axis_name),
    model_summary(model, toys.SHAPE),
    steepness=steepness,
    sparsity=sparsity,
  )


def shapes(model):
  """Returns records and parameters as shapes."""
  x = jax.ShapeDtypeStruct((1, *toys.SHAPE), jnp.float32)
  (_, records), variables = jax.eval_shape(
    lambda x: model.init_with_output(jax.random.key(0), x), x
  )
  convolutions = {
    path: leaf
    for path, leaf in flax.traverse_util.flatten_dict(variables["params"]).items()
    if "conv" in path[-2:]
  }
  return records, flax.traverse_util.unflatten_dict(convolutions)


def with_embeddings(params, *values):
  flat = flax.traverse_util.flatten_dict(params)
  assert all(path in flat for path in EMBEDDINGS)
  return flax.traverse_util.unflatten_dict(
    flat | {path: jnp.asarray(e, jnp.float32) for path, e in zip(EMBEDDINGS, values, strict=True)}
  )


def embeddings(params):
  flat = flax.traverse_util.flatten_dict(params)
  return [np.asarray(flat[path]) for path in EMBEDDINGS]


def batch(data, place=0.5):
  return Batch(
    toys.problem().normalise(data.pixels),
    jnp.asarray(data.labels),
    jax.random.key(0),
    jnp.float32(0),
    jnp.float32(place),
  )


def saturated(learner):
  """Pushes the embeddings to their limits: every mask is exactly 0 or 1."""
  return learner.replace(
    params=with_embeddings(
      learner.params, *(np.where(e > 0, 6, -6) for e in embeddings(learner.params))
    )
  )


def test_a_weight_is_as_free_as_the_freer_of_its_two_ends():
  records, convolutions = shapes(net(norm=False, chain=(2, 3)))
  free = hat.plasticity(convolutions, records, jnp.array([1, 0.25, 0.5, 0, 1]), jnp.float32(1))
  np.testing.assert_array_equal(free["layer1"]["conv"]["conv"]["kernel"], [0, 0.75])
  np.testing.assert_array_equal(free["layer1"]["conv"]["conv"]["bias"], [0, 0.75])
  np.testing.assert_array_equal(
    free["layer2"]["conv"]["conv"]["kernel"], [[0.5, 1, 0], [0.75, 1, 0.75]]
  )
  np.testing.assert_array_equal(free["layer2"]["conv"]["conv"]["bias"], [0.5, 1, 0])


@pytest.mark.slow
def test_unmasked_units_serve_every_task_and_a_shortcut_protects_its_input():
  records, convolutions = shapes(
    ResNet(classes=None, blocks=(1, 1), features=2, gating="all_channels", shortcut="B", gate=MASKS)
  )
  used = np.zeros(12)
  used[[0, 2, 4, 8]] = 1  # the first channel of each of conv1 and the output, in both blocks
  free = [
    hat.plasticity(convolutions, records, jnp.asarray(used), jnp.float32(started))
    for started in (0, 1)
  ]
  for started in (0, 1):
    assert np.all(free[started]["stem"]["conv"]["kernel"] == 1 - started)
  first, second = free[1]["stage1_block1"], free[1]["stage2_block1"]
  np.testing.assert_array_equal(first["conv1"]["conv"]["kernel"], [0, 1])
  np.testing.assert_array_equal(first["conv2"]["conv"]["kernel"], [[0, 1], [1, 1]])
  np.testing.assert_array_equal(second["conv1"]["conv"]["kernel"], [0, 1, 1, 1])
  np.testing.assert_array_equal(second["project"]["conv"]["kernel"], [0, 1, 1, 1])
  np.testing.assert_array_equal(
    second["conv2"]["conv"]["kernel"], [[0, 1, 1, 1]] + [[1, 1, 1, 1]] * 3
  )


def test_the_slope_rises_over_an_epoch():
  np.testing.assert_allclose(
    hat.slope(jnp.array([0, 0.25, 0.5, 0.75, 1]), 400.0),
    [1 / 400, 100.001875, 200.00125, 300.000625, 400],
    rtol=1e-6,
  )


def test_compensation_by_value():
  cosh = math.cosh
  np.testing.assert_allclose(
    hat.compensation(jnp.array([1.0, -1.0]), 2.0, 4.0),
    [2 * (cosh(2) + 1) / (cosh(1) + 1)] * 2,
    rtol=1e-6,
  )
  np.testing.assert_allclose(
    hat.compensation(jnp.array([6.0, -0.2]), 400.0, 400.0),
    [(cosh(50) + 1) / (cosh(6) + 1), (cosh(50) + 1) / (cosh(0.2) + 1)],
    rtol=1e-5,
  )


def test_compensated_gradients_are_those_of_a_slope_of_1_times_the_largest():
  e = jnp.linspace(-1.5, 1.5, 7)
  for s in (0.01, 1.0, 4.0):
    slope = jax.vmap(jax.grad(lambda e, s=s: jax.nn.sigmoid(s * e)))(e)
    np.testing.assert_allclose(
      slope * hat.compensation(e, s, S_MAX), S_MAX * special.expit(e) * special.expit(-e), rtol=1e-3
    )


def test_only_the_gradients_of_embeddings_are_compensated():
  learner = toys.learner(method())
  learner = learner.replace(params=with_embeddings(learner.params, [0.5] * 4, [-0.1] * 6))
  ones = jax.tree.map(jnp.ones_like, learner.params)
  grads = method().gradient(ones, learner, batch(toys.task(0), place=0.02))
  s = 1 / 400 + (400 - 1 / 400) * 0.02
  expected = with_embeddings(
    ones,
    *(
      [400 / s * (math.cosh(s * e) + 1) / (math.cosh(e) + 1)] * n for e, n in ((0.5, 4), (-0.1, 6))
    ),
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), grads, expected)


def test_regulariser_by_hand():
  masks, used = jnp.array([0.5, 1, 0.25, 1]), jnp.array([0, 1, 0.5, 0.25])
  np.testing.assert_allclose(
    hat.regulariser(masks, used), (0.5 + 0 + 0.125 + 0.75) / (1 + 0 + 0.5 + 0.75)
  )
  assert hat.regulariser(masks, jnp.zeros(4)) == np.mean([0.5, 1, 0.25, 1])
  value, grad = jax.value_and_grad(hat.regulariser)(masks, jnp.ones(4))
  assert (value, grad.tolist()) == (0, [0] * 4)  # no unit is left, and nothing is divided by 0


def test_the_loss_is_cross_entropy_and_the_price_of_the_masks_of_its_slope():
  learner = toys.learner(method())
  e = [0.5, -0.5, 0, 1], [0, 0.25, 0, -1, 1, 2]
  used = np.array([1, 0, 0, 0, 0.5, 0, 0, 0, 0, 1])
  learner = learner.replace(
    params=with_embeddings(learner.params, *e), memory=learner.memory.replace(used=used)
  )
  total, (terms, _) = jax.jit(method().loss)(
    learner.params, learner, batch(toys.task(0), place=0.01)
  )
  masks = special.expit((1 / 400 + (400 - 1 / 400) * 0.01) * np.concatenate(e))
  expected = np.sum(masks * (1 - used)) / np.sum(1 - used)
  np.testing.assert_allclose(terms["sparsity"], expected, rtol=1e-4)
  np.testing.assert_allclose(total, terms["cross_entropy"] + PRICE * expected, rtol=1e-4)


def test_embeddings_stay_within_their_limits():
  learner = toys.learner(method())
  learner = learner.replace(params=with_embeddings(learner.params, [5.5, -5.5, 0, 0], [0] * 6))
  steps = jax.tree.map(jnp.zeros_like, learner.params)
  steps = with_embeddings(steps, [1, -1, 1, -1], [0.25] * 6)
  updates, _ = method().update(steps, None, learner)
  first, second = embeddings(jax.tree.map(jnp.add, learner.params, updates))
  assert (first.tolist(), second.tolist()) == ([6, -6, 1, -1], [0.25] * 6)


@functools.cache
def after_one_task(norm=True, saturate=True):
  first = toys.train(method(norm), toys.learner(method(norm)), toys.task(0))
  return toys.end(method(norm), saturated(first) if saturate else first, toys.task(0))


@pytest.mark.slow
@pytest.mark.parametrize("norm", [True, False])
def test_saturated_masks_keep_the_first_task_while_the_second_is_learnt(norm):
  state = after_one_task(norm)
  used = np.asarray(state.memory.used)
  assert set(used.tolist()) == {0.0, 1.0}
  before = toys.aware(method(norm), state, 0, 1)
  last = toys.end(method(norm), toys.train(method(norm), state, toys.task(1)), toys.task(1), seed=1)
  after = toys.aware(method(norm), last, 0, 2)
  assert toys.accuracy(method(norm), last, 0, 2) == 1
  # Without BatchNorm, ten units do not suffice.
  assert toys.accuracy(method(norm), last, 1, 2) == 1 or not norm
  np.testing.assert_array_equal(after, before)

  unmasked = dataclasses.replace(
    method(norm), update=lambda updates, grads, learner: (updates, learner.memory)
  )
  forgotten = toys.aware(method(norm), toys.train(unmasked, state, toys.task(1)), 0, 1)
  assert np.abs(forgotten - before).max() > 0.1


@pytest.mark.slow
def test_masking_the_gradient_in_place_of_the_update_would_move_what_is_protected():
  state = after_one_task()
  state = state.replace(memory=state.memory.replace(used=jnp.ones(10)))
  masked = lambda grads, learner, batch: method().update(grads, grads, learner)[0]
  unmasked = dataclasses.replace(
    method(), gradient=masked, update=lambda updates, grads, learner: (updates, learner.memory)
  )
  shared = state.params["shared"]
  moved = jax.tree.leaves(
    jax.tree.map(
      lambda a, b: np.any(np.asarray(a != b)),
      shared,
      toys.train(unmasked, state, toys.task(1), count=3).params["shared"],
    )
  )
  kept = jax.tree.leaves(
    jax.tree.map(
      lambda a, b: np.all(np.asarray(a == b)),
      shared,
      toys.train(method(), state, toys.task(1), count=3).params["shared"],
    )
  )
  assert (moved, kept) == ([True, True], [True, True])


def test_what_tasks_use_is_the_largest_of_their_masks_and_each_starts_anew():
  state = after_one_task(saturate=False).replace(task=jnp.int32(0))
  used = np.linspace(0, 1, 10)
  state = state.replace(
    params=with_embeddings(state.params, [0.001, -0.001, 1, -1], [0, 0.002, 1, 1, -1, -1]),
    memory=state.memory.replace(used=jnp.asarray(used, jnp.float32)),
  )
  ended = toys.end(method(), state, toys.task(0), seed=5)
  masks = special.expit(400 * np.array([0.001, -0.001, 1, -1, 0, 0.002, 1, 1, -1, -1]))
  np.testing.assert_allclose(ended.memory.used, np.maximum(masks, used), rtol=1e-5, atol=1e-7)
  stored = embeddings(jax.tree.map(lambda tree: tree[0], {"own": ended.memory.own.params}))
  for kept, now, new in zip(
    stored, embeddings(state.params), embeddings(ended.params), strict=True
  ):
    np.testing.assert_array_equal(kept, now)
    assert len(np.unique(new)) == len(new)
    assert np.abs(new - now).min() > 1e-4
  jax.tree.map(np.testing.assert_array_equal, ended.params["shared"], state.params["shared"])
  assert toys.same_shapes(ended, state)


def test_running_statistics_of_a_finished_task_are_those_of_its_steepest_masks():
  state, data = toys.train(method(), toys.learner(method()), toys.task(0, 128)), toys.task(0, 128)
  assert len({1.0, -1.0} & set(np.sign(np.concatenate(embeddings(state.params))))) == 2
  steep = jax.tree_util.tree_map_with_path(
    lambda path, x: S_MAX * x if "gate" in jax.tree_util.keystr(path) else x, state.params
  )
  one = shared_net.SharedNet(net(), toys.problem())
  new = one.apply(steep, state.batch_stats, batch(data).x, train=True).batch_stats["own"]["layer2"][
    "conv"
  ]["norm"]
  mean = lambda stats: np.asarray(stats["own"]["layer2"]["conv"]["norm"]["mean"])
  whole = (np.asarray(new["mean"]) - 0.9 * mean(state.batch_stats)) / 0.1
  kept = jax.tree.map(lambda x: x[0], toys.end(method(), state, data).memory.own.batch_stats)
  gap = lambda m: np.abs(m - whole).max()
  assert 3 * gap(mean({"own": kept})) < gap(mean(state.batch_stats))


def test_macs_count_every_unit_whose_mask_is_not_exactly_0():
  state = after_one_task().replace(task=jnp.int32(0))
  params = with_embeddings(state.params, [6, -6, -6, -0.01], [6, 6, -6, -6, -6, -6])
  ended = toys.end(method(), state.replace(params=params), toys.task(0))
  p = jax.jit(method().predict, static_argnums=3)(ended, batch(toys.task(0)).x, 0, 1)
  fixed = 6 * 2  # the head
  assert set(np.asarray(p.macs).tolist()) == {16 * 9 * (1 * 2 + 2 * 2) + fixed}
  np.testing.assert_array_equal(p.agnostic_macs, p.macs)


@pytest.mark.slow
def test_two_devices_learn_as_one():
  data, axis = toys.task(0), "devices"
  one, _ = jax.jit(toys.step(method()))(toys.learner(method()), data.pixels, data.labels, 0)
  halves = lambda x: x.reshape(2, -1, *x.shape[1:])
  step = toys.step(method(axis_name=axis), axis)
  two, _ = jax.pmap(step, axis, in_axes=(None, 0, 0, None), devices=jax.devices()[:2])(
    toys.learner(method(axis_name=axis)), halves(data.pixels), halves(data.labels), 0
  )
  assert np.any(embeddings(one.params)[1] != embeddings(toys.learner(method()).params)[1])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-3, atol=1e-5),
    (one.params, one.batch_stats),
    (two.params, two.batch_stats),
  )


@pytest.mark.parametrize(
  ("setting", "rule"),
  [
    ({"steepness": 0.5}, ">= 1; got 0.5"),
    ({"sparsity": -1.0}, ">= 0; got -1.0"),
  ],
)
def test_bad_settings_are_named(setting, rule):
  with pytest.raises(ValueError, match=f"^{next(iter(setting))} must be {re.escape(rule)}$"):
    method(**setting)
