import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax.ops.sparse_backward import open_backward

OPEN = (1.0, 0.0, 0.0, 1.0, 1.0, 0.0)


def mlp(weights, x):
  for w in weights:
    x = jnp.tanh(x @ w)
  return x


def centred(weights, x):
  """A function whose examples depend on each other, as under BatchNorm in training."""
  return mlp(weights, x - jnp.mean(x, axis=0, keepdims=True))


def problem(n=6):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)
  return (draw(4, 5), draw(5, 3)), draw(n, 4)


def loss(f, weights, x, gates, capacity=None):
  y = f(weights, x) if capacity is None else open_backward(f, weights, x, gates, capacity=capacity)
  return jnp.sum((gates[:, None] * y - 1) ** 2)


def gradients(f, gates, capacity=None):
  weights, x = problem(len(gates))
  return jax.jit(jax.grad(functools.partial(loss, f, capacity=capacity), (0, 1, 2)))(
    weights, x, jnp.array(gates)
  )


@pytest.mark.parametrize("capacity", [3, 4, 6])
def test_gradients_are_those_of_all_examples(capacity):
  full, skipped = gradients(mlp, OPEN), gradients(mlp, OPEN, capacity)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), full, skipped)
  assert (
    np.abs(full[2])[np.array(OPEN) == 0].min() > 0
  )  # of closed gates: the gradients of their examples
  assert not np.any(skipped[1][np.array(OPEN) == 0])


@pytest.mark.parametrize("gates", [(0.0,) * 6, (1.0,) * 6, (0.0, 0.0, 0.0, 0.0, 0.0, 0.3)])
def test_none_all_or_a_relaxed_one_open(gates):
  capacity = max(1, np.count_nonzero(gates))
  full, skipped = gradients(mlp, gates), gradients(mlp, gates, capacity)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), full, skipped)


def test_the_value_is_that_of_all_examples():
  weights, x = problem()
  np.testing.assert_array_equal(
    open_backward(mlp, weights, x, jnp.array(OPEN), capacity=3), mlp(weights, x)
  )


def test_more_open_examples_than_the_capacity_are_not_passed_over_in_silence():
  of_weights, of_x, _ = gradients(mlp, OPEN, 2)
  assert all(np.isnan(g).all() for g in (*of_weights, of_x))


def test_examples_that_depend_on_each_other_are_not_skipped_exactly():
  full, skipped = gradients(centred, OPEN), gradients(centred, OPEN, 3)
  assert np.abs(np.subtract(full[0][0], skipped[0][0])).max() > 1e-2


def test_the_backward_costs_what_the_capacity_holds():
  def flops(capacity):
    weights, x, gates = (jnp.ones((32, 32)),) * 2, jnp.ones((64, 32)), jnp.zeros(64).at[:8].set(1)
    step = jax.jit(jax.grad(functools.partial(loss, mlp, capacity=capacity)))
    return step.lower(weights, x, gates).compile().cost_analysis()["flops"]

  assert flops(8) < 0.55 * flops(None) < 0.55 * flops(64)


@pytest.mark.parametrize(
  ("gates", "capacity", "message"),
  [
    (jnp.ones(5), 3, r"gates must be \[N\] for x's N examples; got gates \(5,\), x \(6, 4\)"),
    (jnp.ones(6), 0, "capacity must be from 1 to the 6 examples of x; got 0"),
    (jnp.ones(6), 7, "capacity must be from 1 to the 6 examples of x; got 7"),
  ],
)
def test_what_does_not_fit_is_refused(gates, capacity, message):
  weights, x = problem()
  with pytest.raises(ValueError, match=message):
    open_backward(mlp, weights, x, gates, capacity=capacity)
