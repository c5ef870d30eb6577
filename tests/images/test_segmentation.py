"""Segmentation: fit and scores of pixels; settings, training, evaluation and resuming of runs.

Parts that all runs share are tested with classification.
"""

import dataclasses
import importlib
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from gating_jax.data import scenes, tfds
from gating_jax.data.image_sets import Images, padded_batches
from gating_jax.images import segmentation
from gating_jax.models import resnets
from gating_jax.models.summary import ModelCounts, model_summary
from gating_jax.reports import timings
from gating_jax.training import devices, evaluation, steps
from gating_jax.training.checkpoints import Checkpoints
from tests.helpers import tiny, tiny_cli
from tests.helpers.loaded import loaded
from tests.helpers.runs import said


@pytest.fixture(scope="module")
def config():
  def make(name="digits", **changes):
    made = importlib.import_module(f"configs.segmentation_{name}").get_config()
    made.update_from_flattened_dict(
      {
        "model.name": "tiny",
        "model.width": 0.5,
        "model.head": 8,
        "data.size": (12, 16),
        "data.train_scenes": 40,
        "data.test_scenes": 11,
        "optim.batch_size": 8,
        "optim.epochs": 2,
        "checkpoint_every": 1.0,
        "log_every": 2,
      }
    )
    made.lock()
    made.update_from_flattened_dict(changes)
    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
    yield make


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """`(config, directory)` of a finished run of one epoch."""
  made, workdir = config(**{"optim.epochs": 1}), tmp_path_factory.mktemp("finished") / "run"
  said(segmentation, made, workdir, "train")
  return made, workdir


def test_a_run_leaves_what_it_measured(finished):
  made, workdir = finished
  result, built = json.loads((workdir / "result.json").read_text()), segmentation.build(made)
  assert (result["step"], result["images"]) == (5, 11)
  assert (
    result["head_macs"]
    == built.counts.macs - model_summary(built.model.backbone.clone(), built.test.shape).macs
    > 0
  )
  assert 0 < result["mean_iou"] < result["accuracy"] < 1
  assert (workdir / "scenes.png").stat().st_size > 10_000
  assert f"mean IoU {100 * result['mean_iou']:.2f} %" in " ".join(
    said(segmentation, made, workdir, "evaluate").split()
  )


def test_a_result_says_what_its_scores_are_worth(finished):
  _, workdir = finished
  result = json.loads((workdir / "result.json").read_text())
  assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"]
  # Resampled scenes may lack a class, so that their mean IoU is over others.
  assert 0 < result["mean_iou_low"] <= result["mean_iou_high"] < 1
  confusion = np.array(result["confusion"])
  assert np.trace(confusion) / confusion.sum() == pytest.approx(result["accuracy"])
  assert result["majority_rate"] == pytest.approx(confusion.sum(axis=1).max() / confusion.sum())
  assert "Confusions of classes" in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_a_run_is_loaded_in_one_call(finished):
  made, workdir = finished
  model, variables, _ = loaded(workdir)
  built, score = (
    segmentation.build(made),
    json.loads((workdir / "result.json").read_text())["accuracy"],
  )
  pixels, labels = built.test.read(np.arange(11))
  logits, _ = jax.jit(model.apply)(variables, built.normalise(pixels))
  assert np.mean(np.argmax(logits, axis=-1) == labels) == pytest.approx(score, abs=0.01)


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "data.name",
      "cityscape",
      "data.name must be one of .*; got 'cityscape'. Did you mean 'cityscapes'",
    ),
    ("model.name", "vgg8", "model.name must be one of .*; got 'vgg8'"),
    (
      "data.size",
      (32, 4),
      r"data.size must be a tuple of height and width, each >= 8; got \(32, 4\)",
    ),
    (
      "data.crop",
      (8, 17),
      r"data.crop must be None or a tuple .* at most data.size; got \(8, 17\)",
    ),
    ("data.digits", 0, "data.digits must be >= 1; got 0"),
    ("model.head", 0, "model.head must be >= 1; got 0"),
    (
      "optim.batch_size",
      48,
      "optim.batch_size must be at most 40, the number of training images; got 48",
    ),
    ("loss.sparsity.kind", "mac", "loss.sparsity.kind .* Did you mean 'macs'"),
  ],
)
def test_a_wrong_setting_is_named_before_a_directory_is_made(
  config, tmp_path, field, value, message
):
  with pytest.raises(ValueError, match=message):
    segmentation.run(config(**{field: value}), tmp_path / "run", "train")
  assert not (tmp_path / "run").exists()


def test_seeds_train_on_other_scenes_and_are_tested_on_the_same(config):
  first, second = (segmentation.build(config(seed=seed)) for seed in (0, 1))
  read = lambda images: images.read(np.arange(5))[0]
  np.testing.assert_array_equal(read(first.test), read(second.test))
  assert not np.array_equal(read(first.open_train()), read(second.open_train()))


@pytest.mark.parametrize("crop", [None, (16, 24)])
def test_the_budget_is_of_what_is_trained_on_and_the_score_of_whole_scenes(
  config, monkeypatch, crop
):
  monkeypatch.setattr(tfds, "open_tfds", lambda *_, **__: [None] * 8)
  settings = {
    "data.size": (32, 48),
    "data.crop": crop,
    "data.workers": 0,
    "model.output_stride": None,
  }
  built = segmentation.build(config("cityscapes", **settings))
  assert (built.test.shape, len(built.test.class_names)) == ((32, 48, 3), 19)
  trained = model_summary(built.model, (*(crop or (32, 48)), 3))
  assert built.open_train().shape == (*(crop or (32, 48)), 3)
  assert built.objective.never_gated_macs == trained.macs - trained.gated
  assert built.counts == model_summary(built.model, (32, 48, 3))
  assert (built.counts.macs > trained.macs) == (crop is not None)


def final_state(made, workdir):
  built = segmentation.build(made)
  like = steps.init_state(built.model, built.optimiser, made.seed, built.test.shape)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()


def street(count):
  rng = np.random.default_rng(0)
  labels = rng.choice([7, 26, 0], (count, 12, 16, 1)).astype(np.uint8)
  return [
    {"image_left": np.repeat(label * 5, 3, axis=-1), "segmentation_label": label}
    for label in labels
  ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cityscapes"])
def test_a_run_goes_on_from_an_earlier_checkpoint_to_the_same_end(
  config, tmp_path, capsys, monkeypatch, name
):
  if name == "cityscapes":
    monkeypatch.setattr(
      tfds, "open_tfds", lambda _, split, *rest, **readers: street(40 if split == "train" else 11)
    )
    made = config(name, **{"data.crop": (8, 8), "data.workers": 0, "model.output_stride": None})
  else:
    made = config(name)
  segmentation.run(made, tmp_path, "train")
  step, state = final_state(made, tmp_path)
  result = json.loads((tmp_path / "result.json").read_text())
  assert (step, result["images"]) == (10, 11)
  built = segmentation.build(made)
  assert (
    result["head_macs"]
    == built.counts.macs - model_summary(built.model.backbone.clone(), built.test.shape).macs
    > 0
  )
  assert 0 < result["mean_iou"] < result["accuracy"] < 1
  assert result["gates"] == built.counts.gates == 4
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  train = [line for line in lines if line["split"] == "train"]
  assert train[-1]["cross_entropy"] < train[0]["cross_entropy"]
  assert "batch_shaping" in train[0]
  for picture in ("scenes.png", "gates.png"):
    assert (tmp_path / picture).stat().st_size > 10_000
  report = (tmp_path / "report.html").read_text()
  assert all(
    f"{title}</h2>" in report
    for title in ("Score and multiply-accumulates", "Easiest and hardest scenes", "Some scenes")
  )
  assert "Gates and classes</h2>" not in report  # a scene has no class of its own
  shutil.rmtree(tmp_path / "checkpoints" / "10")
  (tmp_path / "result.json").unlink()
  capsys.readouterr()
  segmentation.run(made, tmp_path, "train")
  said = capsys.readouterr().out
  assert "resuming from the checkpoint of step 5" in said
  assert f"mean IoU {100 * result['mean_iou']:.2f} %" in " ".join(said.split())
  assert tiny.bit_equal(final_state(made, tmp_path)[1], state)
  segmentation.run(made, tmp_path, "evaluate")
  assert f"{100 * result['mean_iou']:.2f} %" in capsys.readouterr().out


@pytest.mark.slow
def test_the_backbone_of_a_run_is_compiled(config, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(timings, "_REPEATS", 1)
  # One call of each program is no measurement.
  monkeypatch.setattr(timings, "MAX_EFFICIENCY", float("inf"))
  monkeypatch.setattr(timings, "_BATCHES", (1, 3))
  made = config()
  segmentation.run(made, tmp_path / "run", "train")
  segmentation.run(made, tmp_path / "run", "compile")
  found = json.loads((tmp_path / "run" / "compile.json").read_text())
  assert found["timings"].keys() == {"1 image at a time", "3 images at a time"}
  for rows in found["timings"].values():
    assert {"masked", "switch"} <= {row["strategy"] for row in rows if row["part"] == 1}
  assert "compile.png" in capsys.readouterr().out
  page = (tmp_path / "run" / "report.html").read_text()
  assert "Milliseconds of the backbone" in page
  assert "the backbone is timed, without the head, on training images of 12 x 16 pixels." in page
  with pytest.raises(
    ValueError, match="mode must be one of compile, evaluate, report, train; got 'export'"
  ):
    segmentation.run(made, tmp_path / "run", "export")


RANDOM = np.random.default_rng(0)
K = 4
TRUTH = RANDOM.choice([0, 1, 2, scenes.IGNORED], (6, 5, 7), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
# Class 3 nowhere.
LOGITS = RANDOM.normal(size=(6, 5, 7, K)).astype(np.float32) - 9 * (np.arange(K) == 3)
COUNTED = TRUTH != scenes.IGNORED
NLL = -np.take_along_axis(
  np.asarray(jax.nn.log_softmax(LOGITS)), (TRUTH * COUNTED)[..., None].astype(int), axis=-1
)[..., 0]


def objective():
  return dataclasses.replace(tiny.objective(), fit=segmentation.fit_pixels)


def test_confusion_is_that_of_scikit_learn_for_each_scene():
  predicted = LOGITS.argmax(-1)
  for got, truth, guess in zip(
    segmentation.count_confusion(predicted, TRUTH, K), TRUTH, predicted, strict=True
  ):
    counted = truth != scenes.IGNORED
    np.testing.assert_array_equal(
      got, metrics.confusion_matrix(truth[counted], guess[counted], labels=range(K))
    )


def test_only_known_pixels_are_scored_class_by_class():
  test = SimpleNamespace(class_names=("a", "b"))
  programme = segmentation.Segmentation(SimpleNamespace(test=test))
  entries = lambda confusion: programme.class_entries(
    SimpleNamespace(images=SimpleNamespace(confusion=confusion))
  )
  assert entries(np.array([[[1, 1], [0, 2]]] * 3))["confusion"] == [[3, 3], [0, 6]]
  assert entries(None) == {}


def test_mean_iou_is_that_of_the_whole_set_without_absent_classes():
  results = jax.device_get(segmentation.pixel_scores(LOGITS, TRUTH))
  sums = {name: values.sum(axis=0) for name, values in results.items()}
  got = segmentation.summarise_pixels(sums, "abcd")
  expected = metrics.jaccard_score(
    TRUTH[COUNTED], LOGITS.argmax(-1)[COUNTED], labels=range(3), average=None
  )
  assert got["mean_iou"] == pytest.approx(expected.mean())
  assert [got[f"iou/{name}"] for name in "abc"] == pytest.approx(expected)
  assert "iou/d" not in got
  assert got["accuracy"] == pytest.approx((LOGITS.argmax(-1) == TRUTH)[COUNTED].mean())
  assert got["cross_entropy"] == pytest.approx(NLL[COUNTED].mean(), rel=1e-5)
  of_each = np.mean(
    [
      segmentation.summarise_pixels({n: v[i] for n, v in results.items()}, "abcd")["mean_iou"]
      for i in range(6)
    ]
  )
  assert abs(of_each - got["mean_iou"]) > 1e-3, "a mean over scenes is another number"


def test_a_class_in_truth_or_prediction_alone_has_iou_zero():
  np.testing.assert_array_equal(
    segmentation.intersection_over_union(np.array([[2, 0, 0], [1, 0, 0], [0, 0, 0]])),
    [2 / 3, 0, np.nan],
  )


def test_a_set_without_a_pixel_that_counts_has_finite_numbers():
  got = segmentation.summarise_pixels(
    {"confusion": np.zeros((2, 2)), "cross_entropy": np.float64(0)}, "ab"
  )
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
  nothing = np.full_like(TRUTH, scenes.IGNORED)
  value, gradient = jax.jit(jax.value_and_grad(lambda x: objective()(x, nothing, (), 0)[0]))(LOGITS)
  assert value == 0
  assert np.all(gradient == 0)


def test_devices_with_unequal_ignored_pixels_give_the_whole_batchs_loss():
  truth = TRUTH.copy()
  truth[:2] = scenes.IGNORED
  truth[2, :4] = scenes.IGNORED

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
  made = Images(np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1), TRUTH, tuple("abcd"))
  run = jax.jit(
    lambda images, labels: segmentation.pixel_scores(jnp.asarray(LOGITS)[images.ravel()], labels)
  )
  counts = ModelCounts(params=1, gate_params=0, gates=0, macs=10, gate_macs=0, gated=0)
  result, *_ = evaluation.evaluate(
    run,
    padded_batches(made, size),
    counts,
    lambda sums, _: segmentation.summarise_pixels(sums, "abcd"),
    classes=None,
    noise_scale=1.0,
  )
  whole = jax.device_get(segmentation.pixel_scores(LOGITS, TRUTH))
  expected = segmentation.summarise_pixels(
    {name: values.sum(axis=0) for name, values in whole.items()}, "abcd"
  )
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
