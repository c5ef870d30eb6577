import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gating_jax.video import metrics


def average_precision(scores, labels):
  """Mean over positives of the precision among all that score at least as high."""
  return np.mean([labels[scores >= s].mean() for s in scores[labels == 1]])


def test_mean_average_precision_by_hand():
  scores = np.array([[0.9, 0.2, 0.5], [0.8, 0.9, 0.5], [0.7, 0.8, 0.5], [0.6, 0.1, 0.5]])
  labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
  result = metrics.mean_average_precision(scores, labels)
  np.testing.assert_allclose(result.per_class, [(1 + 2 / 3) / 2, (1 + 2 / 4) / 2, np.nan])
  assert result.mean == pytest.approx((5 / 6 + 3 / 4) / 2)
  assert result.left_out == ("2",)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_mean_average_precision_is_the_mean_precision_at_the_positives(videos, classes, seed):
  rng = np.random.default_rng(seed)
  scores, labels = rng.integers(0, 6, (videos, classes)) / 4, rng.integers(0, 2, (videos, classes))
  result = metrics.mean_average_precision(scores, labels)
  known = [c for c in range(classes) if labels[:, c].any()]
  expected = [average_precision(scores[:, c], labels[:, c]) for c in known]
  np.testing.assert_allclose(result.per_class[known], expected)
  assert np.isnan(np.delete(result.per_class, known)).all()
  assert result.left_out == tuple(str(c) for c in range(classes) if c not in known)
  assert result.mean == pytest.approx(np.mean(expected)) if known else math.isnan(result.mean)


def test_the_order_of_videos_and_the_scale_of_scores_do_not_matter():
  rng = np.random.default_rng(0)
  scores, labels = rng.normal(size=(30, 5)), rng.random((30, 5)) < 0.3
  one = metrics.mean_average_precision(scores, labels)
  mixed = rng.permutation(30)
  np.testing.assert_allclose(
    metrics.mean_average_precision(np.exp(scores)[mixed], labels[mixed]).per_class, one.per_class
  )


@pytest.mark.parametrize(
  ("scores", "labels", "message"),
  [
    (
      np.array([[0.0], [np.nan], [np.inf]]),
      np.ones((3, 1)),
      r"scores must be finite; got \[nan\] for video 1 \(2 ",
    ),
    (np.zeros((2, 1)), np.array([[1], [2]]), r"labels must be 0 or 1; got \[2\] for video 1$"),
    (
      np.zeros((2, 3)),
      np.zeros((2, 2)),
      r"scores and labels must both be \[M, classes\]; got \(2, 3\) and \(2, 2\)$",
    ),
    (
      np.zeros((0, 3)),
      np.zeros((0, 3)),
      r"scores and labels must both be \[M, classes\]; got \(0, 3\) and \(0, 3\)$",
    ),
  ],
)
def test_what_cannot_be_scored_is_named(scores, labels, message):
  with pytest.raises(ValueError, match=f"^{message}"):
    metrics.mean_average_precision(scores, labels)


GATES = np.array([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1], [0.3, 0, 0, 0]])
VALID = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
RELEVANT = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)


def test_segment_report_by_hand():
  report = metrics.segment_report(
    GATES, VALID, np.array([0, 2, 0, 2]), relevant=RELEVANT, class_names="abc"
  )
  assert report == metrics.SegmentReport(
    share=(0.25 + 1 + 0.75 + 1) / 4,
    share_std=pytest.approx(np.sqrt((0.5**2 + 0.25**2 + 0 + 0.25**2) / 4)),
    share_p10=pytest.approx(0.25 + 0.3 * 0.5),
    share_p90=1.0,
    share_per_class={"a": 0.5, "c": 1.0},
    precision=pytest.approx((1 + 1 / 2 + 1) / 3),
    recall=pytest.approx((1 / 2 + 1 + 1) / 3),
    relevant_share=pytest.approx((1 / 2 + 1 / 2 + 1) / 3),
    without_relevant=1,
  )


def test_a_video_counts_for_each_of_its_classes():
  labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0]], np.float32)
  report = metrics.segment_report(GATES, VALID, labels)
  assert report.share_per_class == {"0": pytest.approx(0.625), "1": pytest.approx(2.75 / 3)}
  assert report.precision is report.recall is report.without_relevant is None


def test_padding_and_the_order_of_videos_do_not_matter():
  rng = np.random.default_rng(0)
  gates, relevant, valid = (rng.random((9, 6)) < p for p in (0.5, 0.4, 0.7))
  valid[:, 2] = True
  labels = rng.integers(0, 3, 9)
  report = metrics.segment_report(gates, valid, labels, relevant=relevant)
  mixed = rng.permutation(9)
  gates, relevant = gates | ~valid, relevant | ~valid
  other = metrics.segment_report(
    gates[mixed], valid[mixed], labels[mixed], relevant=relevant[mixed]
  )
  for name, value in vars(report).items():
    assert vars(other)[name] == pytest.approx(value), name


def test_a_split_without_truth_or_with_nothing_chosen_has_no_nan():
  nothing = metrics.segment_report(0 * GATES, VALID, np.zeros(4, int), relevant=RELEVANT)
  assert (nothing.share, nothing.precision, nothing.recall) == (0, 0, 0)
  unknown = metrics.segment_report(GATES, VALID, np.zeros(4, int), relevant=0 * RELEVANT)
  assert (unknown.precision, unknown.recall, unknown.without_relevant) == (None, None, 4)
  json.dumps([vars(nothing), vars(unknown)], allow_nan=False)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"gates": GATES[:, :3]}, r"gates and valid must both be \[M, T\]; got \(4, 3\) and \(4, 4\)"),
    (
      {"relevant": RELEVANT[:3]},
      r"relevant and valid must both be \[M, T\]; got \(3, 4\) and \(4, 4\)",
    ),
    (
      {"valid": VALID & [[1], [1], [0], [0]]},
      "every video must have a valid segment; got none for video 2",
    ),
    (
      {"labels": np.zeros(3, int)},
      "labels must have one row for each of M >= 1 videos; got 3, 4 videos",
    ),
    (
      {"labels": np.zeros((4, 2)), "class_names": "abc"},
      "class_names must name each of 2 classes; got 3 names",
    ),
  ],
)
def test_what_cannot_be_reported_is_named(change, message):
  arrays = {"gates": GATES, "valid": VALID, "labels": np.zeros(4, int)} | change
  with pytest.raises(ValueError, match=f"^{message}$"):
    metrics.segment_report(arrays.pop("gates"), arrays.pop("valid"), arrays.pop("labels"), **arrays)
