import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from gating_jax.ops import confidence

LOGITS = np.random.default_rng(0).normal(0, 2, (7, 3, 4)).astype(np.float32)


def test_entropy_share_is_that_of_the_softmax_and_spans_zero_to_one():
  probs = special.softmax(LOGITS.astype(np.float64), axis=-1)
  expected = special.entr(probs).sum(-1) / np.log(4)
  np.testing.assert_allclose(confidence.entropy_share(LOGITS), expected, rtol=1e-5)
  assert 0.05 < expected.min() < expected.max() < 0.95
  extremes = confidence.entropy_share(jnp.array([[110.0, -110.0, 0.0], [5.0, 5.0, 5.0]]))
  np.testing.assert_allclose(extremes, [0, 1], atol=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_the_network_runs_on_exactly_while_every_exit_so_far_is_unsure(threshold):
  share = np.asarray(confidence.entropy_share(LOGITS))
  unsure = np.cumprod(share > threshold, axis=1).astype(bool)
  stay = np.asarray(
    jax.jit(confidence.stay_logits, static_argnames="threshold")(LOGITS, threshold=threshold)
  )
  assert 0 < unsure.mean() < 1
  np.testing.assert_array_equal(stay > 0, unsure)
  shift = np.asarray(confidence.stay_logits(LOGITS, threshold=0.5)) - stay
  # The same for all entropies.
  np.testing.assert_allclose(shift, special.logit(threshold), atol=1e-5)


def test_saturated_exits_have_finite_logits():
  stay = np.asarray(
    confidence.stay_logits(
      jnp.array([[[110.0, -110.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]), threshold=0.3
    )
  )
  assert np.isfinite(stay).all()
  assert (stay > 0).tolist() == [[False, False], [True, True]]


def test_an_example_has_the_answer_of_the_exit_it_leaves_at():
  answers = jnp.arange(3 * 3 * 2.0).reshape(3, 3, 2)
  stay = jnp.array([[-1.0, -1.0], [1.0, 0.0], [1.0, 2.0]])
  assert confidence.first_sure(answers, stay).tolist() == [[0, 1], [8, 9], [16, 17]]


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.9, 1.0])
def test_the_threshold_of_a_budget_spends_it_and_no_lower_one_does(share):
  logits = np.random.default_rng(1).normal(0, 3, (400, 2, 10)).astype(np.float32)
  stay, macs, fixed = np.asarray(confidence.stay_logits(logits, threshold=0.4)), (30, 50), 20

  def spent(threshold):
    return fixed + np.mean(
      (np.asarray(confidence.stay_logits(logits, threshold=threshold)) > 0) @ np.array(macs)
    )

  found = confidence.threshold_for_budget(stay, macs, always_macs=fixed, threshold=0.4, share=share)
  assert spent(found) <= share * 100
  lower = [t for t in np.linspace(0.01, 0.99, 99) if t < found]
  # One example less is the least step.
  assert all(spent(t) > share * 100 - 50 / 400 - 1e-9 for t in lower)
  assert spent(found) == pytest.approx(share * 100, abs=0.2)


def test_wrong_arguments_are_named():
  with pytest.raises(
    ValueError, match=r"threshold must be in \(0, 1\), a fraction of the largest entropy; got 1.0"
  ):
    confidence.stay_logits(LOGITS, threshold=1.0)
  with pytest.raises(ValueError, match=r"logits must have two classes or more; got shape \(2, 1\)"):
    confidence.entropy_share(jnp.zeros((2, 1)))
  with pytest.raises(
    ValueError, match="share must be at least 0.25, the cost up to the first exit; got 0.2"
  ):
    confidence.threshold_for_budget(np.zeros((2, 1)), [3], always_macs=1, threshold=0.5, share=0.2)
  with pytest.raises(
    ValueError, match=r"stay must be \[N, X\] for X macs; got shapes \(2, 1\) and \(2,\)"
  ):
    confidence.threshold_for_budget(
      np.zeros((2, 1)), [3, 4], always_macs=1, threshold=0.5, share=0.2
    )


def test_the_macs_of_every_example_are_taken_by_their_former_name():
  stay, settings = np.array([[3.0], [-2.0]]), dict(threshold=0.5, share=0.7)
  with pytest.warns(DeprecationWarning, match="fixed is now called always_macs"):
    found = confidence.threshold_for_budget(stay, [10], fixed=10, **settings)
  assert found == confidence.threshold_for_budget(stay, [10], always_macs=10, **settings)


# Exits in time: segments of a video come one by one.
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
  return np.mean(confidence.exit_steps(logits, counts, threshold=threshold, **options) / counts)


@pytest.mark.parametrize(
  ("threshold", "steps"),
  [
    (0.0, [1, 1, 1]),
    (0.55, [1, 1, 3]),
    (0.65, [2, 1, 3]),
    (0.85, [2, 2, 3]),
    (0.92, [4, 2, 3]),
    (confidence.NEVER, [4, 2, 3]),
  ],
)
def test_a_video_is_seen_until_its_confidence_reaches_the_threshold_or_it_ends(threshold, steps):
  assert (
    confidence.exit_steps(two_classes(CONFIDENCES), COUNTS, threshold=threshold).tolist() == steps
  )


def test_multi_label_confidence_is_the_likeliest_class_alone():
  logits = np.array([[[-9.0, -9.0], [-9.0, 1.0], [3.0, 3.0]]])
  steps = [
    confidence.exit_steps(logits, [3], threshold=0.7, multi_label=m).tolist() for m in (False, True)
  ]
  assert steps == [[2], [2]]
  assert confidence.exit_steps(logits, [3], threshold=0.9, multi_label=False).tolist() == [2]
  assert confidence.exit_steps(logits, [3], threshold=0.9, multi_label=True).tolist() == [3]


def test_what_follows_a_videos_end_is_not_looked_at():
  logits = two_classes(CONFIDENCES)
  spoilt = logits.copy()
  spoilt[1, 2:], spoilt[2, 3:] = np.nan, np.inf
  for threshold in (0.7, 0.985):
    np.testing.assert_array_equal(
      confidence.exit_steps(spoilt, COUNTS, threshold=threshold),
      confidence.exit_steps(logits, COUNTS, threshold=threshold),
    )
  assert confidence.step_threshold_for_budget(spoilt, COUNTS, share=0.8) == (
    confidence.step_threshold_for_budget(logits, COUNTS, share=0.8)
  )


@pytest.mark.parametrize(
  ("share", "threshold", "reached"),
  [
    (0.37, 0.5, (1 / 4 + 1 / 2 + 1 / 3) / 3),
    (0.60, 0.6, (1 / 4 + 1 / 2 + 1) / 3),
    (0.70, 0.8, (2 / 4 + 1 / 2 + 1) / 3),
    (0.83, 0.8, (2 / 4 + 1 / 2 + 1) / 3),
    (0.84, 0.9, (2 / 4 + 1 + 1) / 3),
    (1.0, confidence.NEVER, 1.0),
  ],
)
def test_the_threshold_of_steps_for_a_budget_by_hand(share, threshold, reached):
  logits = two_classes(CONFIDENCES)
  found = confidence.step_threshold_for_budget(logits, COUNTS, share=share)
  assert found == pytest.approx(threshold)
  # In numbers of 8 bits the sum of all segments would overflow.
  many = (np.tile(logits, (50, 1, 1)), np.tile(COUNTS, 50).astype(np.int8))
  assert confidence.step_threshold_for_budget(*many, share=share) == pytest.approx(threshold)
  assert mean_share(logits, COUNTS, found) == pytest.approx(reached)


@pytest.mark.parametrize("multi_label", [False, True])
@given(st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10**6))
def test_no_threshold_comes_nearer_to_the_budget_from_below(
  multi_label, videos, segments, share, seed
):
  logits, counts = random_split(videos, segments, seed)
  share = max(share, np.mean(1 / counts))
  found = confidence.step_threshold_for_budget(logits, counts, share=share, multi_label=multi_label)
  reached = mean_share(logits, counts, found, multi_label=multi_label)
  assert reached <= share + 1e-9
  probs = special.expit(logits) if multi_label else special.softmax(logits, axis=2)
  for other in [*np.unique(probs), confidence.NEVER]:
    of_other = mean_share(logits, counts, other, multi_label=multi_label)
    assert of_other <= reached + 1e-9 or of_other > share + 1e-9


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 1.0])
def test_the_threshold_of_open_segments_meets_the_budget_and_no_lower_one_does(share):
  rng = np.random.default_rng(3)
  scores, valid = rng.normal(size=(40, 6)), np.arange(6) < rng.integers(2, 7, (40, 1))
  # Equal scores open and close together.
  scores[:20] = scores[:20].round()
  padded = np.where(valid, scores, np.nan)
  best = np.arange(6) == np.nanargmax(padded, axis=1)[:, None]

  def opened(threshold):
    return np.mean(np.sum((padded > threshold) | best, axis=1) / valid.sum(axis=1))

  one_each = np.mean(1 / valid.sum(axis=1))
  share = max(share, one_each)
  found = confidence.open_threshold_for_budget(padded, valid, share=share)
  assert opened(found) <= share + 1e-9
  # The best segment of a video is open whatever the threshold.
  others = padded[valid & ~best]
  below = others[others < found]
  assert (opened(below.max() - 1e-9) > share) if len(below) else (share == 1)


def test_videos_of_one_segment_need_no_threshold_of_open_segments():
  assert confidence.open_threshold_for_budget([[5.0]], [[True]], share=1.0) == 0


@pytest.mark.parametrize(
  ("scores", "valid", "share", "message"),
  [
    (np.ones(3), np.ones(3), 1.0, r"scores and valid must both be \[M, T\]"),
    (np.ones((1, 2)), np.ones((2, 1)), 1.0, r"got shapes \(1, 2\) and \(2, 1\)"),
    (np.ones((2, 2)), [[1, 1], [0, 0]], 1.0, "valid must be True for a segment of video 1"),
    ([[1.0, np.inf]], [[1, 1]], 1.0, "scores must be finite; got inf for video 0, segment 1"),
    (np.ones((1, 4)), np.ones((1, 4)), 0.2, "share must be at least 0.25, .*; got 0.2"),
  ],
)
def test_scores_of_segments_that_do_not_fit_are_named(scores, valid, share, message):
  with pytest.raises(ValueError, match=message):
    confidence.open_threshold_for_budget(scores, valid, share=share)


def test_the_whole_budget_sees_everything_and_one_segment_a_video_is_the_least():
  logits, counts = random_split(6, 5, seed=2)
  for share in (1.0, np.mean(1 / counts)):
    threshold = confidence.step_threshold_for_budget(logits, counts, share=share)
    assert mean_share(logits, counts, threshold) == pytest.approx(share)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: confidence.step_threshold_for_budget(np.zeros((2, 4, 3)), [4, 2], share=0.3),
      "share must be at least 0.375, that of one segment per video; got 0.3",
    ),
    (
      lambda: confidence.exit_steps(np.zeros((2, 4)), [4, 2], threshold=0.5),
      r"step_logits must be \[M, T, classes\]; got shape \(2, 4\)",
    ),
    (
      lambda: confidence.exit_steps(np.zeros((2, 4, 3)), [4, 5], threshold=0.5),
      r"valid_counts must be \[M\] in 1 .. 4; got \[4 5\]",
    ),
    (
      lambda: confidence.exit_steps(np.zeros((2, 4, 3)), [4], threshold=0.5),
      r"valid_counts must be \[M\] in 1 .. 4; got \[4\]",
    ),
    (
      lambda: confidence.exit_steps(
        np.array([[[0.0], [0.0]], [[0.0], [np.nan]]]), [2, 2], threshold=0.5
      ),
      r"step_logits must be finite; got \[nan\] for video 1, step 1",
    ),
  ],
)
def test_videos_that_do_not_fit_are_named(call, message):
  with pytest.raises(ValueError, match=f"^{message}$"):
    call()
