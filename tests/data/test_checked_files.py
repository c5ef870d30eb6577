"""Files that are checked before they are needed, and the ranges that are kept of them."""

import csv
import os
import time
from pathlib import Path

import numpy as np
import pytest

from gating_jax.data import checked_files
from gating_jax.data.checked_files import keep_ranges, recall_ranges, stamp_files

RANGES = {
  "a.png": np.array([3, 250], np.uint8),
  "b.png": np.array([0, 65535], np.uint16),
  "c.png": np.array([7, 7], np.uint8),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
  """A folder of files, whose content does not matter."""
  folder = tmp_path / "set"
  folder.mkdir()
  for number, name in enumerate(RANGES):
    (folder / name).write_text(name)
    # Each has a time of its own, also where the file system's clock is coarse.
    os.utime(folder / name, ns=(number, number))
  return folder


def keep(root, *names):
  """Keeps the ranges of these files, of all that are in the folder."""
  files = [root / name for name in names]
  ranges = {file: RANGES[file.name] for file in files}
  keep_ranges(root, stamp_files(files), ranges, listed=sorted(root.iterdir()))


def recalled(root):
  """Returns the ranges that are recalled of all files, by name."""
  found = recall_ranges(root, stamp_files(root / name for name in RANGES))
  return {file.name: extremes for file, extremes in found.items()}


def kept(root):
  """Returns the number of files in the folder's entry."""
  return len(checked_files._known(checked_files._open_cache(), root))


def entry(cache):
  (file,) = cache.rglob("*.safetensors")
  return file


def test_kept_ranges_are_recalled_with_their_types(root):
  assert recalled(root) == {}
  # As for two splits, one after the other.
  keep(root, "a.png", "b.png")
  keep(root, "c.png")
  found = recalled(root)
  assert found.keys() == RANGES.keys()
  for name, expected in RANGES.items():
    np.testing.assert_array_equal(found[name], expected)
    assert found[name].dtype == expected.dtype
  # Those of another folder are its own.
  assert recall_ranges(root.parent, stamp_files(root.iterdir())) == {}


def test_ranges_of_other_types_are_not_kept(root):
  file = root / "a.png"
  stamps = stamp_files([file])
  keep_ranges(root, stamps, {file: np.array([0.0, 1.0])}, listed=[file])
  assert recalled(root) == {}


@pytest.mark.parametrize(
  ("change", "left"), [("size", "b.png c.png"), ("time", "b.png c.png"), ("path", "c.png")]
)
def test_a_file_that_changed_is_not_recalled(root, change, left):
  keep(root, *RANGES)
  file = root / "a.png"
  if change == "size":
    stat = file.stat()
    file.write_text("longer than before")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  elif change == "time":
    os.utime(file, ns=(9, 9))
  else:
    file.unlink()
    (root / "b.png").rename(file)
  assert list(recalled(root)) == left.split()


def test_what_was_kept_of_files_that_changed_or_went_away_is_dropped(root):
  keep(root, *RANGES)
  os.utime(root / "a.png", ns=(9, 9))
  (root / "b.png").unlink()
  keep(root, "a.png")
  assert recalled(root).keys() == {"a.png", "c.png"}
  assert kept(root) == 2


def test_a_damaged_entry_counts_as_missing_and_is_made_again(root, cache):
  keep(root, *RANGES)
  entry(cache).write_bytes(entry(cache).read_bytes()[:-3])
  assert recalled(root) == {}
  keep(root, "a.png")
  assert recalled(root).keys() == {"a.png"}


def test_without_a_folder_that_can_be_written_nothing_is_kept(root, cache):
  # A file where the folder would be: the superuser may write in any folder.
  cache.touch()
  keep(root, *RANGES)
  assert recalled(root) == {}


def test_a_file_that_is_removed_meanwhile_is_left_out(root):
  files = [root / name for name in RANGES]
  ranges = {file: RANGES[file.name] for file in files}
  (root / "b.png").unlink()
  stamps = stamp_files(files)
  assert [file.name for file in stamps] == ["a.png", "c.png"]
  keep_ranges(root, stamps, ranges, listed=files)
  assert recalled(root).keys() == {"a.png", "c.png"}


def test_ctrl_c_while_files_are_checked_waits_for_no_file_that_has_not_begun(monkeypatch):
  begun = []

  def interrupted(found, **_):
    next(iter(found))
    raise KeyboardInterrupt

  monkeypatch.setattr(checked_files, "usable_cores", lambda: 1)
  monkeypatch.setattr(checked_files, "progress_bar", interrupted)
  # The first file is read when the interrupt comes; the others wait for it.
  read = lambda file: (begun.append(file), time.sleep(1))
  with pytest.raises(KeyboardInterrupt):
    checked_files.find_faults([Path(str(i)) for i in range(100)], read, "checking", describe=str)
  assert 1 <= len(begun) < 10


def test_unreadable_files_are_listed_with_names_as_they_are(tmp_path):
  file = tmp_path / checked_files.UNREADABLE_FILE
  reasons = {'two\nlines, "x".png': "is empty", os.fsdecode(b"\xff.png"): "is missing"}
  checked_files.write_unreadable(tmp_path, reasons)
  with file.open(newline="", encoding="utf-8") as lines:
    rows = list(csv.reader(lines))
  assert rows == [
    ["path", "reason"],
    ['two\nlines, "x".png', "is empty"],
    ["\\udcff.png", "is missing"],
  ]
  for _ in range(2):
    checked_files.write_unreadable(tmp_path, {})
    assert not file.exists()


def test_the_list_of_unreadable_files_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
  checked_files.write_unreadable(tmp_path, {"a": "is empty"})
  file = tmp_path / checked_files.UNREADABLE_FILE
  before = file.read_bytes()

  def full(_):
    raise OSError("disk")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="unreadable_files.csv cannot be written: disk"):
    checked_files.write_unreadable(tmp_path, {"b": "is empty"})
  assert file.read_bytes() == before
