import os

import ml_collections
import numpy as np
import pytest

from configs import video_common
from gating_jax.data import image_sets
from gating_jax.data.image_sets import SetSource
from gating_jax.data.video_tables import read_breakfast
from gating_jax.video import sets
from tests.helpers import made_tfds, made_videos

# Each is a literal name: none is a pattern, a kind of storage, a frame number or an option.
NAMES = ("lr[0:4]*?", "{a,b}|#%03d", "concat:a\\b", "-i ~x\nü\u2028$HOME'\"")
ODD = pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"\xff")], ids=ascii)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  return tmp_path


def write_videos(folder):
  made_videos.write(folder / "a.mp4", 4)
  np.save(folder / "a.npy", np.ones((2, 3), np.float32))
  (folder / "table.csv").write_text("video,label\na.mp4,x\n")
  (folder / "split.txt").write_text("a.mp4\n")


def config_of(name, folder):
  made = ml_collections.ConfigDict(video_common.video_config())
  made.data.update(
    {
      "name": name,
      "folder": folder,
      "heavy_folder": folder if name == "features" else None,
      "table": f"{folder}/table.csv",
      "train_split": f"{folder}/split.txt",
      "segments": 2,
      "frames": 1,
      "size": 8,
    }
  )
  return made


@ODD
@pytest.mark.parametrize("kind", ["videos", "features"])
def test_videos_are_read_in_a_folder_of_any_name_below_the_home_folder(home, name, kind):
  (home / name).mkdir()
  write_videos(home / name)
  for folder in (f"~/{name}", str(home / name)):
    opened = sets.open_set(config_of(kind, folder), "train")
    assert opened.read([0])["weight"].tolist() == [1], opened.unreadable


@ODD
def test_layouts_are_read_in_a_folder_of_any_name_below_the_home_folder(home, name):
  video = home / name / "P03" / "cam01" / "P03_cereals.avi"
  video.parent.mkdir(parents=True)
  video.touch()
  assert read_breakfast(f"~/{name}", "train").names == ("P03/cam01/P03_cereals",)


def test_prepared_sets_are_read_in_a_folder_of_any_name_below_the_home_folder(home):
  images, labels = made_tfds.images(4, (4, 4, 3))
  made_tfds.write(home / "first", *2 * [list(zip(images, labels, strict=True))], shape=(4, 4, 3))
  for name in NAMES:
    (home / "first").rename(home / name)
    for folder in (f"~/{name}", str(home / name)):
      read = image_sets.load(SetSource("made_set", "train", folder))
      assert sorted(read.pixels.sum(axis=(1, 2, 3))) == sorted(images.sum(axis=(1, 2, 3)))
    (home / name).rename(home / "first")


def test_a_folder_of_prepared_sets_that_is_no_text_is_refused(home):
  with pytest.raises(ValueError, match=r"data.data_dir must be UTF-8 text.*got '.*\\udcff'"):
    image_sets.load(SetSource("made_set", "train", f"~/{os.fsdecode(bytes([255]))}"))
