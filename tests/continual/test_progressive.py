import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import tiny_tasks as toys

from gating_jax.continual.method import Batch
from gating_jax.continual.progressive import progressive
from gating_jax.models.columns import Column

CHAIN = (3, "pool", 4)


@functools.cache
def method(tasks=toys.TASKS, axis_name=None):
  column = Column(classes=toys.CLASSES, chain=CHAIN, alpha=0.5, axis_name=axis_name)
  return progressive(column, dataclasses.replace(toys.problem(axis_name), tasks=tasks))


@functools.cache
def after(tasks):
  """The learner after so many of three tasks; the third is the first again."""
  if tasks == 0:
    return toys.learner(method(3))
  data = toys.task((tasks - 1) % 2)
  data = data._replace(labels=data.labels % 2 + 2 * (tasks - 1))
  return toys.end(method(3), toys.train(method(3), after(tasks - 1), data), data, seed=tasks)


def batch():
  data = toys.task(1)
  return Batch(toys.problem().normalise(data.pixels), jnp.asarray(data.labels), jax.random.key(0), jnp.float32(0))


def test_both_tasks_are_learnt_and_the_first_stays_bit_equal():
  assert [toys.accuracy(method(3), after(2), task, 2) for task in (0, 1)] == [1, 1]
  first = toys.aware(method(3), after(1), 0, 1)
  assert np.ptp(first, axis=0).min() > 1
  for tasks in (2, 3):
    np.testing.assert_array_equal(toys.aware(method(3), after(tasks), 0, tasks), first)
  np.testing.assert_array_equal(toys.aware(method(3), after(3), 1, 3), toys.aware(method(3), after(2), 1, 2))


def test_older_columns_are_frozen_and_the_shapes_of_a_learner_are_for_good():
  for tasks in (1, 2, 3):
    old, new = after(tasks - 1).memory, after(tasks).memory
    for task in range(3):
      same = jax.tree.leaves(jax.tree.map(lambda a, b, t=task: bool(jnp.all(a[t] == b[t])), old, new))
      assert all(same) == (task != tasks - 1)
    assert toys.same_shapes(after(tasks), after(0))


def test_a_column_looks_at_the_older_ones_and_they_not_at_it():
  def changed(task):
    learner = after(2)
    memory = jax.tree.map(lambda x: x.at[task].multiply(1.5), learner.memory["params"])
    learner = learner.replace(memory={**learner.memory, "params": memory})
    return [np.any(toys.aware(method(3), learner, j, 2) != toys.aware(method(3), after(2), j, 2)) for j in (0, 1)]

  assert (changed(0), changed(1), changed(2)) == ([True, True], [False, True], [False, False])


def test_training_sees_what_prediction_does():
  learner = after(2)
  own = jax.tree.map(lambda x: x[1], learner.memory)
  learner = learner.replace(task=jnp.int32(1))
  logits = toys.aware(method(3), learner, 1, 2, toys.task(1))
  evaluated = progressive(Evaluating(toys.CLASSES, CHAIN, alpha=0.5), dataclasses.replace(toys.problem(), tasks=3))
  wrong = toys.task(1).labels ^ 1
  loss, _ = jax.jit(evaluated.loss)(
      own["params"], learner.replace(batch_stats=own["batch_stats"]), batch()._replace(labels=jnp.asarray(wrong)))
  log_probs = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(loss, -np.mean(log_probs[np.arange(64), wrong - 2]), rtol=1e-4)


class Evaluating(Column):
  """A column that normalises by its running statistics in training too."""

  def __call__(self, x, before, train=False):
    return super().__call__(x, before)


def test_adapters_are_trained_where_there_is_something_to_adapt():
  for task in (0, 1):
    learner = after(task)
    grads, _ = jax.jit(jax.grad(method(3).loss, has_aux=True))(learner.params, learner, batch()._replace(
        labels=jnp.asarray(toys.task(1).labels) % 2 + 2 * task))
    flat = flax.traverse_util.flatten_dict(grads)
    for name in ("adapter2", "classifier_adapter"):
      for leaf in ("alpha", "kernel"):
        norms = [float(jnp.abs(place).max()) for place in flat[name, leaf]]
        assert (norms[0] > 0, norms[1]) == (task == 1, 0)
    assert float(jnp.abs(flat["layer1", "conv", "conv", "kernel"]).max()) > 0


def test_macs_are_of_all_columns_that_have_to_run():
  x = batch().x
  p = [jax.jit(method(3).predict, static_argnums=3)(after(3), x, task, 3) for task in range(3)]
  # Layers of column j: 16 pixels, 9 x 1 x 3; 4 pixels, 9 x 3 x 4 or twice that and j x 3 x 3. Head: j x 4 x 4 and
  # 4 x 2 or twice that.
  layers = [432 + 4 * 108, 432 + 4 * (216 + 9), 432 + 4 * (216 + 18)]
  heads = [8, 16 + 16, 32 + 16]
  for task in range(3):
    assert set(np.asarray(p[task].macs).tolist()) == {sum(layers[: task + 1]) + heads[task]}
    assert set(np.asarray(p[task].agnostic_macs).tolist()) == {sum(layers) + sum(heads)}


def test_without_the_task_the_likeliest_class_of_all_heads_is_taken():
  x = batch().x
  p = jax.jit(method(3).predict, static_argnums=3)(after(2), x, 1, 2)
  assert np.all(np.isneginf(p.agnostic[:, 4:]))
  log_probs = [jax.nn.log_softmax(toys.aware(method(3), after(2), task, 2, toys.task(1))) for task in (0, 1)]
  np.testing.assert_allclose(p.agnostic[:, :4], np.concatenate(log_probs, -1), rtol=1e-4, atol=1e-5)


def test_a_single_task_has_one_column():
  learner = toys.train(method(1), toys.learner(method(1)), toys.task(0), count=20)
  learner = toys.end(method(1), learner, toys.task(0))
  assert toys.accuracy(method(1), learner, 0, 1) == 1


def test_two_devices_learn_as_one():
  data, axis = toys.task(1), "devices"
  learner = after(1)
  one, _ = jax.jit(toys.step(method(3)))(learner, data.pixels, data.labels, 0)
  halves = lambda x: x.reshape(2, -1, *x.shape[1:])
  step = toys.step(method(3, axis), axis)
  two, _ = jax.pmap(step, axis, in_axes=(None, 0, 0, None), devices=jax.devices()[:2])(
      learner, halves(data.pixels), halves(data.labels), 0)
  assert not np.allclose(one.params["adapter2"]["kernel"], learner.params["adapter2"]["kernel"], rtol=0, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], rtol=1e-3, atol=1e-5),
               (one.params, one.batch_stats), (two.params, two.batch_stats))
