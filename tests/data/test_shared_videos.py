import numpy as np
import pytest

from gating_jax.data.shared_videos import check_apart, find_shared
from gating_jax.data.video_features import FeatureFolder
from gating_jax.data.video_tables import VideoTable
from gating_jax.data.videos import VideoArrays

IN_MEMORY = VideoArrays({"label": np.arange(2)}, class_names=("a", "b"), names=("v", "w"))


def table_of(names):
  return VideoTable(names, np.zeros(len(names), np.int32), ("a",))


def features_of(folder, names, content=None):
  """Writes files of features, each with a number of its own, and opens them as a set."""
  for i, name in enumerate(names):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    rows = np.full((3, 2), i if content is None else content, np.float32)
    np.save(folder / f"{name}.npy", rows)
  return FeatureFolder(table_of(names), folder, segments=2)


def test_a_file_in_two_splits_is_named_whatever_the_case_of_its_name(tmp_path):
  train = features_of(tmp_path, ("a", "b.c", "b.d"))
  np.save(tmp_path / "A.npy", np.ones((3, 2), np.float32))
  (tmp_path / "link.npy").symlink_to(tmp_path / "b.c.npy")
  names = ("A.mp4", "link", "new")
  np.save(tmp_path / "new.npy", np.full((3, 2), 7, np.float32))
  test = FeatureFolder(table_of(names), tmp_path, segments=2)
  shared = find_shared(train, test)
  assert shared.by_path == [("a", "A.mp4"), ("b.c", "link")]
  assert shared.by_content == []
  with pytest.raises(ValueError, match="2 of training are also in test: A.mp4, link"):
    check_apart(training=train, validation=None, test=test)
  check_apart(training=train, validation=None, test=IN_MEMORY)


def test_copies_of_a_file_in_two_splits_are_found_by_their_bytes(tmp_path):
  train = features_of(tmp_path / "train", ("a", "b", "c"))
  test = features_of(tmp_path / "test", ("d",), content=1)
  other = features_of(tmp_path / "test", ("e",), content=9)
  assert find_shared(train, test).by_content == [("b", "d")]
  assert find_shared(train, other) == ([], [])
  check_apart(training=train, test=test)


def test_files_alike_in_their_beginnings_are_compared_whole(tmp_path):
  for name, last in (("a", 0), ("b", 1), ("c", 1)):
    rows = np.zeros((100_000, 1), np.float32)
    rows[-1] = last
    np.save(tmp_path / f"{name}.npy", rows)
  train = FeatureFolder(table_of(("a", "b")), tmp_path, segments=2)
  test = FeatureFolder(table_of(("c",)), tmp_path, segments=2)
  assert find_shared(train, test).by_content == [("b", "c")]
