"""Trainings on a folder of images with everything that people have in theirs."""

import importlib
import json
import logging

import numpy as np
import pytest
from PIL import Image

from gating_jax.continual import run as continual
from gating_jax.data import folders
from gating_jax.images import classification
from gating_jax.models import resnets, vggs
from tests.helpers import runs, tiny_cli

CLASSES = ("a b", "it's", "two\nlines", "ümlaut")
# Mode of the picture, and ending of its file.
KINDS = (
  ("RGB", ".jpg"),
  ("L", ".jpg"),
  ("CMYK", ".jpeg"),
  ("RGB", ".PNG"),
  ("P", ".png"),
  ("LA", ".png"),
  ("RGBA", ".png"),
  ("1", ".png"),
  ("I;16", ".png"),
  ("RGB", ".webp"),
  ("RGB", ".bmp"),
  ("P", ".gif"),
)


def write_pictures(folder, *, each):
  """Writes pictures of every kind and of many sizes: each class has a grey of its own."""
  rng = np.random.default_rng(0)
  for number, name in enumerate(CLASSES):
    (folder / name).mkdir(parents=True)
    for i in range(each):
      mode, suffix = KINDS[i % len(KINDS)]
      height, width = rng.integers(5, 30, 2)
      grey = np.clip(rng.normal(60 * number, 10, (height, width)), 0, 255).astype(np.uint8)
      if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
      else:
        picture = Image.fromarray(grey).convert(mode)
      picture.save(folder / name / f'{i} "{name}" %s{suffix}')


def spoil(folder, count):
  """Cuts off every fifth file of a folder, `count` in all; returns their names."""
  names = []
  for file in sorted(file for file in folder.rglob("*") if file.is_file())[::5][:count]:
    file.write_bytes(file.read_bytes()[:20])
    names.append(file.name)
  return names


@pytest.fixture
def folder(tmp_path):
  """A folder of 100 images, ten of them damaged, without splits."""
  folders._list_images.cache_clear()
  write_pictures(tmp_path / "my images", each=25)
  assert len(spoil(tmp_path / "my images", 10)) == 10
  (tmp_path / "my images" / CLASSES[0] / "notes.txt").write_text("")
  yield tmp_path / "my images"
  folders._list_images.cache_clear()


def config_of(name, folder, **changes):
  """Returns a config for the folder."""
  config = importlib.import_module(f"configs.{name}").get_config()
  given = {"data.name": "folder", "data.data_dir": str(folder), "data.image_size": 8}
  config.update_from_flattened_dict({**given, "model.name": "tiny", "optim.epochs": 1, **changes})
  return config.lock()


@pytest.mark.slow
def test_a_folder_of_odd_images_trains_and_reports(folder, tmp_path, monkeypatch, caplog):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  config = config_of("digits_resnet20", folder, **{"optim.batch_size": 16})
  with caplog.at_level(logging.WARNING):
    classification.run(config, tmp_path / "run", "train")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert result["classes"] == list(CLASSES)
  counts = [len(folders.open_folder(str(folder), split)) for split in ("train", "test")]
  assert (sum(counts), result["images"]) == (90, counts[1])
  assert "10 of 100 images cannot be read and are left out" in caplog.text
  assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
def test_tasks_are_made_of_the_classes_of_a_folder(folder, tmp_path, monkeypatch):
  monkeypatch.setitem(vggs.VGGS, "tiny", (8, vggs.POOL, 8))
  runs.without_reports(monkeypatch)
  changes = {"method": "fine_tuning", "tasks.count": 2, "optim.batch_size": 16}
  config = config_of("split_digits", folder, **changes)
  continual.run(config, tmp_path / "run", "train")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  first, second = result["task_aware"]["accuracies"][1]
  assert 0 <= first <= 1
  assert 0 <= second <= 1
