import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual.methods.icarl import (
  Headed,
  class_means,
  herd,
  icarl,
  nearest_mean,
  sigmoid_losses,
)
from gating_jax.continual.replay_memory import EMPTY, ReplaySettings
from tests.helpers import toy


def network():
  return toy.network(model=Headed(toy.Dense(None), toy.TASKS * toy.CLASSES))


def method(images=12):
  return icarl(network(), ReplaySettings(images, batch_size=8))


def unit_features(learner, pixels):
  """By hand, from the parameters."""
  hidden = learner.params["body"]["hidden"]
  f = np.maximum(
    np.reshape(pixels, (len(pixels), -1)) / 255 @ np.asarray(hidden["kernel"]) + hidden["bias"], 0
  )
  return f / np.linalg.norm(f, axis=1, keepdims=True)


def test_herding_by_hand():
  features = np.array([[0.0, 0.0], [4.0, 1.0], [2.0, -1.0], [2.0, 2.0]])  # mean (2, 1/2)
  # 1: (2, 2) and (2, -1) are equally near, the first is taken. 2: (2, 2) makes the mean exact.
  # 3: (0, 0) gives (4/3, 1/3) and (4, 1) gives (8/3, 2/3), again equally near.
  assert herd(features, 4).tolist() == [2, 3, 0, 1]
  assert herd(features, 2).tolist() == [2, 3]
  assert herd(features, 9).tolist() == [2, 3, 0, 1]


def test_herding_is_the_greedy_choice_of_its_equation():
  features = np.random.default_rng(0).normal(size=(12, 3))
  chosen = []
  for _ in range(7):
    gaps = {
      i: np.linalg.norm(features.mean(0) - features[[*chosen, i]].mean(0))
      for i in range(12)
      if i not in chosen
    }
    chosen.append(min(gaps, key=gaps.get))
  assert herd(features, 7).tolist() == chosen


def test_losses_by_hand():
  z, teacher = (
    np.array([[0.5, -1.0, 2.0, 0.1, 7.0, 7.0]] * 2),
    np.array([[1.0, 0.0, 9.0, 9.0, 9.0, 9.0]] * 2),
  )
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  bce = lambda x, target: -target * np.log(sigmoid(x)) - (1 - target) * np.log(1 - sigmoid(x))
  new, old = sigmoid_losses(
    jnp.asarray(z), jnp.asarray(teacher), jnp.array([3, 0]), jnp.int32(1), 2
  )
  assert float(new) == pytest.approx(
    (bce(2.0, 0) + bce(0.1, 1) + bce(2.0, 0) + bce(0.1, 0)) / 2, rel=1e-5
  )
  assert float(old) == pytest.approx(bce(0.5, sigmoid(1.0)) + bce(-1.0, 0.5), rel=1e-5)
  assert (
    float(
      sigmoid_losses(jnp.asarray(z), jnp.asarray(teacher), jnp.array([1, 0]), jnp.int32(0), 2)[1]
    )
    == 0
  )


def test_means_and_scores_by_hand():
  features = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
  means, has_mean = class_means(features, jnp.array([0, 0, 2, EMPTY]), 4)
  half = np.sqrt(0.5)
  np.testing.assert_allclose(means, [[half, half], [0, 0], [0, 1], [0, 0]], rtol=1e-6)
  assert has_mean.tolist() == [True, False, True, False]
  scores = nearest_mean(jnp.array([[1.0, 0.0]]), means, has_mean)
  np.testing.assert_allclose(
    scores, [[-((1 - half) ** 2 + half**2), -np.inf, -2.0, -np.inf]], rtol=1e-6
  )


@pytest.fixture(scope="module")
def two_tasks():
  """The learner after one task and after two."""
  m = method()
  return toy.learn(m, tasks=1), toy.learn(m, tasks=2)


def test_exemplars_are_those_of_herding(two_tasks):
  first, _ = two_tasks
  data = toy.images(0)
  for c in range(2):
    of_class = data.pixels[data.labels == c]
    best = of_class[herd(unit_features(first, of_class), 6)]
    kept = np.asarray(first.memory.exemplars.pixels)[np.asarray(first.memory.exemplars.labels) == c]
    assert sorted(x.tobytes() for x in kept) == sorted(x.tobytes() for x in best)
    np.testing.assert_array_equal(kept, best)


def test_reduced_exemplars_are_the_first_in_their_order(two_tasks):
  before, after = (learner.memory.exemplars for learner in two_tasks)
  for c in range(2):
    of_class = lambda memory, c=c: np.asarray(memory.pixels)[np.asarray(memory.labels) == c]
    assert (len(of_class(before)), len(of_class(after))) == (6, 3)
    np.testing.assert_array_equal(of_class(after), of_class(before)[:3])


def test_the_nearest_mean_of_exemplars_decides_with_and_without_the_task(two_tasks):
  _, learner = two_tasks
  exemplars, data = learner.memory.exemplars, toy.images(1, seed=1)
  features, labels = (
    unit_features(learner, np.asarray(exemplars.pixels)),
    np.asarray(exemplars.labels),
  )
  means = np.stack([features[labels == c].mean(axis=0) for c in range(4)])
  means /= np.linalg.norm(means, axis=1, keepdims=True)
  distance = np.linalg.norm(unit_features(learner, data.pixels)[:, None] - means, axis=-1)
  p = method().predict(learner, toy.normalise(jnp.asarray(data.pixels)), jnp.int32(1), 2)
  assert p.agnostic.shape == (40, 6)
  assert np.isneginf(p.agnostic[:, 4:]).all()
  np.testing.assert_array_equal(np.argmax(p.agnostic, axis=1), distance.argmin(axis=1))
  np.testing.assert_array_equal(np.argmax(p.aware, axis=1), distance[:, 2:].argmin(axis=1))


def test_the_teacher_is_the_network_at_the_end_of_the_last_task(two_tasks):
  m, (learner, _) = method(), two_tasks
  jax.tree.map(np.testing.assert_array_equal, learner.memory.teacher.params, learner.params)
  data = toy.images(1)
  after, _ = toy.step(m)(learner, data.pixels[:8], data.labels[:8])
  jax.tree.map(np.testing.assert_array_equal, after.memory.teacher, learner.memory.teacher)
  assert not np.array_equal(after.params["head"]["kernel"], learner.params["head"]["kernel"])


def test_every_class_needs_an_exemplar():
  with pytest.raises(ValueError, match="images must be at least 6, one exemplar per class; got 5"):
    method(images=5)
