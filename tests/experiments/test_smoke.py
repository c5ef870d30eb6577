import importlib

import jax
import ml_collections
import pytest

from gating_jax import config_files
from gating_jax.experiments import smoke
from gating_jax.training.rundir import flatten

BUILT = {"digits_resnet20", "segmentation_digits", "split_digits", "composed_timegate"}


def config_of(name):
  return importlib.import_module(f"configs.{name}").get_config().lock()


@pytest.mark.parametrize("name", sorted(config_files.packaged()))
def test_every_config_becomes_small_and_keeps_its_fields_and_model(name):
  given, small = (flatten(each) for each in (config_of(name), smoke.shrink(config_of(name))))
  assert small.keys() == given.keys()
  assert given == flatten(config_of(name))
  changed = {field for field in given if given[field] != small[field]}
  assert {field.split(".")[0] for field in changed} <= {
      "data", "tasks", "router", "generator", "ewc", "online_ewc", "replay", "optim", "pretrain", "gates", "log_every",
      "eval_every", "devices"}
  assert small["optim.epochs"] == 1
  assert small["optim.batch_size"] <= max(16, jax.device_count())
  assert small["optim.batch_size"] % jax.device_count() == 0
  assert smoke.shrink(smoke.shrink(config_of(name))) == smoke.shrink(config_of(name))
  if "data.train_split" in given and "data.layout" not in given and name not in BUILT:
    assert small["data.train_split"].startswith(f"{given['data.train_split']}[:")


def test_a_split_that_is_more_than_a_name_stays():
  config = ml_collections.ConfigDict({"data": {"name": "cifar10", "train_split": "train[:80%]", "test_split": "test"}})
  assert smoke.shrink(config).data.to_dict() == {
      "name": "cifar10", "train_split": "train[:80%]", "test_split": "test[:32]"}


def test_nets_that_another_run_has_trained_are_taken_as_they_are():
  config = config_of("composed_timegate")
  config.pretrained = "runs/other"
  small = smoke.shrink(config)
  assert small.pretrain == config.pretrain
  assert small.optim.epochs == 1
