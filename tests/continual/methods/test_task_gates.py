"""Zero forgetting: the logits of a task stay bit-equal, whatever is learnt later."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from gating_jax.continual import rehearsal, task_inference, training
from gating_jax.continual.method import Batch, LearnerState, Network, Problem, TaskData, TaskTable
from gating_jax.continual.methods.task_gates import FullLayerError, TaskGatesSettings, task_gates
from gating_jax.continual.rehearsal import episodic
from gating_jax.continual.replay_memory import ReplaySettings
from gating_jax.continual.shared_net import SharedNet
from gating_jax.continual.task_inference import TaskClassifierSettings
from gating_jax.continual.units import freeze
from gating_jax.layers.gate import GATE_RNG, GateSettings
from gating_jax.models.resnets import ResNet
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import POOL, VGG
from gating_jax.training import devices, optim
from gating_jax.types import GateRecord
from tests.helpers import tiny

SHAPE, TASKS, STEPS = (6, 6, 1), 3, 12
GATE = GateSettings(hidden=4, initial_open=0.6)
RECIPE = GateSettings(
  hidden=4,
  context="glance+pooled",
  normalise=2.0,
  threshold="quantile",
  share=0.5,
  weighted=True,
  noise_scale=0.0,
)
MODELS = {
  "quantile": VGG(None, (8, POOL, 8), gating="channel", gate=RECIPE),
  "simple_cnn": VGG(None, (8, POOL, 8), gating="channel", gate=GATE),
  "vgg": VGG(None, (8, 8, POOL), gating="channel", gate=GATE),
  "resnet": ResNet(None, (1, 1), features=8, shortcut="B", gating="all_channels", gate=GATE),
}
# Models of the fast tier: today's rule, and that of quantiles.
FAST = {"vgg": (), "quantile": ()}
PLAIN = VGG(6, (4, POOL))
PROBLEM = Problem(
  tasks=TASKS,
  classes=2,
  shape=SHAPE,
  batch_size=32,
  normalise=lambda x: x.astype(jnp.float32) / 128 - 1,
)


NETWORK = Network(PLAIN, PROBLEM, model_summary(PLAIN, SHAPE).macs, "seen")


def data(task, count=64, seed=0):
  """Makes images of bright against dark, left against right, or top against bottom, over noise."""
  rng = np.random.default_rng((seed, task))
  which = rng.integers(0, 2, count)
  pixels = rng.integers(60, 130, (count, *SHAPE))
  part = [np.s_[:], np.s_[:, :3], np.s_[:3]][task]
  for image, bright in zip(pixels, which, strict=True):
    image[part] += 60 * bright.astype(int)
  return pixels.astype(np.uint8), (2 * task + which).astype(np.int32)


class Run:
  """A method on three tasks, as the experiment runs it, on one device."""

  def __init__(
    self, name, remembering=None, classifier=None, network=None, distillation=0.0, **settings
  ):
    model = MODELS[name]
    # The threshold drops units that test images would open.
    gates = TaskGatesSettings(
      **{"sparsity": 0.5, "patience": 0.0, "when_full": "reuse", "threshold": 0.9, **settings}
    )
    self.method = task_gates(
      model,
      PROBLEM,
      model_summary(model, SHAPE),
      gates,
      rehearsal=remembering,
      classifier_settings=classifier,
      network=network,
      distillation=distillation,
    )
    self.optimiser = optim.sgd(optax.constant_schedule(0.1), momentum=0.9, weight_decay=1e-2)
    self.step = jax.jit(
      training.make_step(
        self.method, self.optimiser, lambda key, x: PROBLEM.normalise(x), seed=0, steps_per_epoch=4
      )
    )
    self.predict = jax.jit(self.method.predict, static_argnums=3)

    @jax.jit
    def init(key):
      start = self.method.init(key)
      return LearnerState(
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        *start[:2],
        self.optimiser.init(start.params),
        start.memory,
        TaskTable(*[jnp.zeros(())] * 5),
      )

    self.learner = init(jax.random.key(0, impl="rbg"))

  def learn(self, task, seed=0, count=STEPS):
    for i in range(count):
      self.learner, self.metrics = self.step(
        self.learner, *data(task, seed=seed + i), np.int32(task * STEPS)
      )
    held_out = data(task, 16, seed=1000 + seed)
    self.learner = self.method.end_task(
      self.learner,
      TaskData(*data(task, seed=seed), *held_out),
      jax.random.key(task + 1, impl="rbg"),
    )
    self.learner = self.learner.replace(
      task=self.learner.task + 1, opt_state=self.optimiser.init(self.learner.params)
    )

  def logits(self, task, batch_size, count=256):
    """Of the task's test images, in batches."""
    x = PROBLEM.normalise(data(task, count, seed=99)[0])
    seen = int(self.learner.task)
    parts = [
      self.predict(self.learner, x[i : i + batch_size], task, seen).aware
      for i in range(0, count, batch_size)
    ]
    return np.concatenate(parts)


@functools.cache
def learnt(name, **changes):
  """Logits of task 1 after it and after all, by batch size, and the run."""
  run = Run(name, **dict(changes))
  run.learn(0)
  before = {size: run.logits(0, size, 16 if size == 1 else 256) for size in (1, 256)}
  middle = run.learner
  for task in range(1, TASKS):
    run.learn(task)
  after = {size: run.logits(0, size, 16 if size == 1 else 256) for size in (1, 256)}
  return before, after, run, middle


@pytest.fixture
def learnt_run(name):
  """Is a fixture, so that the training counts as set-up: many tests share it."""
  return learnt(name)


@pytest.mark.parametrize("batch_size", [1, 256])
@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=FAST.get(name, pytest.mark.slow)) for name in MODELS],
)
def test_nothing_is_forgotten_to_the_last_bit(learnt_run, batch_size):
  before, after, run, middle = learnt_run
  assert len(np.unique(before[batch_size], axis=0)) > 1
  np.testing.assert_array_equal(after[batch_size], before[batch_size])
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), middle.params["shared"], run.learner.params["shared"]
  )
  assert any(jax.tree.leaves(moved))


@pytest.mark.thin(4)
@pytest.mark.parametrize("protection", ["protect_updates", "shut_gates", "own_norms"])
@pytest.mark.parametrize(
  "name", ["simple_cnn", "vgg", pytest.param("resnet", marks=pytest.mark.slow)]
)
def test_every_protection_is_needed(protection, name):
  before, after, *_ = learnt(name, **{protection: False})
  assert not np.array_equal(after[256], before[256])


def test_frozen_filters_stay_and_the_others_begin_anew():
  run = Run("vgg")
  kernel = lambda: np.asarray(run.learner.params["shared"]["layer2"]["conv"]["conv"]["kernel"])
  begun = kernel()
  run.learn(0)
  first, mask = kernel(), run.learner.memory.relevant[0, 8:]
  assert 0 < mask.sum() < 8
  np.testing.assert_array_equal(run.learner.memory.frozen["layer2"]["conv"]["conv"]["kernel"], mask)
  assert not np.array_equal(first[..., mask], begun[..., mask])
  # As he_normal draws them: untrained.
  np.testing.assert_allclose(first[..., ~mask].std(), np.sqrt(2 / 72), rtol=0.3)
  run.learn(1)
  np.testing.assert_array_equal(kernel()[..., mask], first[..., mask])
  later = np.asarray(run.learner.memory.relevant[1, 8:]) & ~mask
  assert later.any()
  assert (kernel()[..., later] != first[..., later]).all()


def test_a_unit_is_relevant_by_the_share_of_held_out_images_that_open_it():
  run = Run("vgg", threshold=0.5)
  for i in range(STEPS):
    run.learner, _ = run.step(run.learner, *data(0, seed=i), np.int32(0))
  held_out, learner = data(0, 16, seed=1000), run.learner
  net = SharedNet(MODELS["vgg"], PROBLEM)
  records = jax.jit(lambda x: net.apply(learner.params, learner.batch_stats, x).records)
  rates = lambda pixels: np.concatenate(
    [r.gates for r in records(PROBLEM.normalise(pixels))], axis=-1
  ).mean(0)
  assert ((rates(held_out[0]) > 0.5) != (rates(data(0)[0]) > 0.5)).any()
  ended = run.method.end_task(learner, TaskData(*data(0), *held_out), jax.random.key(1, impl="rbg"))
  np.testing.assert_array_equal(ended.memory.relevant[0], rates(held_out[0]) > 0.5)


@pytest.mark.slow
def test_what_no_gate_switches_is_frozen_after_the_first_task():
  *_, run, middle = learnt("resnet")
  stem = lambda learner: learner.params["shared"]["stem"]["conv"]["kernel"]
  assert bool(middle.memory.frozen["stem"]["conv"]["kernel"])
  np.testing.assert_array_equal(stem(run.learner), stem(middle))


def test_units_that_are_not_relevant_never_open_again():
  *_, middle = learnt("vgg")
  own = jax.tree.map(lambda x: x[0], middle.memory.own.params["net"])
  mask = np.asarray(middle.memory.relevant[0])
  for layer, units in (("layer1", mask[:8]), ("layer2", mask[8:])):
    head = own[layer]["gate"]["head"]["logits"]
    assert (head["kernel"][:, ~units] == 0).all()
    assert (head["bias"][~units] <= -1000).all()
    assert (head["bias"][units] > -100).all()


def test_a_full_layer_is_an_error_that_names_it():
  run = Run("vgg", when_full="error", threshold=0.0, sparsity=0.0)
  run.method.check_capacity(run.learner)
  run.learn(0)  # what was learnt is kept
  message = (
    r"after task 1 of 3 no unit is free for the next task in layer1/conv/conv, layer2/conv/conv; "
    r"in a new workdir, a larger"
  )
  with pytest.raises(FullLayerError, match=message):
    run.method.check_capacity(run.learner)


# Units that are made by layer, and the parameters of a filter of each, a projection's included.
@pytest.mark.parametrize(
  ("name", "made", "filters"),
  [
    ("vgg", [8, 8], [9, 9 * 8]),
    pytest.param(
      "resnet", [8, 8, 16, 16], [9 * 8, 9 * 8, 9 * 8, 9 * 16 + 8], marks=pytest.mark.slow
    ),
  ],
)
def test_a_full_layer_grows_and_nothing_is_forgotten(name, made, filters):
  """Half of the units are active at first; a task that leaves none free adds a quarter."""
  run, made = Run(name, when_full="grow", growth=0.5, threshold=0.0, sparsity=0.0), np.array(made)
  open_units, params, shares, logits = [], [], [], None
  for task in range(TASKS):
    run.learn(task)
    shares.append(float(run.metrics["sparsity"]))
    open_units.append(
      [units.shape[1] for units in run.method.footprint(run.learner).relevant.values()]
    )
    params.append(run.method.footprint(run.learner).params)
    there = np.concatenate([np.arange(n) < n * (2 + task) // 4 for n in made])
    assert not np.asarray(run.learner.memory.relevant)[task][~there].any()
    logits = run.logits(0, 256) if logits is None else logits
  assert open_units == [(made * 3 // 4).tolist(), made.tolist(), made.tolist()]
  assert shares[0] > 0.5  # of the active units, not of all that are allocated
  own = sum(x.size for x in jax.tree.leaves(run.learner.params["own"]))
  assert np.diff(params).tolist() == [own + made // 4 @ filters, own]
  np.testing.assert_array_equal(run.logits(0, 256), logits)


def test_sparsity_is_on_hard_gates_and_waits_for_the_patience():
  run = Run("vgg", sparsity=2.0, patience=1.5)
  for epoch, price in ((1.25, 0.0), (1.5, 2.0)):
    batch = Batch(PROBLEM.normalise(data(0)[0]), data(0)[1], jax.random.key(0), epoch)
    total, (terms, _) = jax.jit(run.method.loss)(run.learner.params, run.learner, batch)
    gates = float(terms["sparsity"]) * 2 * 8 * 64  # two layers of 8 units, 64 images
    assert gates == pytest.approx(round(gates), abs=1e-2)
    assert float(total) == pytest.approx(float(terms["cross_entropy"] + price * terms["sparsity"]))


@pytest.mark.slow
def test_the_task_is_told_from_the_streams_and_costs_all_of_them():
  run = Run(
    "vgg",
    episodic(PROBLEM, ReplaySettings(30, 32)),
    TaskClassifierSettings(hidden=16, steps=400, batch_size=32, learning_rate=1e-2),
  )
  run.learn(0)
  logits = run.logits(0, 256)
  for task in range(1, TASKS):
    run.learn(task)
  np.testing.assert_array_equal(run.logits(0, 256), logits)  # whatever the task classifier learns
  assert sorted(np.bincount(run.learner.memory.rehearsal.episodes.labels)) == [5] * 6
  right = []
  for task in range(TASKS):
    pixels, labels = data(task, 128, seed=99)
    p = run.predict(run.learner, PROBLEM.normalise(pixels), task, TASKS)
    chosen = np.argmax(p.agnostic, axis=1)
    np.testing.assert_array_equal(np.isfinite(p.agnostic).sum(1), 2)  # the head of one task
    own = chosen // 2 == task
    np.testing.assert_array_equal(chosen[own] % 2, np.argmax(p.aware, axis=1)[own])
    assert (np.asarray(p.agnostic_macs) > 2 * np.asarray(p.macs)).all()
    assert (np.asarray(p.agnostic_macs) < TASKS * model_summary(MODELS["vgg"], SHAPE).macs).all()
    right.append(own.mean())
  assert np.mean(right) > 0.6  # chance is a third


@pytest.mark.slow
def test_a_network_tells_the_task_and_only_the_stream_of_that_task_runs():
  run = Run("vgg", episodic(PROBLEM, ReplaySettings(30, 32)), network=NETWORK)
  run.learn(0, count=40)
  logits = run.logits(0, 256)
  for task in range(1, TASKS):
    run.learn(task, count=40)
  np.testing.assert_array_equal(run.logits(0, 256), logits)
  right = []
  for task in range(TASKS):
    x = PROBLEM.normalise(data(task, 128, seed=99)[0])
    p = run.predict(run.learner, x, task, TASKS)
    of_all = jax.jit(NETWORK.logits)(
      run.learner.params["router"], run.learner.batch_stats["router"], x
    )
    chosen = np.argmax(jax.nn.softmax(of_all).reshape(-1, TASKS, 2).sum(-1), axis=-1)
    own = chosen == task
    together = jax.nn.log_softmax(p.aware) + jax.nn.log_softmax(of_all)[:, 2 * task : 2 * task + 2]
    np.testing.assert_allclose(
      p.agnostic[own, 2 * task : 2 * task + 2], together[own], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(
      np.isfinite(p.agnostic), np.repeat(np.eye(TASKS)[chosen] == 1, 2, axis=1)
    )
    macs = np.stack([run.predict(run.learner, x, t, TASKS).macs for t in range(TASKS)])
    np.testing.assert_allclose(p.agnostic_macs, macs[chosen, np.arange(128)] + NETWORK.macs)
    right.append(own.mean())
  assert np.mean(right) > 0.6


@pytest.mark.parametrize("weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_the_loss_of_a_network_by_hand_and_streams_see_nothing_rehearsed(weight):
  new = data(1, 32, seed=6)
  batch = Batch(PROBLEM.normalise(new[0]), jnp.asarray(new[1]), jax.random.key(3), 0.0)

  def results(old):
    replayed = rehearsal.ReplayedImages(PROBLEM.normalise(old[0]), jnp.asarray(old[1]), weight)
    made = dataclasses.replace(
      episodic(PROBLEM, ReplaySettings(30, 16)), replay=lambda *_, key: replayed
    )
    run = Run("simple_cnn", made, network=NETWORK)
    learner = run.learner.replace(task=jnp.int32(1))
    return (
      learner,
      replayed,
      jax.jit(jax.grad(run.method.loss, has_aux=True))(learner.params, learner, batch),
    )

  learner, replayed, (grads, (terms, stats)) = results(data(0, 16, seed=5))
  x = np.concatenate([np.reshape(batch.x, (16, 2, *SHAPE)), replayed.x[:, None]], axis=1).reshape(
    -1, *SHAPE
  )
  of_all, expected_stats = jax.jit(NETWORK.train_logits)(
    learner.params["router"], learner.batch_stats["router"], x, key=jax.random.key(0)
  )
  labels = np.concatenate([np.reshape(batch.labels, (16, 2)), replayed.labels[:, None]], axis=1)
  # Four classes are seen. Two of three images are the batch's: with 0.2 in place of 2/3 all classes
  # would have the same weight.
  even, shift = (2 / 3, np.log([1 / 3 / 0.8, 2 / 3 / 0.2]).repeat(2)) if weight else (0.0, 0.0)
  each = -jax.nn.log_softmax(of_all[:, :4] + shift)[np.arange(48), labels.ravel()].reshape(16, 3)
  expected = even * each[:, :2].mean() + (1 - even) * each[:, 2].mean()
  assert float(terms["class_cross_entropy"]) == pytest.approx(float(expected), rel=1e-5)
  assert tiny.relative_gap(stats["router"], expected_stats) < 1e-5
  *_, (others, _) = results(data(0, 16, seed=7))
  assert tiny.bit_equal((others["own"], others["shared"]), (grads["own"], grads["shared"]))
  assert not tiny.bit_equal(others["router"], grads["router"])


@pytest.mark.slow
def test_a_network_teaches_the_stream_and_learns_nothing_from_it():
  new, old = data(1, 32, seed=6), data(0, 16, seed=5)
  batch = Batch(PROBLEM.normalise(new[0]), jnp.asarray(new[1]), jax.random.key(3), 0.0)
  replayed = rehearsal.ReplayedImages(PROBLEM.normalise(old[0]), jnp.asarray(old[1]), 0.5)
  made = dataclasses.replace(
    episodic(PROBLEM, ReplaySettings(30, 16)), replay=lambda *_, key: replayed
  )
  found = {}
  for weight in (0.0, 3.0):
    run = Run("simple_cnn", made, network=NETWORK, distillation=weight)
    learner = run.learner.replace(task=jnp.int32(1))
    found[weight] = jax.jit(jax.value_and_grad(run.method.loss, has_aux=True))(
      learner.params, learner, batch
    )
  ((without, (terms, _)), alone), ((total, (same, _)), taught) = found.values()
  assert terms == same
  assert float(total - without) == pytest.approx(3 * float(terms["distillation"]), rel=1e-4)
  assert tiny.bit_equal(alone["router"], taught["router"])
  assert not tiny.bit_equal(alone["own"], taught["own"])
  net = SharedNet(MODELS["simple_cnn"], PROBLEM)
  stream = net.apply(
    learner.params,
    learner.batch_stats,
    batch.x,
    train=True,
    rngs={GATE_RNG: jax.random.split(batch.key)[0]},
  )
  x = np.concatenate([np.reshape(batch.x, (16, 2, *SHAPE)), replayed.x[:, None]], axis=1).reshape(
    -1, *SHAPE
  )
  of_all, _ = jax.jit(NETWORK.train_logits)(
    learner.params["router"], learner.batch_stats["router"], x, key=jax.random.key(0)
  )
  # Of the batch, the classes of task 1.
  teacher = np.reshape(of_all, (16, 3, 6))[:, :2].reshape(32, 6)[:, 2:4]
  expected = -np.mean(
    np.sum(jax.nn.softmax(teacher / 2) * jax.nn.log_softmax(stream.logits / 2), axis=1)
  )
  assert float(terms["distillation"]) == pytest.approx(float(expected), rel=1e-4)
  with pytest.raises(ValueError, match="distillation must be >= 0; got -1"):
    Run("simple_cnn", made, network=NETWORK, distillation=-1.0)


def test_rehearsal_without_anything_to_rehearse_is_an_error():
  with pytest.raises(
    ValueError, match="rehearsal without a network needs classifier_settings; got None"
  ):
    Run("vgg", episodic(PROBLEM, ReplaySettings(30, 32)))


def test_a_network_without_rehearsal_is_an_error():
  with pytest.raises(
    ValueError, match="a network for task inference needs images of earlier tasks; got no"
  ):
    Run("vgg", network=NETWORK)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_the_loss_of_the_classifier_of_tasks_by_hand(weight):
  """Earlier streams run in evaluation, the task's own in training; the batch has a weight."""
  old, new = data(0, 16, seed=5), data(1, 32, seed=6)
  replayed = rehearsal.ReplayedImages(PROBLEM.normalise(old[0]), jnp.asarray(old[1]), weight)
  made = dataclasses.replace(
    episodic(PROBLEM, ReplaySettings(30, 16)), replay=lambda *_, key: replayed
  )
  run = Run(
    "simple_cnn",
    made,
    TaskClassifierSettings(hidden=16, steps=10, batch_size=32, learning_rate=1e-2),
  )
  run.learn(0)
  learner, net = run.learner, SharedNet(MODELS["simple_cnn"], PROBLEM)
  batch = Batch(PROBLEM.normalise(new[0]), jnp.asarray(new[1]), jax.random.key(3), 0.0)
  _, (terms, _) = jax.jit(run.method.loss)(learner.params, learner, batch)
  # Two images of the batch go with each replayed one.
  x = np.concatenate([np.reshape(batch.x, (16, 2, *SHAPE)), replayed.x[:, None]], axis=1).reshape(
    -1, *SHAPE
  )
  trained = net.apply(
    learner.params,
    learner.batch_stats,
    x,
    train=True,
    rngs={GATE_RNG: jax.random.split(batch.key)[0]},
  )
  own = jax.tree.map(lambda tree: tree[0], learner.memory.own)
  earlier = net.run_task(learner, own, x)
  scores = task_inference.task_scores(
    learner.params["router"], jnp.stack([earlier.features, trained.features], axis=1)
  )
  each = -jax.nn.log_softmax(scores)[np.arange(48), np.tile([1, 1, 0], 16)].reshape(16, 3)
  expected = weight * each[:, :2].mean() + (1 - weight) * each[:, 2].mean()
  assert float(terms["task_cross_entropy"]) == pytest.approx(float(expected), rel=1e-5)
  own_logits = trained.logits.reshape(16, 3, 2)[:, :2].reshape(32, 2)
  cross_entropy = -jax.nn.log_softmax(own_logits)[np.arange(32), new[1] - 2].mean()
  assert float(terms["cross_entropy"]) == pytest.approx(float(cross_entropy), rel=1e-5)


@pytest.mark.slow
def test_what_the_classifier_has_for_tasks_to_come_waits_as_it_was_made():
  """Otherwise weight decay would shrink it before it is trained."""
  run = Run(
    "vgg",
    episodic(PROBLEM, ReplaySettings(30, 32)),
    TaskClassifierSettings(hidden=16, steps=10, batch_size=32, learning_rate=1e-2),
  )
  later = lambda: jax.device_get(
    {
      "hidden": run.learner.params["router"]["hidden"]["kernel"][2:],
      "out": jax.tree.map(lambda x: x[..., 2:], run.learner.params["router"]["out"]),
    }
  )
  made, first = later(), np.asarray(run.learner.params["router"]["hidden"]["kernel"][:2])
  run.learn(0)
  run.learn(1)
  assert tiny.bit_equal(later(), made)
  assert not np.array_equal(run.learner.params["router"]["hidden"]["kernel"][:2], first)


def test_the_classifier_of_tasks_is_trained_with_the_task_and_sees_every_stream():
  run = Run(
    "vgg",
    episodic(PROBLEM, ReplaySettings(30, 32)),
    TaskClassifierSettings(hidden=16, steps=10, batch_size=32, learning_rate=1e-2),
    sparsity=0.0,
  )
  run.learn(0)
  pixels, labels = data(1)
  batch = Batch(PROBLEM.normalise(pixels), labels, jax.random.key(0), 0.0)
  grad = jax.jit(jax.grad(run.method.loss, has_aux=True))
  grads, (terms, _) = grad(run.learner.params, run.learner, batch)
  assert 0 < terms["task_cross_entropy"] < 5
  without = {
    **run.learner.params,
    "router": jax.tree.map(jnp.zeros_like, run.learner.params["router"]),
  }
  blind, (even, _) = grad(without, run.learner, batch)
  # as unsure about two tasks as possible
  assert even["task_cross_entropy"] == pytest.approx(np.log(2))
  gate = lambda tree: tree["own"]["net"]["layer2"]["gate"]["head"]["logits"]["kernel"]
  assert not np.allclose(gate(grads), gate(blind))  # it moves the gates of the task
  later = grads["router"]["hidden"]["kernel"]
  assert [bool(jnp.any(part != 0)) for part in later] == [True, True, False]


def test_what_it_holds_is_counted():
  *_, run, middle = learnt("vgg")
  held, first = run.method.footprint(run.learner), run.method.footprint(middle)
  own = sum(x.size for x in jax.tree.leaves(run.learner.params["own"]))
  assert held.params - first.params == (TASKS - 1) * own
  assert {layer: units.shape for layer, units in held.relevant.items()} == {
    "layer1/conv/conv": (TASKS, 8),
    "layer2/conv/conv": (TASKS, 8),
  }


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("sparsity", -1, "sparsity must be >= 0; got -1"),
    ("threshold", 1, r"threshold must be a fraction in \[0, 1\); got 1"),
    ("growth", -0.5, "growth must be >= 0; got -0.5"),
    (
      "when_full",
      "grwo",
      "when_full must be one of error, grow, reuse; got 'grwo'. Did you mean 'grow'",
    ),
  ],
)
def test_settings_are_checked(field, value, message):
  with pytest.raises(ValueError, match=message):
    TaskGatesSettings(**{"sparsity": 0.5, "patience": 0.0, field: value})


@pytest.mark.slow
@pytest.mark.parametrize(("rehearsed", "network"), [(False, None), (True, None), (True, NETWORK)])
def test_two_devices_take_the_step_of_one(rehearsed, network):
  settings = (
    TaskClassifierSettings(hidden=16, steps=10, batch_size=32, learning_rate=1e-2)
    if rehearsed
    else None
  )
  remembering = lambda problem: episodic(problem, ReplaySettings(30, 32)) if rehearsed else None
  run = Run("vgg", remembering(PROBLEM), settings, network)
  model = MODELS["vgg"].clone(axis_name=devices.AXIS)
  problem = dataclasses.replace(PROBLEM, axis_name=devices.AXIS)
  method = task_gates(
    model,
    problem,
    model_summary(model, SHAPE),
    TaskGatesSettings(sparsity=0.5, patience=0.0),
    rehearsal=remembering(problem),
    classifier_settings=settings,
    network=network
    and dataclasses.replace(network, model=PLAIN.clone(axis_name=devices.AXIS), problem=problem),
  )
  step = training.make_step(
    method,
    run.optimiser,
    lambda key, x: PROBLEM.normalise(x),
    seed=0,
    steps_per_epoch=4,
    axis_name=devices.AXIS,
  )
  spread = devices.map_over_devices(
    step,
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
    results=(devices.REPLICATED, devices.REPLICATED),
    devices=jax.devices()[:2],
  )
  run.learn(0)
  pixels, labels = data(1)
  alone, metrics = run.step(run.learner, pixels, labels, np.int32(STEPS))
  both, same = spread(run.learner, pixels, labels, np.int32(STEPS))
  assert float(metrics["cross_entropy"]) == pytest.approx(float(same["cross_entropy"]), rel=1e-5)
  assert tiny.relative_gap(both.params, alone.params) < 1e-5
  assert tiny.relative_gap(both.batch_stats, alone.batch_stats) < 1e-5
  assert not tiny.bit_equal(alone.params, run.learner.params)


def test_updates_of_frozen_filters_are_0_and_all_others_stay():
  settings = TaskGatesSettings(sparsity=0.0, patience=0.0)
  method = task_gates(MODELS["vgg"], PROBLEM, None, settings)
  frozen = {"kernel": np.array([True, False]), "bias": np.array(False)}
  updates = {"shared": {"kernel": np.full((3, 2), 0.5), "bias": np.ones(4)}, "own": 7.0}
  kept, _ = method.update(updates, None, SimpleNamespace(memory=SimpleNamespace(frozen=frozen)))
  np.testing.assert_array_equal(kept["shared"]["kernel"], [[0, 0.5]] * 3)
  np.testing.assert_array_equal(kept["shared"]["bias"], np.ones(4))
  assert kept["own"] == 7.0


def test_filters_of_every_task_so_far_are_frozen_and_what_no_gate_switches():
  gates = np.zeros((1, 3))
  records = [GateRecord(gates, gates, gates, 1, writers=(("conv",),))]
  before = {"conv": {"kernel": np.array([True, False, False])}, "stem": {"kernel": np.array(False)}}
  frozen = freeze(before, records, np.array([False, True, False]))
  assert frozen["conv"]["kernel"].tolist() == [True, True, False]
  assert bool(frozen["stem"]["kernel"])


@pytest.mark.parametrize(("own_norms", "shared"), [(True, {"conv"}), (False, {"conv", "norm"})])
def test_every_task_has_its_own_norms_unless_they_are_to_be_shared(own_norms, shared):
  net = SharedNet(MODELS["vgg"], PROBLEM, own_norms)
  params, _ = jax.eval_shape(net.fresh, jax.random.key(0))
  assert {path[-2] for path in traverse_util.flatten_dict(params["shared"])} == shared
