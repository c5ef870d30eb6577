import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.continual.generators import wgan
from gating_jax.models.generator import Critic


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_penalty_of_a_linear_critic_is_that_of_its_slope():
  weights = 2 * normal(2, 3, 1)
  linear = lambda x: jnp.sum(x * weights, axis=(1, 2, 3)) + 5
  x = normal(7, 2, 3, 1, seed=1)
  slope = float(np.sqrt(np.sum(np.square(weights))))
  assert abs(slope - 1) > 0.3
  np.testing.assert_allclose(wgan.gradient_penalty(linear, x), (slope - 1) ** 2, rtol=1e-5)
  unit = lambda x: linear(x) / slope
  np.testing.assert_allclose(wgan.gradient_penalty(unit, x), 0, atol=1e-10)


def test_the_penalty_is_of_each_images_own_slope():
  """The slope of |x|^2 / 2 is x."""
  x = jnp.array([[3.0, 4.0], [0.6, 0.8], [0.0, 2.0]])
  penalty = wgan.gradient_penalty(lambda x: jnp.sum(x**2, axis=-1) / 2, x)
  np.testing.assert_allclose(penalty, (16 + 0 + 1) / 3, rtol=1e-6)


def test_a_flat_critic_has_a_finite_penalty_and_gradient():
  critic = lambda w, x: jnp.sum(w * x, axis=-1)
  loss = lambda w: wgan.gradient_penalty(lambda x: critic(w, x), jnp.ones((3, 2)))
  value, gradient = jax.value_and_grad(loss)(jnp.zeros(2))
  assert value == 1
  np.testing.assert_array_equal(gradient, [0, 0])


def test_the_critics_loss_by_hand():
  real, fake, mix = jnp.array([[2.0], [4.0]]), jnp.array([[0.0], [1.0]]), jnp.array([0.5, 0.25])
  loss, terms = wgan.critic_loss(lambda x: x[:, 0] ** 2, real, fake, mix, penalty=10.0)
  between = np.array([1.0, 1.75])  # of slope 2 x
  penalty = np.mean((2 * between - 1) ** 2)
  np.testing.assert_allclose(terms["distance"], (4 + 16) / 2 - (0 + 1) / 2)
  np.testing.assert_allclose(terms["gradient_penalty"], penalty)
  np.testing.assert_allclose([loss, terms["critic_loss"]], [10 * penalty - 9.5] * 2)


@pytest.mark.usefixtures("x64")
def test_the_gradient_of_the_critics_loss_by_finite_differences():
  critic, labels = Critic(classes=1, width=2), jnp.zeros(3, int)
  real, fake = (
    jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (3, 8, 8, 1))) for seed in (1, 2)
  )
  mix = jnp.array([0.2, 0.5, 0.9])
  rng = np.random.default_rng(3)
  shapes = jax.eval_shape(critic.init, jax.random.key(0), real, labels)["params"]
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape)), shapes)
  loss = jax.jit(
    lambda p: wgan.critic_loss(
      lambda x: critic.apply({"params": p}, x, labels), real, fake, mix, penalty=10.0
    )[0]
  )
  gradient = jax.jit(jax.grad(loss))(params)
  for seed in range(4):
    rng = np.random.default_rng(seed)
    way = jax.tree.map(lambda p: rng.normal(size=p.shape), params)  # noqa: B023
    at = lambda h: loss(jax.tree.map(lambda p, d: p + h * d, params, way))  # noqa: B023
    slope = sum(
      np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True)
    )
    assert abs(slope) > 1e-2
    np.testing.assert_allclose((at(1e-6) - at(-1e-6)) / 2e-6, slope, rtol=1e-5)
