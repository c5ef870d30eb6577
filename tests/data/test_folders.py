"""Folders and tables of images, with everything that people have in them."""

import io
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gating_jax.data import faults, features, folders, image_sets, streaming

RED = (200, 10, 10)


@pytest.fixture(autouse=True)
def _fresh():
  """Folders of one test are not those of another."""
  folders._list_images.cache_clear()
  yield
  folders._list_images.cache_clear()


def picture(size=(6, 4), mode="RGB", colour=RED):
  """A picture of one colour; `size` is width and height."""
  plain = Image.new("RGB", size, colour)
  # A palette of its own has the very colour.
  return plain.quantize() if mode == "P" else plain.convert(mode)


def saved(file, image=None, **settings):
  file.parent.mkdir(parents=True, exist_ok=True)
  (picture() if image is None else image).save(file, **settings)
  return file


def classes(root, per_class=6, names=("cat", "dog"), suffix=".png"):
  for number, name in enumerate(names):
    for i in range(per_class):
      saved(root / name / f"{i}{suffix}", picture(colour=(20 * number, 10 * i, 5)))
  return root


def test_a_folder_for_each_split_gives_its_images(tmp_path):
  classes(tmp_path / "train", 3)
  classes(tmp_path / "val", 2, names=("dog", "emu"))
  train, val = (folders.open_folder(str(tmp_path), split) for split in ("train", "val"))
  # Classes are those of all splits, so that a number means the same in each.
  assert train.class_names == val.class_names == ("cat", "dog", "emu")
  assert [example["label"] for example in train] == [0, 0, 0, 1, 1, 1]
  assert [example["label"] for example in val] == [1, 1, 2, 2]
  assert train[1]["image"].shape == (4, 6, 3)
  assert train[1]["image"][0, 0].tolist() == [0, 10, 5]
  with pytest.raises(ValueError, match="must be one of train, val; got 'test'"):
    folders.open_folder(str(tmp_path), "test")


def test_without_splits_a_hash_of_the_path_decides(tmp_path):
  classes(tmp_path / "a", 50)
  train, test = (folders.open_folder(str(tmp_path / "a"), split) for split in ("train", "test"))
  assert len(train) + len(test) == 100
  assert 8 < len(test) < 35
  # Neither the place of the folder nor further files move an image.
  os.rename(tmp_path / "a", tmp_path / "b")
  before = {file.relative_to(tmp_path / "a") for file in test._files}
  saved(tmp_path / "b" / "cat" / "new.png")
  after = folders.open_folder(str(tmp_path / "b"), "test")
  found = {file.relative_to(tmp_path / "b") for file in after._files}
  assert before <= found
  assert len(found - before) <= 1


@pytest.mark.parametrize(
  ("mode", "suffix"),
  [
    ("RGB", ".png"),
    ("RGB", ".JPG"),
    ("RGB", ".webp"),
    ("RGB", ".bmp"),
    ("P", ".gif"),
    ("P", ".png"),
    ("L", ".png"),
    ("1", ".png"),
    ("LA", ".png"),
    ("RGBA", ".png"),
    ("RGBA", ".webp"),
    ("CMYK", ".jpeg"),
    ("L", ".jpg"),
  ],
)
def test_pictures_of_every_mode_become_colours(tmp_path, mode, suffix):
  file = saved(tmp_path / f"a{suffix}", picture(mode=mode))
  pixels = folders.read_picture(file.read_bytes())
  assert (pixels.shape, pixels.dtype) == ((4, 6, 3), np.uint8)
  if mode in ("L", "LA", "1"):
    assert (pixels == pixels[..., :1]).all()
  else:
    np.testing.assert_allclose(pixels[1, 1], RED, atol=12)


def test_sixteen_bits_become_eight(tmp_path):
  deep = Image.fromarray(np.full((4, 6), 257 * 100, np.uint16))
  file = saved(tmp_path / "deep.png", deep)
  assert (folders.read_picture(file.read_bytes()) == 100).all()


def test_the_first_frame_of_several_is_read(tmp_path):
  frames = [picture(mode="P", colour=(0, 0, 200)), picture(mode="P")]
  file = tmp_path / "film.gif"
  frames[0].save(file, save_all=True, append_images=frames[1:])
  np.testing.assert_allclose(folders.read_picture(file.read_bytes())[0, 0], (0, 0, 200), atol=12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_the_camera_noted(tmp_path, orientation):
  pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = saved(tmp_path / "a.png", Image.fromarray(pixels), exif=exif)
  # By the standard: where row 0 and column 0 of the file are in the upright picture.
  upright = {
    1: pixels,
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: pixels.swapaxes(0, 1),
    6: np.rot90(pixels, -1),
    7: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90(pixels),
  }
  np.testing.assert_array_equal(folders.read_picture(file.read_bytes()), upright[orientation])


ODD_NAMES = ("a b", "it's", 'say "x"', "ümlaut", "two\nlines", "%s", "日本")


def test_odd_names_and_files_that_cannot_be_read_stop_nothing(tmp_path, caplog):
  root = tmp_path / "odd folder"
  for name in ODD_NAMES:
    for part in range(2):
      saved(root / "train" / name / "deeper" / f"{name}{part}.png")
  bad = root / "train" / "bad"
  whole = saved(bad / "whole.jpg").read_bytes()
  (bad / "cut.jpg").write_bytes(whole[: len(whole) // 2])
  (bad / "empty.png").write_bytes(b"")
  (bad / "text.png").write_text("no picture")
  (bad / "line\n.gif").write_bytes(b"GIF89a")
  (bad / ".hidden.png").write_bytes(b"")
  (bad / "notes.txt").write_text("")
  (bad / "Thumbs").write_text("")
  with caplog.at_level(logging.WARNING):
    images = folders.open_folder(str(root), "train")
  assert images.class_names == tuple(sorted((*ODD_NAMES, "bad")))
  assert len(images) == 2 * len(ODD_NAMES) + 1
  assert all(example["image"].shape == (4, 6, 3) for example in images)
  said = caplog.text
  assert "4 of 19 images cannot be read and are left out" in said
  for name in ("cut.jpg", "empty.png", "text.png", "line?.gif"):
    assert name in said
  assert "left out hidden files and other endings: 1 of .txt, 1 of hidden, 1 of no ending" in said


def test_a_table_names_paths_labels_and_splits(tmp_path):
  classes(tmp_path / "pictures", 2)
  table = tmp_path / "table.csv"
  rows = ["path,label,split", "pictures/cat/0.png,tom,train", '"pictures/dog/1.png","a, b",test']
  table.write_text("\n".join([*rows, "pictures/none.png,tom,train", "pictures/cat/1.png,,train"]))
  train, test = (folders.open_folder(str(table), split) for split in ("train", "test"))
  assert train.class_names == ("a, b", "tom")
  assert [example["label"] for example in train] == [1]
  assert [example["label"] for example in test] == [0]
  assert test[0]["image"][0, 0].tolist() == [20, 10, 5]
  table.write_text("file,label\npictures/cat/0.png,tom\n")
  folders._list_images.cache_clear()
  with pytest.raises(ValueError, match="it lacks the column path"):
    folders.open_folder(str(table), "train")


@pytest.mark.parametrize(
  ("data_dir", "message"),
  [
    (None, "must be a folder of classes or a .csv file where data.name is 'folder'; got None"),
    ("missing", "no .*missing exists"),
    ("", "has no readable image"),
  ],
)
def test_a_folder_without_images_is_refused(tmp_path, data_dir, message):
  with pytest.raises(ValueError, match=message):
    folders.open_folder(None if data_dir is None else str(tmp_path / data_dir), "train")


def test_both_loaders_read_a_folder(tmp_path):
  classes(tmp_path / "train", 3)
  saved(tmp_path / "train" / "cat" / "wide.png", picture(size=(40, 10)))
  folder = str(tmp_path)
  with pytest.raises(ValueError, match="images of different sizes .* set data.image_size"):
    image_sets.load(folders.FOLDER, "train", folder)
  images = image_sets.load(folders.FOLDER, "train", folder, image_size=4)
  assert images.pixels.shape == (7, 4, 4, 3)
  assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
  assert image_sets.count_images(folders.FOLDER, "train", folder) == 7
  with pytest.raises(ValueError, match="data.image_size must be set"):
    streaming.open_stream(folders.FOLDER, "train", folder)
  stream = streaming.open_stream(folders.FOLDER, "train", folder, image_size=4)
  pixels, labels = stream.read(np.arange(7))
  assert pixels.shape == (7, 4, 4, 3)
  assert labels.tolist() == images.labels.tolist()
  (first, _), *_ = stream.batches(2, 0, 1, total_steps=2)
  assert first.shape == (2, 1, 4, 4, 3)


def test_the_middle_of_an_image_is_kept_in_its_proportions(tmp_path):
  pixels = np.zeros((4, 12, 3), np.uint8)
  pixels[:, 4:8] = 100
  saved(tmp_path / "train" / "cat" / "a.png", Image.fromarray(pixels))
  images = image_sets.load(folders.FOLDER, "train", str(tmp_path), image_size=4)
  assert (images.pixels == 100).all()


def test_a_file_that_changed_since_is_named(tmp_path):
  file = saved(tmp_path / "train" / "cat" / "a.png")
  images = folders.open_folder(str(tmp_path), "train")
  file.write_bytes(b"")
  with pytest.raises(ValueError, match=r"a\.png has changed since the training began"):
    images[0]
  with pytest.raises(IndexError):
    images[1]


def test_pictures_are_turned_only_where_that_is_asked():
  exif = Image.Exif()
  exif[0x0112] = 6
  buffer = io.BytesIO()
  picture().save(buffer, "PNG", exif=exif)
  assert features.decode_picture(buffer.getvalue(), 3).shape == (4, 6, 3)
  assert features.decode_picture(buffer.getvalue(), 3, upright=True).shape == (6, 4, 3)


def test_ctrl_c_while_files_are_checked_waits_for_no_file_that_has_not_begun(monkeypatch):
  begun = []

  def interrupted(found, **_):
    next(iter(found))
    raise KeyboardInterrupt

  monkeypatch.setattr(faults, "usable_cores", lambda: 1)
  monkeypatch.setattr(faults, "progress_bar", interrupted)
  read = lambda file: (begun.append(file), time.sleep(0.005))
  with pytest.raises(KeyboardInterrupt):
    faults.find_faults([Path(str(i)) for i in range(100)], read, "checking", describe=str)
  assert 1 <= len(begun) < 50
