import os

import numpy as np
import pytest
from absl import logging

from gating_jax.data import array_cache, video_files
from gating_jax.data.array_cache import ArrayCache
from gating_jax.data.video_files import read_cached, read_clips
from tests.helpers import made_videos

ARRAYS = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": np.array([0.5, np.nan])}
CLIPS = dict(segments=3, length=4, size=(8, 12))


@pytest.fixture
def cache(tmp_path):
  return ArrayCache(tmp_path / "cache", 10**9)


@pytest.fixture
def film(tmp_path):
  path = tmp_path / "film.mp4"
  made_videos.write(path, 20)
  return path


def entries(tmp_path):
  return sorted((tmp_path / "cache").iterdir())


def test_arrays_are_kept_with_their_types_and_found_by_another_cache(tmp_path, cache):
  assert cache.get("key") is None
  cache.put("key", ARRAYS)
  found = ArrayCache(tmp_path / "cache", 10).get("key")
  assert found.keys() == ARRAYS.keys()
  for name, values in ARRAYS.items():
    np.testing.assert_array_equal(found[name], values)
    assert found[name].dtype == values.dtype


def test_a_key_tells_files_their_changes_and_settings_apart(tmp_path, cache, film):
  keys = [cache.key(film, size=(8, 8)), cache.key(film, size=(8, 9))]
  os.utime(film, ns=(0, 0))
  keys.append(cache.key(film, size=(8, 8)))
  film.write_bytes(film.read_bytes() + b"\0")
  os.utime(film, ns=(0, 0))
  keys.append(cache.key(film, size=(8, 8)))
  (tmp_path / "other.mp4").write_bytes(film.read_bytes())
  os.utime(tmp_path / "other.mp4", ns=(0, 0))
  keys.append(cache.key(tmp_path / "other.mp4", size=(8, 8)))
  assert len(set(keys)) == 5
  assert keys[-1] == cache.key(tmp_path / "other.mp4", size=(8, 8))


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "text"])
def test_a_damaged_entry_counts_as_missing_and_is_written_again(
  tmp_path, cache, monkeypatch, damage
):
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
  cache.put("key", ARRAYS)
  (file,) = entries(tmp_path)
  data = bytearray(file.read_bytes())
  # The last bytes are those of arrays.
  data[-10] ^= 1
  parts = {"flipped": data, "cut": data[:-4], "empty": b"", "text": b"no entry at all"}
  file.write_bytes(parts[damage])
  assert cache.get("key") is None
  assert len(said) == 1
  assert "is damaged and is made again" in said[0]
  cache.put("key", ARRAYS)
  assert cache.get("key") is not None


def test_the_longest_unused_entries_go_where_the_folder_is_full(tmp_path):
  cache = ArrayCache(tmp_path / "cache", 5000)
  for number in range(4):
    cache.put(f"key{number}", {"a": np.zeros(1000, np.uint8)})
    os.utime(tmp_path / "cache" / f"key{number}.safetensors", (number + 1, number + 1))
  # Read, so that it is not the longest unused one.
  assert cache.get("key0") is not None
  cache.put("key4", {"a": np.zeros(1000, np.uint8)})
  assert [name for name in range(5) if cache.get(f"key{name}") is None] == [1]
  cache.put("large", {"a": np.zeros(9000, np.uint8)})
  assert cache.get("large") is None
  assert sum(file.stat().st_size for file in entries(tmp_path)) <= 5000


def test_files_that_a_killed_process_left_are_removed(tmp_path, cache, monkeypatch):
  for name, age in (("old", 10**6), ("new", 0)):
    (tmp_path / "cache" / f"{name}.tmp").touch()
    then = (tmp_path / "cache" / f"{name}.tmp").stat().st_mtime - age
    os.utime(tmp_path / "cache" / f"{name}.tmp", (then, then))
  cache.put("key", ARRAYS)
  assert {file.name for file in entries(tmp_path)} == {"new.tmp", "key.safetensors"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="the cache must be a folder that can be written; .*file"):
    ArrayCache(tmp_path / "file", 1)
  with pytest.raises(ValueError, match="most_bytes must be > 0; got 0"):
    ArrayCache(tmp_path / "cache", 0)


@pytest.mark.parametrize("largest", [2**26, 0])
def test_cached_clips_are_those_of_the_file_and_fixed_ones_are_decoded_once(
  cache, film, monkeypatch, largest
):
  monkeypatch.setattr(video_files, "_LARGEST", largest)
  seeds = (None, 0, 1)
  draw = lambda seed: None if seed is None else np.random.default_rng(seed)
  for _ in range(2):
    for seed in seeds:
      cached = read_cached(cache, film, **CLIPS, rng=draw(seed))
      plain = read_clips(film, **CLIPS, rng=draw(seed))
      for found, expected in zip(cached, plain, strict=True):
        np.testing.assert_array_equal(found, expected)
  calls = []
  decode = video_files._decode_segments
  monkeypatch.setattr(
    video_files, "_decode_segments", lambda *a, **k: calls.append(a) or decode(*a, **k)
  )
  for seed in seeds:
    read_cached(cache, film, **CLIPS, rng=draw(seed))
  # Of a long film only the clips at fixed places are kept.
  assert len(calls) == (0 if largest else 2)


@pytest.mark.parametrize("frames", [3, 9])
@pytest.mark.parametrize(
  ("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")]
)
def test_short_films_are_cached_as_they_are_read(tmp_path, cache, name, codec, frames):
  made_videos.write(tmp_path / name, frames, codec=codec)
  for _ in range(2):
    clips, middles = read_cached(cache, tmp_path / name, **CLIPS)
    expected = read_clips(tmp_path / name, **CLIPS)
    np.testing.assert_array_equal(clips, expected[0])
    np.testing.assert_array_equal(middles, expected[1])


def test_a_changed_file_is_decoded_again_and_one_that_cannot_be_read_is_not_kept(
  tmp_path, cache, film
):
  first, _ = read_cached(cache, film, **CLIPS)
  made_videos.write(film, 20, paint=lambda i: np.full((32, 48, 3), 200 - i, np.uint8))
  second, _ = read_cached(cache, film, **CLIPS)
  assert not np.array_equal(first, second)
  kept = len(entries(tmp_path))
  film.write_bytes(b"no video")
  for _ in range(2):
    with pytest.raises(Exception, match=r"."):
      read_cached(cache, film, **CLIPS)
  assert len(entries(tmp_path)) == kept


def test_a_full_disk_is_said_once_and_stops_nothing(cache, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))

  def refuse(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(array_cache.Path, "write_bytes", refuse)
  for _ in range(2):
    cache.put("key", ARRAYS)
  assert len(said) == 1
  assert said[0].endswith("cannot be written: No space left on device")


def test_films_of_two_fields_a_frame_are_cached_as_they_are_read(tmp_path, cache):
  film = made_videos.write_fields(tmp_path / "a.mp4", 20)
  draw = lambda seed: None if seed is None else np.random.default_rng(seed)
  for seed in (None, 0, 1):
    cached = read_cached(cache, film, **CLIPS, rng=draw(seed))
    plain = read_clips(film, **CLIPS, rng=draw(seed))
    for found, expected in zip(cached, plain, strict=True):
      np.testing.assert_array_equal(found, expected)
