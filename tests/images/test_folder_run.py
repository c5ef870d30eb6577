"""Trainings on a folder of images with everything that people have in theirs."""

import csv
import importlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gating_jax.continual import build
from gating_jax.continual import run as continual
from gating_jax.data import folders
from gating_jax.images import build as images
from gating_jax.images import classification
from gating_jax.models import resnets, vggs
from gating_jax.reports import tables
from tests.helpers import runs, tiny_cli

CLASSES = ('a "b"', "it's", "two\nlines", "ümlaut 日本")
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
  ("RGBA", ".webp"),
  ("RGB", ".bmp"),
  ("P", ".gif"),
  ("frames", ".gif"),
  ("turned", ".jpg"),
)
CLOSED = "may not be read (permission denied)"


def write_picture(file, mode, grey):
  """Writes a picture of this mode, `[H, W]` uint8."""
  picture, settings = Image.fromarray(grey), {}
  if mode == "I;16":
    picture = Image.fromarray(grey.astype(np.uint16) * 257)
  elif mode == "frames":
    settings = {"save_all": True, "append_images": [Image.new("L", picture.size, 255)] * 2}
  elif mode == "turned":
    # Its first row is on the right of the upright picture.
    exif = Image.Exif()
    exif[0x0112] = 6
    picture, settings = Image.fromarray(np.rot90(grey)), {"exif": exif}
  else:
    picture = picture.convert(mode)
  picture.save(file, **settings)


def write_pictures(folder, *, each):
  """Writes pictures of every kind and of many sizes: each class has a grey of its own.

  The upper half of a picture is darker than the lower one.
  """
  rng = np.random.default_rng(0)
  for number, name in enumerate(CLASSES):
    (folder / name).mkdir(parents=True)
    for i in range(each):
      mode, suffix = KINDS[i % len(KINDS)]
      grey = np.full(rng.integers(6, 30, 2), 60 * number + 20, np.uint8)
      grey[: len(grey) // 2] -= 20
      write_picture(folder / name / f'{i} "{name}" %s{suffix}', mode, grey)


def spoil(folder):
  """Spoils ten files of a folder; returns the reason why each cannot be read, by its path."""
  files = sorted(file for file in folder.rglob("*") if file.is_file())[::8][:10]
  for file in files[:3]:
    file.write_bytes(file.read_bytes()[:20])
  for file in files[3:6]:
    file.write_bytes(b"")
  for file in files[6:8]:
    file.write_bytes(file.read_bytes()[:40])
  files[8].write_text("no picture")
  files[9].chmod(0)
  reasons = ["is truncated"] * 3 + ["is empty"] * 3 + ["is truncated"] * 2
  reasons += ["is no image of a known format", CLOSED]
  return {str(file): reason for file, reason in zip(files, reasons, strict=True)}


@pytest.fixture
def odd(tmp_path, monkeypatch):
  """A folder of 100 images without splits, and what is wrong with ten of them, by path."""
  folders._list_images.cache_clear()
  folder = tmp_path / "my images"
  write_pictures(folder, each=25)
  reasons = spoil(folder)
  assert len(reasons) == 10
  (folder / CLASSES[0] / "notes.txt").write_text("")
  (folder / CLASSES[0] / ".hidden.png").write_bytes(b"")
  (folder / CLASSES[1] / ".thumbnails").mkdir()
  (folder / CLASSES[1] / ".thumbnails" / "0.png").write_bytes(b"")
  read = Path.read_bytes

  def read_open(file):
    """Reads a file; refuses what is closed even to a root, who may read everything."""
    if reasons.get(str(file)) == CLOSED:
      raise PermissionError(13, "Permission denied", str(file))
    return read(file)

  monkeypatch.setattr(Path, "read_bytes", read_open)
  yield folder, reasons
  folders._list_images.cache_clear()


def test_a_folder_of_odd_images_is_read(odd, caplog):
  folder, reasons = odd
  with caplog.at_level(logging.WARNING):
    parts = [folders.open_folder(str(folder), split) for split in ("train", "test")]
  assert sum(map(len, parts)) == 90
  for part in parts:
    assert part.class_names == CLASSES
    assert part.unreadable.keys() == reasons.keys()
    for name, reason in part.unreadable.items():
      assert reason.startswith(reasons[name])
    for file, example in zip(part._files, part, strict=True):
      pixels, number = example["image"], example["label"]
      assert (pixels.dtype, pixels.shape[-1]) == (np.uint8, 3)
      height = len(pixels)
      halves = [60 * number] * (height // 2) + [60 * number + 20] * (height - height // 2)
      mode, _ = KINDS[int(file.name.split()[0]) % len(KINDS)]
      # Dots of black and white are right on average alone.
      if mode == "1":
        assert set(np.unique(pixels)) <= {0, 255}
      else:
        # At the edge of the halves JPEG blurs.
        rows = np.abs(np.arange(height) - height // 2 + 0.5) > 8 * file.suffix.startswith(".j")
        expected = np.broadcast_to(np.array(halves)[:, None, None], pixels.shape)
        np.testing.assert_allclose(pixels[rows], expected[rows], atol=4)
  assert "10 of 100 images cannot be read and are left out" in caplog.text
  assert "left out hidden files and other endings: 1 of .txt, 2 of hidden" in caplog.text


def read_rows(file):
  """Returns the rows of a table by the names of its columns."""
  with file.open(newline="", encoding="utf-8") as lines:
    return list(csv.DictReader(lines))


def config_of(name, folder, **changes):
  """Returns a config for the folder."""
  config = importlib.import_module(f"configs.{name}").get_config()
  given = {"data.name": "folder", "data.data_dir": str(folder), "data.image_size": 8}
  config.update_from_flattened_dict({**given, "model.name": "tiny", "optim.epochs": 1, **changes})
  return config.lock()


@pytest.mark.slow
def test_a_folder_of_odd_images_trains_and_reports(odd, tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  folder, reasons = odd
  config = config_of("digits_resnet20", folder, **{"optim.batch_size": 16})
  classification.run(config, tmp_path / "run", "train")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert (result["classes"], result["unreadable_files"]) == (list(CLASSES), 10)
  counts = [len(folders.open_folder(str(folder), split)) for split in ("train", "test")]
  assert (sum(counts), result["images"]) == (90, counts[1])
  rows = read_rows(tmp_path / "run" / "unreadable_files.csv")
  assert [row["path"] for row in rows] == sorted(reasons)
  predicted = read_rows(tmp_path / "run" / "predictions.csv")
  assert len(predicted) == counts[1]
  for row in predicted:
    assert (folder / row["image"]).is_file()
    assert Path(row["image"]).parent.name == row["class"]
  page = (tmp_path / "run" / "report.html").read_text()
  assert "10, listed in unreadable_files.csv" in page
  for name in ("it&#39;s", "ümlaut 日本"):
    assert name in page


@pytest.mark.slow
def test_a_table_of_odd_images_trains_and_reports(odd, tmp_path, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  folder, reasons = odd
  listed = [entry.file for entry in folders.list_files(folder, folders.ENDINGS).entries]
  table = tmp_path / "my table.csv"
  with table.open("w", newline="", encoding="utf-8") as lines:
    writer = csv.writer(lines)
    writer.writerow(("label", "path", "split"))
    for i, file in enumerate(listed):
      writer.writerow((file.parent.name, file, "mine" if i % 5 else "yours"))
  splits = {"data.train_split": "mine", "data.test_split": "yours"}
  config = config_of("digits_resnet20", table, **{"optim.batch_size": 16, **splits})
  classification.run(config, tmp_path / "run", "train")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  tested = [file for file in listed[::5] if str(file) not in reasons]
  assert (result["classes"], result["unreadable_files"]) == (list(CLASSES), len(reasons))
  assert result["images"] == len(tested)
  predicted = [row["image"] for row in read_rows(tmp_path / "run" / "predictions.csv")]
  assert sorted(tmp_path / name for name in predicted) == sorted(tested)


def test_a_result_counts_the_files_that_went_bad_in_the_training_too(odd, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  folder, reasons = odd
  changes = {"optim.batch_size": 16, "data.loader": "streaming"}
  experiment = images.build(config_of("digits_resnet20", folder, **changes))
  programme, train = classification.Classification(experiment), experiment.open_train()
  evaluated = SimpleNamespace(result={}, gates=None)
  programme._add_names(evaluated)
  assert evaluated.result == {"classes": list(CLASSES), "unreadable_files": len(reasons)}
  gone = Path(train.source._files[0])
  gone.unlink()
  train.read(np.arange(2))
  programme._add_names(evaluated, train)
  assert evaluated.result["unreadable_files"] == len(reasons) + 1
  assert programme._unreadable(train)[str(gone)] == "is missing"
  (row,) = tables._unreadable_rows(evaluated.result)
  assert row == ("files that cannot be read", "11, listed in unreadable_files.csv")
  assert tables._unreadable_rows({"unreadable_files": 0}) == []


@pytest.mark.slow
def test_tasks_are_made_of_the_classes_of_a_folder(odd, tmp_path, monkeypatch):
  monkeypatch.setitem(vggs.VGGS, "tiny", (8, vggs.POOL, 8))
  runs.without_reports(monkeypatch)
  folder, reasons = odd
  changes = {"method": "fine_tuning", "tasks.classes_per_task": 2, "optim.batch_size": 16}
  config = config_of("split_digits", folder, **changes)
  continual.run(config, tmp_path / "run", "train")
  result = json.loads((tmp_path / "run" / "result.json").read_text())
  assert (result["classes"], result["unreadable_files"]) == (list(CLASSES), 10)
  assert len(result["task_names"]) == 2
  first, second = result["task_aware"]["accuracies"][1]
  assert 0 <= first <= 1
  assert 0 <= second <= 1
  assert len(reasons) == len(read_rows(tmp_path / "run" / "unreadable_files.csv"))
  for row in read_rows(tmp_path / "run" / "predictions.csv"):
    assert (folder / row["image"]).parent.name == row["class"]


def test_tasks_of_a_folder_know_its_unreadable_files(odd, monkeypatch):
  monkeypatch.setitem(vggs.VGGS, "tiny", (8, vggs.POOL, 8))
  folder, reasons = odd
  changes = {"method": "fine_tuning", "tasks.classes_per_task": 2, "optim.batch_size": 8}
  experiment = build.build(config_of("split_digits", folder, **changes))
  assert [task.train.class_names for task in experiment.tasks] == [CLASSES] * 2
  assert experiment.unreadable.keys() == reasons.keys()
  assert experiment.file_entries() == {"unreadable_files": 10}
