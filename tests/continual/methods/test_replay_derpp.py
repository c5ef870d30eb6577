import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual.method import Batch
from gating_jax.continual.methods.replay import derpp, squared_gap
from gating_jax.continual.replay_memory import ReplaySettings
from tests.helpers import toy

REPLAY = ReplaySettings(images=1, batch_size=4)
STORED = np.array([[2.0, -1.0, 0.5, 9.0, 9.0, 9.0]])


def cross_entropy(logits, label, seen):
  logits = np.asarray(logits, np.float64)[:seen]
  return np.log(np.sum(np.exp(logits))) - logits[label]


def method(alpha=0.3, beta=0.7):
  return derpp(toy.network(), REPLAY, alpha=alpha, beta=beta)


def batch():
  data = toy.images(1, per_class=2)
  return Batch(
    toy.normalise(jnp.asarray(data.pixels)), jnp.asarray(data.labels), jax.random.key(1), 0.0
  )


def test_terms_by_hand_with_one_image_in_memory():
  learner = toy.start(method())
  remembered = toy.images(0, per_class=1).pixels[:1]
  memory = learner.memory.replace(
    pixels=jnp.asarray(remembered), labels=jnp.array([0]), extra=jnp.asarray(STORED)
  )
  learner = learner.replace(memory=memory, task=jnp.int32(1))
  total, (terms, _) = jax.jit(method().loss)(learner.params, learner, batch())
  net = toy.network()
  new = net.logits(learner.params, {}, batch().x)
  old = np.asarray(net.logits(learner.params, {}, toy.normalise(jnp.asarray(remembered))))[0]
  expected = {
    "cross_entropy": np.mean(
      [cross_entropy(z, y, 4) for z, y in zip(new, [2, 2, 3, 3], strict=True)]
    ),
    "logits": np.mean((old[:2] - STORED[0, :2]) ** 2),  # of the two classes seen when it was stored
    "replay": cross_entropy(old, 0, 4),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(
    total,
    expected["cross_entropy"] + 0.3 * expected["logits"] + 0.7 * expected["replay"],
    rtol=1e-5,
  )


def test_squared_gap_by_hand():
  gap = squared_gap(
    jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 5.0]]),
    jnp.zeros((2, 3)),
    jnp.array([[True, True, False], [True, True, True]]),
  )
  assert float(gap) == pytest.approx(((1 + 4) / 2 + (0 + 1 + 25) / 3) / 2)


def test_nothing_is_replayed_before_there_is_a_memory():
  learner = toy.start(method())
  first = batch()._replace(labels=batch().labels - 2)
  total, (terms, _) = jax.jit(method().loss)(learner.params, learner, first)
  assert (float(terms["logits"]), float(terms["replay"])) == (0.0, 0.0)
  assert float(total) == float(terms["cross_entropy"]) > 0


def test_logits_are_stored_with_their_own_image():
  m = derpp(toy.network(), ReplaySettings(images=7, batch_size=4), alpha=1.0, beta=1.0)
  learner = toy.end_task(m, toy.start(m), toy.images(0))
  logits = toy.network().logits(learner.params, {}, toy.normalise(learner.memory.pixels))
  assert np.std(logits, axis=0).min() > 1e-3
  np.testing.assert_allclose(learner.memory.extra, logits, rtol=1e-5, atol=1e-6)


def test_stored_logits_hold_the_network_to_them():
  def drift(alpha):
    m = derpp(toy.network(), ReplaySettings(images=12, batch_size=8), alpha=alpha, beta=0.0)
    learner = toy.learn(m, tasks=2)
    old = learner.memory.labels < 2
    gap = (
      toy.network().logits(learner.params, {}, toy.normalise(learner.memory.pixels))
      - learner.memory.extra
    )
    return float(jnp.mean(gap[old, :2] ** 2))

  assert drift(1.0) < 0.1 * drift(0.0)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_weights_are_checked(name):
  with pytest.raises(ValueError, match=f"{name} must be >= 0; got -1"):
    method(**{name: -1})
