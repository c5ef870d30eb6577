"""Segmentation runs: settings, training, evaluation, resuming.

Parts that all runs share are tested with classification.
"""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from gating_jax.data import tfds
from gating_jax.images import segmentation
from gating_jax.models import resnet
from gating_jax.models.summary import model_summary
from gating_jax.reports import compile_report
from gating_jax.training import devices, steps
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
    patch.setitem(resnet.RESNETS, "tiny", tiny_cli.TINY)
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
  monkeypatch.setattr(tfds, "open_tfds", lambda *_: [None] * 8)
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
      tfds, "open_tfds", lambda _, split, *rest: street(40 if split == "train" else 11)
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
  monkeypatch.setattr(compile_report, "_REPEATS", 1)
  monkeypatch.setattr(compile_report, "_BATCHES", (1, 3))
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
