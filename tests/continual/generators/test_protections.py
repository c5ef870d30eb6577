"""Images of a task stay bit-equal, whatever the generator learns later."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual.generators import protections, wgan
from gating_jax.continual.generators import shared as shared_generator
from gating_jax.continual.method import Problem
from gating_jax.continual.units import ProtectionSettings, by_record
from gating_jax.layers.gate import GateSettings
from gating_jax.models.generator import Generator
from tests.helpers import tiny

SHAPE, TASKS, IMAGES = (16, 16, 1), 3, 40
PROBLEM = Problem(tasks=TASKS, classes=2, shape=SHAPE, normalise=lambda x: x / 255.0)
GENERATOR = Generator(
  SHAPE,
  latent=4,
  width=4,
  classes=2,
  gating="channel",
  gate=GateSettings(hidden=4, initial_open=0.6),
)
records_of_net = functools.cache(lambda: shared_generator.trace_records(GENERATOR))
KEY = jax.random.key(0, impl="rbg")
UNITS = 12  # 8 of the first map, 4 of the second


init, apply = jax.jit(GENERATOR.init), jax.jit(GENERATOR.apply)


def fresh():
  return init(KEY, jnp.zeros((1, 4)), jnp.zeros(1, int))


def protection(**changes):
  return protections.gated(
    GENERATOR,
    TASKS,
    ProtectionSettings(**{"sparsity": 0.1, "patience": 0.0, "threshold": 0.4, **changes}),
  )


def rehearsal(**changes):
  settings = wgan.WganSettings(critic_steps=1, learning_rate=1e-2, ema_decay=0.5)
  return shared_generator.shared_generative(
    PROBLEM, GENERATOR, settings, protection(**changes), images=IMAGES, replayed=12, seed=0
  )


def images(task, count=16):
  """Makes images that are bright in one of three parts, brighter for the second class."""
  labels = np.arange(count) % 2
  pixels = np.random.default_rng(task).integers(0, 60, (count, *SHAPE))
  pixels[:, 5 * task : 5 * task + 5] += 80 + 80 * labels[:, None, None, None]
  return jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.int32)


@functools.cache
def learnt(**changes):
  """Returns the rehearsal, its memory after each task, and the images it recalled then."""
  method, recalled = rehearsal(**changes), []
  step = jax.jit(method.pretrain_step)
  memories = [jax.jit(method.init)(KEY)]
  for task in range(TASKS):
    memory = memories[-1]
    for _ in range(8):
      memory, _ = step(memory, *images(task))
    recalled.append(method.recall(memory, None, task, KEY))
    memories.append(method.keep(memory, None, task, KEY))
  return method, memories[1:], recalled


@pytest.fixture(scope="module")
def rehearsed():
  return learnt()


def shared(memory):
  return shared_generator.split(memory.training.average, records_of_net()).shared


@pytest.mark.slow
def test_nothing_that_was_generated_is_ever_generated_otherwise(rehearsed):
  _, memories, recalled = rehearsed
  for task, (pixels, labels) in enumerate(recalled):
    assert np.bincount(labels).tolist() == [IMAGES // 2] * 2 * (task + 1)
    assert len(np.unique(pixels, axis=0)) > len(pixels) / 2
    np.testing.assert_array_equal(recalled[-1][0][: len(pixels)], pixels)
  assert not tiny.bit_equal(shared(memories[-1]), shared(memories[0]))


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["protect_updates", "shut_gates"])
def test_every_protection_is_needed(removed):
  _, memories, recalled = learnt(**{removed: False})
  relevant = np.asarray(memories[0].protection.relevant)[0]
  assert 0 < relevant.sum() < UNITS
  assert np.any(recalled[-1][0][:IMAGES] != recalled[0][0])


@pytest.mark.slow
def test_frozen_filters_stay_and_the_others_begin_anew(rehearsed):
  method, memories, _ = rehearsed
  before, after = shared(memories[0]), shared(memories[1])
  protection = memories[0].protection
  relevant = by_record(np.asarray(protection.relevant[0]), records_of_net())
  again = np.asarray(memories[1].protection.relevant[1])
  for layer, mine, later in zip(
    ("map1", "map2"), relevant, by_record(again, records_of_net()), strict=True
  ):
    old, new = (np.asarray(s[layer]["filters"]["kernel"]) for s in (before, after))
    np.testing.assert_array_equal(protection.frozen[layer]["filters"]["kernel"], mine)
    np.testing.assert_array_equal(new[..., mine], old[..., mine])
    bias = np.asarray(before[layer]["filters"]["bias"])
    assert np.all(bias[..., ~mine] == 0)  # not trained yet
    assert np.all(np.any(bias[..., mine].reshape(-1, mine.sum()) != 0, axis=0))
    assert np.all(old[..., ~mine & ~later] != new[..., ~mine & ~later])
  assert tiny.bit_equal(memories[0].training.average, memories[0].training.generator)


def test_a_batch_is_joined_by_all_classes_so_far_and_old_images_stay(rehearsed):
  method, memories, _ = rehearsed
  memory = memories[0]
  later, _ = jax.jit(method.pretrain_step)(memory, *images(1))
  one, two = (jax.jit(method.replay)(m, None, 1, jax.random.key(3)) for m in (memory, later))
  np.testing.assert_array_equal(one.labels, two.labels)
  assert set(one.labels.tolist()) == {0, 1, 2, 3}
  old = np.asarray(one.labels) < 2
  np.testing.assert_array_equal(one.x[old], two.x[old])
  assert np.any(np.asarray(one.x) != two.x)
  assert (one.x.shape, one.batch_weight) == ((12, *SHAPE), 0.0)


def test_what_each_task_has_for_itself_is_kept_and_starts_fresh(rehearsed):
  method, memories, _ = rehearsed
  parts = [shared_generator.split(m.training.average, records_of_net()).own for m in memories]
  assert set(parts[0]) == {"pixels", "map1", "map2"}
  assert set(parts[0]["map1"]) == set(parts[0]["map2"]) == {"gate"}
  kept = jax.tree.map(lambda x: x[0], memories[-1].own)
  assert tiny.bit_equal(kept, jax.tree.map(lambda x: x[0], memories[0].own))
  assert not tiny.bit_equal(kept.params["pixels"], parts[0]["pixels"])


def test_units_whose_gates_open_often_are_relevant_and_other_gates_are_shut():
  params = fresh()
  head = params["params"]["map1"]["gate"]["head"]["logits"]
  head["kernel"] = jnp.zeros_like(head["kernel"])
  head["bias"] = jnp.array([1.0, -1.0] * 4)
  rates = protections.open_rates(GENERATOR, params, KEY)
  np.testing.assert_array_equal(rates[:8], [1, 0] * 4)
  parts = shared_generator.split(params["params"], records_of_net())
  gates = protection(threshold=0.5)
  state, own = gates.finish(gates.init(parts.shared), 1, parts, params["batch_stats"], KEY)
  np.testing.assert_array_equal(state.relevant[1], rates > 0.5)
  assert not np.any(state.relevant[jnp.array([0, 2])])
  np.testing.assert_array_equal(
    own["map1"]["gate"]["head"]["logits"]["bias"] < -100, [False, True] * 4
  )


def test_open_gates_cost_their_share_after_the_patience():
  gates = protection(sparsity=2.0, patience=3.0)
  state = gates.init(shared_generator.split(fresh()["params"], records_of_net()).shared)
  _, records = apply(fresh(), jax.random.normal(KEY, (9, 4)), jnp.zeros(9, int))
  shares = [np.mean(r.gates) for r in records]
  for step, price in ((2, 0.0), (3, 2.0)):
    np.testing.assert_allclose(
      gates.training(state, step).records_loss(records), price * np.mean(shares), rtol=1e-6
    )


def test_it_needs_the_filters_once_and_the_rest_of_every_task_learnt(rehearsed):
  method, memories, _ = rehearsed
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  filters = 4 * ((4 + 2) * 16 * 8 + 16 * 8 + 9 * 8 * 4 + 4)
  own = size(shared_generator.split(memories[0].training.average, records_of_net()).own)
  statistics = size(memories[0].training.batch_stats)
  state = size(memories[0].protection)
  for tasks in (1, 3):
    assert method.megabytes(memories[-1], tasks) == pytest.approx(
      (filters + tasks * (own + statistics) + state) / 1e6
    )
