import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
  stay = np.asarray(jax.jit(confidence.stay_logits, static_argnums=1)(LOGITS, threshold))
  assert 0 < unsure.mean() < 1
  np.testing.assert_array_equal(stay > 0, unsure)
  shift = np.asarray(confidence.stay_logits(LOGITS, 0.5)) - stay
  np.testing.assert_allclose(
    shift, special.logit(threshold), atol=1e-5
  )  # the same for all entropies


def test_saturated_exits_have_finite_logits():
  stay = np.asarray(
    confidence.stay_logits(
      jnp.array([[[110.0, -110.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]), 0.3
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
  stay, macs, fixed = np.asarray(confidence.stay_logits(logits, 0.4)), (30, 50), 20

  def spent(threshold):
    return fixed + np.mean(
      (np.asarray(confidence.stay_logits(logits, threshold)) > 0) @ np.array(macs)
    )

  found = confidence.threshold_for_budget(stay, macs, fixed, threshold=0.4, share=share)
  assert spent(found) <= share * 100
  lower = [t for t in np.linspace(0.01, 0.99, 99) if t < found]
  assert all(
    spent(t) > share * 100 - 50 / 400 - 1e-9 for t in lower
  )  # one example less is the least step
  assert spent(found) == pytest.approx(share * 100, abs=0.2)


def test_wrong_arguments_are_named():
  with pytest.raises(
    ValueError, match=r"threshold must be in \(0, 1\), a fraction of the largest entropy; got 1.0"
  ):
    confidence.stay_logits(LOGITS, 1.0)
  with pytest.raises(ValueError, match=r"logits must have two classes or more; got shape \(2, 1\)"):
    confidence.entropy_share(jnp.zeros((2, 1)))
  with pytest.raises(
    ValueError, match="share must be at least 0.25, the cost up to the first exit; got 0.2"
  ):
    confidence.threshold_for_budget(np.zeros((2, 1)), [3], 1, threshold=0.5, share=0.2)
  with pytest.raises(
    ValueError, match=r"stay must be \[N, X\] for X macs; got shapes \(2, 1\) and \(2,\)"
  ):
    confidence.threshold_for_budget(np.zeros((2, 1)), [3, 4], 1, threshold=0.5, share=0.2)
