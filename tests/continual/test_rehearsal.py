import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gating_jax.continual import rehearsal, wgan
from gating_jax.continual.method import Problem, TaskData

SHAPE = (8, 8, 1)
PROBLEM = Problem(tasks=3, classes=2, shape=SHAPE, normalise=lambda x: x / 255.0)
KEY = jax.random.key(0, impl="rbg")


def data(task, count=12):
  """Every pixel says which image it is of."""
  labels = (2 * task + np.arange(count) % 2).astype(np.int32)
  pixels = np.broadcast_to(100 * task + np.arange(count), (*SHAPE, count)).transpose(3, 0, 1, 2).astype(np.uint8)
  return TaskData(pixels, labels, pixels[:0], labels[:0])


def test_episodes_recall_the_task_that_ends_whole_and_a_share_of_those_before():
  episodic = rehearsal.episodic(PROBLEM, images=8)
  memory = episodic.init(KEY)
  for task, per_class in ((0, [6, 6]), (1, [4, 4, 6, 6]), (2, [2, 2, 2, 2, 6, 6])):
    pixels, labels = episodic.recall(memory, data(task), task, KEY)
    assert np.bincount(labels).tolist() == per_class
    np.testing.assert_array_equal(pixels[:, 0, 0, 0] // 100, labels // 2)
    memory = episodic.keep(memory, data(task), task, KEY)
  assert episodic.megabytes(memory, 3) == pytest.approx(8 * (64 + 4) / 1e6)


def generative(**changes):
  settings = wgan.WganSettings(critic_steps=1, learning_rate=1e-3, average=0.0)
  return rehearsal.generative(PROBLEM, settings, **{"images": 5, "latent": 4, "width": 2, "seed": 0, **changes})


def trained(method, memory, task, steps=2):
  step = jax.jit(method.prelude)
  for _ in range(steps):
    memory, metrics = step(memory, jnp.asarray(data(task).pixels), jnp.asarray(data(task).labels) - 2 * task)
  assert np.isfinite(metrics["critic_loss"])
  return memory


def test_generators_are_kept_task_by_task_and_all_that_is_recalled_is_generated():
  method = generative()
  memory, recalled = method.init(KEY), []
  for task in range(3):
    fresh = memory["training"]
    memory = trained(method, memory, task)
    learnt = memory["training"].average
    pixels, labels = method.recall(memory, data(task), task, KEY)
    assert np.bincount(labels, minlength=2 * task + 2).tolist() == [3, 2] * (task + 1)
    assert pixels.shape == (5 * (task + 1), *SHAPE)
    assert pixels.dtype == np.uint8
    memory = method.keep(memory, data(task), task, KEY)
    kept = jax.tree.map(lambda x, t=task: x[t], memory["generators"])
    assert tiny.bit_equal(kept, learnt)
    assert tiny.bit_equal(memory["training"], fresh)  # the next task's begins as this one's did
    recalled.append(pixels)
  for earlier, later in zip(recalled, recalled[1:], strict=False):
    np.testing.assert_array_equal(later[: len(earlier)], earlier)
  one = sum(x.nbytes for x in jax.tree.leaves(memory["training"].average)) / 1e6
  assert method.megabytes(memory, 2) == pytest.approx(2 * one)


def test_what_is_too_small_is_refused():
  with pytest.raises(ValueError, match="replay.images must be at least 6, one of every class; got 0"):
    rehearsal.episodic(PROBLEM, images=0)
  with pytest.raises(ValueError, match="generator.images must be at least the 2 classes of a task; got 1"):
    generative(images=1)
