import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.ops import compaction

UNITS = 7
OPEN = (1.0, 0.0, 0.0, 1.0, 1.0, 0.0)
gates_lists = st.lists(st.booleans(), min_size=UNITS, max_size=UNITS)
open_indices = jax.jit(compaction.open_indices, static_argnames="capacity")


@given(gates_lists, st.sampled_from([1, 3, UNITS, UNITS + 2]))
def test_open_indices_are_those_of_numpy(gates, capacity):
  index, taken = open_indices(jnp.array(gates, jnp.float32), capacity=capacity)
  expected = np.flatnonzero(gates)[:capacity]
  assert (index.shape, index.dtype, taken.shape) == ((capacity,), jnp.int32, (capacity,))
  np.testing.assert_array_equal(taken, np.arange(capacity) < len(expected))
  np.testing.assert_array_equal(index, np.pad(expected, (0, capacity - len(expected))))


def test_relaxed_gates_are_open_above_zero_and_not_a_number_is_closed():
  index, taken = compaction.open_indices(jnp.array([jnp.nan, 0.2, 0.0, 1.0]), capacity=4)
  np.testing.assert_array_equal(index, [1, 3, 0, 0])
  np.testing.assert_array_equal(taken, [True, True, False, False])


@pytest.mark.parametrize(
  ("places", "capacity"),
  [
    ([], 1),
    ([], UNITS),
    ([0], 1),
    ([6], 3),
    ([0, 2, 5], 3),
    ([0, 2, 5], 6),
    (range(UNITS), UNITS),
    (range(UNITS), 9),
  ],
)
def test_a_function_on_the_open_units_alone_is_the_function_masked(places, capacity):
  gates = jnp.zeros(UNITS, jnp.float32).at[jnp.array(places, int)].set(1)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(UNITS, 2, 3)), jnp.float32)
  weights = jnp.arange(1.0, 1 + x.size, dtype=jnp.float32).reshape(x.shape)
  heavy = lambda x: jnp.exp(x) + 1

  @jax.jit
  def skipping(x):
    index, taken = compaction.open_indices(gates, capacity=capacity)
    return compaction.scatter_back(heavy(x[index]), index, taken, size=UNITS)

  mask = np.asarray(gates)[:, None, None]
  np.testing.assert_allclose(skipping(x), heavy(x) * mask, rtol=1e-6)
  slope = jax.grad(lambda x: (skipping(x) * weights).sum())(x)
  np.testing.assert_allclose(slope, weights * np.exp(x) * mask, rtol=1e-5)


def test_what_stands_in_the_padding_goes_nowhere_and_gets_no_gradient():
  index, taken = jnp.array([2, 0, 0]), jnp.array([True, False, False])
  values = jnp.array([[3.0, 4.0], [jnp.nan, 1.0], [jnp.inf, 1.0]])
  out, pullback = jax.vjp(lambda v: compaction.scatter_back(v, index, taken, size=4), values)
  np.testing.assert_array_equal(out, [[0, 0], [0, 0], [3, 4], [0, 0]])
  np.testing.assert_array_equal(pullback(jnp.full((4, 2), 7.0))[0], [[7, 7], [0, 0], [0, 0]])


def test_beyond_the_capacity_the_last_units_are_left_out():
  index, taken = compaction.open_indices(jnp.ones(5), capacity=3)
  np.testing.assert_array_equal(index, [0, 1, 2])
  assert taken.all()


def test_jit_and_vmap_agree():
  gates = jnp.asarray(np.random.default_rng(1).random((5, 6)) < 0.5, jnp.float32)
  values = jnp.arange(30, dtype=jnp.float32).reshape(5, 6)

  def there_and_back(gates, values):
    index, taken = compaction.open_indices(gates, capacity=6)
    return compaction.scatter_back(values[index], index, taken, size=6)

  assert 0 < gates.sum() < gates.size
  one_by_one = np.stack([there_and_back(g, v) for g, v in zip(gates, values, strict=True)])
  np.testing.assert_array_equal(one_by_one, gates * values)
  np.testing.assert_array_equal(jax.jit(jax.vmap(there_and_back))(gates, values), one_by_one)


def test_short_floats_stay_short():
  out = compaction.scatter_back(
    jnp.ones(2, jnp.bfloat16), jnp.array([1, 0]), jnp.array([True, False]), size=2
  )
  assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 4), (4, 4), (5, 9), (9, 9)])
def test_the_smallest_size_that_holds_the_count(count, size):
  assert compaction.capacity_for(count, sizes=(9, 4)) == size


@given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 9))
def test_bucket_sizes_hold_everything_with_little_padding(total, buckets, multiple):
  sizes = compaction.bucket_sizes(total, buckets=buckets, multiple=multiple)
  assert list(sizes) == sorted(set(sizes))
  assert len(sizes) <= buckets
  assert all(size % multiple == 0 for size in sizes)
  assert total <= sizes[-1] < total + multiple
  for count in range(1, total + 1):
    assert compaction.capacity_for(count, sizes=sizes) - count <= total / buckets + multiple


@given(st.integers(0, 100), st.lists(st.integers(1, 20), min_size=1))
def test_pieces_hold_all_units_and_only_the_last_has_padding(count, sizes):
  *filled, last = compaction.pieces_for(count, sizes)
  assert set(filled) <= {max(sizes)}
  rest = count - sum(filled)
  assert last == min(size for size in sizes if size >= rest)
  assert rest > 0 or not filled


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: compaction.capacity_for(70, sizes=(32, 64)),
      "count must be at most the largest of sizes, 64; got 70",
    ),
    (lambda: compaction.bucket_sizes(0, buckets=4), "total must be >= 1; got 0"),
    (lambda: compaction.bucket_sizes(4, buckets=0), "buckets must be >= 1; got 0"),
    (lambda: compaction.bucket_sizes(4, buckets=4, multiple=0), "multiple must be >= 1; got 0"),
    (
      lambda: compaction.open_indices(jnp.ones((2, 3)), capacity=4),
      r"gates must be \[N\] with N >= 1; got shape \(2, 3\)",
    ),
    (
      lambda: compaction.open_indices(jnp.ones(0), capacity=4),
      r"gates must be \[N\] with N >= 1; got shape \(0,\)",
    ),
    (lambda: compaction.open_indices(jnp.ones(3), capacity=0), "capacity must be >= 1; got 0"),
    (
      lambda: compaction.scatter_back(
        jnp.ones((3, 2)), jnp.zeros(2, int), jnp.ones(2, bool), size=4
      ),
      r"values must be \[capacity, ...\] with index and taken \[capacity\]; got \(3, 2\), \(2,\), "
      r"\(2,\)",
    ),
  ],
)
def test_what_does_not_fit_is_named_with_numbers(call, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    call()


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
  y = (
    f(weights, x)
    if capacity is None
    else compaction.open_backward(f, weights, x, gates, capacity=capacity)
  )
  return jnp.sum((gates[:, None] * y - 1) ** 2)


def gradients(f, gates, capacity=None):
  weights, x = problem(len(gates))
  return jax.jit(jax.grad(functools.partial(loss, f, capacity=capacity), (0, 1, 2)))(
    weights, x, jnp.array(gates, jnp.float32)
  )


@pytest.mark.parametrize("capacity", [3, 4, 6])
def test_gradients_are_those_of_all_examples(capacity):
  full, skipped = gradients(mlp, OPEN), gradients(mlp, OPEN, capacity)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), full, skipped)
  # Of closed gates: the gradients of their examples.
  assert np.abs(full[2])[np.array(OPEN) == 0].min() > 0
  assert not np.any(skipped[1][np.array(OPEN) == 0])


@pytest.mark.parametrize("gates", [(0.0,) * 6, (1.0,) * 6, (0.0, 0.0, 0.0, 0.0, 0.0, 0.3)])
def test_none_all_or_a_relaxed_one_open(gates):
  capacity = max(1, np.count_nonzero(gates))
  full, skipped = gradients(mlp, gates), gradients(mlp, gates, capacity)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), full, skipped)


def test_the_value_is_that_of_all_examples():
  weights, x = problem()
  np.testing.assert_array_equal(
    compaction.open_backward(mlp, weights, x, jnp.array(OPEN), capacity=3), mlp(weights, x)
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
def test_a_backward_that_does_not_fit_is_refused(gates, capacity, message):
  weights, x = problem()
  with pytest.raises(ValueError, match=message):
    compaction.open_backward(mlp, weights, x, gates, capacity=capacity)
