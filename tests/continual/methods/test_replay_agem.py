import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gating_jax.continual.method import Batch
from gating_jax.continual.methods.replay import agem, project
from gating_jax.continual.replay_memory import ReplaySettings
from gating_jax.ops.collectives import mean_over_devices
from tests.helpers import toy

REPLAY = ReplaySettings(images=8, batch_size=8)
GRADIENT = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[3.0]])}
AGAINST = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([[-1.0]])}  # g.r = -5, r.r = 2
ALONG = jax.tree.map(jnp.negative, AGAINST)


def test_projection_by_hand():
  result = project(GRADIENT, AGAINST)
  np.testing.assert_allclose(result["a"], [1.0, 0.5])
  np.testing.assert_allclose(result["b"], [[0.5]])
  assert float(optax.tree.vdot(result, AGAINST)) == 0.0


def test_a_gradient_along_the_reference_stays():
  for reference in (ALONG, jax.tree.map(jnp.zeros_like, ALONG)):
    jax.tree.map(np.testing.assert_array_equal, project(GRADIENT, reference), GRADIENT)


def test_projection_of_random_gradients_is_the_nearest_that_does_not_conflict():
  keys = jax.random.split(jax.random.key(0), 20)
  conflicts = 0
  for key in keys:
    g, r = jax.random.normal(key, (2, 30))
    p = project(g, r)
    conflicts += bool(g @ r < 0)
    assert p @ r >= -1e-4
    # The removed part is orthogonal to the rest.
    np.testing.assert_allclose((g - p) @ p, 0, atol=1e-4)
  assert 3 < conflicts < 17


def batch(task):
  data = toy.images(task, per_class=4)
  return Batch(
    toy.normalise(jnp.asarray(data.pixels)), jnp.asarray(data.labels), jax.random.key(1), 0.0
  )


def memory_gradient(learner):
  """The gradient on the whole memory."""
  memory = learner.memory
  remembered = batch(0)._replace(x=toy.normalise(memory.pixels), labels=memory.labels)
  return jax.jit(jax.grad(lambda p: toy.network().loss(p, learner, remembered)[0]))(learner.params)


def test_without_a_memory_the_gradient_stays():
  method = agem(toy.network(), REPLAY)
  learner = toy.start(method)
  grads = jax.tree.map(
    lambda x: -x, jax.jit(jax.grad(lambda p: method.loss(p, learner, batch(0))[0]))(learner.params)
  )
  unchanged = jax.jit(method.gradient)(grads, learner, batch(0))
  jax.tree.map(np.testing.assert_array_equal, unchanged, grads)


def test_the_gradient_no_longer_raises_the_loss_on_what_is_remembered():
  one_image = ReplaySettings(images=1, batch_size=8)  # every draw is the whole memory
  method = agem(toy.network(), one_image)
  learner = toy.end_task(method, toy.start(method), toy.images(0))
  reference = memory_gradient(learner)
  grads = jax.tree.map(lambda g, r: g - 2 * r, jax.tree.map(jnp.ones_like, reference), reference)
  assert optax.tree.vdot(grads, reference) < -0.1
  gradient = jax.jit(method.gradient)
  changed = gradient(grads, learner, batch(1))
  np.testing.assert_allclose(optax.tree.vdot(changed, reference), 0, atol=1e-4)
  agreeing = jax.tree.map(jnp.negative, grads)
  jax.tree.map(np.testing.assert_array_equal, gradient(agreeing, learner, batch(1)), agreeing)


@pytest.mark.slow
def test_the_reference_is_of_the_images_of_all_devices():
  method = agem(toy.network("devices"), REPLAY)
  learner = toy.end_task(method, toy.start(agem(toy.network(), REPLAY)), toy.images(0))
  conflicting = jax.tree.map(lambda r: -3 * r, memory_gradient(learner))
  halves = lambda x: x.reshape(2, -1, *x.shape[1:])
  b = batch(1)

  def on_device(x, labels):
    part = b._replace(x=x, labels=labels)
    return method.gradient(mean_over_devices(conflicting, "devices"), learner, part)

  both = jax.vmap(on_device, axis_name="devices")(halves(b.x), halves(b.labels))
  alone = agem(toy.network(), REPLAY).gradient(conflicting, learner, b)
  for spread, one, given in zip(*map(jax.tree.leaves, (both, alone, conflicting)), strict=True):
    np.testing.assert_allclose(spread, np.stack([one, one]), rtol=1e-4, atol=1e-6)
    assert not np.allclose(one, given, rtol=1e-2)
