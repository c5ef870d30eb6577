"""A run that is cut back to an earlier checkpoint ends as before, with either loader."""

import importlib
import json
import shutil

import pytest

from gating_jax.images import classification
from gating_jax.images.build import LOADERS
from gating_jax.models import resnets
from gating_jax.training import devices, steps, stopping
from gating_jax.training.checkpoints import Checkpoints
from tests.helpers import made_tfds, tiny, tiny_cli
from tests.helpers.runs import Stopping, said

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  train, test = made_tfds.images(40, SHAPE), made_tfds.images(21, SHAPE, seed=1)
  made_tfds.write(
    folder,
    list(zip(*train, strict=True)),
    list(zip(*test, strict=True)),
    shape=SHAPE,
    name="resume_set",
  )
  return folder


def final_state(config, workdir):
  built = classification.build(config)
  like = steps.init_state(built.model, built.optimiser, config.seed, built.test.shape)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()


def test_a_streamed_run_that_was_stopped_goes_on(data_dir, tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.setattr(classification.Classification, "write_report", lambda *_, **__: None)
  config = importlib.import_module("configs.tfds_resnet20").get_config("epochs=1,batch=16")
  config.update_from_flattened_dict(
    {
      "data.name": "resume_set",
      "data.data_dir": str(data_dir),
      "data.loader": "streaming",
      "model.name": "tiny",
      "model.gating": "none",
    }
  )
  with monkeypatch.context() as patch:
    patch.setattr(stopping, "StopRequest", lambda: Stopping(1))
    assert "stopped as asked" in said(classification, config, tmp_path, "train")
  assert "resuming from the checkpoint of step 1" in said(classification, config, tmp_path, "train")
  assert final_state(config, tmp_path)[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_goes_on_from_an_earlier_checkpoint_to_the_same_end(
  loader, data_dir, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  config = importlib.import_module("configs.tfds_resnet20").get_config("epochs=3,batch=16")
  config.update_from_flattened_dict(
    {
      "data.name": "resume_set",
      "data.data_dir": str(data_dir),
      "data.loader": loader,
      "data.flip": True,
      "model.name": "tiny",
    }
  )
  if loader == "streaming":
    config.data.crop_area = 0.5
  classification.run(config, tmp_path, "train")
  step, state = final_state(config, tmp_path)
  result = json.loads((tmp_path / "result.json").read_text())
  folder = tmp_path / "checkpoints"
  assert sorted(f.name for f in folder.iterdir()) == ["2", "4", "6"]
  for later in ("4", "6"):
    shutil.rmtree(folder / later)
  (tmp_path / "result.json").unlink()
  assert not tiny.bit_equal(final_state(config, tmp_path)[1].params, state.params)
  capsys.readouterr()
  classification.run(config, tmp_path, "train")
  assert "resuming from the checkpoint of step 2" in capsys.readouterr().out
  again, resumed = final_state(config, tmp_path)
  assert step == again == 6
  assert tiny.bit_equal(resumed, state)
  repeated = json.loads((tmp_path / "result.json").read_text())
  for one in (result, repeated):
    del one["seconds_since_last_start"]
  assert repeated == result
