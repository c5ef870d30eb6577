"""Sets of videos as configs name them: layouts, parts of a table, and the cache of frames."""

import ml_collections
import numpy as np
import pytest

from configs import video_common
from gating_jax.video import sets
from tests.helpers import made_videos
from tests.helpers.made_tables import write


def of_features(folder, names, **data):
  """Makes features of two segments for each name; returns a config that opens them."""
  for i, name in enumerate(names):
    np.save(folder / f"{name}.npy", np.full((2, 3), i, np.float32))
  config = video_common.video_config()
  config.data.update({"name": "features", "folder": str(folder), "segments": 2, **data})
  return config


def opened(config):
  """Returns the names, labels and classes of both splits."""
  splits = [sets.open_set(config, split) for split in ("train", "test")]
  return [(videos.names, videos.table.labels.tolist(), videos.class_names) for videos in splits]


def test_breakfast_is_opened_from_its_folder_with_the_units_of_a_segmentation(tmp_path):
  files = {
    "coarse/cereals/P03_cam01_P03_cereals.txt": "1-30 SIL\n",
    "coarse/tea/P47_cam01_P47_tea.txt": "1-15 pour_milk\n",
  }
  write(tmp_path, files)
  names = ("P03_cam01_P03_cereals", "P47_cam01_P47_tea")
  config = of_features(tmp_path, names, layout="breakfast")
  classes = ("cereals", "tea")
  assert opened(config) == [(names[:1], [0], classes), (names[1:], [1], classes)]
  assert sets.open_set(config, "train").table.units is None
  config.data.table = str(tmp_path / "coarse")
  assert sets.open_set(config, "train").table.units == (((0.0, 2.0, 0),),)


def test_charades_is_opened_from_the_tables_of_its_authors(tmp_path):
  files = {
    "Charades_v1_classes.txt": "c000 Holding\nc001 Taking\n",
    "Charades_v1_train.csv": "id,actions,length\n46GP8,c001 0.00 2.00,4.0\n",
    "Charades_v1_test.csv": "id,actions,length\nYYYYY,c000 1.00 2.00,5.5\n",
  }
  write(tmp_path / "tables", files)
  config = of_features(
    tmp_path, ("46GP8", "YYYYY"), layout="charades", table=str(tmp_path / "tables")
  )
  classes = ("Holding", "Taking")
  assert opened(config) == [(("46GP8",), [[0, 1]], classes), (("YYYYY",), [[1, 0]], classes)]


def test_multithumos_is_opened_from_the_tables_of_its_authors(tmp_path):
  files = {
    "class_list.txt": "1 Pitch\n2 Run\n",
    "annotations/Pitch.txt": "video_test_0000002 1.00 2.00\n",
    "annotations/Run.txt": "video_validation_0000100 3.50 4.00\n",
  }
  write(tmp_path / "tables", files)
  names = ("video_validation_0000100", "video_test_0000002")
  config = of_features(tmp_path, names, layout="multithumos", table=str(tmp_path / "tables"))
  classes = ("Pitch", "Run")
  assert opened(config) == [(names[:1], [[0, 1]], classes), (names[1:], [[1, 0]], classes)]


def of_films(folder, names, **data):
  """Makes films of two frames; returns a config that opens them in folders of their classes."""
  for name in names:
    made_videos.write(folder / name, 2)
  config = video_common.video_config()
  where = {"name": "videos", "layout": "folders", "folder": str(folder)}
  config.data.update({**where, "segments": 1, "frames": 2, "size": 8, **data})
  return config


def test_folders_have_the_classes_of_the_splits_that_a_config_uses(tmp_path):
  names = ("train/b/1.mp4", "train/a/2.mp4", "test/b/3.mp4", "extra/c/4.mp4")
  config = of_films(tmp_path, names)
  assert opened(config) == [
    (("train/a/2.mp4", "train/b/1.mp4"), [0, 1], ("a", "b")),
    (("test/b/3.mp4",), [1], ("a", "b")),
  ]
  config.data.validation_split = "extra"
  assert sets.open_set(config, "train").class_names == ("a", "b", "c")


def test_features_in_folders_of_their_classes_are_opened(tmp_path):
  for name in ("train/a", "train/b", "test/a"):
    (tmp_path / name).mkdir(parents=True)
  config = of_features(tmp_path, ("train/a/1", "train/b/2", "test/a/3"), layout="folders")
  assert opened(config) == [
    (("train/a/1.npy", "train/b/2.npy"), [0, 1], ("a", "b")),
    (("test/a/3.npy",), [0], ("a", "b")),
  ]
  assert sets.open_set(config, "train").read([1])["light"].max() == 1


def test_features_next_to_their_films_are_opened_once(tmp_path):
  config = of_films(tmp_path, ["train/a/1.mp4", "train/a/1.avi", "train/b/2.mp4", "test/b/3.mp4"])
  films = opened(config)
  for name in ("train/a/1.npy", "train/b/2.npy", "train/b/4.npy", "train/b/4.npz", "test/b/3.npy"):
    (tmp_path / name).touch()
  assert opened(config)[1] == films[1]
  assert opened(config)[0][0] == (*films[0][0], "train/b/4.npy")
  config = of_features(tmp_path, ("train/a/1", "train/b/2", "train/b/4", "test/b/3"))
  config.data.layout = "folders"
  (tmp_path / "train" / "a" / "1.avi").unlink()
  names = ("train/a/1.mp4", "train/b/2.mp4", "train/b/4.npy")
  assert [part[0] for part in opened(config)] == [names, ("test/b/3.mp4",)]


def of_table(folder, count, **data):
  """Returns a config that opens videos of a class each, all of which are trained on."""
  names = [f"v{i}" for i in range(count)]
  rows = "".join(f"{name},{name}\n" for name in names)
  write(folder, {"all.csv": f"video,label\n{rows}", "train.txt": "\n".join(names)})
  tables = {"table": str(folder / "all.csv"), "train_split": str(folder / "train.txt")}
  return of_features(folder, names, **tables, **data)


@pytest.mark.parametrize(
  ("most", "names"), [(3, ("v0", "v2", "v4")), (9, ("v0", "v1", "v2", "v3", "v4"))]
)
def test_a_part_of_a_set_is_spread_over_its_table(tmp_path, most, names):
  assert sets.open_set(of_table(tmp_path, 5, at_most=most), "train").names == names


def test_a_validation_that_leaves_no_videos_is_refused(tmp_path):
  config = of_table(tmp_path, 1, validation=0.5)
  message = "must leave videos in both parts of 1 training videos, .*; got 0.5"
  with pytest.raises(ValueError, match=f"^data.validation {message}"):
    sets.open_set(config, "validation")


def test_films_in_folders_are_looked_at_when_they_are_opened(tmp_path, caplog):
  write(tmp_path, {"train/b/bad.mp4": "no film"})
  config = of_films(tmp_path, ["train/a/good.mp4"], cache=str(tmp_path / "cache"))
  films = sets.open_set(config, "train")
  assert set(films.unreadable) == {"train/b/bad.mp4"}
  assert "1 of 2 videos cannot be read and are skipped: train/b/bad.mp4" in caplog.text
  # The resized frames are kept in the folder that the config names.
  films.read([0])
  assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(("given", "most"), [(None, 20_000_000_000), (0.5, 500_000_000)])
def test_a_cache_has_the_size_of_the_config_or_twenty_gigabytes(tmp_path, monkeypatch, given, most):
  monkeypatch.setattr(sets, "ArrayCache", lambda *of: of)
  data = ml_collections.ConfigDict({"cache": str(tmp_path), "cache_gb": given})
  assert sets._open_cache(data) == (str(tmp_path), most)
  data.cache = ""
  assert sets._open_cache(data) is None


def test_a_cache_that_cannot_be_a_folder_is_named_by_its_field(tmp_path):
  (tmp_path / "file").write_text("")
  data = ml_collections.ConfigDict({"cache": str(tmp_path / "file"), "cache_gb": None})
  with pytest.raises(
    ValueError, match=r"^data.cache: the cache must be a folder that can be writt"
  ):
    sets._open_cache(data)
