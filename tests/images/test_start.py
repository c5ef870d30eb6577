"""Trainings that start from files of weights, and freeze layers at first."""

import importlib
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from gating_jax import ResNet, save_pretrained
from gating_jax.images import build, classification, start
from gating_jax.layers.blocks import BasicBlock
from gating_jax.layers.gate import is_gate_path
from gating_jax.models import resnets
from gating_jax.models.pretrained import IMAGENET_MEAN
from gating_jax.models.resnets import NamedResNet
from gating_jax.training import rundir, steps

BLOCKS, FEATURES = (1, 1), 4


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
  assert "the classifier is fresh: the file's has the shapes 8 x 3, this one 8 x 10" in said
  assert "the gates" not in said
  for name, value in began.params["classifier"].items():
    np.testing.assert_array_equal(value, fresh.params["classifier"][name])
  np.testing.assert_array_equal(
    began.params["stem"]["conv"]["kernel"], variables["params"]["stem"]["conv"]["kernel"]
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
