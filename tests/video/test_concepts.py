import numpy as np
import pytest

from gating_jax.video.concepts import find_concepts

CORNERS = np.array([[0, 0, 4], [5, 0, 0], [0, -6, 0], [7, 7, 7]], np.float32)


def test_concepts_are_the_means_of_clusters():
  rng = np.random.default_rng(0)
  rows = np.repeat(CORNERS, 40, axis=0) + rng.normal(0, 0.1, (160, 3)).astype(np.float32)
  found = find_concepts(rng.permutation(rows), 4, seed=1)
  assert found.dtype == np.float32
  means = rows.reshape(4, 40, 3).mean(axis=1, dtype=np.float64)
  np.testing.assert_allclose(sorted(found.tolist()), sorted(means.tolist()), atol=1e-5)


def test_as_many_concepts_as_distinct_features_are_those_features():
  found = find_concepts(np.repeat(CORNERS, 3, axis=0), 4, seed=0)
  np.testing.assert_allclose(sorted(found.tolist()), sorted(CORNERS.tolist()), atol=1e-6)


def test_one_concept_is_the_mean():
  np.testing.assert_allclose(
    find_concepts(CORNERS, 1, seed=0), CORNERS.mean(axis=0, keepdims=True), rtol=1e-6
  )


def test_the_seed_alone_decides():
  rows = np.random.default_rng(0).normal(size=(300, 5))
  np.testing.assert_array_equal(find_concepts(rows, 6, seed=3), find_concepts(rows, 6, seed=3))
  assert (find_concepts(rows, 6, seed=4) != find_concepts(rows, 6, seed=3)).any()


@pytest.mark.parametrize(
  ("rows", "k", "message"),
  [
    (
      np.repeat(CORNERS, 3, axis=0),
      5,
      "k must be in 1 .. 4, the number of distinct features of 12; got 5",
    ),
    (CORNERS, 0, "k must be in 1 .. 4, the number of distinct features of 4; got 0"),
    (
      np.array([[0.0, 1.0], [np.nan, 1.0]]),
      1,
      r"features must be finite; got \[nan  1.\] in row 1 \(1 such rows\)",
    ),
    (
      np.array([[np.inf], [1.0], [np.inf]]),
      1,
      r"features must be finite; got \[inf\] in row 0 \(2 such rows\)",
    ),
    (np.zeros((4, 2, 2)), 1, r"features must be \[n, C\]; got shape \(4, 2, 2\)"),
  ],
)
def test_what_has_no_concepts_is_named(rows, k, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    find_concepts(rows, k, seed=0)
