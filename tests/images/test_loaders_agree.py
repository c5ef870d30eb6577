"""Short trainings on images from disk with both loaders.

Two programs are bit-equal if the compiler treats them alike, as it does with users' optimisations.
"""

import json

import pytest

from tests.helpers import jobs, made_tfds, tiny
from tests.helpers.commands import run_one_after_the_other


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
      "data.crop_padding": 4,
      "model.name": "tiny",
      "optim.epochs": 2,
      "optim.batch_size": 16,
      **changes,
    },
  )


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
  runs = {
    "resident": command(tmp_path / "resident", "loader_set", tmp_path, "resident"),
    "streamed": command(tmp_path / "streamed", "loader_set", tmp_path, "streaming"),
    "other": command(tmp_path / "other", "loader_set", tmp_path, "resident", seed=1),
  }
  run_one_after_the_other(runs.values(), devices=8, optimised=True)
  resident, streamed, _ = (json.loads((tmp_path / run / "result.json").read_text()) for run in runs)
  a, b, c = (jobs.saved_state(tmp_path / run)["params"] for run in runs)
  assert not tiny.bit_equal(a, c), "another seed trains another net"
  assert tiny.bit_equal(a, b)
  for result in (resident, streamed):
    del result["seconds_since_last_start"]
  # A stream has not read its labels.
  resident.pop("classes_without_training")
  assert resident == streamed
  assert (resident["images"], resident["step"]) == (21, 4)
