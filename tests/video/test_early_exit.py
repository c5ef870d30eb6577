import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from gating_jax.video import early_exit

CONFIDENCES = np.array([[0.6, 0.9, 0.7, 0.95], [0.8, 0.55, 0.99, 0.99], [0.5, 0.5, 0.5, 0.5]])
COUNTS = np.array([4, 2, 3])


def two_classes(confidences):
  return np.stack([special.logit(confidences), np.zeros_like(confidences)], axis=-1)


def random_split(videos, segments, seed, classes=3):
  rng = np.random.default_rng(seed)
  return rng.integers(-3, 4, (videos, segments, classes)).astype(float), rng.integers(
    1, segments + 1, videos
  )


def mean_share(logits, counts, threshold, **options):
  return np.mean(early_exit.exit_steps(logits, counts, threshold=threshold, **options) / counts)


@pytest.mark.parametrize(
  ("threshold", "steps"),
  [
    (0.0, [1, 1, 1]),
    (0.55, [1, 1, 3]),
    (0.65, [2, 1, 3]),
    (0.85, [2, 2, 3]),
    (0.92, [4, 2, 3]),
    (early_exit.NEVER, [4, 2, 3]),
  ],
)
def test_a_video_is_seen_until_its_confidence_reaches_the_threshold_or_it_ends(threshold, steps):
  assert (
    early_exit.exit_steps(two_classes(CONFIDENCES), COUNTS, threshold=threshold).tolist() == steps
  )


def test_multi_label_confidence_is_the_likeliest_class_alone():
  logits = np.array([[[-9.0, -9.0], [-9.0, 1.0], [3.0, 3.0]]])
  steps = [
    early_exit.exit_steps(logits, [3], threshold=0.7, multi_label=m).tolist() for m in (False, True)
  ]
  assert steps == [[2], [2]]
  assert early_exit.exit_steps(logits, [3], threshold=0.9, multi_label=False).tolist() == [2]
  assert early_exit.exit_steps(logits, [3], threshold=0.9, multi_label=True).tolist() == [3]


def test_what_follows_a_videos_end_is_not_looked_at():
  logits = two_classes(CONFIDENCES)
  spoilt = logits.copy()
  spoilt[1, 2:], spoilt[2, 3:] = np.nan, np.inf
  for threshold in (0.7, 0.985):
    np.testing.assert_array_equal(
      early_exit.exit_steps(spoilt, COUNTS, threshold=threshold),
      early_exit.exit_steps(logits, COUNTS, threshold=threshold),
    )
  assert early_exit.threshold_for_budget(spoilt, COUNTS, share=0.8) == (
    early_exit.threshold_for_budget(logits, COUNTS, share=0.8)
  )


@pytest.mark.parametrize(
  ("share", "threshold", "reached"),
  [
    (0.37, 0.5, (1 / 4 + 1 / 2 + 1 / 3) / 3),
    (0.60, 0.6, (1 / 4 + 1 / 2 + 1) / 3),
    (0.70, 0.8, (2 / 4 + 1 / 2 + 1) / 3),
    (0.83, 0.8, (2 / 4 + 1 / 2 + 1) / 3),
    (0.84, 0.9, (2 / 4 + 1 + 1) / 3),
    (1.0, early_exit.NEVER, 1.0),
  ],
)
def test_the_threshold_for_a_budget_by_hand(share, threshold, reached):
  logits = two_classes(CONFIDENCES)
  found = early_exit.threshold_for_budget(logits, COUNTS, share=share)
  assert found == pytest.approx(threshold)
  assert mean_share(logits, COUNTS, found) == pytest.approx(reached)


@pytest.mark.parametrize("multi_label", [False, True])
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10**6))
def test_no_threshold_comes_nearer_to_the_budget_from_below(
  multi_label, videos, segments, share, seed
):
  logits, counts = random_split(videos, segments, seed)
  share = max(share, np.mean(1 / counts))
  found = early_exit.threshold_for_budget(logits, counts, share=share, multi_label=multi_label)
  reached = mean_share(logits, counts, found, multi_label=multi_label)
  assert reached <= share + 1e-9
  probs = special.expit(logits) if multi_label else special.softmax(logits, axis=2)
  for other in [*np.unique(probs), early_exit.NEVER]:
    of_other = mean_share(logits, counts, other, multi_label=multi_label)
    assert of_other <= reached + 1e-9 or of_other > share + 1e-9


def test_the_whole_budget_sees_everything_and_one_segment_a_video_is_the_least():
  logits, counts = random_split(6, 5, seed=2)
  for share in (1.0, np.mean(1 / counts)):
    threshold = early_exit.threshold_for_budget(logits, counts, share=share)
    assert mean_share(logits, counts, threshold) == pytest.approx(share)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: early_exit.threshold_for_budget(np.zeros((2, 4, 3)), [4, 2], share=0.3),
      "share must be at least 0.375, that of one segment per video; got 0.3",
    ),
    (
      lambda: early_exit.exit_steps(np.zeros((2, 4)), [4, 2], threshold=0.5),
      r"step_logits must be \[M, T, classes\]; got shape \(2, 4\)",
    ),
    (
      lambda: early_exit.exit_steps(np.zeros((2, 4, 3)), [4, 5], threshold=0.5),
      r"valid_counts must be \[M\] in 1 .. 4; got \[4 5\]",
    ),
    (
      lambda: early_exit.exit_steps(np.zeros((2, 4, 3)), [4], threshold=0.5),
      r"valid_counts must be \[M\] in 1 .. 4; got \[4\]",
    ),
    (
      lambda: early_exit.exit_steps(
        np.array([[[0.0], [0.0]], [[0.0], [np.nan]]]), [2, 2], threshold=0.5
      ),
      r"step_logits must be finite; got \[nan\] for video 1, step 1",
    ),
  ],
)
def test_what_does_not_fit_is_named(call, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    call()
