import dataclasses
import functools
import importlib
import json
import math
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gating_jax import load_run
from gating_jax.analysis import outcomes
from gating_jax.data import augment, image_sets
from gating_jax.data.tfds import DatasetNotPreparedError
from gating_jax.images import classification, report, start
from gating_jax.models import resnets
from gating_jax.training import devices, rundir, steps
from gating_jax.training.loop import LoopSettings, NonFiniteError
from tests.helpers import jobs, pages, runs, tiny, tiny_cli
from tests.helpers.event_files import events
from tests.helpers.loaded import loaded
from tests.helpers.runs import said

STEPS_PER_EPOCH = 1437 // 128
# Long enough to learn something.
LONG = {
  "optim.epochs": 6,
  "eval_every": 2.5,
  "log_every": 20,
  "optim.warmup": 0.1,
}


@pytest.fixture(scope="module")
def config():
  """`(**changes) -> config` of the quickstart, with a net of one block."""

  def make(**changes):
    made = importlib.import_module("configs.digits_resnet20").get_config()
    made.update_from_flattened_dict({"model.name": "tiny", "optim.epochs": 2})
    made.lock()
    made.update_from_flattened_dict(changes)
    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
    yield make


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """`(config, directory, output)` of a run with a budget; tests copy it to change it."""
  made = config(**LONG, **{"devices.backend": "shard_map", "loss.sparsity.kind": "budget"})
  workdir = tmp_path_factory.mktemp("finished") / "run"
  return made, workdir, said(classification, made, workdir, "train")


def test_the_settings_as_they_stand_are_right(config):
  assert classification.build(config()).settings == LoopSettings(
    total_steps=2 * STEPS_PER_EPOCH,
    log_every=50,
    checkpoint_every=STEPS_PER_EPOCH,
    eval_every=4 * STEPS_PER_EPOCH,
  )


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    (
      "data.loader",
      "residnt",
      "data.loader must be one of auto, resident, streaming; got 'residnt'. Did you mean",
    ),
    ("data.loader", "streaming", "data.loader must be 'resident' for digits"),
    (
      "data.train_split",
      "validation",
      "data split of digits must be 'train' or 'test'; got 'validation'",
    ),
    ("data.mean", (0.5, 0.5), r"data.mean must hold .*; got \(0.5, 0.5\)"),
    ("data.std", (0.0,), r"data.std must be a tuple of positive numbers; got \(0.0,\)"),
    ("data.crop_padding", -1, "data.crop_padding must be >= 0; got -1"),
    ("data.cutout_size", -1, "data.cutout_size must be >= 0; got -1"),
    (
      "model.name",
      "resnet21",
      "model.name must be one of .*; got 'resnet21'. Did you mean 'resnet",
    ),
    (
      "model.gating",
      "chanel",
      "model.gating must be one of all_.*; got 'chanel'. Did you mean 'channel'",
    ),
    (
      "model.backward_share",
      0.5,
      "model.gating must be 'layer' where model.backward_share .*; got 'channel'",
    ),
    ("model.backward_share", 0.0, r"model.backward_share must be in \(0, 1\]; got 0.0"),
    ("model.shortcut", "C", "model.shortcut must be one of A, B; got 'C'"),
    ("model.width", 0.0, "model.width must be a positive finite number; got 0.0"),
    ("model.inner_width", -1.0, "model.inner_width must be a positive finite number; got -1.0"),
    (
      "model.dtype",
      "float23",
      "model.dtype must be one of .*; got 'float23'. Did you mean 'float32'",
    ),
    ("model.gate.initial_open", 1.0, r"gate initial_open must be in \(0, 1\); got 1.0"),
    ("model.exits.threshold", 1.0, r"model.exits.threshold must be in \(0, 1\); got 1.0"),
    (
      "model.gating",
      "exits",
      "loss.regulariser must be 'none' where model.gating is 'exits'; got 'batch_shaping'",
    ),
    ("loss.exit_weights", (), r"loss.exit_weights must be a tuple of numbers; got \(\)"),
    (
      "model.gate.block",
      3,
      "gate block must divide a layer's channels or exceed them; got 3 for 8 channels",
    ),
    (
      "loss.regulariser",
      "entropie",
      "loss.regulariser must be one of .*; got 'entropie'. Did you mean 'entropy'",
    ),
    (
      "loss.entropy.coefficient",
      -1.0,
      "loss.entropy.coefficient must be a finite number >= 0; got -1.0",
    ),
    (
      "optim.gate_lr_multiplier",
      0.0,
      "optim.gate_lr_multiplier must be a positive finite number; got 0.0",
    ),
    ("loss.batch_shaping.a", 0.0, "a must be .*got 0.0"),
    (
      "loss.batch_shaping.coefficient",
      math.nan,
      "loss.batch_shaping.coefficient must be a finite number >= 0",
    ),
    (
      "loss.batch_shaping.reduction",
      "layermean",
      "loss.batch_shaping.reduction .* Did you mean 'layer_mean'",
    ),
    ("loss.batch_shaping.fade_end", 20.0, "fade_end must be a fraction of training, .*; got 20.0"),
    ("loss.sparsity.kind", "mac", "loss.sparsity.kind .* Did you mean 'macs'"),
    (
      "loss.sparsity.ramp_start",
      0.7,
      "ramp_start must be <= ramp_end; got ramp_start 0.7, ramp_end 0.6",
    ),
    ("loss.sparsity.target", 0.0, r"loss.sparsity.target must be in \(0, 1\]; got 0.0"),
    ("optim.schedule", "cosin", "optim.schedule .* Did you mean 'cosine'"),
    (
      "optim.lr_drop_at",
      (0.5, 2.0),
      r"lr_drop_at\[1\] must be a fraction of training, .*; got 2.0",
    ),
    ("optim.epochs", 0, "optim.epochs must be >= 1; got 0"),
    ("optim.learning_rate", -0.1, "optim.learning_rate must be a positive finite number; got -0.1"),
    ("optim.batch_size", 12, "optim.batch_size must be a multiple of the 8 devices; got 12"),
    ("optim.batch_size", 0, "optim.batch_size must be >= 1; got 0"),
    (
      "optim.batch_size",
      1440,
      "optim.batch_size must be at most 1437, the number of training images; got 1440",
    ),
    ("optim.momentum", 1.0, r"momentum must be in \[0, 1\); got 1.0"),
    ("optim.gate_weight_decay", -0.1, "^optim: gate_weight_decay must be >= 0; got -0.1"),
    ("devices.backend", "pamp", "devices.backend .* Did you mean 'pmap'"),
    ("devices.steps_per_dispatch", 0, "devices.steps_per_dispatch must be >= 1; got 0"),
    ("log_every", 0, "log_every must be >= 1; got 0"),
    ("eval_every", -1.0, "eval_every must be a finite number >= 0; got -1.0"),
    ("checkpoint_every", 0.0, "checkpoint_every must be a positive finite number; got 0.0"),
  ],
)
def test_a_wrong_setting_is_named_before_a_directory_is_made(
  config, tmp_path, field, value, message
):
  with pytest.raises(ValueError, match=message):
    classification.run(config(**{field: value}), tmp_path / "run", "train")
  assert not (tmp_path / "run").exists()


def test_a_data_set_that_is_not_prepared_is_named(config, tmp_path):
  settings = {"data.name": "cifar10", "data.data_dir": str(tmp_path / "data")}
  with pytest.raises(DatasetNotPreparedError, match="data set 'cifar10' is not prepared in"):
    classification.run(config(**settings), tmp_path / "run", "train")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("epochs", "k", "total"), [(2, 1, 22), (2, 4, 24), (3, 11, 33), (1, 50, 50)]
)
def test_the_number_of_steps_is_rounded_up_to_whole_dispatches(config, epochs, k, total):
  built = classification.build(config(**{"optim.epochs": epochs, "devices.steps_per_dispatch": k}))
  assert (built.settings.total_steps, built.settings.steps_per_dispatch) == (total, k)


def test_schedules_span_the_whole_training(config):
  coefficients = {"loss.batch_shaping.coefficient": 0.8, "loss.sparsity.coefficient": 1.4}
  built = classification.build(config(**{"optim.epochs": 100}, **coefficients))
  total = 100 * STEPS_PER_EPOCH
  gamma, rho = built.objective.batch_shaping_coefficient, built.objective.sparsity_coefficient
  assert [float(gamma(step)) for step in (0, total // 10, total // 5)] == pytest.approx(
    [0.8, 0.4, 0]
  )
  assert [
    float(rho(step)) for step in (total // 5, 2 * total // 5, 3 * total // 5)
  ] == pytest.approx([0, 0.7, 1.4])


@pytest.mark.parametrize("name", ["digits_resnet20", "cifar10_resnet20"])
def test_never_gated_macs_are_those_of_what_is_never_gated(name, config):
  made = importlib.import_module(f"configs.{name}").get_config()
  made.data.name = "digits"
  made.data.mean = made.data.std = (0.5,)
  built = classification.build(made)
  assert built.counts.gates == 336
  assert built.objective.never_gated_macs == built.counts.macs - built.counts.gated
  assert 0 < built.counts.gated < built.counts.macs


@functools.cache
def mixed_state():
  """A state of the tiny net, on the host, whose gates all open on some test images."""
  made = importlib.import_module("configs.digits_resnet20").get_config()
  made.model.name = "tiny"
  built = classification.build(made)
  random = np.random.default_rng(1)
  noisy = lambda tree: jax.tree.map(
    lambda x: np.asarray(x + random.normal(0, 0.3, x.shape), np.float32), tree
  )
  state = jax.device_get(steps.init_state(built.model, built.optimiser, 0, built.test.shape))
  state = state.replace(
    params=noisy(state.params), batch_stats=jax.tree.map(np.abs, noisy(state.batch_stats))
  )
  results = steps.make_eval_step(built.model, built.normalise)(
    state, built.test.pixels, built.test.labels
  )
  state.params["stage1_block1"]["gate"]["head"]["logits"]["bias"] -= np.mean(
    results["gate_logits"], axis=0
  )
  return state


def evaluated(made, used):
  """The test result of the mixed state on some of the devices."""
  built = classification.build(made)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      devices, "map_over_devices", functools.partial(devices.map_over_devices, devices=used)
    )
    return classification.Classification(built).make_test()(devices.replicate(mixed_state(), used))


@pytest.mark.thin(3)
@pytest.mark.parametrize("backend", devices.BACKENDS)
@pytest.mark.parametrize("batch_size", [8, 24, 1000])
def test_evaluation_does_not_depend_on_batch_and_devices(config, monkeypatch, batch_size, backend):
  result, _, gates = evaluated(
    config(**{"optim.batch_size": batch_size, "devices.backend": backend}), jax.devices()
  )
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  reference, _, behaviour = evaluated(config(**{"optim.batch_size": 7}), jax.devices()[:1])
  assert result["images"] == 360
  assert 0.01 < reference["accuracy"] < 0.5
  assert np.all(np.abs(behaviour.diagnosis.open_rates - 0.5) < 0.49)
  # Random weights make logits so small that they are lost in the noise.
  assert reference["random_dropout"] == 8
  assert reference["class_information"] > 0
  # From whole numbers, which no rounding changes.
  for name in ("class_accuracy", "classes_without_test", "confusion"):
    assert result.pop(name) == reference.pop(name), name
  assert result == pytest.approx(reference, rel=1e-5)
  for name in ("accuracy", "images", "macs", "macs_std", "mean_open", "random_dropout"):
    assert result[name] == reference[name], name
  for name in ("open_rates", "class_information", "outcomes"):
    np.testing.assert_array_equal(
      getattr(gates.diagnosis, name), getattr(behaviour.diagnosis, name), err_msg=name
    )
  np.testing.assert_allclose(gates.logits, behaviour.logits, rtol=1e-4, atol=1e-5)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def check_gates(result, train, workdir):
  """Checks the gates of a run with a budget, and its TensorBoard during training."""
  assert result["budget"] == 0.5
  assert train[-1]["mac_ratio"] < train[0]["mac_ratio"] < 1
  assert (
    result["macs_min"]
    <= result["macs_p10"]
    <= result["macs_p50"]
    <= result["macs_p90"]
    <= result["macs_max"]
  )
  assert result["macs"] == pytest.approx(
    np.mean([result[f"macs_of_quarter{i}"] for i in (1, 2, 3, 4)]), rel=1e-9
  )
  (layer,) = result["layers"]
  assert (layer["layer"], layer["gates"]) == ("stage1_block1/conv1", 8)
  assert (
    sum(result[name] for name in outcomes.OUTCOMES)
    == sum(layer[name] for name in outcomes.OUTCOMES)
    == 8
  )
  shown = {(tag, step): value for tag, value, step in (e for e in events(workdir) if len(e) == 3)}
  last = train[-1]
  assert last["gates/batch_shaping_floor"] == pytest.approx(1 / (6 * 129))
  # Summed over 8 gates.
  assert last["gates/batch_shaping_mean"] == pytest.approx(last["batch_shaping"] / 8, rel=1e-5)
  for tag in (
    "gates/batch_shaping_mean",
    "gates/batch_shaping_floor",
    "gate_rate/stage1_block1/conv1",
  ):
    assert shown[tag, last["step"]] == pytest.approx(last[tag])
  for split, line in (("train", last), ("test", result)):
    assert shown[f"{split}/mac_ratio", last["step"]] == pytest.approx(line["mac_ratio"])


@pytest.fixture(scope="module")
def ungated(config, tmp_path_factory):
  """`(config, directory, what it printed)` of a run without gates in bfloat16."""
  made = config(**LONG, **{"model.gating": "none", "model.dtype": "bfloat16"})
  workdir = tmp_path_factory.mktemp("ungated") / "run"
  return made, workdir, said(classification, made, workdir, "train")


def check_run(made, workdir, printed, total):
  """Checks files and output of a finished run; returns its result and its training lines."""
  result = json.loads((workdir / "result.json").read_text())
  assert result["step"] == total
  assert result["accuracy"] > 0.3
  train, test = (
    [line for line in lines(workdir) if line["split"] == split] for split in ("train", "test")
  )
  assert [line["step"] for line in train][-1] == total
  assert [line["step"] for line in test] == [28, 56, total]
  for name in ("accuracy", "cross_entropy", "macs", "mac_ratio", "images"):
    assert test[-1][name] == result[name]
  assert train[-1]["loss"] < train[0]["loss"]
  gated = made.model.gating != "none"
  for name in ("gates.png", "gates.csv"):
    assert (workdir / name).exists() == gated
  assert ("gates" in result) == ("budget" in result) == ("layers" in result) == gated
  assert f"{100 * result['accuracy']:.2f} %" in printed
  return result, train


def test_a_result_says_what_its_accuracy_is_worth(ungated):
  _, workdir, printed = ungated
  result = json.loads((workdir / "result.json").read_text())
  assert result["accuracy_low"] < result["accuracy"] < result["accuracy_high"]
  # Handwritten digits are even over ten classes.
  assert 0.1 <= result["majority_rate"] < 0.12
  confusion = np.array(result["confusion"])
  assert confusion.sum() == result["images"]
  assert np.trace(confusion) / confusion.sum() == pytest.approx(result["accuracy"])
  assert result["classes_without_training"] == result["classes_without_test"] == []
  assert len(result["class_accuracy"]) == 10
  for name in ("95 % interval", "majority rate", "class 0"):
    assert name in printed
  page = (workdir / "report.html").read_text()
  assert "Confusions of classes" in page
  assert "majority rate" in page


def test_only_known_predictions_are_scored_class_by_class():
  test = SimpleNamespace(class_names=("a", "b"))
  programme = classification.Classification(SimpleNamespace(test=test))

  def entries(labels, predicted):
    return programme.class_entries(
      SimpleNamespace(images=SimpleNamespace(labels=labels, predicted=predicted))
    )

  labels = np.array([0, 0, 1])
  assert entries(labels, np.array([0, 1, 1]))["confusion"] == [[1, 1], [0, 1]]
  assert entries(labels, None) == entries(None, labels) == {}


def check_modes(made, workdir, total):
  """A finished run is not repeated, and its evaluation prints the same accuracy."""
  result = json.loads((workdir / "result.json").read_text())
  assert "nothing was trained or changed" in said(classification, made, workdir, "train")
  printed = said(classification, made, workdir, "evaluate")
  assert f"checkpoint of step {total}" in printed
  assert re.search(rf"test accuracy +{100 * result['accuracy']:.2f} %", printed)


def test_a_gated_run_leaves_what_it_measured(finished):
  made, workdir, printed = finished
  result, train = check_run(made, workdir, printed, total=66)
  check_gates(result, train, workdir)


@pytest.mark.slow
def test_a_gated_run_of_four_steps_a_dispatch_leaves_what_it_measured(config, tmp_path):
  made = config(
    **LONG,
    **{
      "devices.steps_per_dispatch": 4,
      "devices.backend": "shard_map",
      "loss.sparsity.kind": "budget",
    },
  )
  printed = said(classification, made, tmp_path / "run", "train")
  result, train = check_run(made, tmp_path / "run", printed, total=68)
  check_gates(result, train, tmp_path / "run")


def test_a_finished_run_is_not_repeated_and_evaluates_to_its_result(finished):
  made, workdir, _ = finished
  check_modes(made, workdir, total=66)


@pytest.mark.slow
def test_an_ungated_run_in_bfloat16_leaves_what_it_measured(ungated):
  made, workdir, printed = ungated
  check_run(made, workdir, printed, total=66)
  check_modes(made, workdir, total=66)


def test_gates_are_added_to_the_net_of_an_ungated_run(
  config, ungated, capsys, monkeypatch, tmp_path
):
  made = config(**{"model.dtype": "bfloat16", "model.init_from": str(ungated[1])})
  start.check_start(made)
  built = classification.build(made)
  fresh = steps.init_state(built.model, built.optimiser, made.seed, built.test.shape)
  with monkeypatch.context() as patch:
    # The data of the run need not be there.
    patch.delattr(image_sets, "load")
    began = start.start_from(built, fresh)
  assert "starting from the parameters of step 66 in" in capsys.readouterr().out
  block, new = (state.params["stage1_block1"] for state in (began, fresh))
  assert not np.array_equal(block["conv1"]["conv"]["kernel"], new["conv1"]["conv"]["kernel"])
  np.testing.assert_array_equal(
    block["gate"]["head"]["logits"]["bias"], new["gate"]["head"]["logits"]["bias"]
  )
  wider = config(
    **{"model.dtype": "bfloat16", "model.init_from": str(ungated[1]), "model.width": 2.0}
  )
  with pytest.raises(ValueError, match="model.init_from must name a run .*with model.width=2.0"):
    classification.run(wider, ungated[1].parent / "wider", "train")
  earlier = shutil.copytree(ungated[1], tmp_path / "earlier")
  # A run of an earlier version keeps no outlines of its data.
  (earlier / "data.json").unlink()
  same = config(**{"model.dtype": "bfloat16", "model.init_from": str(earlier)})
  assert tiny.bit_equal(start.start_from(classification.build(same), fresh), began)


def test_where_a_step_may_hold_too_little_there_is_one_that_holds_all(config):
  settings = {"model.gating": "layer", "model.group_norm": True}
  assert classification.build(config(**settings)).full is None
  built = classification.build(config(**settings, **{"model.backward_share": 0.75}))
  assert built.full.backward_share == 1.0


@pytest.mark.slow
def test_a_run_cut_back_to_an_earlier_checkpoint_ends_with_the_same_parameters(
  finished, tmp_path, monkeypatch
):
  made, workdir, _ = finished
  copy = shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(copy / "checkpoints" / "66")
  (copy / "result.json").unlink()
  runs.without_reports(monkeypatch)
  assert "resuming from the checkpoint of step 55" in said(classification, made, copy, "train")
  assert tiny.bit_equal(jobs.saved_state(copy), jobs.saved_state(workdir))


def test_a_run_is_loaded_in_one_call(finished, tmp_path):
  made, workdir, _ = finished
  model, variables, read = loaded(workdir)
  pixels, labels = classification.build(made).test.read(np.arange(360))
  images = augment.normalise(pixels, read.data.mean, read.data.std)
  logits, records = jax.jit(model.apply)(variables, images)
  score = json.loads((workdir / "result.json").read_text())["accuracy"]
  assert np.mean(np.argmax(logits, axis=1) == labels) == pytest.approx(score, abs=2 / 360)
  assert records[0].gates.shape[0] == 360
  model.apply(
    variables, images[:2], train=True, mutable=["batch_stats"], rngs={"gate": jax.random.key(0)}
  )
  with pytest.raises(rundir.RunDirError, match="holds no run"):
    load_run(tmp_path)
  shutil.copy(workdir / "config.json", tmp_path)
  for content in (
    "{",
    '{"sets": []}',
    '{"sets": [{"examples": 1, "class_names": 3}]}',
    '{"sets": [{"examples": 1, "class_names": ["a"], "shape": [8, "8", 1]}]}',
  ):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(rundir.RunDirError, match=f"{tmp_path}/data.json is damaged"):
      load_run(tmp_path)
  (tmp_path / "data.json").unlink()  # as of an earlier version
  with pytest.raises(rundir.RunDirError, match="no checkpoint in .* yet"):
    load_run(tmp_path)


def test_histograms_are_drawn_whether_lines_name_layers_or_number_them():
  older = {"step": 2, "gates/layer00/probs": [1], "gates/layer01/open_rates": [2]}
  line = {
    "step": 2,
    "gates/stage1_block1/conv1/probs": [1],
    "gates/stage1_block2/conv1/open_rates": [2],
  }
  names = ["stage1_block1/conv1", "stage1_block2/conv1"]
  assert report._numbered(names, line) == report._numbered(names, older) == older


def test_damaged_lines_of_a_journal_have_no_place_on_the_page(finished, tmp_path):
  made, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  damaged = (
    {"acduracy": 0.5, "mac_ratio": 0.4},
    {"accuracy": "0.5", "mac_ratio": 0.4},
    {"accuracy": 0.5, "mac_ratio": None},
    {"gates/stage1_block1/conv1/probs": [1, 2]},
    {"gates/stage1_block1/conv1/probs": [[1], [1, 2]]},
  )
  for name in ("metrics.jsonl", "histograms.jsonl"):
    with (tmp_path / "run" / name).open("a") as file:
      for line in damaged:
        file.write(json.dumps({"step": 5, "split": "test", **line}) + "\n")
  said(classification, made, tmp_path / "run", "report")
  assert "Tests during training" in (tmp_path / "run" / "report.html").read_text()


def test_a_result_that_lacks_an_entry_is_named(finished, tmp_path):
  made, workdir, _ = finished
  shutil.copytree(workdir, tmp_path / "run")
  (tmp_path / "run" / "result.json").write_text('{"step": 66}')
  message = r"run/result\.json is damaged: .*KeyError: .*; without it, the same command ends"
  with pytest.raises(rundir.RunDirError, match=message):
    classification.run(made, tmp_path / "run", "train")


@pytest.fixture(scope="module")
def compiled(finished, tmp_path_factory):
  return runs.compiled(classification, finished, tmp_path_factory.mktemp("compiled"))


def test_a_run_is_compiled_and_the_fastest_program_chosen(compiled):
  found, printed = compiled
  assert found["step"] == 66
  rows = found["timings"]["3 images at a time"]
  assert {"masked", "switch"} <= {row["strategy"] for row in rows if row["part"] == 1}
  assert sum(row["chosen"] for row in rows if row["part"] is None) == 1
  assert all(f"{1e3 * row['seconds']:.2f}" in printed for row in rows)


def test_evaluation_of_a_run_without_a_checkpoint_is_refused(config, tmp_path):
  with rundir.open_run(tmp_path, config()):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(rundir.RunDirError, match="no checkpoint in .* yet"):
      classification.run(config(), tmp_path, "evaluate")
    assert sorted(tmp_path.rglob("*")) == before


def test_evaluation_of_no_run_is_refused(config, tmp_path):
  with pytest.raises(rundir.RunDirError, match="holds no run"):
    classification.run(config(), tmp_path / "run", "evaluate")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_diverging_run_stops_and_its_last_good_checkpoint_stays(config, tmp_path, capsys):
  made = config(**{"optim.schedule": "step", "optim.lr_drop_at": (0.5,), "optim.drop_factor": 1e30})
  with pytest.raises(NonFiniteError, match=r"^\w+ is (nan|inf) at step 1[23] \(not finite: "):
    classification.run(made, tmp_path / "run", "train")
  assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["11"]
  assert not (tmp_path / "run" / "result.json").exists()
  page = (tmp_path / "run" / "report.html").read_text()
  assert "This run failed and is not finished: " in page
  assert "step 11 of" in page
  capsys.readouterr()
  classification.run(made, tmp_path / "run", "evaluate")
  said = capsys.readouterr().out
  assert "checkpoint of step 11" in said
  assert "nan" not in said


@pytest.mark.slow
@pytest.mark.parametrize("gating", ["channel", "none"])
def test_a_report_is_that_of_the_training_wherever_the_run_stands(
  config, tmp_path, capsys, monkeypatch, gating
):
  wicked = tuple("<script>alert(1)</script>" if k == 3 else str(k) for k in range(10))
  load = image_sets.load
  monkeypatch.setattr(
    image_sets, "load", lambda *args: dataclasses.replace(load(*args), class_names=wicked)
  )
  made = config(**{"model.gating": gating, "eval_every": 1.0})
  classification.run(made, tmp_path / "run", "train")
  report = tmp_path / "run" / "report.html"
  written = report.read_text()
  assert "Result</h2>" in written
  assert "Easiest and hardest images</h2>" in written
  assert ("Gates over training</h2>" in written) == (gating == "channel")
  assert ("This network has no gates" in written) == (gating == "none")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert f"{100 * result['accuracy']:.2f} %" in written
  assert "<script" not in written
  assert (tmp_path / "run" / "histograms.jsonl").exists() == (gating == "channel")
  lasting = pages.lasting(report.parent)
  report.write_text("old")
  classification.run(made, tmp_path / "run", "report")
  assert f"report of the checkpoint of step 22: {report}" in capsys.readouterr().out
  assert pages.lasting(report.parent) == lasting
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "22")
  (tmp_path / "run" / "result.json").unlink()
  classification.run(made, tmp_path / "run", "report")
  assert "step 11 of 22" in report.read_text()
  assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("backend", devices.BACKENDS)
def test_layers_trained_with_the_backward_of_open_images_alone_are_the_same(
  config, tmp_path, monkeypatch, backend
):
  runs.without_reports(monkeypatch)

  def trained(share):
    folder = tmp_path / str(share)
    classification.run(
      config(
        **{
          "model.gating": "layer",
          "model.group_norm": True,
          "model.gate.initial_open": 0.5,
          "optim.epochs": 1,
          "model.backward_share": share,
          "optim.learning_rate": 0.02,
          "devices.backend": backend,
        }
      ),
      folder,
      "train",
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (train,) = [line for line in lines if line["split"] == "train"]
    return train

  full, skipped = trained(1.0), trained(0.75)
  assert 0 < skipped.pop("in_full") < 1  # both ways are gone
  assert skipped.keys() == full.keys()
  np.testing.assert_allclose(
    [skipped[name] for name in full if name != "split"],
    [full[name] for name in full if name != "split"],
    rtol=1e-4,
  )


@pytest.mark.slow
def test_a_net_whose_gates_begin_open_ends_at_its_budget(config, tmp_path, monkeypatch):
  """To 0.04 on 360 test images after 132 steps; to 0.02 on CIFAR-10, see docs/results/images.md."""
  runs.without_reports(monkeypatch)
  classification.run(
    config(
      **{
        "model.name": "resnet8",
        "model.width": 0.5,
        "model.gate.initial_open": 0.85,
        "optim.epochs": 12,
        "model.gate.noise_scale": 0.25,
        "optim.gate_lr_multiplier": 5.0,
        "loss.sparsity.kind": "budget",
        "loss.sparsity.target": 0.4,
        "loss.sparsity.coefficient": 50.0,
      }
    ),
    tmp_path / "run",
    "train",
  )
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["mac_ratio"] == pytest.approx(0.4, abs=0.04)
  assert result["accuracy"] > 0.7
