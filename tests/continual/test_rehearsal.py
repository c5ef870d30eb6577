import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual import rehearsal
from gating_jax.continual.generators import wgan
from gating_jax.continual.method import Batch, Problem, TaskData
from gating_jax.continual.replay_memory import ReplaySettings
from tests.helpers import tiny

SHAPE = (8, 8, 1)
PROBLEM = Problem(tasks=3, classes=2, shape=SHAPE, normalise=lambda x: x / 255.0)
KEY = jax.random.key(0, impl="rbg")


def data(task, count=12):
  """Makes images whose pixels hold the image's number."""
  labels = (2 * task + np.arange(count) % 2).astype(np.int32)
  pixels = (
    np.broadcast_to(100 * task + np.arange(count), (*SHAPE, count))
    .transpose(3, 0, 1, 2)
    .astype(np.uint8)
  )
  return TaskData(pixels, labels, pixels[:0], labels[:0])


def test_episodes_recall_the_task_that_ends_whole_and_a_share_of_those_before():
  episodic = rehearsal.episodic(PROBLEM, ReplaySettings(8, 4))
  memory = episodic.init(KEY)
  for task, per_class in ((0, [6, 6]), (1, [4, 4, 6, 6]), (2, [2, 2, 2, 2, 6, 6])):
    pixels, labels = episodic.recall(memory, data(task), task, KEY)
    assert np.bincount(labels).tolist() == per_class
    np.testing.assert_array_equal(pixels[:, 0, 0, 0] // 100, labels // 2)
    memory = episodic.keep(memory, data(task), task, KEY)
  assert episodic.megabytes(memory, 3) == pytest.approx(8 * (64 + 4) / 1e6)


def generative(problem=PROBLEM, **changes):
  settings = wgan.WganSettings(critic_steps=1, learning_rate=1e-3, ema_decay=0.0)
  sizes = {"images": 5, "replayed": 6, "latent": 4, "width": 2, "seed": 0}
  return rehearsal.generative(problem, settings, **{**sizes, **changes})


def trained(method, memory, task, steps=2):
  step = jax.jit(method.pretrain_step)
  for _ in range(steps):
    memory, metrics = step(
      memory, jnp.asarray(data(task).pixels), jnp.asarray(data(task).labels) - 2 * task
    )
  assert np.isfinite(metrics["critic_loss"])
  return memory


def test_generators_are_kept_task_by_task_and_all_that_is_recalled_is_generated():
  method = generative()
  memory, recalled = method.init(KEY), []
  for task in range(3):
    fresh = memory.training
    memory = trained(method, memory, task)
    learnt = memory.training.average
    pixels, labels = method.recall(memory, data(task), task, KEY)
    assert np.bincount(labels, minlength=2 * task + 2).tolist() == [3, 2] * (task + 1)
    assert pixels.shape == (5 * (task + 1), *SHAPE)
    assert pixels.dtype == np.uint8
    memory = method.keep(memory, data(task), task, KEY)
    kept = jax.tree.map(lambda x, t=task: x[t], memory.generators)
    assert tiny.bit_equal(kept, learnt)
    # the next task's training begins as this one's did
    assert tiny.bit_equal(memory.training, fresh)
    recalled.append(pixels)
  for earlier, later in zip(recalled, recalled[1:], strict=False):
    np.testing.assert_array_equal(later[: len(earlier)], earlier)
  one = sum(x.nbytes for x in jax.tree.leaves(memory.training.average)) / 1e6
  assert method.megabytes(memory, 2) == pytest.approx(2 * one)


def batch(task, count=12):
  pixels, labels, *_ = data(task, count)
  return Batch(PROBLEM.normalise(jnp.asarray(pixels)), jnp.asarray(labels), KEY, 0.0)


def test_a_batch_and_its_episodes_weigh_as_many_tasks_as_they_hold():
  episodic = rehearsal.episodic(PROBLEM, ReplaySettings(12, 600))
  memory, replay = episodic.init(KEY), jax.jit(episodic.replay)
  for task in range(3):
    replayed = replay(memory, batch(task), jnp.int32(task), KEY)
    assert replayed.batch_weight == pytest.approx(1 / (task + 1))
    counts = np.bincount(replayed.labels // 2, minlength=3)
    if task:
      np.testing.assert_allclose(counts[:task] / 600, 1 / task, atol=0.08)
      assert not counts[task:].any()
      np.testing.assert_array_equal(
        np.round(255 * replayed.x[:, 0, 0, 0]) // 100, replayed.labels // 2
      )
    memory = episodic.keep(memory, data(task), task, KEY)


def test_generated_replay_holds_every_task_up_to_this_one_and_none_of_the_batch():
  method = generative(replayed=600)
  memory, replay = jax.jit(method.init)(KEY), jax.jit(method.replay)
  fill = lambda tree, bias: jax.tree.map(
    lambda x: jnp.full_like(x, bias if x.ndim == 1 else 0), tree
  )
  for task, value in ((0, -1.0), (1, 1.0)):  # all its images dark, then all bright
    training = memory.training
    memory = memory.replace(training=training.replace(average=fill(training.average, value)))
    replayed = replay(memory, batch(task), jnp.int32(task), KEY)
    assert replayed.batch_weight == 0
    counts = np.bincount(replayed.labels, minlength=6)
    np.testing.assert_allclose(counts[: 2 * task + 2] / 600, 1 / (2 * task + 2), atol=0.08)
    assert not counts[2 * task + 2 :].any()
    memory = method.keep(memory, data(task), task, KEY)
  np.testing.assert_array_equal(replayed.x.mean((1, 2, 3)) > 0.5, replayed.labels // 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  "make",
  [
    lambda problem: rehearsal.episodic(problem, ReplaySettings(12, 8)),
    lambda problem: generative(problem, replayed=8),
  ],
)
def test_what_is_replayed_does_not_depend_on_how_the_batch_is_spread(make):
  key = jax.random.key(0)  # as steps have; under vmap rbg's numbers depend on how many there are
  whole, spread = (make(dataclasses.replace(PROBLEM, axis_name=axis)) for axis in (None, "devices"))
  memory = whole.keep(whole.init(KEY), data(0), 0, KEY)
  one = whole.replay(memory, batch(1, 8), jnp.int32(1), key)
  parts = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), (batch(1, 8).x, batch(1, 8).labels))
  two = jax.pmap(
    lambda memory, x, labels: spread.replay(memory, Batch(x, labels, key, 0.0), jnp.int32(1), key),
    axis_name="devices",
    in_axes=(None, 0, 0),
    devices=jax.devices()[:2],
  )(memory, *parts)
  np.testing.assert_array_equal(two.labels.reshape(-1), one.labels)
  # Rounded to pixels.
  np.testing.assert_allclose(two.x.reshape(one.x.shape), one.x, atol=1 / 255 + 1e-6)


def test_what_is_too_small_is_refused():
  with pytest.raises(ValueError, match="replay.images must be at least 6, one per class; got 5"):
    rehearsal.episodic(PROBLEM, ReplaySettings(5, 4))
  with pytest.raises(
    ValueError, match="generator.images must be at least 2, one per class of a task; got 1"
  ):
    generative(images=1)


def test_replayed_images_are_as_many_on_each_device():
  spread = dataclasses.replace(PROBLEM, axis_name="devices", normalise=lambda pixels: pixels)
  generate = lambda own, z, labels: jnp.broadcast_to(own, (len(z), *SHAPE))

  def replay(count):
    def on_device(_):
      own = jnp.arange(3, dtype=jnp.uint8)
      replayed = rehearsal.replay_of_all(
        generate, own, spread, task=jnp.int32(1), key=KEY, count=count, latent=2
      )
      return replayed.x, replayed.labels

    return jax.vmap(on_device, axis_name="devices")(jnp.zeros(2))

  pixels, labels = replay(4)
  assert (pixels.shape, labels.shape) == ((2, 2, *SHAPE), (2, 2))
  # An image is of the task of its class.
  np.testing.assert_array_equal(pixels[..., 0, 0, 0], labels // 2)
  with pytest.raises(
    ValueError, match="replayed images must be a multiple of the 2 devices; got 3"
  ):
    replay(3)
