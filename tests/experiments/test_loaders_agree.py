"""One short training on images from disk, by both loaders: made ones, and real CIFAR-10 where it is prepared."""

import importlib
import os

import made_tfds
import pytest
import tiny

from gating_jax.experiments import classification
from gating_jax.layers.blocks import BasicBlock
from gating_jax.models import resnet
from gating_jax.training import devices, rundir, steps
from gating_jax.training.checkpoints import Checkpoints

REAL = os.environ.get("GATING_JAX_DATA_DIR")


@pytest.fixture(autouse=True)
def small_net(monkeypatch):
  monkeypatch.setitem(resnet.RESNETS, "small", ("cifar", BasicBlock, (1,), 4, "A"))


def short_config(name, data_dir, loader, **changes):
  config = importlib.import_module("configs.tfds_resnet20").get_config("epochs=2,batch=16")
  config.update_from_flattened_dict({
      "data.name": name, "data.data_dir": str(data_dir), "data.loader": loader, "data.flip": True,
      "model.name": "small", **changes})
  return config


def trained(config, workdir):
  """Runs a config and returns `(result, parameters)`."""
  classification.run(config, workdir, "train")
  experiment = classification.build(config)
  like = steps.init_state(experiment.model, experiment.optimiser, config.seed, experiment.test.shape)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  _, state = checkpoints.restore(like, devices.replicated_sharding())
  checkpoints.close()
  return rundir.existing_run(workdir, config).result(), state.params


def check_loaders_agree(name, data_dir, folder, **changes):
  resident, a = trained(short_config(name, data_dir, "resident", **changes), folder / "resident")
  streamed, b = trained(short_config(name, data_dir, "streaming", **changes), folder / "streamed")
  other, c = trained(short_config(name, data_dir, "resident", **changes, seed=1), folder / "other")
  assert not tiny.bit_equal(a, c), "another seed trains another net"
  assert tiny.bit_equal(a, b)
  for result in (resident, streamed):
    del result["seconds_since_last_start"]
  assert resident == streamed
  return resident


@pytest.mark.slow
def test_loaders_train_the_same_net_on_made_images(tmp_path):
  train, test = made_tfds.images(40, (8, 8, 3)), made_tfds.images(21, (8, 8, 3), seed=1)
  made_tfds.write(tmp_path, list(zip(*train, strict=True)), list(zip(*test, strict=True)), shape=(8, 8, 3),
                  name="loader_set")
  result = check_loaders_agree("loader_set", tmp_path, tmp_path)
  assert result["images"] == 21
  assert result["step"] == 4


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="GATING_JAX_DATA_DIR names no folder of prepared sets")
def test_loaders_train_the_same_net_on_cifar10(tmp_path):
  splits = {"data.train_split": "train[:64]", "data.test_split": "test[:50]", "data.pad": 4}
  result = check_loaders_agree("cifar10", REAL, tmp_path, **splits)
  assert result["images"] == 50
