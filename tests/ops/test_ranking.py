import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gating_jax.ops import ranking
from gating_jax.ops.ranking import sort_with_vjp


def weighted_sort(x, weights, axis=0):
  return jnp.sum(weights * sort_with_vjp(x, axis=axis))


def columns_with_ties(n, seed):
  """`[n, 5]`: distinct; few values; infinities of both signs; all equal; zeros of both signs."""
  rng = np.random.default_rng(seed)
  return np.stack(
    [
      rng.normal(size=n),
      rng.integers(-2, 3, n),
      rng.choice([-np.inf, -1.0, 0.5, np.inf], n),
      np.full(n, 0.3),
      rng.choice([-0.0, 0.0, 1.0], n),
    ],
    axis=1,
  ).astype(np.float32)


@pytest.mark.parametrize(
  ("shape", "axis"), [((1,), 0), ((7,), -1), ((6, 3), 0), ((3, 6), 1), ((2, 5, 3), -2)]
)
def test_values_are_those_of_numpy_along_the_axis(shape, axis):
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  expected = np.sort(x, axis)
  assert shape == (1,) or (expected != x).any()
  np.testing.assert_array_equal(
    jax.jit(sort_with_vjp, static_argnames="axis")(x, axis=axis), expected
  )


def is_tied(x, order):
  ordered = np.take_along_axis(x, order, 0)
  return ordered[1:] == ordered[:-1]


@pytest.mark.parametrize("length", [2**k for k in range(10)])
def test_the_network_sorts_any_power_of_two(length, monkeypatch):
  # The same lines run by numpy: long networks take seconds to compile.
  monkeypatch.setattr(ranking, "jnp", np)
  x = np.random.default_rng(length).integers(-length, length, (length, 50))
  np.testing.assert_array_equal(ranking._network(x), np.sort(x, 0))


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (2, 5), (5, 5), (8, 5), (13, 70), (3, 130)])
def test_the_network_gives_the_order_of_the_library_sort(n, columns):
  x = np.tile(columns_with_ties(n, seed=n), (1, columns // 5 + 1))[:, :columns]
  source, tied = jax.jit(ranking._network_argsort)(x)
  library_source, library_tied = jax.jit(ranking._library_argsort)(x)
  order = np.argsort(x, axis=0, kind="stable")
  assert source.dtype == library_source.dtype == jnp.int32
  for got in (source, library_source):
    np.testing.assert_array_equal(got, order)
  for got in (tied, library_tied):
    np.testing.assert_array_equal(got, is_tied(x, order))


@example([-0.0, 1e-45, 0.0, -1e-45, 6.7e-44, 1e-45])
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=6, max_size=6))
def test_the_network_orders_every_float(x):
  x = np.asarray(x, np.float32)
  source, tied = packed_argsort(x)
  np.testing.assert_array_equal(source, np.argsort(x, kind="stable"))
  np.testing.assert_array_equal(tied, is_tied(x, np.asarray(source)))


packed_argsort = jax.jit(ranking._network_argsort)


@pytest.mark.parametrize("n", [ranking._NETWORK_MAX_LENGTH + 1])
def test_columns_too_long_for_the_network_are_sorted_stably_too(n):
  x = np.random.default_rng(n).integers(0, n // 2, (n, 1)).astype(np.float32)
  source, _ = jax.jit(ranking.argsort)(x)
  np.testing.assert_array_equal(source, np.argsort(x, axis=0, kind="stable"))


def test_float64_is_ordered_to_its_last_digit(x64):
  x = 1 + np.array([3, 1, 2, 0]) * 2.0**-52
  source, tied = ranking.argsort(jnp.asarray(x))
  np.testing.assert_array_equal(source, [3, 1, 2, 0])
  assert not tied.any()


def test_the_processor_uses_the_network_and_other_devices_the_library():
  x = jax.ShapeDtypeStruct((4, 2), jnp.float32)
  sorts = lambda platform: (
    "stablehlo.sort"
    in (jax.jit(ranking.argsort).trace(x).lower(lowering_platforms=(platform,)).as_text())
  )
  assert not sorts("cpu")
  assert sorts("cuda")


@pytest.mark.parametrize(("shape", "axis"), [((7, 3), 0), ((3, 6), -1), ((2, 5, 3), 1)])
def test_the_backward_pass_is_the_transposed_permutation(shape, axis):
  rng = np.random.default_rng(1)
  x = rng.permutation(np.linspace(-1, 1, np.prod(shape))).reshape(shape).astype(np.float32)
  cotangent = rng.normal(size=shape).astype(np.float32)
  n = shape[axis]
  columns = np.moveaxis(x, axis, 0).reshape(n, -1)
  weights = np.moveaxis(cotangent, axis, 0).reshape(n, -1)
  expected = np.empty_like(weights)
  for c in range(columns.shape[1]):
    permutation = np.eye(n, dtype=np.float32)[np.argsort(columns[:, c])]
    np.testing.assert_array_equal(permutation @ columns[:, c], np.sort(columns[:, c]))
    expected[:, c] = permutation.T @ weights[:, c]
  moved = np.moveaxis(x, axis, 0).shape
  expected = np.moveaxis(expected.reshape(moved), 0, axis)
  assert (expected != cotangent).any()
  np.testing.assert_array_equal(
    jax.jit(jax.grad(weighted_sort), static_argnums=2)(x, cotangent, axis), expected
  )


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_gradient_is_the_finite_difference(n, central_differences):
  rng = np.random.default_rng(n)
  x = rng.permutation(n)[:, None] + rng.uniform(-0.3, 0.3, (n, 2))
  weights = rng.normal(size=(n, 2))
  f = lambda x: weighted_sort(x**2, weights)
  np.testing.assert_allclose(jax.jit(jax.grad(f))(x), central_differences(f, x), atol=1e-7)


def test_equal_values_get_the_mean_of_the_gradients_of_their_places():
  cases = {
    "three tied at the top": ([0.5, 0.1, 0.5, 0.2, 0.5], [7, 1, 7, 2, 7]),
    "two pairs": ([3.0, -1.0, 3.0, -1.0, 0.0], [9, 1.5, 9, 1.5, 3]),
    "zeros of either sign": ([0.0, -0.0, 1.0, -1.0, 0.0], [4, 4, 11, 1, 4]),
    "all equal": ([0.3] * 5, [4.8] * 5),
    "infinities": ([-np.inf, np.inf, 0.0, np.inf, -np.inf], [1.5, 9, 3, 9, 1.5]),
    "distinct": ([5.0, 4.0, 3.0, 2.0, 1.0], [11, 7, 3, 2, 1]),
  }
  x, expected = (
    np.stack(column, 1).astype(np.float32) for column in zip(*cases.values(), strict=True)
  )
  weights = np.array([1, 2, 3, 7, 11], np.float32)[:, None]
  _, pullback = jax.vjp(jax.jit(sort_with_vjp), x)
  np.testing.assert_allclose(pullback(np.broadcast_to(weights, x.shape))[0], expected, rtol=1e-6)


def test_small_gradients_of_ties_survive_beside_large_ones():
  gradient = jax.grad(lambda x: sort_with_vjp(x) @ jnp.array([1e8, 1.0, 1.0]))(
    jnp.array([0.0, 1.0, 1.0])
  )
  np.testing.assert_array_equal(gradient, [1e8, 1, 1])
  x = jnp.arange(512.0) // 2
  halves = jax.grad(lambda x: jnp.sum(sort_with_vjp(x.astype(jnp.bfloat16)).astype(jnp.float32)))(x)
  np.testing.assert_array_equal(halves, np.ones(512))


jitted_gradient = jax.jit(
  jax.grad(lambda x: jnp.sum(np.sin(np.arange(6.0, dtype=np.float32)) * sort_with_vjp(x) ** 2))
)


@given(
  x=st.lists(
    st.sampled_from([-1.5, 0.0, 0.25, 2.0]) | st.floats(-3, 3, width=32), min_size=6, max_size=6
  ),
  order=st.permutations(range(6)),
)
def test_permuting_the_batch_permutes_the_gradient_ties_or_not(x, order):
  x, order = np.asarray(x, np.float32), np.asarray(order)
  np.testing.assert_array_equal(jitted_gradient(x[order]), jitted_gradient(x)[order])


def test_jit_and_vmap_agree():
  x = np.random.default_rng(2).integers(0, 3, (3, 4, 2)).astype(np.float32)
  weights = np.random.default_rng(3).normal(size=(4, 2)).astype(np.float32)
  mapped = jax.jit(jax.vmap(jax.value_and_grad(weighted_sort), in_axes=(0, None)))(x, weights)
  for i in range(3):
    value, gradient = jax.value_and_grad(weighted_sort)(x[i], weights)
    np.testing.assert_allclose(mapped[0][i], value, rtol=1e-5)
    np.testing.assert_allclose(mapped[1][i], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_keep_their_type_in_value_and_gradient(dtype):
  x = jnp.array([3, 1, 1, 2], dtype)
  value, pullback = jax.vjp(sort_with_vjp, x)
  gradient = pullback(jnp.array([1, 3, 5, 7], dtype))[0]
  assert value.dtype == gradient.dtype == dtype
  np.testing.assert_array_equal(value.astype(jnp.float32), [1, 1, 2, 3])
  np.testing.assert_array_equal(gradient.astype(jnp.float32), [7, 2, 2, 5])


def test_nan_poisons_its_own_column_only():
  x = jnp.array([[3.0, 3.0], [jnp.nan, 2.0], [1.0, 1.0]])
  value = sort_with_vjp(x)
  assert np.isnan(value[:, 0]).sum() == 1
  np.testing.assert_array_equal(value[:, 1], [1, 2, 3])


def test_tie_bounds_by_hand():
  first, last = ranking.tie_bounds(jnp.array([0, 1, 1, 0, 0, 1], bool))
  np.testing.assert_array_equal(first, [0, 1, 1, 1, 4, 5, 5])
  np.testing.assert_array_equal(last, [0, 3, 3, 3, 4, 6, 6])


def test_unsort_puts_values_back():
  source = jnp.array([[2, 0], [0, 1], [1, 2]])
  values = jnp.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
  np.testing.assert_array_equal(ranking.unsort(values, source), [[2, 10], [3, 20], [1, 30]])


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integers_are_refused(dtype):
  with pytest.raises(
    TypeError, match=rf"^x must be of a floating type, to have a gradient; got {jnp.dtype(dtype)}$"
  ):
    sort_with_vjp(jnp.zeros(3, dtype))


@pytest.mark.parametrize(("shape", "axis"), [((3, 2), 2), ((3, 2), -3), ((), 0)])
def test_an_axis_the_input_does_not_have_is_named(shape, axis):
  message = f"axis must name an axis of the input; got axis {axis}, shape {shape}"
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    sort_with_vjp(jnp.zeros(shape), axis=axis)
