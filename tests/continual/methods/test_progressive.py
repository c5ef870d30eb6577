import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual.method import Batch
from gating_jax.continual.methods.progressive import progressive
from gating_jax.models.columns import ChainColumn, ResNetColumn
from tests.helpers import tiny_tasks as toys

COLUMNS = {
  "chain": (ChainColumn, dict(chain=(3, "pool", 4))),
  "resnet": (ResNetColumn, dict(blocks=(1, 1), features=3, shortcut="B")),
}
# An adapter of each, and the convolution that images pass first.
FIRST_ADAPTER = {"chain": "adapter2", "resnet": "stage1_block1_adapter"}
STEM = {"chain": ("layer1", "conv", "conv", "kernel"), "resnet": ("stem", "conv", "kernel")}


@pytest.fixture(params=["chain", pytest.param("resnet", marks=pytest.mark.slow)])
def kind(request):
  return request.param


@functools.cache
def method(kind, tasks=3, axis_name=None):
  column, fields = COLUMNS[kind]
  column = column(classes=toys.CLASSES, alpha=0.5, axis_name=axis_name, **fields)
  return progressive(column, dataclasses.replace(toys.problem(axis_name), tasks=tasks))


@functools.cache
def after(kind, tasks):
  """Returns the learner after so many of three tasks; the third is the first again."""
  if tasks == 0:
    return toys.learner(method(kind))
  data = toys.task((tasks - 1) % 2)
  data = data._replace(labels=data.labels % 2 + 2 * (tasks - 1))
  return toys.end(
    method(kind), toys.train(method(kind), after(kind, tasks - 1), data), data, seed=tasks
  )


def batch():
  data = toys.task(1)
  return Batch(
    toys.problem().normalise(data.pixels),
    jnp.asarray(data.labels),
    jax.random.key(0),
    jnp.float32(0),
  )


def test_both_tasks_are_learnt_and_the_first_stays_bit_equal(kind):
  assert [toys.accuracy(method(kind), after(kind, 2), task, 2) for task in (0, 1)] == [1, 1]
  first = toys.aware(method(kind), after(kind, 1), 0, 1)
  assert np.ptp(first, axis=0).min() > 1
  for tasks in (2, 3):
    np.testing.assert_array_equal(toys.aware(method(kind), after(kind, tasks), 0, tasks), first)
  second = [toys.aware(method(kind), after(kind, tasks), 1, tasks) for tasks in (2, 3)]
  np.testing.assert_array_equal(*second)


def test_older_columns_are_frozen_and_the_shapes_of_a_learner_are_for_good(kind):
  for tasks in (1, 2, 3):
    old, new = after(kind, tasks - 1).memory, after(kind, tasks).memory
    for task in range(3):
      same = jax.tree.leaves(
        jax.tree.map(lambda a, b, t=task: bool(jnp.all(a[t] == b[t])), old, new)
      )
      assert all(same) == (task != tasks - 1)
    assert toys.same_shapes(after(kind, tasks), after(kind, 0))


def test_parameters_are_those_of_the_columns_and_of_adapters_to_earlier_ones(kind):
  def size(before):
    """Returns a column made for so many older columns."""
    shapes = jax.eval_shape(
      lambda x: method(kind, tasks=before + 1).init(x).params, jax.random.key(0)
    )
    adapters = [name for name in shapes if "adapter" in name]
    return sum(
      x.size
      for x in jax.tree.leaves(
        shapes if before else {k: shapes[k] for k in {*shapes} - {*adapters}}
      )
    )

  for tasks in (1, 2, 3):
    assert method(kind).footprint(after(kind, tasks)).params == sum(
      size(before) for before in range(tasks)
    )


def test_a_column_looks_at_the_older_ones_and_they_not_at_it(kind):
  def changed(task):
    learner = after(kind, 2)
    memory = jax.tree.map(lambda x: x.at[task].multiply(1.5), learner.memory.params)
    learner = learner.replace(memory=learner.memory.replace(params=memory))
    new, old = (
      [toys.aware(method(kind), of, j, 2) for j in (0, 1)] for of in (learner, after(kind, 2))
    )
    return [np.any(a != b) for a, b in zip(new, old, strict=True)]

  assert (changed(0), changed(1), changed(2)) == ([True, True], [False, True], [False, False])


def test_training_sees_what_prediction_does(kind):
  learner = after(kind, 2)
  own = jax.tree.map(lambda x: x[1], learner.memory)
  learner = learner.replace(task=jnp.int32(1))
  logits = toys.aware(method(kind), learner, 1, 2, toys.task(1))
  column, fields = COLUMNS[kind]
  evaluated = progressive(
    evaluating(column)(classes=toys.CLASSES, alpha=0.5, **fields),
    dataclasses.replace(toys.problem(), tasks=3),
  )
  wrong = toys.task(1).labels ^ 1
  loss, _ = jax.jit(evaluated.loss)(
    own.params,
    learner.replace(batch_stats=own.batch_stats),
    batch()._replace(labels=jnp.asarray(wrong)),
  )
  log_probs = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(loss, -np.mean(log_probs[np.arange(64), wrong - 2]), rtol=1e-4)


def evaluating(column):
  """A column that normalises by its running statistics in training too."""

  class Evaluating(column):
    def __call__(self, x, before, train=False):
      return super().__call__(x, before)

  return Evaluating


def test_adapters_are_trained_where_there_is_something_to_adapt(kind):
  for task in (0, 1):
    learner = after(kind, task)
    grads, _ = jax.jit(jax.grad(method(kind).loss, has_aux=True))(
      learner.params,
      learner,
      batch()._replace(labels=jnp.asarray(toys.task(1).labels) % 2 + 2 * task),
    )
    flat = flax.traverse_util.flatten_dict(grads)
    for name in (FIRST_ADAPTER[kind], "classifier_adapter"):
      for leaf in ("alpha", "kernel"):
        norms = [float(jnp.abs(place).max()) for place in flat[name, leaf]]
        assert (norms[0] > 0, norms[1]) == (task == 1, 0)
    assert float(jnp.abs(flat[STEM[kind]]).max()) > 0


# Chain, layers of column j: 16 pixels, 9 x 1 x 3; 4 pixels, 9 x 3 x 4 or twice that and j x 3 x 3.
# Head: j x 4 x 4, and 4 x 2 or twice that.
CHAIN_MACS = [432 + 4 * 108, 432 + 4 * (216 + 9), 432 + 4 * (216 + 18)], [8, 16 + 16, 32 + 16]
# Residual net: stem, 16 pixels, 9 x 1 x 3; block 1, 16 pixels, 9 x 3 x 3 or twice that, and
# 9 x 3 x 3; block 2, 4 pixels, 9 x 3 x 6 or twice that, 9 x 6 x 6, and 3 x 6 of the shortcut;
# each block's adapter, 16 pixels, j x 3 x 3.
# Head: j x 6 x 6, and 6 x 2 or twice that.
OWN, SEEN = 432 + 16 * 2 * 81 + 4 * (162 + 324 + 18), 16 * 81 + 4 * 162
RESNET_MACS = [OWN, OWN + SEEN + 2 * 16 * 9, OWN + SEEN + 2 * 16 * 18], [12, 36 + 24, 72 + 24]


@pytest.mark.parametrize(
  ("kind", "macs"),
  [("chain", CHAIN_MACS), pytest.param("resnet", RESNET_MACS, marks=pytest.mark.slow)],
)
def test_macs_are_of_all_columns_that_have_to_run(kind, macs):
  x, (layers, heads) = batch().x, macs
  p = [
    jax.jit(method(kind).predict, static_argnums=3)(after(kind, 3), x, task, 3) for task in range(3)
  ]
  for task in range(3):
    assert set(np.asarray(p[task].macs).tolist()) == {sum(layers[: task + 1]) + heads[task]}
    assert set(np.asarray(p[task].agnostic_macs).tolist()) == {sum(layers) + sum(heads)}


def test_without_the_task_the_likeliest_class_of_all_heads_is_taken(kind):
  x = batch().x
  p = jax.jit(method(kind).predict, static_argnums=3)(after(kind, 2), x, 1, 2)
  assert np.all(np.isneginf(p.agnostic[:, 4:]))
  log_probs = [
    jax.nn.log_softmax(toys.aware(method(kind), after(kind, 2), task, 2, toys.task(1)))
    for task in (0, 1)
  ]
  np.testing.assert_allclose(p.agnostic[:, :4], np.concatenate(log_probs, -1), rtol=1e-4, atol=1e-5)


def test_a_single_task_has_one_column(kind):
  learner = toys.train(method(kind, 1), toys.learner(method(kind, 1)), toys.task(0), count=20)
  learner = toys.end(method(kind, 1), learner, toys.task(0))
  assert toys.accuracy(method(kind, 1), learner, 0, 1) == 1


@pytest.mark.slow
def test_two_devices_learn_as_one(kind):
  data, axis = toys.task(1), "devices"
  learner = after(kind, 1)
  one, _ = jax.jit(toys.step(method(kind)))(learner, data.pixels, data.labels, 0)
  halves = lambda x: x.reshape(2, -1, *x.shape[1:])
  step = toys.step(method(kind, 3, axis), axis)
  two, _ = jax.pmap(step, axis, in_axes=(None, 0, 0, None), devices=jax.devices()[:2])(
    learner, halves(data.pixels), halves(data.labels), 0
  )
  adapter = lambda learner: learner.params[FIRST_ADAPTER[kind]]["kernel"]
  assert not np.allclose(adapter(one), adapter(learner), rtol=0, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-3, atol=1e-5),
    (one.params, one.batch_stats),
    (two.params, two.batch_stats),
  )
