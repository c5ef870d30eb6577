"""All tasks at once: the own parts of a task see the images of that task only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual import metrics, shared_net, units
from gating_jax.continual.method import Batch, Network, TaskData, put_task
from gating_jax.continual.methods.multitask import multitask_gates, multitask_norms, multitask_trunk
from gating_jax.continual.methods.task_gates import TaskGatesSettings
from gating_jax.data import image_sets
from gating_jax.layers.gate import GateSettings
from gating_jax.models.summary import model_summary
from gating_jax.models.vggs import POOL, VGG
from gating_jax.training import devices
from tests.helpers import tiny, tiny_tasks
from tests.helpers.tiny_tasks import CLASSES, SHAPE, TASKS

CHAIN = (4, POOL, 6)
KINDS = ("gates", "norms", "trunk")
every_kind = pytest.mark.parametrize("kind", KINDS)


def model(kind, axis_name=None, norm=True):
  gating = "channel" if kind == "gates" else "none"
  return VGG(
    TASKS * CLASSES if kind == "trunk" else None,
    CHAIN,
    norm=norm,
    gating=gating,
    axis_name=axis_name,
    gate=GateSettings(hidden=4, initial_open=0.7),
  )


def method(kind, axis_name=None, norm=True, **settings):
  net, problem = model(kind, axis_name, norm), tiny_tasks.problem(axis_name)
  if kind == "trunk":
    return multitask_trunk(Network(net, problem, model_summary(net, SHAPE).macs))
  if kind == "norms":
    return multitask_norms(net, problem, model_summary(net, SHAPE))
  gates = TaskGatesSettings(**{"sparsity": 0.1, "patience": 0.0, **settings})
  return multitask_gates(net, problem, model_summary(net, SHAPE), gates)


def both_tasks(count=64, seed=0):
  return TaskData(
    *map(
      image_sets.interleave,
      zip(*(tiny_tasks.task(t, count, seed) for t in range(TASKS)), strict=True),
    )
  )


def batch_of(data, epoch=1.0):
  return Batch(
    tiny_tasks.problem().normalise(data.pixels), jnp.asarray(data.labels), jax.random.key(3), epoch
  )


def gradients(method, learner):
  """Runs on a batch, and on one with other images of the first task."""
  data = both_tasks()
  changed = np.array(data.pixels)
  changed[::TASKS] = tiny_tasks.task(0, seed=7).pixels
  of = jax.jit(jax.grad(lambda params, batch: method.loss(params, learner, batch)[0]))
  return [of(learner.params, batch_of(d)) for d in (data, data._replace(pixels=changed))]


@pytest.mark.parametrize("kind", ["norms", pytest.param("gates", marks=pytest.mark.slow)])
def test_a_task_s_own_parts_learn_from_its_own_images_alone(kind):
  made = method(kind)
  before, after = gradients(made, tiny_tasks.learner(made))
  of_task = lambda grads, task: jax.tree.map(lambda x: x[task], grads["own"])
  assert tiny.bit_equal(of_task(after, 1), of_task(before, 1))
  assert optax.tree.norm(of_task(before, 1)) > 0.01
  assert tiny.relative_gap(of_task(after, 0), of_task(before, 0)) > 0.01
  assert tiny.relative_gap(after["shared"], before["shared"]) > 0.01


def test_a_head_of_the_trunk_learns_from_its_own_images_alone():
  made = method("trunk", norm=False)
  before, after = (
    grads["classifier"]["kernel"] for grads in gradients(made, tiny_tasks.learner(made))
  )
  assert np.abs(before[:, CLASSES:]).max() > 0.01
  np.testing.assert_allclose(after[:, CLASSES:], before[:, CLASSES:], rtol=1e-5)
  assert tiny.relative_gap(after[:, :CLASSES], before[:, :CLASSES]) > 0.01


@pytest.mark.parametrize("kind", [pytest.param("norms", marks=pytest.mark.slow), "trunk"])
def test_the_loss_is_the_sum_of_what_tasks_have_alone(kind):
  made, data = method(kind, norm=kind == "norms"), both_tasks(16)
  learner = tiny_tasks.learner(made)
  batch = batch_of(data)
  total, (terms, _) = made.loss(learner.params, learner, batch)
  net = shared_net.SharedNet(model(kind), tiny_tasks.problem())
  expected = []
  for t in range(TASKS):
    x, labels = batch.x[t::TASKS], batch.labels[t::TASKS] - t * CLASSES
    if kind == "trunk":
      logits = model(kind, norm=False).apply({"params": learner.params}, x)[0][:, t * CLASSES :][
        :, :CLASSES
      ]
    else:
      own, stats = jax.tree.map(
        lambda x, t=t: x[t], (learner.params["own"], learner.batch_stats["own"])
      )
      logits = net.apply(
        {**learner.params, "own": own}, {**learner.batch_stats, "own": stats}, x, train=True
      ).logits
    expected.append(
      float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)))
    )
  assert float(total) == pytest.approx(sum(expected), rel=1e-5)
  assert float(terms["cross_entropy"]) == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.slow
def test_open_gates_cost_after_the_patience_and_every_task_pays_for_its_own():
  made, data = method("gates", sparsity=2.0, patience=1.5), both_tasks(16)
  learner = tiny_tasks.learner(made)
  records = shared_net.SharedNet(model("gates"), tiny_tasks.problem()).shapes[0]
  net = learner.params["own"]["net"]
  none = units.close_gates(jax.tree.map(lambda x: x[1], net), records, np.zeros(10, bool))
  learner = learner.replace(
    params={**learner.params, "own": {**learner.params["own"], "net": put_task(net, 1, none)}}
  )
  for epoch, price in ((1.25, 0.0), (1.5, 2.0)):
    total, (terms, _) = made.loss(learner.params, learner, batch_of(data, epoch))
    # All of task 2's gates are shut, and about 0.7 of task 1's open.
    assert 0.2 < terms["sparsity"] < 0.5
    assert float(total) == pytest.approx(
      TASKS * float(terms["cross_entropy"] + price * terms["sparsity"]), rel=1e-6
    )


@pytest.mark.slow
@every_kind
def test_all_tasks_are_learnt_and_nothing_changes_shape(kind):
  made, data = method(kind), both_tasks()
  learner = tiny_tasks.learner(made)
  trained = tiny_tasks.train(made, learner, data, 100)
  ended = made.end_task(
    trained,
    data._replace(validation_pixels=data.pixels, validation_labels=data.labels),
    jax.random.key(0),
  )
  assert tiny_tasks.same_shapes(learner, trained)
  assert tiny_tasks.same_shapes(learner, ended)
  assert tiny.bit_equal(ended.params, trained.params)
  assert min(tiny_tasks.accuracy(made, ended, t, TASKS) for t in range(TASKS)) > 0.9
  x = tiny_tasks.problem().normalise(data.pixels)
  p = made.predict(ended, x, 1, TASKS)
  np.testing.assert_allclose(
    np.exp(p.agnostic).reshape(len(x), TASKS, CLASSES).sum(-1), 1, rtol=1e-5
  )
  np.testing.assert_array_equal(np.argmax(p.aware, -1), np.argmax(p.agnostic[:, CLASSES:], -1))
  passes = 1 if kind == "trunk" else TASKS
  if kind != "gates":
    np.testing.assert_allclose(p.agnostic_macs, passes * np.asarray(p.macs))
    own_head = 0 if kind == "trunk" else 6 * CLASSES
    np.testing.assert_allclose(p.macs, model_summary(model(kind), SHAPE).macs + own_head)


def test_units_are_relevant_to_the_tasks_whose_gates_open_on_their_own_images():
  made, data = method("gates", threshold=0.0), both_tasks(8)
  learner = tiny_tasks.learner(made)
  records = shared_net.SharedNet(model("gates"), tiny_tasks.problem()).shapes[0]
  kept = np.array([[1, 1, 1, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 1, 1, 0, 0]], bool)
  net = learner.params["own"]["net"]
  for t in range(TASKS):
    own = jax.tree.map(lambda x, t=t: x[t], net)  # by its bias alone, a gate is open at first
    for layer in ("layer1", "layer2"):
      logits = own[layer]["gate"]["head"]["logits"]
      logits["kernel"] = jnp.zeros_like(logits["kernel"])
    net = put_task(net, t, units.close_gates(own, records, kept[t]))
  learner = learner.replace(params={**learner.params, "own": {**learner.params["own"], "net": net}})
  ended = made.end_task(
    learner, data._replace(validation_pixels=data.pixels, validation_labels=data.labels), None
  )
  np.testing.assert_array_equal(ended.memory.relevant, kept)
  used = made.footprint(ended).relevant
  np.testing.assert_array_equal(np.concatenate(list(used.values()), axis=1), kept)
  assert metrics.gate_overlap(np.concatenate(list(used.values()), axis=1))[0, 1] == 1 / 7
  x = tiny_tasks.problem().normalise(data.pixels)
  dense = model_summary(model("gates"), SHAPE)
  macs = [
    float(made.predict(ended, x, t, TASKS).macs[0]) - dense.always_macs - 6 * CLASSES
    for t in range(TASKS)
  ]
  per_unit, per_pair = records[0].macs_per_unit, records[1].macs_per_pair
  assert macs == [3 * per_unit + 3 * 1 * per_pair, 2 * per_unit + 2 * 2 * per_pair]


@pytest.mark.slow
@every_kind
def test_two_devices_take_the_step_of_one(kind):
  made, spread = method(kind), method(kind, devices.AXIS)
  learner, data = tiny_tasks.learner(made), both_tasks(16)
  alone, one = jax.jit(tiny_tasks.step(made))(learner, data.pixels, data.labels, np.int32(0))
  run = devices.map_over_devices(
    tiny_tasks.step(spread, devices.AXIS),
    args=(devices.REPLICATED, devices.BATCH, devices.BATCH, devices.REPLICATED),
    results=(devices.REPLICATED, devices.REPLICATED),
    devices=jax.devices()[:2],
  )
  both, two = run(learner, data.pixels, data.labels, np.int32(0))
  assert float(one["cross_entropy"]) == pytest.approx(float(two["cross_entropy"]), rel=1e-5)
  assert tiny.relative_gap(both.params, alone.params) < 1e-5
  assert tiny.relative_gap(both.batch_stats, alone.batch_stats) < 1e-5
  assert not tiny.bit_equal(alone.params, learner.params)


def test_tasks_begin_apart():
  own = tiny_tasks.learner(method("gates")).params["own"]["head"]["kernel"]
  assert (own[0] != own[1]).all()
