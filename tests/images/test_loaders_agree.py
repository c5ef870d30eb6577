"""Short trainings on images from disk with both loaders: made ones, and CIFAR-10 if prepared.

Two programs are bit-equal if the compiler treats them alike, as it does with users' optimisations.
"""

import json
import os

import pytest

from tests.helpers import jobs, made_tfds, tiny
from tests.helpers.commands import run_one_after_the_other

REAL = os.environ.get("GATING_JAX_DATA_DIR")


def command(workdir, name, data_dir, loader, **changes):
  """Returns the arguments of a training of a tiny net."""
  return jobs.arguments(
    workdir,
    "tfds_resnet20",
    **{
      "data.name": name,
      "data.data_dir": data_dir,
      "data.loader": loader,
      "data.flip": True,
      "model.name": "tiny",
      "optim.epochs": 2,
      "optim.batch_size": 16,
      **changes,
    },
  )


def check_loaders_agree(folder, name, data_dir, **changes):
  runs = {
    "resident": command(folder / "resident", name, data_dir, "resident", **changes),
    "streamed": command(folder / "streamed", name, data_dir, "streaming", **changes),
    "other": command(folder / "other", name, data_dir, "resident", **changes, seed=1),
  }
  run_one_after_the_other(runs.values(), devices=8, optimised=True)
  resident, streamed, _ = (json.loads((folder / run / "result.json").read_text()) for run in runs)
  a, b, c = (jobs.saved_state(folder / run)["params"] for run in runs)
  assert not tiny.bit_equal(a, c), "another seed trains another net"
  assert tiny.bit_equal(a, b)
  for result in (resident, streamed):
    del result["seconds_since_last_start"]
  assert resident == streamed
  return resident


@pytest.mark.slow
def test_loaders_train_the_same_net_on_made_images(tmp_path):
  train, test = made_tfds.images(40, (8, 8, 3)), made_tfds.images(21, (8, 8, 3), seed=1)
  made_tfds.write(
    tmp_path,
    list(zip(*train, strict=True)),
    list(zip(*test, strict=True)),
    shape=(8, 8, 3),
    name="loader_set",
  )
  result = check_loaders_agree(tmp_path, "loader_set", tmp_path)
  assert result["images"] == 21
  assert result["step"] == 4


@pytest.mark.real_data
@pytest.mark.skipif(not REAL, reason="GATING_JAX_DATA_DIR names no folder of prepared sets")
def test_loaders_train_the_same_net_on_cifar10(tmp_path):
  splits = {
    "data.train_split": "train[:64]",
    "data.test_split": "test[:50]",
    "data.crop_padding": 4,
  }
  result = check_loaders_agree(tmp_path, "cifar10", REAL, **splits)
  assert result["images"] == 50
