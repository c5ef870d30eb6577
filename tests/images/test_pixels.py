import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from gating_jax.data import batches
from gating_jax.data.image_sets import Images
from gating_jax.images import pixels
from gating_jax.images.pixels import IGNORED, fit_pixels
from gating_jax.models.summary import ModelCounts
from gating_jax.training import evaluation
from tests.helpers import tiny

RANDOM = np.random.default_rng(0)
K = 4
TRUTH = RANDOM.choice([0, 1, 2, IGNORED], (6, 5, 7), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
LOGITS = RANDOM.normal(size=(6, 5, 7, K)).astype(np.float32) - 9 * (
  np.arange(K) == 3
)  # class 3 nowhere
COUNTED = TRUTH != IGNORED
NLL = -np.take_along_axis(
  np.asarray(jax.nn.log_softmax(LOGITS)), (TRUTH * COUNTED)[..., None].astype(int), axis=-1
)[..., 0]


def objective():
  return dataclasses.replace(tiny.objective(), fit=fit_pixels)


def test_confusion_is_that_of_scikit_learn_for_each_scene():
  predicted = LOGITS.argmax(-1)
  for got, truth, guess in zip(
    pixels.confusion(predicted, TRUTH, K), TRUTH, predicted, strict=True
  ):
    counted = truth != IGNORED
    np.testing.assert_array_equal(
      got, metrics.confusion_matrix(truth[counted], guess[counted], labels=range(K))
    )


def test_mean_iou_is_that_of_the_whole_set_without_absent_classes():
  results = jax.device_get(pixels.pixel_scores(LOGITS, TRUTH))
  sums = {name: values.sum(axis=0) for name, values in results.items()}
  got = pixels.summarise(sums, "abcd")
  expected = metrics.jaccard_score(
    TRUTH[COUNTED], LOGITS.argmax(-1)[COUNTED], labels=range(3), average=None
  )
  assert got["mean_iou"] == pytest.approx(expected.mean())
  assert [got[f"iou/{name}"] for name in "abc"] == pytest.approx(expected)
  assert "iou/d" not in got
  assert got["accuracy"] == pytest.approx((LOGITS.argmax(-1) == TRUTH)[COUNTED].mean())
  assert got["cross_entropy"] == pytest.approx(NLL[COUNTED].mean(), rel=1e-5)
  of_each = np.mean(
    [pixels.summarise({n: v[i] for n, v in results.items()}, "abcd")["mean_iou"] for i in range(6)]
  )
  assert abs(of_each - got["mean_iou"]) > 1e-3, "a mean over scenes is another number"


def test_a_class_in_truth_or_prediction_alone_has_iou_zero():
  np.testing.assert_array_equal(
    pixels.intersection_over_union(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]])), [2 / 3, 0, np.nan]
  )


def test_a_set_without_a_pixel_that_counts_has_finite_numbers():
  got = pixels.summarise({"confusion": np.zeros((2, 2)), "cross_entropy": np.float64(0)}, "ab")
  assert got == {"mean_iou": 0, "accuracy": 0, "cross_entropy": 0}


def test_the_loss_is_the_mean_over_pixels_that_count():
  total, terms = jax.jit(objective())(LOGITS, TRUTH, (), 0)
  assert float(total) == pytest.approx(NLL[COUNTED].mean(), rel=1e-5)
  assert float(terms["accuracy"]) == pytest.approx(
    (LOGITS.argmax(-1) == TRUTH)[COUNTED].mean(), rel=1e-5
  )
  gradient = jax.jit(jax.grad(lambda x: objective()(x, TRUTH, (), 0)[0]))(LOGITS)
  assert np.all(gradient[~COUNTED] == 0)
  assert np.all(np.abs(gradient[COUNTED]).sum(-1) > 0)


def test_nothing_to_learn_from_is_a_loss_of_zero():
  nothing = np.full_like(TRUTH, IGNORED)
  value, gradient = jax.jit(jax.value_and_grad(lambda x: objective()(x, nothing, (), 0)[0]))(LOGITS)
  assert value == 0
  assert np.all(gradient == 0)


def test_devices_with_unequal_ignored_pixels_give_the_whole_batchs_loss():
  truth = TRUTH.copy()
  truth[:2] = IGNORED
  truth[2, :4] = IGNORED

  def loss(scale, logits, labels, axis_name):
    return objective()(scale * logits, labels, (), 0, axis_name)[0]

  split = lambda x: x.reshape(3, 2, *x.shape[1:])
  on_each = jax.vmap(lambda x, y: jax.value_and_grad(loss)(1.0, x, y, "d"), axis_name="d")
  values, gradients = jax.jit(on_each)(split(LOGITS), split(truth))
  value, gradient = jax.jit(lambda x, y: jax.value_and_grad(loss)(1.0, x, y, None))(LOGITS, truth)
  np.testing.assert_allclose(values, value, rtol=1e-6)
  assert np.mean(gradients) == pytest.approx(float(gradient), rel=1e-5)


@pytest.mark.parametrize("size", [1, 4, 6, 50])
def test_padding_of_the_last_batch_does_not_count(size):
  scenes = Images(np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), TRUTH, tuple("abcd"))
  run = jax.jit(
    lambda images, labels: pixels.pixel_scores(jnp.asarray(LOGITS)[images.ravel()], labels)
  )
  counts = ModelCounts(params=1, gate_params=0, gates=0, macs=10, gate_macs=0, gated=0)
  result, *_ = evaluation.evaluate(
    run,
    batches.padded_batches(scenes, size),
    counts,
    lambda sums, _: pixels.summarise(sums, "abcd"),
    classes=None,
    noise_scale=1.0,
  )
  whole = jax.device_get(pixels.pixel_scores(LOGITS, TRUTH))
  expected = pixels.summarise({name: values.sum(axis=0) for name, values in whole.items()}, "abcd")
  assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5)
  assert result["images"] == 6


def test_the_gates_pay_what_they_pay_in_classification():
  model, labels = tiny.net(), np.zeros(4, np.int32)
  state = tiny.state(optax.sgd(0.1))
  logits, records = jax.jit(model.apply)(
    {"params": state.params, "batch_stats": state.batch_stats}, tiny.normalise(tiny.images(4)[0])
  )
  scene = jnp.broadcast_to(logits[:, None, None], (4, 2, 3, tiny.CLASSES))
  total, terms = jax.jit(objective())(scene, np.zeros((4, 2, 3), np.uint8), records, 0)
  expected, expected_terms = jax.jit(tiny.objective())(logits, labels, records, 0)
  assert terms.keys() == expected_terms.keys()
  assert float(total) == pytest.approx(float(expected), rel=1e-5)
  assert float(terms["batch_shaping"]) > 0
