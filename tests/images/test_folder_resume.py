"""Trainings on folders that are stopped, and on a union with a folder.

A stopped training leaves no process of its workers, and ends as one that nothing has stopped.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import digits_resnet20, union
from gating_jax.data import folders
from gating_jax.images import build, classification
from gating_jax.models import resnets
from gating_jax.training import devices, steps, stopping
from gating_jax.training.checkpoints import Checkpoints
from tests.helpers import environment, runs, tiny, tiny_cli
from tests.helpers.jobs import arguments

CLASSES = ("dark", "light")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of 40 training and 12 test images of many sizes."""
  root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
  for split, count in (("train", 40), ("test", 12)):
    for i in range(count):
      pixels = rng.integers(0, 100, (*rng.integers(8, 20, 2), 3)) + 100 * (i % 2)
      file = root / split / CLASSES[i % 2] / f"{i}.png"
      file.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(pixels.astype(np.uint8)).save(file)
  return root


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  runs.without_reports(monkeypatch)
  folders._list_images.cache_clear()
  yield
  folders._list_images.cache_clear()


def settings_of(folder, **changes):
  """Returns the settings of a training of three epochs of two steps."""
  given = {"data.name": "folder", "data.data_dir": str(folder), "data.image_size": 8}
  return {**given, "model.name": "tiny", "optim.batch_size": 16, "optim.epochs": 3, **changes}


def config_of(folder, **changes):
  config = digits_resnet20.get_config()
  config.update_from_flattened_dict(settings_of(folder, **{"data.mean": (0.5,), **changes}))
  return config.lock()


def final_state(config, workdir):
  """Returns the step and the state of the newest checkpoint."""
  built = build.build(config)
  like = steps.init_state(built.model, built.optimiser, config.seed, built.test.shape)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  try:
    return checkpoints.restore(like, devices.replicated_sharding())
  finally:
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("loader", build.LOADERS)
def test_a_run_on_a_folder_that_is_stopped_ends_as_one_that_is_not(
  folder, tmp_path, monkeypatch, loader
):
  changes = {"data.loader": loader, "data.flip": True}
  if loader == "streaming":
    changes |= {"data.crop_area": 0.5}
  whole = config_of(folder, **changes)
  classification.run(whole, tmp_path / "whole", "train")
  with monkeypatch.context() as patch:
    patch.setattr(stopping, "StopRequest", lambda: runs.Stopping(3))
    assert "stopped as asked" in runs.said(classification, whole, tmp_path / "cut", "train")
  # Another number of workers changes nothing.
  resumed = config_of(folder, **changes, **{"data.workers": 1})
  said = runs.said(classification, resumed, tmp_path / "cut", "train")
  assert "resuming from the checkpoint of step 3" in said
  ends = [final_state(whole, tmp_path / name) for name in ("whole", "cut")]
  assert ends[0][0] == ends[1][0] == 6
  assert tiny.bit_equal(ends[0][1], ends[1][1])
  results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "cut")]
  for result in results:
    del result["seconds_since_last_start"]
  assert results[0] == results[1]
  assert (results[0]["classes"], results[0]["images"]) == (list(CLASSES), 12)


@pytest.mark.slow
def test_a_run_on_a_union_with_a_folder_says_what_became_of_it(folder, tmp_path):
  config = union.get_config("images=32,batch=16,epochs=1")
  name = f"union(digits,folder:{folder})"
  config.update_from_flattened_dict(
    {"data.name": name, "model.name": "tiny", "model.width": 0.5, "data.image_size": 8}
  )
  classification.run(config.lock(), tmp_path / "run", "train")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert list(result["sets"]) == ["digits", folder.name]
  assert result["classes"][10:] == [f"{folder.name}/{of_class}" for of_class in CLASSES]
  assert (result["images"], result["unreadable_files"]) == (360 + 12, 0)


def processes_of(mark):
  """Returns the processes that have this text in their environment, by number."""
  found = []
  for place in Path("/proc").iterdir():
    if place.name.isdigit():
      try:
        if mark.encode() in (place / "environ").read_bytes():
          found.append(int(place.name))
      # It has just ended, or is another user's.
      except OSError:
        continue
  return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no list of processes")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_stopped_training_leaves_no_worker(folder, tmp_path, ctrl_c, number, status):
  mark, workdir = f"mark-{uuid.uuid4()}", tmp_path / "run"
  changes = {"data.loader": "streaming", "data.workers": 2, "optim.epochs": 4000}
  given = arguments(workdir, **settings_of(folder, **changes))
  with workdir.with_suffix(".out").open("w") as out:
    process = subprocess.Popen(
      [sys.executable, tiny_cli.__file__, *given, "--mode=train"],
      env=environment(1, MARK=mark),
      stdout=out,
      stderr=subprocess.STDOUT,
      # A process group of its own, to which a terminal sends Ctrl-C.
      start_new_session=True,
    )
  try:
    until = time.monotonic() + 200
    while not any((workdir / "checkpoints").glob("[0-9]*")):
      assert process.poll() is None, workdir.with_suffix(".out").read_text()
      assert time.monotonic() < until
      time.sleep(0.05)
    # The command, its two workers and what keeps account of them.
    assert len(processes_of(mark)) >= 3
    os.killpg(process.pid, number)
    assert process.wait(60) == status, workdir.with_suffix(".out").read_text()
    until = time.monotonic() + 10
    while processes_of(mark) and time.monotonic() < until:
      time.sleep(0.05)
    assert processes_of(mark) == []
    said = workdir.with_suffix(".out").read_text()
    assert "stopped as asked; a checkpoint is saved" in said
    assert "Traceback" not in said
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
