"""Trainings that start from files of weights, and freeze layers at first."""

import dataclasses
import importlib
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from gating_jax import ResNet, load_pretrained, runner, save_pretrained
from gating_jax.data.image_sets import EqualShares, Images
from gating_jax.images import build, classification, start, teacher
from gating_jax.layers.blocks import BasicBlock
from gating_jax.layers.gate import is_gate_path
from gating_jax.models import resnets, vggs
from gating_jax.models.pretrained import IMAGENET_MEAN, read_network
from gating_jax.models.resnets import NamedResNet
from gating_jax.training import outlines, rundir, steps
from gating_jax.training.checkpoints import restore_newest
from gating_jax.training.outlines import Outline
from tests.helpers import tiny
from tests.helpers.runs import without_reports

BLOCKS, FEATURES = (1, 1), 4
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture
def config(monkeypatch):
  """`(**changes) -> config` of the quickstart, with a small net that torchvision could have."""
  small = NamedResNet("imagenet", BasicBlock, BLOCKS, FEATURES, "B")
  monkeypatch.setitem(resnets.RESNETS, "small_imagenet", small)

  def make(**changes):
    made = importlib.import_module("configs.digits_resnet20").get_config()
    made.update_from_flattened_dict({"model.name": "small_imagenet", "optim.epochs": 2})
    made.lock()
    made.update_from_flattened_dict(changes)
    return made

  return make


def weights(tmp_path, classes=10, features=FEATURES):
  """Writes random weights for grey images; returns the file and the variables."""
  model = ResNet(classes, BLOCKS, features=features, stem="imagenet", shortcut="B")
  shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda leaf: np.float32(rng.uniform(0.5, 1.5, leaf.shape)), shapes)
  return save_pretrained(variables, tmp_path / f"of_{classes}.safetensors"), variables


def fresh_state(built):
  return steps.init_state(built.model, built.optimiser, 0, built.test.shape)


def flat(tree):
  return traverse_util.flatten_dict(jax.device_get(tree))


def test_gates_are_added_to_the_network_of_a_file(config, tmp_path, capsys):
  file, variables = weights(tmp_path)
  built = classification.build(config(**{"model.init_from": str(file)}))
  start.check_can_start(built)
  assert capsys.readouterr().out == ""
  fresh = fresh_state(built)
  began = start.start_from(built, fresh)
  said = capsys.readouterr().out
  assert f"starting from the weights in {file}" in said
  assert "the gates are fresh" in said
  assert "the classifier is fresh" not in said
  # The quickstart normalises grey pixels in its own way.
  assert f"expect data.mean={IMAGENET_MEAN}" in said
  for collection in ("params", "batch_stats"):
    after, theirs = flat(getattr(began, collection)), flat(variables[collection])
    before = flat(getattr(fresh, collection))
    assert after.keys() == before.keys() > theirs.keys()
    for path, value in after.items():
      assert is_gate_path(path) == (path not in theirs)
      np.testing.assert_array_equal(value, theirs.get(path, before[path]))


def test_the_classifier_is_fresh_where_the_classes_differ(config, tmp_path, capsys):
  file, variables = weights(tmp_path, classes=3)
  built = classification.build(config(**{"model.init_from": str(file), "model.gating": "none"}))
  fresh = fresh_state(built)
  began = start.start_from(built, fresh)
  said = capsys.readouterr().out
  assert "the classifier is fresh: 8 x 10 here, the file has 8 x 3" in said
  assert "the gates" not in said
  for name, value in began.params["classifier"].items():
    np.testing.assert_array_equal(value, fresh.params["classifier"][name])
  np.testing.assert_array_equal(
    began.params["stem"]["conv"]["kernel"], variables["params"]["stem"]["conv"]["kernel"]
  )


def started(built):
  """The shapes of a state that starts from a file, with what is taken of it, and what is said."""
  shapes = jax.eval_shape(lambda: fresh_state(built))
  image = jax.ShapeDtypeStruct((1, *built.test.shape), np.float32)
  state, said = start._start_from_file(built, shapes, image)
  return state.params, "\n".join(said)


def test_a_file_without_a_classifier_is_started_from(config, tmp_path):
  whole, variables = weights(tmp_path)
  file = tmp_path / "backbone.npz"
  state = safetensors.numpy.load_file(whole)
  np.savez(file, **{name: v for name, v in state.items() if not name.startswith("fc.")})
  params, said = started(classification.build(config(**{"model.init_from": str(file)})))
  assert "the classifier is fresh: 8 x 10 here, the file has no such layer" in said
  assert params["classifier"]["kernel"].shape == (8, 10)
  kernel = variables["params"]["stem"]["conv"]["kernel"]
  np.testing.assert_array_equal(params["stem"]["conv"]["kernel"], kernel)


def test_dense_layers_of_a_file_are_taken_one_by_one(config, tmp_path, monkeypatch):
  monkeypatch.setitem(vggs.VGGS, "tiny_vgg", (4, vggs.POOL, 4, vggs.POOL))
  rng, state = np.random.default_rng(0), {}
  for place, channels in ((0, 1), (4, 4)):
    state[f"features.{place}.weight"] = rng.normal(size=(4, channels, 3, 3))
    for name in (f"{place}.bias", *(f"{place + 1}.{v}" for v in BATCH_NORM)):
      state[f"features.{name}"] = rng.uniform(0.5, 1.5, 4)
  for number, shape in {0: (6, 4), 3: (5, 6), 6: (3, 5)}.items():
    state[f"classifier.{number}.weight"] = rng.normal(size=shape)
    state[f"classifier.{number}.bias"] = rng.normal(size=shape[0])
  file = tmp_path / "vgg.npz"
  np.savez(file, **state)
  built = classification.build(config(**{"model.name": "tiny_vgg", "model.init_from": str(file)}))
  _, said = started(built)
  for line in (
    "the classifier is fresh: 4 x 10 here, the file has 5 x 3",
    "hidden1 of the file, 4 x 6, is dropped: model.name='tiny_vgg' has no such layer",
    "hidden2 of the file, 6 x 5, is dropped",
  ):
    assert line in said
  # A network with these layers takes them, and the one of other classes is fresh.
  params, said = started(dataclasses.replace(built, model=built.model.clone(hidden=(6, 5))))
  assert "the classifier is fresh: 5 x 10 here, the file has 5 x 3" in said
  assert "hidden" not in said
  theirs = np.float32(state["classifier.3.weight"].T)
  np.testing.assert_array_equal(params["hidden2"]["kernel"], theirs)


def test_weights_are_looked_at_before_the_data_are(config, tmp_path, monkeypatch):
  monkeypatch.setattr(classification, "build", lambda _: pytest.fail("data are opened"))
  (tmp_path / "text.npz").write_text("no weights")
  for name, error in (("none.npz", FileNotFoundError), ("text.npz", ValueError)):
    with pytest.raises(error, match=f"model.init_from.*{name}"):
      classification.run(
        config(**{"model.init_from": str(tmp_path / name)}), str(tmp_path / "run"), "train"
      )


def test_a_file_of_another_network_is_refused_before_a_run_begins(config, tmp_path):
  file, _ = weights(tmp_path, features=6)
  made = config(**{"model.init_from": str(file)})
  message = r"model.init_from must name weights of the same network; \S+ has shape \(.*\) here and"
  with pytest.raises(ValueError, match=message):
    classification.run(made, tmp_path / "run", "train")
  for name, error, text in (
    ("none.safetensors", FileNotFoundError, "there is none at"),
    ("resnet.pth", ValueError, "runs what is in it"),
  ):
    made = config(**{"model.init_from": str(tmp_path / name)})
    with pytest.raises(error, match=text):
      classification.run(made, tmp_path / "run", "train")
  # A folder is a run, whatever its name.
  (tmp_path / "run.bin").mkdir()
  with pytest.raises(
    rundir.RunDirError, match=r"init_from must name a run directory; \S+run\.bin has no"
  ):
    start.check_can_start(
      classification.build(config(**{"model.init_from": str(tmp_path / "run.bin")}))
    )
  assert not (tmp_path / "run").exists()


def test_a_file_is_read_once_for_checks_a_teacher_and_a_fresh_start(config, tmp_path, monkeypatch):
  file, _ = weights(tmp_path)
  read, begun = [], []

  def counted(path):
    read.append(path)
    return read_network(path)

  def begin(*arguments, **keywords):
    begun.append(start.start_from(*arguments, **keywords))
    return begun[-1]

  def stop(*_):
    raise InterruptedError

  monkeypatch.setattr(start, "read_network", counted)
  monkeypatch.setattr(teacher, "read_network", counted)
  monkeypatch.setattr(classification, "start_from", begin)
  monkeypatch.setattr(runner.Training, "begin", stop)
  made = config(**{"model.init_from": str(file), "loss.distillation.coefficient": 0.5})
  programme = classification._prepare(made, tmp_path / "run", "train")
  assert programme.teacher.source == str(file)
  assert programme.teacher.variables is programme.weights.variables
  (tmp_path / "run").mkdir()
  with pytest.raises(InterruptedError):
    programme.train(rundir.RunDir(tmp_path / "run"))
  assert len(begun) == len(read) == 1
  # The training does not hold them a second time.
  assert programme.weights is None
  # One that is made by hand loads its teacher when it is asked for it.
  by_hand = classification.Classification(programme.experiment)
  assert by_hand.teacher is by_hand.teacher
  assert len(read) == 2


@pytest.mark.parametrize(
  ("layers", "frozen"),
  [(None, ("stem", "stage1_block1", "stage2_block1")), (("stem", "stage1"), ("stem", "stage1_b"))],
)
def test_layers_are_frozen_for_the_first_epochs(config, layers, frozen):
  built = build.build(config(**{"optim.freeze_epochs": 0.1, "optim.frozen_layers": layers}))
  # 1437 images in batches of 128 are 11 steps.
  steps_of_epoch = 1437 // 128
  params = fresh_state(built).params
  grads = jax.tree.map(np.ones_like, params)
  update = jax.jit(built.optimiser.update)
  state = jax.jit(built.optimiser.init)(params)
  for step in range(3):
    updates, state = update(grads, state, params)
    for path, value in flat(updates).items():
      still = path[0].startswith(frozen) and not is_gate_path(path)
      assert (value != 0).any() != (still and step < round(0.1 * steps_of_epoch)), path


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"optim.freeze_epochs": -1.0}, "optim.freeze_epochs must be None or a finite number >= 0"),
    (
      {"optim.frozen_layers": ("stem",)},
      "optim.frozen_layers must be None where optim.freeze_epochs is None; got",
    ),
    (
      {"optim.freeze_epochs": 1.0, "optim.frozen_layers": ()},
      "optim.frozen_layers must be None or a tuple of names; got ()",
    ),
    (
      {"optim.freeze_epochs": 1.0, "optim.frozen_layers": ("stem", "layer1")},
      "each of optim.frozen_layers must be the beginning of one of classifier, stage1_block1, "
      "stage2_block1, stem; got 'layer1'",
    ),
  ],
)
def test_frozen_layers_that_are_not_there_are_named(config, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    build.build(config(**changes))


GATED = {
  "model.gate.threshold": "quantile",
  "model.gate.share": 0.5,
  "model.gate.noise_scale": 0.0,
  "model.gate.weighted": True,
  "loss.regulariser": "none",
}
PRIOR = {
  **GATED,
  "model.importance.form": "prior",
  "model.importance.images": 20,
  "loss.distillation.coefficient": 0.5,
}
UNGATED = {"model.gating": "none", "loss.regulariser": "none"}
COMPARED = {**UNGATED, "loss.distillation.coefficient": 0.5}
DIGITS = tuple("0123456789")


def test_the_network_of_a_file_is_named_where_the_config_names_another(config, tmp_path):
  file, _ = weights(tmp_path)
  made = config(**{"model.name": "resnet18", "model.init_from": str(file)})
  message = (
    r"of the network of model.name='resnet18', a ResNet with 2, 2, 2, 2 blocks of the kind "
    r"BasicBlock; those in \S+ are of a ResNet with 1, 1 blocks of the kind BasicBlock, which load_"
  )
  with pytest.raises(ValueError, match=message):
    start.read_weights(made)


def test_gates_begin_with_the_importance_of_a_file(config, tmp_path, capsys):
  file, _ = weights(tmp_path)
  changes = {"model.importance.gain": 0.5, "model.importance.static_layers": ("stage1",)}
  built = classification.build(config(**PRIOR, **changes, **{"model.init_from": str(file)}))
  began = start.start_from(built, fresh_state(built), built.open_train())
  assert "the importance of units is taken from 20 training images" in capsys.readouterr().out
  gates = {name: began.params[name]["gate"] for name in ("stage1_block1", "stage2_block1")}
  np.testing.assert_array_equal(gates["stage1_block1"]["gain"], 0)
  np.testing.assert_array_equal(gates["stage2_block1"]["gain"], 0.5)
  for name, gate in gates.items():
    assert len(set(np.asarray(gate["prior"]))) == gate["prior"].size
    # The threshold is that of the share: half of the gates are open.
    assert (gate["prior"] > began.batch_stats[name]["gate"]["threshold"]).mean() == 0.5
  # Static gates stay as they are.
  few = {name: {"gate": {"gain": np.ones(2)}, "conv1": np.ones(2)} for name in gates}
  updates, _ = jax.jit(built.optimiser.update)(few, built.optimiser.init(few), few)
  for path, value in flat(updates).items():
    assert (value != 0).any() != (path[0] == "stage1_block1" and is_gate_path(path)), path


def test_thresholds_begin_at_the_share_that_is_solved_for(config, monkeypatch):
  changes = {"model.gate.share": None, "model.inner_width": 4.0, "model.equal_inner_width": 2.0}
  made = config(**{**PRIOR, **changes, "model.init_from": "runs/dense"})
  data = Outline(512, DIGITS, (8, 8, 1))
  built = build.build(made, outlines=[data, data])
  begun = []

  def begin(variables, units, *, share, **others):
    begun.append(share)
    return variables

  monkeypatch.setattr(start.units, "unit_importance", lambda *given: [])
  monkeypatch.setattr(start.units, "with_prior", begin)
  start._with_prior(built, steps.TrainState(0, {}, {}, ()), None)
  # Of static gates, and of others.
  assert begun == [built.model.gate.share] * 2
  assert 0.3 < begun[0] < 0.5
  # A share that changes in training begins as at step 0, at most with all gates.
  for scheduled, share in ((lambda step: 0.75 - step, 0.75), (lambda step: 1.5, 1.0)):
    falling = dataclasses.replace(built, share=scheduled)
    start._with_prior(falling, steps.TrainState(0, {}, {}, ()), None)
    assert begun[-2:] == [share] * 2


def test_importance_is_of_sets_in_equal_shares(config):
  pixels = np.concatenate([np.zeros((4, 2, 2, 1)), np.ones((96, 2, 2, 1))]).astype(np.uint8)
  train = Images(pixels, np.zeros(100, np.int32), ("a",), EqualShares((4, 96), per_set=96))
  experiment = SimpleNamespace(config=config(**PRIOR), normalise=lambda pixels: pixels)
  assert start._read_images(experiment, train).mean() == 0.5
  # Of other sets, evenly.
  alone = dataclasses.replace(train, shares=None)
  assert start._read_images(experiment, alone).mean() == 0.95


def test_a_narrower_network_begins_as_the_pruned_one_of_a_file(config, tmp_path):
  file, _ = weights(tmp_path, classes=3)
  changes = {"model.init_from": str(file), "model.gating": "none", "model.inner_width": 0.5}
  made = config(**changes, **{"model.importance.form": "prune"})
  built = classification.build(made)
  start.check_can_start(built)
  began = start.start_from(built, fresh_state(built), built.open_train())
  _, theirs = load_pretrained(file)
  whole = theirs["params"]["stage1_block1"]["conv1"]["conv"]["kernel"]
  kept = np.asarray(began.params["stage1_block1"]["conv1"]["conv"]["kernel"])
  assert kept.shape[-1] == whole.shape[-1] // 2
  columns = {channel.tobytes() for channel in np.moveaxis(np.asarray(whole), -1, 0)}
  assert all(channel.tobytes() in columns for channel in np.moveaxis(kept, -1, 0))
  made.model.inner_width = 2.0
  with pytest.raises(ValueError, match="the narrower network must differ in units alone"):
    start.check_can_start(classification.build(made))


def test_a_teacher_of_other_classes_or_an_unfinished_run_is_refused(config, tmp_path):
  file, _ = weights(tmp_path, classes=3)
  made = config(**PRIOR, **{"model.init_from": str(file)})
  with pytest.raises(ValueError, match=r"must have the 10 classes of the data; .* shape \(3,\)"):
    teacher.load_teacher(classification.build(made))
  made.loss.distillation.teacher = str(tmp_path)
  with pytest.raises(rundir.RunDirError, match="teacher must name a finished run; .* holds none"):
    teacher.load_teacher(classification.build(made))


def test_a_teacher_must_take_the_images_of_the_data(config, tmp_path):
  file, _ = weights(tmp_path)
  made = config(**COMPARED, **{"loss.distillation.teacher": str(file), "model.width": 0.5})
  data = Outline(512, DIGITS, (8, 8, 3))
  made.data.mean = made.data.std = (0.5,) * 3
  message = r"teacher must take images of shape \(8, 8, 3\); \S+of_10.safetensors does not: "
  with pytest.raises(ValueError, match=f"^loss.distillation.{message}"):
    teacher.load_teacher(build.build(made, outlines=[data, data]))


@pytest.mark.parametrize(
  ("kept", "changes", "error", "message"),
  [
    ("segmentation_digits", {}, ValueError, "a run of classification; {} is of segmentation"),
    (
      "digits_resnet20",
      {"data.mean": (0.25,)},
      ValueError,
      r"a run with data.mean=\(0.5,\); that of {} has \(0.25,\)",
    ),
    ("digits_resnet20", {}, rundir.RunDirError, "a run with a checkpoint; got {}"),
  ],
)
def test_a_run_that_cannot_teach_is_named(config, tmp_path, kept, changes, error, message):
  data, folder = Outline(512, DIGITS, (8, 8, 1)), tmp_path / "run"
  made = config(**COMPARED, **{"loss.distillation.teacher": str(folder), "data.mean": (0.5,)})
  theirs = importlib.import_module(f"configs.{kept}").get_config()
  theirs.update_from_flattened_dict({"data.mean": (0.5,), "data.std": made.data.std, **changes})
  folder.mkdir()
  (folder / "config.json").write_text(theirs.to_json())
  (folder / "result.json").write_text("{}")
  outlines.write_outlines(folder, [data, data])
  with pytest.raises(
    error, match=f"^loss.distillation.teacher must name {message.format(folder)}$"
  ):
    teacher.load_teacher(build.build(made, outlines=[data, data]))


def test_a_pruned_network_is_no_wider_than_the_run_that_it_starts_from(config, tmp_path):
  changes = {**UNGATED, "model.init_from": str(tmp_path), "model.importance.form": "prune"}
  made = config(**changes, **{"model.inner_width": 0.75})
  (tmp_path / "config.json").write_text(config(**UNGATED).to_json())
  assert start.check_start(made).model.inner_width == 1.0
  (tmp_path / "config.json").write_text(config(**UNGATED, **{"model.inner_width": 0.5}).to_json())
  message = (
    "model.inner_width must be at most that of the run that model.init_from names, 0.5, where "
    "model.importance.form is 'prune'; got 0.75"
  )
  with pytest.raises(ValueError, match=f"^{message}$"):
    start.check_start(made)


def test_a_run_without_a_checkpoint_starts_nothing(config, tmp_path):
  data = [Outline(512, DIGITS, (8, 8, 1))] * 2
  outlines.write_outlines(tmp_path, data)
  (tmp_path / "config.json").write_text(config(**UNGATED).to_json())
  built = build.build(config(**UNGATED, **{"model.init_from": str(tmp_path)}), outlines=data)
  message = "model.init_from must name a run with a checkpoint; .* has none"
  with pytest.raises(rundir.RunDirError, match=message):
    start.start_from(built, None)


def test_a_run_that_has_begun_does_without_the_file_of_its_start(config, tmp_path, monkeypatch):
  made = config(**{"model.init_from": str(tmp_path / "gone.npz")})
  called = []
  monkeypatch.setattr(classification, "build", lambda made: SimpleNamespace(config=made))
  monkeypatch.setattr(classification, "load_teacher", lambda *_, **__: None)
  monkeypatch.setattr(runner, "run", lambda programme, workdir, mode: called.append(mode))
  with rundir.open_run(tmp_path / "run", made) as run_dir, pytest.raises(FileNotFoundError):
    classification.run(made, run_dir.path, "train")
  (run_dir.checkpoints / "1").mkdir(parents=True)
  classification.run(made, run_dir.path, "train")
  assert called == ["train"]


@pytest.mark.parametrize(
  ("changes", "names", "shape", "message"),
  [
    ({}, DIGITS[::-1], (8, 8, 1), "with the classes of the data, in their order; class 0 of the "),
    ({}, DIGITS[:9], (8, 8, 1), r"class 9 of the data is '9', and that of \S+ is None"),
    ({}, DIGITS, (16, 16, 1), r"on images of shape \(8, 8, 1\); .* have shape \(16, 16, 1\)"),
    (
      {"data.name": "union(digits)", "loss.scope": "source"},
      DIGITS,
      (8, 8, 1),
      "whose classes all compete; that of .* has loss.scope='source'",
    ),
  ],
)
def test_a_run_on_other_data_is_no_teacher(config, tmp_path, changes, names, shape, message):
  made = config(**{**COMPARED, "loss.distillation.teacher": str(tmp_path)})
  mine, theirs = (Outline(512, of, size) for of, size in ((DIGITS, (8, 8, 1)), (names, shape)))
  kept = config(**{**UNGATED, **changes})
  (tmp_path / "config.json").write_text(kept.to_json())
  (tmp_path / "result.json").write_text("{}")
  outlines.write_outlines(tmp_path, [theirs, theirs])
  with pytest.raises(ValueError, match=f"^loss.distillation.teacher must name a run .*{message}"):
    teacher.load_teacher(build.build(made, outlines=[mine, mine]))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.importance.gain": 1.0}, "model.importance.gain must be None where model.importance."),
    ({"model.importance.form": "prior"}, "model.init_from must be set where model.importance.form"),
    ({"model.importance.form": "all"}, "model.importance.form must be one of prior, prune; got"),
    (
      {"model.importance.form": "prune", "model.init_from": "runs/dense"},
      "model.gating must be 'none' where model.importance.form is 'prune'; got 'channel'",
    ),
    (
      {**PRIOR, "model.init_from": "runs/dense", "model.importance.scale": 0.0},
      "model.importance.scale must be None, or with the form 'prior' a finite number > 0; got 0.0",
    ),
    (
      {**PRIOR, "model.init_from": "runs/dense", "model.importance.images": 0},
      "model.importance.images must be None or >= 1; got 0",
    ),
    (
      {**PRIOR, "model.init_from": "runs/dense", "model.importance.static_layers": ()},
      "static_layers must be None, or with the form 'prior' a tuple of names; got ()",
    ),
    (
      {**PRIOR, "model.init_from": "runs/dense", "model.importance.static_layers": ("stem", "x")},
      "each of model.importance.static_layers must be the beginning of one of classifier, stage1_",
    ),
    (
      {"loss.distillation.temperature": 2.0},
      "loss.distillation.temperature must be None without loss.distillation.coefficient; got 2.0",
    ),
    (
      {"loss.distillation.coefficient": 0.5, "loss.distillation.temperature": 0.0},
      "loss.distillation.temperature must be None or a finite number > 0; got 0.0",
    ),
    (
      {"loss.distillation.coefficient": 0.5},
      "loss.distillation.teacher must name a run or a file of weights where model.init_from is",
    ),
    (
      {"loss.distillation.coefficient": 2.0},
      "loss.distillation.coefficient must be None or in [0, 1]; got 2.0",
    ),
    (
      {
        "loss.distillation.coefficient": 0.5,
        "loss.distillation.teacher": "runs/dense",
        "model.gating": "exits",
        "loss.regulariser": "none",
      },
      "loss.distillation.coefficient must be None except for classifiers without exits; got 0.5",
    ),
  ],
)
def test_settings_of_importance_and_teachers_without_effect_are_named(config, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    build.build(config(**changes))


@pytest.mark.slow
def test_a_run_with_a_teacher_resumes_bit_for_bit(config, tmp_path, monkeypatch):
  without_reports(monkeypatch)
  dense = config(**{"model.gating": "none", "loss.regulariser": "none", "optim.epochs": 1})
  classification.run(dense, tmp_path / "dense", "train")
  made = config(**PRIOR, **{"model.init_from": str(tmp_path / "dense")})
  classification.run(made, tmp_path / "gated", "train")
  result = json.loads((tmp_path / "gated" / "result.json").read_text())
  theirs = json.loads((tmp_path / "dense" / "result.json").read_text())
  assert result["teacher_macs"] == theirs["macs"]
  assert result["teacher_accuracy"] == theirs["accuracy"]
  assert result["teacher_mac_ratio"] == pytest.approx(result["macs"] / theirs["macs"])
  built = classification.build(made)
  end = restore_newest(rundir.RunDir(tmp_path / "gated").checkpoints, fresh_state(built))
  # Cut back to the end of the first epoch.
  newest = max((tmp_path / "gated" / "checkpoints").iterdir(), key=lambda path: int(path.name))
  shutil.rmtree(newest)
  (tmp_path / "gated" / "result.json").unlink()
  classification.run(made, tmp_path / "gated", "train")
  again = restore_newest(rundir.RunDir(tmp_path / "gated").checkpoints, fresh_state(built))
  assert end[0] == again[0] == 22
  assert tiny.bit_equal(again[1], end[1])
  static = config(
    **{
      "model.gating": "none",
      "loss.regulariser": "none",
      "model.inner_width": 0.5,
      "model.importance.form": "prune",
      "loss.distillation.coefficient": 0.5,
      "loss.distillation.teacher": str(tmp_path / "gated"),
      "model.init_from": str(tmp_path / "dense"),
      "optim.epochs": 1,
    }
  )
  classification.run(static, tmp_path / "static", "train")
  pruned = json.loads((tmp_path / "static" / "result.json").read_text())
  # Any finished run may teach: here the gated one.
  assert pruned["teacher_mac_ratio"] == pruned["macs"] / result["macs"] < 1
