"""A generator with masks, and a classifier that learns from what it remembers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from gating_jax.continual.generators import protections, shared, wgan
from gating_jax.continual.method import Batch, Problem
from gating_jax.continual.methods import dgm, hat
from gating_jax.continual.rehearsal import Rehearsal, ReplayedImages
from gating_jax.layers.gate import GateSettings
from gating_jax.models.generator import Generator
from tests.helpers import tiny, toy

SHAPE, STEPS, STEEPNESS = (16, 16, 1), 8, 400.0
PROBLEM = Problem(tasks=2, classes=2, shape=SHAPE, normalise=lambda x: x / 255.0)
GENERATOR = Generator(
  SHAPE,
  latent=4,
  width=4,
  classes=2,
  gating="channel",
  gate=GateSettings(context="none", relaxation="sigmoid"),
)
KEY = jax.random.key(0, impl="rbg")
UNITS = 12
fresh = functools.cache(
  lambda: shared.split(
    jax.jit(GENERATOR.init)(KEY, jnp.zeros((1, 4)), jnp.zeros(1, int))["params"],
    shared.trace_records(GENERATOR),
  )
)


def masked(**changes):
  return protections.masked(
    GENERATOR, PROBLEM.tasks, **{"steps": STEPS, "steepness": STEEPNESS, "sparsity": 0.5, **changes}
  )


def params_with(*embeddings):
  own = {
    name: {**fresh().own[name], "gate": {"logits": jnp.asarray(e, jnp.float32)}}
    for name, e in zip(("map1", "map2"), embeddings, strict=True)
  }
  return fresh()._replace(own={**fresh().own, **own})


@functools.cache
def learnt(protected=True):
  """Returns the recalled images of the first task after it and after the second.

  The second task's first mask is saturated.
  """
  settings = wgan.WganSettings(critic_steps=1, learning_rate=1e-2, ema_decay=0.5)
  protection = whole = masked()
  if not protected:
    unmasked = lambda state, step: dataclasses.replace(
      whole.training(state, step), update=lambda updates, params: updates
    )
    protection = dataclasses.replace(whole, training=unmasked)
  method = shared.shared_generative(
    PROBLEM, GENERATOR, settings, protection, images=20, replayed=16, seed=0
  )
  step, memory, recalled = jax.jit(method.pretrain_step), jax.jit(method.init)(KEY), []
  for task in range(2):
    for i in range(STEPS):
      pixels = np.random.default_rng([task, i]).integers(100 * task, 100 * task + 100, (16, *SHAPE))
      memory, _ = step(memory, jnp.asarray(pixels, jnp.uint8), jnp.arange(16) % 2)
    if task == 0:
      push = lambda params: hat.change_embeddings(lambda e: jnp.where(e > 0, 6.0, -6.0), params)
      training = memory.training
      memory = memory.replace(training=training.replace(average=push(training.average)))
    recalled.append(method.recall(memory, None, task, KEY))
    memory = method.keep(memory, None, task, KEY)
  return recalled, memory


@pytest.mark.slow
def test_saturated_masks_keep_images_to_the_bit_and_without_protection_they_change():
  (first, both), memory = learnt()
  masks = np.asarray(memory.protection.masks)
  assert set(masks[0].tolist()) == {0.0, 1.0}
  np.testing.assert_array_equal(both[0][:20], first[0])
  assert np.bincount(both[1]).tolist() == [10] * 4
  assert len(np.unique(first[0], axis=0)) > 10
  (first, both), _ = learnt(protected=False)
  assert np.mean(both[0][:20] != first[0]) > 0.5


def test_the_largest_mask_protects_updates_and_embeddings_move_within_limits():
  params = params_with([0] * 7 + [5.9], [0] * 4)
  used = jnp.zeros((2, UNITS)).at[0, 0].set(1).at[1, 1].set(0.25).at[0, 8].set(1)
  change = masked().training(protections.UsedUnits(used), 0).update
  ones = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params)
  updates = jax.jit(change)(shared.shared_net.merge(*ones), shared.shared_net.merge(*params))
  free = lambda name: np.asarray(updates[name]["filters"]["kernel"]) / 0.1
  np.testing.assert_allclose(free("map1")[0, 0, 0], [0, 0.75] + [1] * 6, rtol=1e-6)
  # From a unit less in use.
  np.testing.assert_allclose(free("map2")[0, 0, :, 0], [0, 0.75] + [1] * 6, rtol=1e-6)
  np.testing.assert_allclose(free("map2")[0, 0, :, 1], [1] * 8)
  np.testing.assert_allclose(updates["map1"]["gate"]["logits"], [1] * 7 + [0.1], rtol=1e-5)
  np.testing.assert_allclose(updates["pixels"]["kernel"], 0.1)


def test_the_slope_rises_over_the_training_and_a_mask_costs_what_it_takes():
  params = shared.shared_net.merge(*params_with([0.01] * 8, [-0.01] * 4))
  state = protections.UsedUnits(jnp.zeros((2, UNITS)).at[0, :4].set(1))
  for step, s in ((0, 1 / STEEPNESS), (STEPS - 1, STEEPNESS)):
    training = masked().training(state, step)
    seen = training.view(params)
    np.testing.assert_allclose(seen["map1"]["gate"]["logits"], 0.01 * s, rtol=1e-5)
    _, records = jax.jit(GENERATOR.apply)({"params": seen}, jnp.zeros((3, 4)), jnp.zeros(3, int))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    taken = (4 * sigmoid(0.01 * s) + 4 * sigmoid(-0.01 * s)) / 8
    np.testing.assert_allclose(training.records_loss(records), 0.5 * taken, rtol=1e-5)


def test_a_finished_task_keeps_its_mask_at_the_full_slope_and_what_is_its_own():
  params = params_with([0.01] * 8, [-0.01] * 4)
  state, own = masked().finish(protections.UsedUnits(jnp.zeros((2, UNITS))), 1, params, {}, KEY)
  expected = [special.expit(0.01 * STEEPNESS)] * 8 + [special.expit(-0.01 * STEEPNESS)] * 4
  np.testing.assert_allclose(state.masks, [[0] * UNITS, expected], rtol=1e-5)
  assert tiny.bit_equal(own, params.own)


def perfect():
  """A rehearsal that remembers real images: the same number of every class seen."""
  pool = [
    np.concatenate(x)
    for x in zip(*(toy.images(t, per_class=8)[:2] for t in range(toy.TASKS)), strict=True)
  ]

  def replay(memory, batch, task, key):
    places = jax.random.randint(key, (16,), 0, 16 * (task + 1))
    return ReplayedImages(
      toy.normalise(jnp.asarray(pool[0])[places]), jnp.asarray(pool[1])[places], 0.0
    )

  return Rehearsal(
    init=lambda key: jnp.zeros(3),
    replay=replay,
    recall=None,
    keep=lambda memory, data, task, key: memory + 1,
    megabytes=lambda memory, learnt: 2.0 * learnt,
    pretrain_step=lambda memory, x, labels: (memory, {"labels": labels}),
  )


def method(real=0.0):
  return dgm.dgm(toy.network(), perfect(), real_weight=real)


@pytest.mark.thin(2)
@pytest.mark.parametrize("real", [0.0, 0.5])
def test_remembered_images_keep_all_classes_alive(real):
  learner = toy.learn(method(real))
  assert np.mean(toy.accuracies(method(real), learner)[1]) > 0.9
  np.testing.assert_array_equal(learner.memory.rehearsal, 3)
  assert method().footprint(learner).memory_mb == 6.0
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(toy.start(method())) == shapes(learner)


@pytest.mark.slow
def test_real_images_have_their_share_of_the_loss():
  learner, data = toy.start(method()).replace(task=jnp.int32(2)), toy.images(2)
  other = toy.images(2, seed=5)
  terms = lambda real, d: method(real).loss(
    learner.params, learner, Batch(toy.normalise(d.pixels[:8]), jnp.asarray(d.labels[:8]), KEY, 0.0)
  )
  total, (parts, _) = terms(0.25, data)
  assert float(total) == pytest.approx(
    float(0.25 * parts["cross_entropy"] + 0.75 * parts["replay"]), rel=1e-6
  )
  assert float(parts["replay"]) != pytest.approx(float(parts["cross_entropy"]), abs=1e-4)
  assert float(terms(0.0, data)[0]) == pytest.approx(float(parts["replay"]), rel=1e-6)
  assert float(terms(0.0, data)[0]) == float(terms(0.0, other)[0])  # it sees generated images only


def test_the_prelude_sees_labels_of_its_task():
  learner = toy.start(method()).replace(task=jnp.int32(2))
  after, metrics = method().pretrain_step(
    learner, jnp.zeros((2, *toy.SHAPE), jnp.uint8), jnp.array([4, 5])
  )
  assert metrics["labels"].tolist() == [0, 1]
  assert int(after.step) == int(learner.step) + 1


def test_settings_are_checked():
  with pytest.raises(ValueError, match=r"real_weight must be a fraction in \[0, 1\); got 1.0"):
    method(1.0)
  with pytest.raises(ValueError, match="steepness must be >= 1; got 0"):
    masked(steepness=0)
  with pytest.raises(ValueError, match="sparsity must be >= 0; got -1"):
    masked(sparsity=-1)
