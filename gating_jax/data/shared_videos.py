"""Videos that two sets have in common, by the paths of their files or by their bytes."""

from __future__ import annotations

import collections
import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

from gating_jax.checks import few
from gating_jax.data.video_tables import FEATURE_SUFFIXES
from gating_jax.data.videos import VIDEO_SUFFIXES, VideoArrays, VideoSet

# Bytes of two files of one size that are compared before they are read whole.
_BEGINNING = 64 * 1024
# Videos that an error names.
_NAMED = 5


class SharedFiles(NamedTuple):
  """Videos of one set that are also in another.

  Attributes:
    by_path: pairs of names, one of each set, whose paths differ in suffix or case at most.
    by_content: pairs of names of other paths, whose files are the same byte for byte.
  """

  by_path: list[tuple[str, str]]
  by_content: list[tuple[str, str]]


def find_shared(one: VideoSet, other: VideoSet) -> SharedFiles:
  """Finds the videos that two sets have in common; each of the second is named once.

  Files of one size are compared by a hash: of their beginnings first, so that few are read whole.
  """
  sizes = {path.stat().st_size for path in other.paths}
  by_path, by_beginning = {}, collections.defaultdict(list)
  for name, path in zip(one.names, one.paths, strict=True):
    by_path.setdefault(_same_video(path), name)
    size = path.stat().st_size
    if size in sizes:
      by_beginning[size, _digest(path, _BEGINNING)].append((name, path))
  found, sizes = SharedFiles([], []), {size for size, _ in by_beginning}
  for name, path in zip(other.names, other.paths, strict=True):
    same_path, size = by_path.get(_same_video(path)), path.stat().st_size
    if same_path is not None:
      found.by_path.append((same_path, name))
    elif size in sizes:
      alike = by_beginning.get((size, _digest(path, _BEGINNING)), [])
      for first_name, first_path in alike:
        if _digest(path) == _digest(first_path):
          found.by_content.append((first_name, name))
          break
  return found


def check_apart(**sets: VideoArrays | VideoSet | None) -> None:
  """Raises a ValueError where a file is in two sets, under names that differ in suffix or case.

  Args:
    **sets: by the names of their splits; sets in memory have no files, and None is no set.
  """
  opened = {split: videos for split, videos in sets.items() if isinstance(videos, VideoSet)}
  for one, other in itertools.combinations(opened, 2):
    paths = {_same_video(path) for path in opened[one].paths}
    shared = []
    for name, path in zip(opened[other].names, opened[other].paths, strict=True):
      if _same_video(path) in paths:
        shared.append(name)
    if shared:
      raise ValueError(
        f"videos must be in one split only; {len(shared)} of {one} are also in {other}: "
        f"{few(shared, _NAMED)}"
      )


def _same_video(path: Path) -> str:
  """Returns what the paths of one video have in common, whatever their suffix and case."""
  # Links lead to the file itself.
  path = path.resolve()
  # Only known suffixes go: a name may hold other dots.
  if path.suffix.lower() in (*VIDEO_SUFFIXES, *FEATURE_SUFFIXES):
    path = path.with_suffix("")
  return str(path).casefold()


def _digest(path: Path, most: int | None = None) -> bytes:
  """Returns the hash of a file's first bytes, or of all of them."""
  with path.open("rb") as file:
    if most is None:
      return hashlib.file_digest(file, "blake2b").digest()
    return hashlib.blake2b(file.read(most)).digest()
