import numpy as np
import pytest
from scipy import stats

from gating_jax.analysis import scores


@pytest.mark.parametrize(("right", "examples"), [(0, 10), (7, 10), (58, 97), (10, 10)])
def test_the_interval_of_a_fraction_is_scipys(right, examples):
  expected = stats.binomtest(right, examples).proportion_ci(0.95, method="wilson")
  assert scores.fraction_interval(right, examples) == pytest.approx(tuple(expected), abs=1e-6)


@pytest.mark.parametrize(("right", "examples"), [(0, 0), (-1, 4), (5, 4)])
def test_a_fraction_of_nothing_or_above_1_is_refused(right, examples):
  with pytest.raises(ValueError, match=f"right must be in .*; got {right} of {examples}"):
    scores.fraction_interval(right, examples)


def test_the_interval_of_a_mean_of_one_fraction_is_about_its_own():
  low, high = scores.mean_interval([0.6], [100])
  own = scores.fraction_interval(60, 100)
  assert (low, high) == pytest.approx((own.low, own.high), abs=0.01)
  # Of four tasks alike, half as wide.
  quarter = scores.mean_interval([0.6] * 4, [100] * 4)
  assert quarter.high - quarter.low == pytest.approx((high - low) / 2)
  # Where all is right, something is still not known.
  assert scores.mean_interval([1.0, 1.0], [50, 50]).low < 0.99


def test_a_bootstrap_of_a_mean_is_about_its_standard_error():
  values = np.random.default_rng(1).normal(0.5, 0.1, 400)
  low, high = scores.bootstrap_interval(lambda index: float(values[index].mean()), 400)
  half = 1.96 * values.std() / 20
  assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.003)
  assert scores.bootstrap_interval(lambda index: np.nan, 5) == (0.0, 1.0)


def test_classes_confusions_and_the_majority_are_counted():
  labels = np.array([0, 0, 0, 1, 1, 3])
  predicted = np.array([0, 0, 1, 1, 0, 0])
  found = scores.score_predictions(labels, predicted, "abcd", trained=np.array([9, 0, 0, 4]))
  low, high = found.pop("accuracy_low"), found.pop("accuracy_high")
  assert 0 < low < 0.5 < high < 1
  assert found == {
    "majority_rate": 0.5,
    "class_accuracy": {"a": 2 / 3, "b": 0.5, "d": 0.0},
    "classes_without_test": ["c"],
    "classes_without_training": ["b", "c"],
    "confusion": [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
  }


def test_of_many_classes_the_largest_confusions_are_kept():
  classes = scores.MOST_CLASSES + 1
  confusion = np.eye(classes, dtype=int)
  confusion[3, 4], confusion[5, 2] = 7, 9
  names = [str(k) for k in range(classes)]
  found = scores.classes_of_score(confusion, names)
  assert "confusion" not in found
  assert found["confusions"] == [["5", "2", 9], ["3", "4", 7]]


def test_labels_of_either_kind_are_counted():
  assert scores.count_labels(np.array([0, 2, 2]), 4).tolist() == [1, 0, 2, 0]
  assert scores.count_labels(np.array([[1, 0], [1, 1]], np.float32), 2).tolist() == [2, 1]


def test_an_older_result_has_no_interval():
  assert scores.interval_of({"accuracy": 0.5}, "accuracy") is None
  entries = scores.interval_entries("accuracy", scores.Interval(0.4, 0.6))
  assert scores.interval_of(entries, "accuracy") == (0.4, 0.6)


def test_a_difference_within_both_intervals_may_be_chance():
  # 58.8 and 59.8 % of 97 videos.
  one, other = scores.fraction_interval(57, 97), scores.fraction_interval(58, 97)
  assert scores.may_be_chance(57 / 97, 58 / 97, (one, other))
  far = scores.fraction_interval(90, 97)
  assert not scores.may_be_chance(57 / 97, 90 / 97, (one, far))
