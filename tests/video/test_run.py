import csv
import functools
import importlib
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gating_jax import runner
from gating_jax.analysis import statistics
from gating_jax.inference.segments import compile_segments, opened_variables
from gating_jax.models import video_backbones
from gating_jax.models.resnets import ResNet
from gating_jax.training import best_state, devices, rundir, stopping
from gating_jax.training.checkpoints import restore_newest
from gating_jax.video import build, evaluate, report, run, sets, speed, thresholds
from gating_jax.video import nets as video_nets
from tests.helpers import made_videos, pages, tiny
from tests.helpers.event_files import summaries
from tests.helpers.loaded import loaded
from tests.helpers.runs import Stopping, announced, said, without_reports

TINY_LIGHT = functools.partial(ResNet, classes=None, blocks=(1,), features=4)
TINY_HEAVY = functools.partial(TINY_LIGHT, stem="small")


@pytest.fixture(scope="module")
def config():
  """`(name, **changes) -> config`, with nets of one block."""

  def make(name="composed_timegate", **changes):
    made = importlib.import_module(f"configs.{name}").get_config()
    made.update_from_flattened_dict(
      {
        "model.light.name": "tiny",
        "model.light.width": 1.0,
        "model.heavy.name": "tiny",
        "model.heavy.width": 1.0,
        "model.heavy.stem": "small",
        "model.gate.concepts": 4,
        "model.gate.hidden": 8,
        "data.train_videos": 32,
        "data.test_videos": 20,
        "data.segments": 14,
        "data.validation": None,
        "pretrain.epochs": 1,
        "pretrain.batch_size": 16,
        "pretrain.segments_per_video": 1,
        "optim.epochs": 2,
        "optim.batch_size": 16,
        "model.dtype": "float32",
      }
    )
    made.lock()
    made.update_from_flattened_dict(changes)
    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(video_backbones.LIGHT_NETS, "tiny", TINY_LIGHT)
    patch.setitem(video_backbones.HEAVY_NETS, "tiny", TINY_HEAVY)
    yield make


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """`(config, directory)` of a finished run; a test that changes the directory copies it."""
  folder = tmp_path_factory.mktemp("finished")
  folder_of_features(folder, np.random.default_rng(0))
  np.save(folder / "video17.npy", np.full((2, 5), np.nan, np.float32))
  made, workdir = (
    config("features_timegate", eval_every=1.0, **feature_settings(folder)),
    folder / "run",
  )
  with pytest.MonkeyPatch.context() as patch:
    announced(patch)
    (folder / "printed.txt").write_text(said(run, made, workdir, "train"))
  return made, workdir


@pytest.mark.slow
def test_whatever_takes_long_says_what_it_does(finished):
  printed = (finished[1].parent / "printed.txt").read_text()
  for what in (
    "opening the data",
    "making the networks",
    "finding the initial concepts of the gates",
    "compiling the training step",
    "timing runs that skip segments",
    "drawing the report",
  ):
    assert f"{what} (" in printed


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("data.name", "compose", "data.name must be one of .*; got 'compose'. Did you mean 'composed'"),
    ("data.name", "videos", "data.table must be set for videos; got None"),
    ("data.segments", 13, "segments must be >= 14, .*; got 13"),
    (
      "model.selection",
      "gates",
      "model.selection must be one of .*; got 'gates'. Did you mean 'gate'",
    ),
    ("model.segment_fraction", 0.0, r"model.segment_fraction must be in \(0, 1\]; got 0.0"),
    (
      "model.heavy.name",
      "resnet3d",
      "model.heavy.name must be one of .*; got 'resnet3d'. Did you mean 'resnet3d",
    ),
    ("model.gate.context", "atention", "model.gate.context .* Did you mean 'attention'"),
    ("model.gate.relaxation", "hard", "model.gate.relaxation must be one of .*; got 'hard'"),
    ("model.gate.concepts", 0, "gate concepts must be >= 1; got 0"),
    ("model.pooling", "median", "model.pooling must be one of .*; got 'median'"),
    (
      "training",
      "three_stage",
      "training must be one of .*; got 'three_stage'. Did you mean 'two_stage'",
    ),
    ("loss.sparsity.kind", "targt", "loss.sparsity.kind .* Did you mean 'target'"),
    ("optim.batch_size", 12, "optim.batch_size must be a multiple of the 8 devices; got 12"),
    (
      "optim.batch_size",
      40,
      "optim.batch_size must be at most 32, the number of training videos; got 40",
    ),
    (
      "pretrain.epochs",
      0,
      "pretrain.epochs must be >= 1 if training is 'two_stage' or .*; got 0",
    ),
    (
      "model.selection",
      "confidence",
      "loss.light must be > 0 if model.selection is 'confidence'",
    ),
    ("pretrain.target", "unit", "pretrain.target must be one of label, units; got 'unit'"),
    (
      "model.heavy.gating",
      "bias",
      "model.heavy.gating must be one of all_channels, channel, layer, none; got 'bias'",
    ),
    (
      "loss.channels.sparsity.kind",
      "budget",
      "model.heavy.gating='none' is incompatible with loss.channels.sparsity.kind='budget'",
    ),
  ],
)
def test_a_wrong_setting_is_named_before_a_directory_is_made(
  config, tmp_path, field, value, message
):
  with pytest.raises(ValueError, match=message):
    run.run(config(**{field: value}), tmp_path / "run", "train")
  assert not (tmp_path / "run").exists()


def test_a_budget_of_channels_is_refused_where_closing_all_would_not_meet_it(config):
  changes = {"model.heavy.gating": "channel", "loss.channels.sparsity.kind": "budget"}
  build.build(config(**changes, **{"loss.channels.sparsity.target": 1.0}))
  with pytest.raises(
    ValueError, match=r"loss.channels.sparsity.target must be above 0\.\d+, .*; got 0.001"
  ):
    build.build(config(**changes, **{"loss.channels.sparsity.target": 0.001}))


def test_the_oracle_needs_to_know_which_segments_matter(config, tmp_path):
  folder_of_features(tmp_path, rng=np.random.default_rng(0))
  with pytest.raises(ValueError, match="model.selection must not be 'oracle': the data"):
    build.build(
      config("features_timegate", **feature_settings(tmp_path), **{"model.selection": "oracle"})
    )


def test_nets_learn_unit_actions_only_where_the_data_have_them(config):
  message = "pretrain.target must be 'label': the data have no unit actions; got 'units'"
  with pytest.raises(ValueError, match=f"^{message}$"):
    build._check_data(config(), SimpleNamespace(shapes={"label": ()}))
  build._check_data(config(), SimpleNamespace(shapes={"units": ()}))


def folder_of_features(folder, rng, lengths=(3, 9, 1, 6), copies=8, multi_label=False):
  """Makes 32 videos of 1 to 9 segments, one of which holds the class's number; and their tables."""
  rows = []
  for i in range(len(lengths) * copies):
    label, features = i % 3, rng.normal(0, 0.1, (lengths[i % len(lengths)], 5)).astype(np.float32)
    features[rng.integers(len(features)), label] = 3.0
    np.save(folder / f"video{i}.npy", features)
    rows.append((f"video{i}", f"class {label}" + (";every" if multi_label else "")))
  with (folder / "labels.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("video", "label"), *rows])
  for split, names in (("train", rows[:16]), ("test", rows[16:])):
    (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in names))


def feature_settings(folder):
  return {
    "data.folder": str(folder),
    "data.table": str(folder / "labels.csv"),
    "data.segments": 6,
    "data.train_split": str(folder / "train.txt"),
    "data.test_split": str(folder / "test.txt"),
    "model.light.name": "features",
    "model.heavy.name": "features",
    "model.heavy.stem": None,
    "pretrain.epochs": 0,
    "data.heavy_macs": 1000,
    "data.light_macs": 10,
  }


def test_a_video_in_both_splits_is_refused_in_training_before_a_directory_is_made(config, tmp_path):
  folder_of_features(tmp_path, np.random.default_rng(0))
  np.save(tmp_path / "VIDEO3.npy", np.load(tmp_path / "video20.npy"))
  with (tmp_path / "labels.csv").open("a") as file:
    file.write("VIDEO3.mp4,class 0\n")
  with (tmp_path / "test.txt").open("a") as file:
    file.write("VIDEO3.mp4\n")
  given = feature_settings(tmp_path) | {"data.validation": None}
  with pytest.raises(ValueError, match="1 of training are also in test: VIDEO3.mp4"):
    run.run(config("features_timegate", **given), tmp_path / "run", "train")
  assert not (tmp_path / "run").exists()


def test_copies_of_training_videos_are_counted_and_named(config, tmp_path, monkeypatch):
  folder_of_features(tmp_path, np.random.default_rng(0))
  shutil.copy(tmp_path / "video3.npy", tmp_path / "video20.npy")
  given = feature_settings(tmp_path) | {"data.validation": None}
  experiment = build.build(config("features_timegate", **given))
  warned = []
  monkeypatch.setattr(evaluate, "warn", lambda message, *values: warned.append(message % values))
  found = evaluate.count_copies(experiment.train, None, experiment.test)
  assert found == {"copies": 1, "copies_names": ["video20"]}
  assert warned == ["1 test videos are copies of training videos: video20 is video3"]
  # Of three splits each is compared with those that a net learns from before it.
  warned.clear()
  found = evaluate.count_copies(experiment.test, experiment.train, experiment.test)
  assert (found["copies"], found["validation_copies"]) == (1, 1)
  assert found["validation_copies_names"] == ["video3"]
  assert warned[0] == "1 held-out videos are copies of training videos: video3 is video20"


@pytest.mark.parametrize("field", ["data.table", "data.train_split", "data.test_split"])
def test_a_file_of_names_that_is_not_there_is_named_by_its_field(config, tmp_path, field):
  folder_of_features(tmp_path, np.random.default_rng(0))
  given = feature_settings(tmp_path) | {field: str(tmp_path / "none.txt")}
  with pytest.raises(ValueError, match=f"{field} must be a file; there is no .*none.txt"):
    build.build(config("features_timegate", **given))


@pytest.mark.parametrize("training", ["two_stage", "end_to_end"])
def test_training_on_files_none_of_which_can_be_read_is_refused(config, tmp_path, training):
  folder_of_features(tmp_path, np.random.default_rng(0))
  made = config("features_timegate", **feature_settings(tmp_path), training=training)
  experiment = build.build(made)

  # They can be read when the set is opened, and no longer when training begins.
  spoil_training_features(tmp_path)
  message = r"none of 1\d (training )?videos c\w+ be read: video.*, video.* more"
  with pytest.raises(ValueError, match=message):
    runner.run(run.LongVideo(experiment), tmp_path / "run", "train")
  assert not (tmp_path / "run" / "result.json").exists()

  with pytest.raises(ValueError, match=r"must hold readable features; .*video.* and \d+ more"):
    run.run(made, tmp_path / "other", "train")
  assert not (tmp_path / "other").exists()


def spoil_training_features(folder):
  """Writes numbers that cannot be learnt into the files of the training videos."""
  for i in range(16):
    np.save(folder / f"video{i}.npy", np.full((3, 5), np.nan, np.float32))


def test_readable_videos_take_the_places_of_others_among_the_features(config, tmp_path):
  folder_of_features(tmp_path, np.random.default_rng(0))
  experiment = build.build(config("features_timegate", **feature_settings(tmp_path)))
  given = experiment.train.names
  for name in (given[2], given[5]):
    np.save(tmp_path / f"{name}.npy", np.full((3, 5), np.nan, np.float32))
  # Networks on features have no variables.
  train = evaluate.extract_features(experiment, {"params": {}, "batch_stats": {}})
  assert train.arrays["weight"].tolist() == [1] * len(given)
  for i, name in enumerate(train.names):
    assert (name == given[i]) == (i not in (2, 5))
    own = experiment.train.read([given.index(name)])
    np.testing.assert_array_equal(train.arrays["light"][i], own["light"][0])
    assert train.arrays["label"][i] == own["label"][0]
  assert evaluate.count_unread(experiment.train, "training") == {
    "training_unreadable": 2,
    "training_unreadable_names": [given[2], given[5]],
  }
  assert evaluate.count_unread(experiment.validation, "validation") == {}


HELD_OUT = {"data.validation": 0.25, "optim.batch_size": 8, "eval_every": 1.0}


@pytest.fixture(scope="module")
def held_out(config, tmp_path_factory):
  """`(config, directory)` of a finished run with videos held out of training."""
  folder = tmp_path_factory.mktemp("held_out")
  folder_of_features(folder, np.random.default_rng(0))
  made = config("features_timegate", **feature_settings(folder), **HELD_OUT)
  said(run, made, folder / "run", "train")
  return made, folder / "run"


def test_a_budget_is_met_on_videos_that_are_held_out(held_out):
  made, workdir = held_out
  result = read_result(workdir)
  splits = result["splits"]
  assert list(splits) == ["training", "validation", "test"]
  assert [of_split["videos"] for of_split in splits.values()] == [12, 4, 16]
  assert splits["test"]["share"] == result["share"]
  validation = build.build(made).validation
  one_each = np.mean(1 / validation.read(range(4))["valid"].sum(axis=1))
  assert one_each <= splits["validation"]["share"] + 1e-6
  assert splits["validation"]["share"] <= max(0.5, one_each) + 1e-6
  page = (workdir / "report.html").read_text()
  assert "fraction of segments: training / validation / test" in page


def test_the_epoch_is_the_one_that_is_best_on_videos_that_are_held_out(held_out):
  made, workdir = held_out
  result, chosen = read_result(workdir), json.loads((workdir / "chosen.json").read_text())
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  scores = {line["step"]: line["accuracy"] for line in lines if line["split"] == "validation"}
  assert set(scores) == {1, 2}
  assert result["step"] == chosen["step"] == max(scores, key=lambda step: (scores[step], step))
  assert chosen["is_best"] == (chosen["step"] == 1)
  assert result["last_step"] == 2
  printed = said(run, made, workdir, "evaluate")
  assert f"checkpoint of step {result['step']}" in printed
  assert re.search(rf"test accuracy +{100 * result['accuracy']:.2f} %", printed)


def test_a_loaded_run_has_the_threshold_that_was_set_on_held_out_videos(held_out):
  made, workdir = held_out
  _, variables, _ = loaded(workdir)
  chosen = thresholds.load(workdir)
  like = run.LongVideo(build.build(made)).fresh()
  folder = workdir / best_state.BEST_DIR if chosen.is_best else workdir
  trained = restore_newest(folder / "checkpoints", like).state.params["gate"]["logits"]["bias"]
  moved = np.asarray(trained) - np.float32(chosen.thresholds["gate"])
  np.testing.assert_array_equal(variables["params"]["gate"]["logits"]["bias"], moved)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"data.validation": 1.0},
      r"data.validation must be a fraction in \(0, 1\) or None; got 1.0",
    ),
    (
      {"data.validation": 0.5, "data.validation_split": "held.txt"},
      "data.validation_split must be None if data.validation is 0.5; got 'held.txt'",
    ),
    (
      {"data.validation_split": "held.txt"},
      "data.validation_split must be None unless splits are files, .*; got 'held.txt'",
    ),
    ({"budget.scope": "batch"}, "budget.scope must be one of set, video; got 'batch'"),
    ({"data.crop_padding": -1}, "data.crop_padding must be >= 0 or None; got -1"),
    ({"data.colour": 1.0}, r"data.colour must be in \[0, 1\) or None; got 1.0"),
    (
      {"data.name": "features", "data.flip": True},
      "data.crop_padding, data.flip and data.colour must be None for 'features', .* None, True",
    ),
    ({"data.cache": "cache"}, "data.cache must be None unless data.name is 'videos', .*'cache'"),
    ({"data.cache_gb": 0.0}, "data.cache_gb must be a positive finite number or None; got 0.0"),
  ],
)
def test_settings_that_may_be_none_are_checked(config, changes, message):
  with pytest.raises(ValueError, match=message):
    build.build(config(**changes))


@pytest.mark.parametrize(("given", "scope"), [(None, "set"), ("set", "set"), ("video", "video")])
def test_the_budget_is_that_of_the_set_unless_each_video_has_it(config, given, scope):
  assert build.build(config(**{"budget.scope": given})).training.objective.scope == scope


def test_segments_of_a_video_are_augmented_alike_in_both_trainings(config):
  both = {"training": "end_to_end", "pretrain.segments_per_video": 3}
  made = config(**both, **{"data.crop_padding": 3, "data.flip": True})
  plain = config(**both)
  clips = np.random.default_rng(0).integers(1, 256, (8, 1, 1, 16, 16, 1), dtype=np.uint8)
  inputs = {"clips": np.tile(clips, (1, 14, 8, 1, 1, 1)), "valid": np.ones((8, 14), bool)}
  spread = {kind: x[:, None] for kind, x in inputs.items()}

  def prepared(phase):
    run_phase = jax.pmap(lambda x: phase.prepare(jax.random.key(0), x), axis_name=devices.AXIS)
    return np.asarray(run_phase(spread)["heavy"]).reshape(8, -1, 16, 16)

  found = {}
  for name, each in (("made", made), ("plain", plain)):
    built = build.build(each)
    for phase in (built.pretraining, built.training):
      found[name, phase.name] = prepared(phase)
  for name, phase in found:
    frames = found[name, phase]
    np.testing.assert_array_equal(frames, np.broadcast_to(frames[:, :1], frames.shape))
  for phase in ("pretrain", "train"):
    assert not np.array_equal(found["made", phase][:, 0], found["plain", phase][:, 0])
  # Tests see the videos as they are.
  tested = built.prepare({kind: jnp.asarray(x) for kind, x in inputs.items()})["heavy"]
  np.testing.assert_allclose(tested[:, 0, 0, ..., 0], found["plain", "train"][:, 0], rtol=1e-5)


def test_videos_are_held_out_of_each_class_or_named_in_a_file(config, tmp_path):
  folder_of_features(tmp_path, np.random.default_rng(0))
  given = feature_settings(tmp_path)
  parts = lambda **changes: build.build(
    config("features_timegate", **given, **{"optim.batch_size": 8, **changes})
  )
  whole, cut = parts(), parts(**{"data.validation": 0.25})
  assert whole.validation is None
  assert sorted(cut.train.names + cut.validation.names) == sorted(whole.train.names)
  assert np.bincount(cut.validation.table.labels).tolist() == [2, 1, 1]
  assert cut.test.names == whole.test.names
  names = whole.train.names
  for file, part in (("held", names[:2]), ("rest", names[2:])):
    (tmp_path / f"{file}.txt").write_text("".join(f"{name}\n" for name in part))
  given["data.train_split"] = str(tmp_path / "rest.txt")
  named = parts(**{"data.validation_split": str(tmp_path / "held.txt")})
  assert (named.validation.names, named.train.names) == (names[:2], names[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {"model.selection": "prefix"},
    {"model.selection": "confidence", "loss.light": 1.0, "budget.scope": "set"},
  ],
)
def test_other_selections_meet_their_budget_on_held_out_videos(config, tmp_path, changes):
  given = {"training": "end_to_end", "pretrain.epochs": 0, "data.validation": 0.5}
  made = config(**given, **changes)
  run.run(made, tmp_path / "run", "train")
  result = read_result(tmp_path / "run")
  assert result["splits"]["validation"]["videos"] == 16
  # A segment may lie on the other side of a threshold by rounding.
  assert result["splits"]["validation"]["share"] <= 0.5 + 0.01
  check_run(made, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True])
def test_features_made_elsewhere_are_trained_on(config, tmp_path, multi_label):
  folder_of_features(tmp_path, np.random.default_rng(0), multi_label=multi_label)
  np.save(tmp_path / "video17.npy", np.full((2, 5), np.nan, np.float32))
  made = config(
    "features_timegate",
    **feature_settings(tmp_path),
    **{
      "optim.epochs": 40,
      "eval_every": 20.0,
      "loss.sparsity.coefficient": 1.0,
      "optim.learning_rate": 0.01,
    },
  )
  run.run(made, tmp_path / "run", "train")
  result = read_result(tmp_path / "run")
  assert (result["videos"], result["unreadable"]) == (15, 1)
  assert result["mean_average_precision" if multi_label else "accuracy"] > 0.6
  counts = build.build(made).counts
  assert counts.all_segments == 6 * 1000 + counts.classifier
  # Some videos are shorter.
  assert 1000 + counts.classifier < result["all_segments_macs"] < counts.all_segments
  assert result["macs"] < counts.all_segments + counts.selector
  assert {f.name for f in (tmp_path / "run").glob("*.png")} == {"segments.png", "timeline.png"}


def test_probabilities_in_chosen_segments_are_counted_as_numpy_counts_them():
  rng = np.random.default_rng(0)
  probs, chosen = rng.random((3, 4, 5)).astype(np.float32), rng.random((3, 4)) < 0.5
  probs[0, 0], chosen[0, 0] = [0, 1, 0.5, 0.025, 0.975], True
  counts = np.asarray(evaluate.bin_counts(probs, chosen))
  expected = [
    np.histogram(p[c], statistics.BINS, (0, 1))[0] for p, c in zip(probs, chosen, strict=True)
  ]
  np.testing.assert_array_equal(counts, expected)
  assert not chosen.all()


def test_histograms_are_of_valid_segments_and_of_each_layer_of_channel_gates():
  valid = np.array([[True, True, False]])
  done = {
    "probs": np.array([[0.99, 0.01, 0.5]]),
    "gates": np.array([[1.0, 0.0, 1.0]]),
    "valid": valid,
    "channels": np.stack([np.full((2, statistics.BINS), layer) for layer in range(2)], axis=1),
  }
  heavy = SimpleNamespace(gate_layers=(("conv1", 8), ("conv2", 8)))
  counts = report.count_histograms(SimpleNamespace(counts=SimpleNamespace(heavy=heavy)), done)
  assert counts["gates/segments/probs"].sum() == 2
  for layer, count in (("conv1", 0), ("conv2", 2)):
    assert counts[f"gates/heavy/{layer}/probs"].tolist() == [count] * statistics.BINS


def read_result(path):
  return json.loads((path / "result.json").read_text())


@pytest.mark.slow
def test_videos_in_folders_of_their_classes_are_trained_on_without_a_table(
  config, tmp_path, monkeypatch
):
  without_reports(monkeypatch)
  films = tmp_path / "films"
  # A hash of the path puts about a fifth of them into the test.
  for i in range(32):
    made_videos.write(films / ("fight", "walk")[i % 2] / f"{i}.mp4", 8 + 8 * (i % 2), size=(16, 24))
  (films / "fight" / "bad.mp4").write_bytes(b"no video")
  (films / "fight" / "notes.txt").write_text("")
  changes = {"data.layout": "folders", "data.folder": str(films), "data.workers": 0}
  small = {"data.segments": 4, "data.frames": 4, "data.size": 8, "model.gate.concepts": 2}
  made = config("videos_timegate", **{**changes, **small, "eval_every": 0.0, "optim.epochs": 1})
  run.run(made, tmp_path / "run", "train")
  result = read_result(tmp_path / "run")
  assert result["classes"] == ["fight", "walk"]
  assert result["unreadable"] + result["training_unreadable"] == 1
  parts = [build.build(made).train, build.build(made).test]
  assert sum(map(len, parts)) == 33
  assert result["videos"] == len(parts[1]) - result["unreadable"]
  assert "fight/bad.mp4," in (tmp_path / "run" / "unreadable_files.csv").read_text()


@pytest.mark.slow
def test_a_folder_of_videos_goes_through_training_evaluation_and_the_picture(
  config, tmp_path, capsys
):
  rows = []
  for i in range(24):
    label = "short" if i % 2 else "long"
    made_videos.write(tmp_path / f"video{i}.mp4", 10 if i % 2 else 28, size=(16, 24))
    rows.append((f"video{i}.mp4", label))
  (tmp_path / "video20.mp4").write_bytes(b"no video")
  (tmp_path / "video21.mp4").unlink()
  with (tmp_path / "labels.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("video", "label"), *rows])
  for split, names in (("train", rows[:16]), ("test", rows[16:])):
    (tmp_path / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in names))
  made = config(
    "videos_timegate",
    **{
      "data.folder": str(tmp_path),
      "data.table": str(tmp_path / "labels.csv"),
      "data.segments": 4,
      "data.frames": 4,
      "data.train_split": str(tmp_path / "train.txt"),
      "data.test_split": str(tmp_path / "test.txt"),
      "data.size": 8,
      "data.workers": 0,
      "optim.epochs": 4,
      "training": "end_to_end",
      "model.heavy.gating": "channel",
    },
  )
  run.run(made, tmp_path / "run", "train")
  result = read_result(tmp_path / "run")
  assert (result["videos"], result["unreadable"], result["missing"]) == (6, 1, 1)
  assert 0.25 <= result["share"] <= 1
  assert (tmp_path / "run" / "timeline.png").stat().st_size > 5000
  last = [value for step, value in summaries(tmp_path / "run") if step == result["step"]]
  counts = {
    value.tag: sum(value.histo.bucket) for value in last if value.WhichOneof("value") == "histo"
  }
  chosen = round(result["share"] * 6 * 4)
  assert counts == {
    "gates/segments/probs": 6 * 4,
    "gates/segments/shares": 6,
    "gates/heavy/stage1_block1/conv1/probs": 4 * chosen,
  }
  assert {value.tag for value in last if value.WhichOneof("value") == "image"} == {
    "pictures/segments",
    "pictures/timeline",
  }
  assert "Time lines</h2>" in (tmp_path / "run" / "report.html").read_text()
  capsys.readouterr()
  run.run(made, tmp_path / "run", "evaluate")
  said = capsys.readouterr().out
  assert re.search(rf"test accuracy +{100 * result['accuracy']:.2f} %", said)
  assert re.search(r"videos that could not be read +1", said)


def test_speed_is_of_spread_videos_relative_to_the_quickest_way_to_see_all(
  config, monkeypatch, capsys
):
  changes = {"model.selection": "uniform", "model.segment_fraction": 0.5}
  experiment = build.build(config(**changes))
  inputs = speed._read(experiment, 4)
  np.testing.assert_array_equal(inputs["clips"], experiment.test.read([0, 6, 12, 19])["clips"])
  variables = jax.device_get(
    jax.jit(experiment.model.clone(axis_name=None).init)(
      jax.random.key(0), experiment.prepare(inputs)
    )
  )

  def race_in(seconds):
    """Makes a race by a made-up clock."""

    def race(runs, _):
      return {way: [seconds[way if isinstance(way, str) else way.strategy]] for way in runs}

    return race

  clock = {"segments": 1.0, "ungated": 2.0, "one by one": 1.5}
  monkeypatch.setattr(speed, "race", race_in(clock))
  found = speed.speed(experiment, variables, videos=4)
  assert (found["videos_per_second"], found["timed_videos"]) == (4 / 1.0, 4)
  assert found["all_segments_videos_per_second"] == pytest.approx(4 / 1.5)
  assert found["timed_share"] == pytest.approx(0.5, abs=0.1)
  # Half of the MACs cannot save two thirds of the time.
  monkeypatch.setattr(speed, "race", race_in(clock | {"segments": 0.5}))
  assert speed.speed(experiment, variables, videos=4) == {}
  assert "the speed is not reported: 3 measurements saved more" in capsys.readouterr().out


def check_run(made, workdir, steps=4, videos=20):
  """Checks a finished run: it is not repeated, and its evaluation prints the same accuracy."""
  result = read_result(workdir)
  assert result["step"] == steps
  last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
  assert (last["step"], last["split"], last["accuracy"]) == (steps, "test", result["accuracy"])
  assert result["videos"] == videos
  assert "nothing was trained or changed" in said(run, made, workdir, "train")
  printed = said(run, made, workdir, "evaluate")
  assert f"checkpoint of step {steps}" in printed
  assert re.search(rf"test accuracy +{100 * result['accuracy']:.2f} %", printed)


def test_a_result_says_what_its_accuracy_is_worth(finished):
  _, workdir = finished
  result = read_result(workdir)
  assert result["accuracy_low"] < result["accuracy_high"]
  assert result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"]
  confusion = np.array(result["confusion"])
  assert confusion.sum() == result["videos"]
  assert np.trace(confusion) / confusion.sum() == pytest.approx(result["accuracy"])
  assert result["majority_rate"] == confusion.sum(axis=1).max() / result["videos"]
  assert set(result["class_accuracy"]) == {"class 0", "class 1", "class 2"}
  assert "Confusions of classes" in (workdir / "report.html").read_text()


def test_a_run_leaves_what_it_measured(finished):
  made, workdir = finished
  check_run(made, workdir, steps=2, videos=15)
  result = read_result(workdir)
  assert result["unreadable"] == 1
  assert result["classes"] == ["class 0", "class 1", "class 2"]
  # Of all splits.
  named = (workdir / "unreadable_files.csv").read_text().splitlines()
  unread = result["unreadable"] + result["training_unreadable"]
  assert (named[0], len(named)) == ("path,reason", 1 + unread)
  assert 0 < result["share"] <= 1
  assert result["mac_ratio"] == pytest.approx(result["macs"] / result["all_segments_macs"])
  assert {path.name for path in workdir.glob("*.png")} == {"segments.png", "timeline.png"}


@pytest.mark.slow
def test_a_run_is_loaded_in_one_call(finished):
  made, workdir = finished
  model, variables, _ = loaded(workdir)
  built, score = build.build(made), json.loads((workdir / "result.json").read_text())["accuracy"]
  batch = built.test.read(np.arange(len(built.test)))
  outputs, _ = jax.jit(model.apply)(variables, built.prepare(batch))
  right = np.argmax(outputs["logits"], axis=1) == batch["label"]
  assert np.mean(right[batch["weight"] > 0]) == pytest.approx(score, abs=0.1)


def test_every_test_video_has_a_row_with_its_prediction_and_chosen_segments(finished):
  _, workdir = finished
  result = read_result(workdir)
  with (workdir / "predictions.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  # One video cannot be read.
  assert [row["video"] for row in rows] == [f"video{i}" for i in range(16, 32) if i != 17]
  assert np.mean([row["right"] == "yes" for row in rows]) == pytest.approx(result["accuracy"])
  for row in rows:
    assert (row["class"] == row["prediction"]) == (row["right"] == "yes")
  shares = [len(row["chosen"].split()) / int(row["segments"]) for row in rows]
  assert np.mean(shares) == pytest.approx(result["share"])
  page = (workdir / "report.html").read_text()
  for title in ("Predictions</h2>", "Learning curves</h2>"):
    assert title in page


def test_a_report_is_written_again(finished, tmp_path):
  made, workdir = finished
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "report.html").unlink()
  said(run, made, tmp_path / "run", "report")
  assert pages.lasting(tmp_path / "run") == pages.lasting(workdir)


def test_segments_are_seen_one_by_one_until_the_classifier_is_sure(config, tmp_path):
  folder_of_features(tmp_path, np.random.default_rng(0), multi_label=True)
  made = config("features_timegate", **feature_settings(tmp_path), **{"model.selection": "prefix"})
  printed = said(run, made, tmp_path / "run", "train")
  result = read_result(tmp_path / "run")
  assert result["videos"] == 16
  assert 0 < result["share"] <= 1
  assert f"mean average precision {100 * result['mean_average_precision']:.2f} %" in " ".join(
    printed.split()
  )


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_parameters(finished, tmp_path, monkeypatch):
  without_reports(monkeypatch)
  made, workdir = finished
  with monkeypatch.context() as patch:
    patch.setattr(stopping, "StopRequest", lambda: Stopping(1))
    assert "stopped as asked" in said(run, made, tmp_path / "run", "train")
  assert "resuming from the checkpoint of step 1" in said(run, made, tmp_path / "run", "train")
  assert tiny.bit_equal(newest(made, tmp_path / "run"), newest(made, workdir))


@pytest.fixture(scope="module")
def pretrained(config, tmp_path_factory):
  """`(config, directory)` of a run whose nets are trained, and which stops there."""
  made = config(**{"data.train_videos": 16, "data.test_videos": 8})
  experiment = build.build(made)
  with rundir.open_run(tmp_path_factory.mktemp("pretrained") / "run", made) as run_dir:
    assert run.LongVideo(experiment).pretrain(run_dir) is not None
  return made, run_dir.path


def test_nets_that_were_trained_can_be_taken_for_another_run(config, pretrained, tmp_path):
  made, workdir = pretrained
  other = made.copy_and_resolve_references()
  other.pretrained = str(workdir)
  experiment = build.build(other)
  nets = video_nets.trained_nets(experiment, workdir.parent)
  step, state = video_nets.restore(experiment.pretraining, workdir / video_nets.PRETRAIN_DIR, 0)
  assert step == 1
  assert tiny.bit_equal(nets["params"], state.params)
  assert set(video_nets.placed_nets(experiment, nets)["params"]) == {"light", "heavy"}
  end_to_end = build.build(config(training="end_to_end", **{"model.selection": "uniform"}))
  _, state = video_nets.restore(end_to_end.training, workdir.parent / "none", 0)
  begun = video_nets.begin_training(end_to_end, state, nets, train=None)
  assert tiny.bit_equal(
    begun.params["heavy"], video_nets.placed_nets(end_to_end, nets)["params"]["heavy"]
  )
  # A run that is finished does without the other.
  for _ in range(2):
    video_nets.keep_nets(str(workdir), tmp_path)
  other.pretrained = str(tmp_path / "gone")
  kept = video_nets.trained_nets(build.build(other), tmp_path)
  assert tiny.bit_equal(kept["params"], nets["params"])
  with pytest.raises(
    rundir.RunDirError, match="pretrained must be a run directory with trained nets"
  ):
    video_nets.trained_nets(build.build(other), workdir.parent)
  other.pretrained, other.pretrain.epochs = str(workdir), 2
  with pytest.raises(rundir.RunDirError, match="must hold nets trained for 2 steps; .* of step 1"):
    video_nets.trained_nets(build.build(other), workdir.parent)


@pytest.fixture(scope="module")
def two_stage(pretrained):
  """The output of the run of `pretrained` when it resumes to its end."""
  made, workdir = pretrained
  return said(run, made, workdir, "train")


def test_a_run_goes_on_after_its_nets_are_trained(pretrained, two_stage):
  _, workdir = pretrained
  assert read_result(workdir)["step"] == 2
  assert re.search(r"test accuracy +\d+\.\d\d %", two_stage)


@pytest.fixture(scope="module")
def compiled(config, tmp_path_factory):
  """The times of programs of an untrained net."""
  experiment = build.build(config(training="end_to_end"))
  variables = jax.jit(experiment.model.clone(axis_name=None).init)(
    jax.random.key(0), experiment.prepare(speed._read(experiment, 2))
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(speed, "_REPEATS", 1)
    patch.setattr(speed, "_BATCHES", (2,))
    with rundir.open_run(tmp_path_factory.mktemp("compiled") / "run", experiment.config) as run_dir:
      speed.compile_run(experiment, run_dir, 0, variables)
  return json.loads((run_dir.path / "compile.json").read_text())


@pytest.mark.slow
@pytest.mark.alone
def test_programs_that_skip_segments_are_measured_beside_those_that_do_not(compiled):
  (rows,) = compiled["timings"].values()
  assert {"masked", "segments", "ungated"} == {row["strategy"] for row in rows}
  assert all(row["open_ratio"] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {
      "training": "end_to_end",
      "model.heavy.gating": "channel",
      "loss.channels.sparsity.coefficient": 1.0,
      "loss.channels.batch_shaping.coefficient": 0.5,
      "loss.light": 0.3,
      "loss.batch_shaping.coefficient": 0.5,
      "devices.backend": "shard_map",
      "devices.steps_per_dispatch": 2,
    },
    {"model.selection": "light", "pretrain.target": "label"},
    {"model.selection": "prefix", "model.pooling": "mean"},
    {"model.selection": "confidence", "loss.light": 1.0},
  ],
)
def test_a_run_trains_evaluates_and_is_compiled(config, tmp_path, monkeypatch, changes):
  made = config(**changes)
  run.run(made, tmp_path / "run", "train")
  check_run(made, tmp_path / "run")
  result = read_result(tmp_path / "run")
  selection, counts = changes.get("model.selection", "gate"), build.build(made).counts
  if selection == "light":
    assert result["macs"] == counts.all_segments < result["all_segments_macs"] / 2
  elif selection == "confidence":
    assert result["share"] == pytest.approx(0.5)
  monkeypatch.setattr(speed, "_REPEATS", 1)
  monkeypatch.setattr(speed, "_BATCHES", (1, 20))
  if selection in ("light", "prefix"):
    with pytest.raises(
      ValueError, match=f"model must have a heavy net and choose segments .* {selection!r}"
    ):
      run.run(made, tmp_path / "run", "compile")
    assert (
      "--mode=compile cannot time this run: model must have"
      in (tmp_path / "run" / "report.html").read_text()
    )
    return
  run.run(made, tmp_path / "run", "compile")
  found = json.loads((tmp_path / "run" / "compile.json").read_text())["timings"]
  assert list(found) == ["1 video at a time", "20 videos at a time"]
  for rows in found.values():
    assert {row["strategy"]: row["mac_ratio"] == 1 for row in rows} == {
      "masked": False,
      "segments": False,
      "ungated": True,
    }
    assert all(row["part"] is None and row["open_ratio"] > 0 for row in rows)
  assert found["20 videos at a time"][0]["mac_ratio"] == pytest.approx(
    result["mac_ratio"], rel=1e-5
  )
  for rows in found.values():
    computed = {row["strategy"]: row["computed_ratio"] for row in rows}
    assert rows[0]["mac_ratio"] <= computed["segments"] * 1.0001 <= computed["masked"] * 1.0002
    assert computed["ungated"] < computed["masked"]
  assert (tmp_path / "run" / "compile.png").stat().st_size > 10_000


@pytest.mark.slow
def test_everything_open_is_every_segment(config):
  experiment = build.build(config())
  model, inputs = experiment.model.clone(axis_name=None), speed._read(experiment, 2)
  variables = model.init(jax.random.key(0), experiment.prepare(inputs))
  variables["params"]["gate"]["logits"]["bias"] -= 10.0
  chosen = [
    compile_segments(model, v, capacities=(8,), prepare=experiment.prepare)(inputs).chosen
    for v in (variables, opened_variables(model, variables))
  ]
  assert chosen[0] < chosen[1] == inputs["valid"].sum()


@pytest.mark.slow
def test_a_run_stopped_in_either_training_ends_with_the_same_parameters(
  config, tmp_path, monkeypatch, capsys
):
  without_reports(monkeypatch)
  made = config()
  run.run(made, tmp_path / "whole", "train")
  with monkeypatch.context() as patch:
    patch.setattr(stopping, "StopRequest", lambda: Stopping(1))
    for stop in (1, 2, 3):
      run.run(made, tmp_path / "parts", "train")
      assert capsys.readouterr().out.count("stopped as asked") == 1, stop
  run.run(made, tmp_path / "parts", "train")
  whole, parts = (newest(made, tmp_path / name) for name in ("whole", "parts"))
  assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), whole, parts))
  ignored = {"seconds_since_last_start", "videos_per_second", "all_segments_videos_per_second"}
  # Left out where a measurement of the speed is refused.
  ignored |= {"timed_videos", "timed_share"}
  results = [
    {k: v for k, v in read_result(tmp_path / name).items() if k not in ignored}
    for name in ("whole", "parts")
  ]
  assert results[0] == results[1]


def newest(made, path):
  experiment = build.build(made)
  step, state = video_nets.restore(experiment.training, path, made.seed)
  assert step == experiment.training.settings.total_steps
  return jax.device_get(state)


@pytest.mark.slow
def test_nets_of_another_run_are_taken_and_its_concepts_found_again(config, tmp_path, monkeypatch):
  without_reports(monkeypatch)
  made = config()
  run.run(made, tmp_path / "first", "train")
  second = config(pretrained=str(tmp_path / "first"))
  run.run(second, tmp_path / "second", "train")
  # The nets are copied, not trained: there is no journal.
  assert [file.name for file in (tmp_path / "second" / "pretrain").iterdir()] == ["checkpoints"]
  first, again = newest(made, tmp_path / "first"), newest(second, tmp_path / "second")
  assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
  with pytest.raises(rundir.RunDirError, match="must hold nets trained for 4 steps; .* of step 2"):
    run.run(
      config(pretrained=str(tmp_path / "first"), **{"pretrain.epochs": 2}),
      tmp_path / "third",
      "train",
    )


def test_nets_that_are_not_there_are_named(config, tmp_path):
  with pytest.raises(
    rundir.RunDirError,
    match="pretrained must be a run directory with trained nets; .*none",
  ):
    run.run(config(pretrained=str(tmp_path / "none")), tmp_path / "run", "train")


def test_another_config_does_not_spoil_nets_that_were_trained(config, tmp_path):
  with rundir.open_run(tmp_path / "run", config()) as run_dir:
    (run_dir.path / "pretrain" / "checkpoints" / "2").mkdir(parents=True)
  other = rundir.open_run(tmp_path / "run", config(seed=1))
  with pytest.raises(rundir.RunDirError, match="seed: 0 there, 1 here"):
    other.__enter__()


def test_picked_segments_are_valid_and_their_own(config):
  valid = np.array([[True] * 5, [True, True, False, False, False]])
  batch = {"light": np.arange(10.0).reshape(2, 5, 1), "valid": valid}
  picked = sets.pick_segments(jax.random.key(0), batch, 3, None)
  index = np.asarray(picked["picked"])
  assert len(set(index[0])) == 3
  assert set(index[1]) == {0, 1}
  np.testing.assert_array_equal(np.ravel(picked["light"]), np.ravel(index + np.array([[0], [5]])))


@pytest.mark.parametrize("trained", [False, True])
def test_concepts_are_trained_where_the_config_says_so(config, trained):
  made = config(**{"model.gate.trained_concepts": trained, "optim.kind": "sgd"})
  optimiser = build._optimiser(made, 10)
  params = {"concepts": {"kernel": np.ones(2, np.float32)}, "other": np.ones(2, np.float32)}
  updates, _ = optimiser.update(params, optimiser.init(params), params)
  assert bool(np.any(updates["concepts"]["kernel"])) == trained
  assert np.any(updates["other"])


@pytest.mark.slow
def test_concepts_stay_as_they_were_found(config, tmp_path):
  experiment = build.build(config(**{"optim.weight_decay": 0.1}))
  _, state = video_nets.restore(experiment.training, tmp_path, 0)
  nets = jax.device_get(video_nets.restore(experiment.pretraining, tmp_path, 0)[1])
  variables = {"params": nets.params, "batch_stats": nets.batch_stats}
  train = evaluate.extract_features(experiment, variables)
  begun = video_nets.begin_training(experiment, state, variables, train=train)
  before = np.asarray(begun.params["gate"]["concepts"]["kernel"])
  advance = run.LongVideo(experiment).make_advance(experiment.training, train, 0)
  after, _ = advance(begun, 0)
  np.testing.assert_array_equal(after.params["gate"]["concepts"]["kernel"], before)
  assert before.shape == (4, 4)


SKIPPED = {
  "training": "end_to_end",
  "model.selection": "uniform",
  "model.segment_fraction": 0.25,
  "model.heavy.group_norm": True,
  "optim.kind": "sgd",
  "optim.learning_rate": 0.01,
  "optim.epochs": 1,
}
LEARNT = {"model.selection": "gate", "model.backward_share": 0.86}


def params_without_some_backward(config, changes, folder, *, skip):
  """Returns the trained parameters, the capacity, and the steps that were taken in full."""
  made = config(**{**SKIPPED, **changes, "model.skip_backward": skip})
  run.run(made, folder, "train")
  training = build.build(made).training
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return SimpleNamespace(
    params=video_nets.restore(training, folder, 0)[1].params,
    capacity=training.model.backward_capacity,
    in_full=[line.get("in_full") for line in lines if line["split"] == "train"],
  )


@pytest.mark.slow
def test_nets_trained_with_the_backward_of_chosen_segments_alone_are_the_same(config, tmp_path):
  found = params_without_some_backward(config, LEARNT, tmp_path / "skipped", skip=True)
  assert found.capacity == 25
  assert found.in_full == [0.5]  # half of the steps take either way
  full = params_without_some_backward(config, LEARNT, tmp_path / "full", skip=False)
  assert (full.capacity, full.in_full) == (None, [None])
  assert tiny.relative_gap(found.params, full.params) < 1e-5


@pytest.mark.thin(3)
@pytest.mark.parametrize(
  ("changes", "capacity"), [({}, 2 * 4), (LEARNT, 25), ({**LEARNT, "model.backward_share": 0.3}, 9)]
)
def test_the_backward_holds_the_segments_that_may_be_chosen(config, changes, capacity):
  built = build.build(config(**{**SKIPPED, **changes, "model.skip_backward": True}))
  assert built.training.model.backward_capacity == capacity


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "training",
      "two_stage",
      "training must be 'end_to_end' if model.skip_backward is set; got 'two_stage'",
    ),
    (
      "model.selection",
      "prefix",
      "model.selection must be one of uniform, .*, gate if .*; got 'prefix'",
    ),
    (
      "model.selection",
      "gate",
      "model.backward_share must be < 1 if model.skip_backward is set; got 1.0",
    ),
    ("model.heavy.group_norm", False, "model.heavy.group_norm must be True if .*; got False"),
    ("model.heavy.gating", "channel", "model.heavy.gating must be 'none' if .*; got 'channel'"),
  ],
)
def test_a_backward_that_cannot_be_skipped_exactly_is_refused(config, field, value, message):
  with pytest.raises(ValueError, match=message):
    build.build(config(**{**SKIPPED, "model.skip_backward": True, field: value}))


def test_training_says_where_segments_overlap_and_a_test_does_not(config, tmp_path, monkeypatch):
  made, printed = config(), []
  experiment = SimpleNamespace(config=made, train="films", validation=None, test="others")
  monkeypatch.setattr(run, "build", lambda _: experiment)
  monkeypatch.setattr(run, "check_apart", lambda **splits: printed.append(splits))
  monkeypatch.setattr(run, "say", printed.append)
  monkeypatch.setattr(runner, "run", lambda *_: None)
  monkeypatch.setattr(sets, "advise_segments", lambda films, data: f"{films} overlap")
  run.run(made, tmp_path / "run", "train")
  assert printed == [{"training": "films", "validation": None, "test": "others"}, "films overlap"]
  with rundir.open_run(tmp_path / "run", made) as run_dir:
    (run_dir.checkpoints / "1").mkdir(parents=True)
  run.run(made, tmp_path / "run", "evaluate")
  assert len(printed) == 2


def state_of(bias):
  """A state of training whose only parameter is the bias of the gate."""
  return {"params": {"gate": {"logits": {"bias": jnp.full(1, bias)}}}}


@pytest.fixture
def of_states(config, monkeypatch):
  """A programme whose states are those of `state_of`; no network is built or tested."""
  monkeypatch.setattr(run.LongVideo, "fresh", lambda self: state_of(0.0))
  monkeypatch.setattr(run.LongVideo, "_validate", lambda self, training, variables: 0.5)
  monkeypatch.setattr(video_nets, "whole_network", lambda experiment, state, nets: state)
  monkeypatch.setattr(thresholds, "find_thresholds", lambda *_: {"gate": 0.25})
  made = config(training="end_to_end")
  return run.LongVideo(SimpleNamespace(config=made, pretraining=None, validation="films"))


@pytest.mark.parametrize(("score", "step"), [(0.75, 2), (0.5, 4), (0.25, 4)])
def test_the_state_with_the_best_validation_score_is_taken_and_restored(
  of_states, tmp_path, score, step
):
  printed = []
  training = SimpleNamespace(step=4, state=state_of(4.0), say=printed.append)
  with best_state.BestState(tmp_path / best_state.BEST_DIR) as best:
    best.offer(2, state_of(2.0), score)
    found, variables = of_states._choose_state(training, tmp_path, None, best=best)
  # Each bias is the number of its step, less the threshold.
  assert (found, variables["params"]["gate"]["logits"]["bias"].tolist()) == (step, [step - 0.25])
  assert thresholds.load(tmp_path) == thresholds.Chosen(step, step == 2, {"gate": 0.25})
  said_so = (
    "taking the state of step 2, with the best validation score: 75.00 %, 50.00 % at the end"
  )
  assert (said_so in printed) == (step == 2)
  restored = of_states.restore(rundir.RunDir(tmp_path))
  if step == 2:
    assert restored.step == 2
    assert restored.state["params"]["gate"]["logits"]["bias"].tolist() == [1.75]
  else:
    # The folder has no checkpoint of the training itself.
    assert restored is None


def test_a_run_without_pretraining_has_no_nets_to_train_or_to_take(of_states, tmp_path):
  with pytest.raises(ValueError, match=r"^the config has no pretraining$"):
    of_states.pretrain(rundir.RunDir(tmp_path))
  with pytest.raises(ValueError, match="pretrain.epochs must be that of the pretrained run; got 0"):
    video_nets.trained_nets(of_states.experiment, tmp_path)


def test_a_speed_is_measured_unless_the_config_says_not_to(of_states, monkeypatch):
  monkeypatch.setattr(speed, "speed", lambda *_: {"videos_per_second": 3.0})
  assert of_states._speed(None) == {"videos_per_second": 3.0}
  of_states.config.speed = False
  assert of_states._speed(None) == {}


def test_a_split_that_is_not_held_out_cannot_be_tested():
  experiment = SimpleNamespace(train="a", validation=None, test="b")
  assert evaluate.videos_of(experiment, "training") == "a"
  message = "data.validation must hold videos out for the split 'validation'; got None"
  with pytest.raises(ValueError, match=f"^{message}$"):
    evaluate.videos_of(experiment, "validation")
