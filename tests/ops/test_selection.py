import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.ops import selection
from gating_jax.ops.relaxations import straight_through_gate

SEGMENTS = 9
masks = st.lists(
  st.lists(st.booleans(), min_size=SEGMENTS, max_size=SEGMENTS), min_size=2, max_size=2
)
numbers = st.floats(-3, 3, width=16) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])
POLICIES = {
  "uniform": lambda valid, k: selection.uniform_k(valid, k=k),
  "random": lambda valid, k: selection.random_k(jax.random.key(3), valid, k=k),
  "first": lambda valid, k: selection.first_k(valid, k=k),
  "top": lambda valid, k: selection.top_k(
    jnp.sin(jnp.linspace(0, 50, valid.size).reshape(valid.shape)), valid, k=k
  ),
}
COMPILED = {name: jax.jit(policy) for name, policy in POLICIES.items()}
ensure_one_open, top_k, uniform_k = (
  jax.jit(selection.ensure_one_open),
  jax.jit(selection.top_k),
  jax.jit(selection.uniform_k),
)


def padded(*lengths, segments=SEGMENTS):
  return jnp.asarray(np.arange(segments) < np.array(lengths)[:, None])


@pytest.mark.parametrize("policy", POLICIES)
@given(masks, st.integers(1, SEGMENTS + 2))
def test_every_policy_opens_k_valid_segments_or_all_of_them(policy, valid, k):
  valid = np.array(valid)
  gates = np.asarray(COMPILED[policy](valid, jnp.array([k, k])))
  assert gates.dtype == np.float32
  assert set(np.unique(gates)) <= {0.0, 1.0}
  assert not gates[~valid].any()
  np.testing.assert_array_equal(gates.sum(axis=1), np.minimum(valid.sum(axis=1), k))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_takes_a_number_per_video_and_may_be_jitted(policy):
  valid, k = padded(9, 4, 1, 0), jnp.array([3, 2, 5, 1])
  gates = jax.jit(POLICIES[policy])(valid, k)
  np.testing.assert_array_equal(gates.sum(axis=1), [3, 2, 1, 0])
  np.testing.assert_array_equal(gates, POLICIES[policy](valid, k))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_video_of_one_segment_has_it_open(policy):
  np.testing.assert_array_equal(POLICIES[policy](jnp.ones((1, 1), bool), 3), [[1]])


@given(masks, st.integers(1, SEGMENTS))
def test_uniform_k_is_the_rounded_down_centres_of_equal_parts(valid, k):
  valid = np.array(valid)
  expected = np.zeros(valid.shape)
  for row, mask in zip(expected, valid, strict=True):
    places = np.flatnonzero(mask)
    parts = min(k, len(places))
    row[[places[(2 * i + 1) * len(places) // (2 * parts)] for i in range(parts)]] = 1
  np.testing.assert_array_equal(uniform_k(valid, k=jnp.array([k, k])), expected)


@pytest.mark.parametrize(("k", "places"), [(1, [4]), (2, [2, 6]), (3, [1, 4, 7]), (9, range(9))])
def test_uniform_k_by_hand(k, places):
  np.testing.assert_array_equal(np.flatnonzero(selection.uniform_k(padded(9), k=k)[0]), places)


def test_random_k_takes_every_set_equally_often():
  videos = 6000
  gates = np.asarray(selection.random_k(jax.random.key(0), padded(*[4] * videos, segments=6), k=2))
  sets, counts = np.unique(gates, axis=0, return_counts=True)
  expected = sorted(
    [float(i in pair) for i in range(6)] for pair in itertools.combinations(range(4), 2)
  )
  np.testing.assert_array_equal(sets, expected)
  np.testing.assert_array_less(np.abs(counts - 1000), 5 * np.sqrt(videos * 1 / 6 * 5 / 6))


def test_random_k_depends_on_the_key_and_not_on_padding_or_the_other_videos():
  draw = lambda seed, valid: np.asarray(selection.random_k(jax.random.key(seed), valid, k=3))
  alone, together = draw(0, padded(7, segments=7)), draw(0, padded(7, 9, 9, segments=16))
  np.testing.assert_array_equal(together[:1, :7], alone)
  assert (draw(1, padded(9, 9, 9)) != draw(0, padded(9, 9, 9))).any()


def test_random_k_does_not_depend_on_the_number_of_devices():
  alone = np.asarray(selection.random_k(jax.random.key(5), padded(*[9] * 16), k=4))
  assert len(np.unique(alone, axis=0)) > 8
  shards = jax.pmap(
    lambda valid: selection.random_k(jax.random.key(5), valid, k=4, axis_name="devices"),
    axis_name="devices",
  )(padded(*[9] * 16).reshape(8, 2, 9))
  np.testing.assert_array_equal(shards.reshape(16, 9), alone)


@given(st.lists(numbers, min_size=SEGMENTS, max_size=SEGMENTS), masks, st.integers(1, SEGMENTS))
def test_top_k_is_a_stable_sort_with_nan_last(scores, valid, k):
  valid = np.array(valid[:1])
  worth = lambda i: (math.isnan(scores[i]), -scores[i] if not math.isnan(scores[i]) else 0.0, i)
  best = sorted(np.flatnonzero(valid[0]), key=worth)[:k]
  gates = top_k(np.array([scores], np.float32), valid, k=jnp.array([k]))
  np.testing.assert_array_equal(np.flatnonzero(gates[0]), sorted(best))


def test_nan_is_chosen_only_where_nothing_else_is_left():
  scores = jnp.array([[jnp.nan, -jnp.inf, 1.0, 9.0]])
  for k, places in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2])):
    assert np.flatnonzero(selection.top_k(scores, padded(3, segments=4), k=k)[0]).tolist() == places


@given(masks, masks, st.randoms(use_true_random=False))
def test_keep_best_changes_only_videos_without_an_open_segment(gates, valid, random):
  gates, valid = np.array(gates, np.float32), np.array(valid)
  logits = np.array([[random.uniform(-5, 5) for _ in range(SEGMENTS)] for _ in valid], np.float32)
  kept = np.asarray(ensure_one_open(gates, logits, valid))
  for b in range(len(valid)):
    expected = gates[b] * valid[b]
    if valid[b].any() and not expected.any():
      expected[np.argmax(np.where(valid[b], logits[b], -np.inf))] = 1
    np.testing.assert_array_equal(kept[b], expected)


def test_keep_best_passes_the_gradient_of_the_gates_on_valid_segments():
  logits = jnp.array([[-9.0, -8.0, 20.0], [-9.0, 8.0, 1.0]])
  valid = jnp.array([[True, True, False], [True, True, True]])
  weights = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
  gate = lambda z: straight_through_gate(jax.random.key(0), z, noise_scale=0.0)
  repaired = lambda z: selection.ensure_one_open(gate(z), z, valid)
  np.testing.assert_array_equal(repaired(logits), [[0, 1, 0], [0, 1, 1]])
  slope = jax.grad(lambda z: (repaired(z) * weights).sum())(logits)
  own = jax.grad(lambda z: (gate(z) * weights).sum())(logits)
  assert (own[valid] != 0).all()
  np.testing.assert_array_equal(slope, jnp.where(valid, own, 0))


def test_keep_best_leaves_relaxed_gates_and_their_type():
  gates = jnp.array([[0.25, 0.5]], jnp.bfloat16)
  kept = jax.jit(selection.ensure_one_open)(gates, jnp.zeros((1, 2)), jnp.ones((1, 2), bool))
  assert kept.dtype == jnp.bfloat16
  np.testing.assert_array_equal(kept.astype(jnp.float32), [[0.25, 0.5]])


def test_keep_best_opens_something_even_where_all_logits_are_nan():
  kept = selection.ensure_one_open(
    jnp.zeros((1, 3)), jnp.full((1, 3), jnp.nan), padded(2, segments=3)
  )
  np.testing.assert_array_equal(kept, [[1, 0, 0]])


def test_keep_best_maps_over_an_axis():
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(-2, 1.5, (4, 3, 5)), jnp.float32)
  valid = jnp.asarray(rng.random((4, 3, 5)) < 0.7)
  one_by_one = np.stack(
    [selection.ensure_one_open(z > 0, z, v) for z, v in zip(logits, valid, strict=True)]
  )
  np.testing.assert_array_equal(
    jax.vmap(lambda z, v: selection.ensure_one_open(z > 0, z, v))(logits, valid), one_by_one
  )


@pytest.mark.parametrize(
  ("share", "counts"),
  [
    (1.0, [9, 5, 1, 0]),
    (0.5, [5, 3, 1, 0]),
    (0.25, [3, 2, 1, 0]),
    (1e-6, [1, 1, 1, 0]),
    (1, [1, 1, 1, 0]),
    (3, [3, 3, 1, 0]),
    (40, [9, 5, 1, 0]),
  ],
)
def test_k_for_by_hand(share, counts):
  np.testing.assert_array_equal(selection.budget_to_k(padded(9, 5, 1, 0), share=share), counts)


def test_k_for_does_not_round_up_what_is_whole():
  for percent in range(1, 101):
    assert selection.budget_to_k(jnp.ones((1, 100), bool), share=percent / 100)[0] == percent


@given(st.integers(1, 70))
def test_frame_exit_order_visits_all_and_halves_the_largest_gap_by_levels(segments):
  order = selection.frame_exit_order(segments)
  np.testing.assert_array_equal(np.sort(order), np.arange(segments))
  assert order[0] == segments // 2
  for level in range(1, 7):
    seen = np.sort(order[: 2**level + 1])
    assert np.diff(seen).max(initial=0) <= math.ceil(segments / 2**level)


@given(masks, st.integers(1, SEGMENTS))
def test_first_k_is_in_the_order_of_each_videos_own_length(valid, k):
  gates = np.asarray(selection.first_k(jnp.asarray(valid), k=k))
  for row, mask in zip(gates, np.array(valid), strict=True):
    places = np.flatnonzero(mask)
    first = selection.frame_exit_order(len(places))[:k] if len(places) else []
    np.testing.assert_array_equal(np.flatnonzero(row), np.sort(places[first]))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: selection.uniform_k(padded(3), k=0), "k must be >= 1; got 0"),
    (lambda: selection.random_k(jax.random.key(0), padded(3), k=-1), "k must be >= 1; got -1"),
    (lambda: selection.top_k(jnp.zeros((1, 9)), padded(3), k=0), "k must be >= 1; got 0"),
    (lambda: selection.budget_to_k(padded(3), share=0), "k must be >= 1; got 0"),
    (
      lambda: selection.budget_to_k(padded(3), share=1.5),
      r"share must be in \(0, 1\], or an int number of segments; got 1.5",
    ),
    (
      lambda: selection.budget_to_k(padded(3), share=math.nan),
      r"share must be in \(0, 1\], or an int number of segments; got nan",
    ),
    (lambda: selection.frame_exit_order(0), "segments must be >= 1; got 0"),
  ],
)
def test_a_wrong_number_is_named(call, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    call()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_the_best_are_the_best_where_scores_are_whole_numbers_or_truth_values(dtype):
  scores = jnp.asarray(np.array([[0, 0, 1, 0], [1, 0, 0, 0]], dtype))
  chosen = selection.top_k(scores, jnp.ones((2, 4), bool), k=1)
  np.testing.assert_array_equal(chosen, scores.astype(jnp.float32))


def test_former_names_answer_as_those_of_today_and_warn():
  logits, valid = jnp.array([[1.0, -1.0]]), jnp.ones((1, 2), bool)
  with pytest.warns(DeprecationWarning, match="now called ensure_one_open"):
    kept = selection.keep_best(jnp.zeros((1, 2)), logits, valid)
  with pytest.warns(DeprecationWarning, match="now called budget_to_k"):
    k = selection.k_for(valid, 0.5)
  assert (kept.tolist(), k.tolist()) == ([[1.0, 0.0]], [1])
