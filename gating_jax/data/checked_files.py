"""Pictures that were decoded before, so that a folder of many is not decoded again by each command.

Of every folder or table there is an entry in the user's cache (`XDG_CACHE_HOME`; by default
`~/.cache`), with a stamp of each file's path, size and time of change, and the range of its
values. A file that changed is decoded again, and so are those that could not be read. A damaged
entry is made again. Without the library safetensors, or a folder that can be written, nothing is
kept.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import PIL

from gating_jax.data.array_cache import ArrayCache

# Bytes of all entries. A picture takes 21, and the longest unused entries go first.
_MOST_BYTES = 256_000_000
# Part of every key: a change of what is read must change it. So does another decoder.
_VERSION = 1
_DIGEST = 16
_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


def stamp_files(files: Iterable[Path]) -> dict[Path, bytes]:
  """Returns for each file that is there 16 bytes that change with its path, size and time."""
  stamps = {}
  for file in files:
    try:
      stat = os.stat(file)
    # It has just been removed.
    except OSError:
      continue
    text = os.fsencode(file.absolute()) + f"\0{stat.st_size} {stat.st_mtime_ns}".encode()
    stamps[file] = hashlib.blake2b(text, digest_size=_DIGEST).digest()
  return stamps


def recall_ranges(root: Path, stamps: Mapping[Path, bytes]) -> dict[Path, np.ndarray]:
  """Returns the ranges of those files that `keep_ranges` has kept and that have not changed since.

  Args:
    root: the folder or the table.
    stamps: of any files, as `stamp_files` returns them now.
  """
  known, ranges = _known(root), {}
  for file, stamp in stamps.items():
    if stamp in known:
      ranges[file] = known[stamp]
  return ranges


def keep_ranges(
  root: Path, stamps: Mapping[Path, bytes], ranges: Mapping[Path, np.ndarray]
) -> None:
  """Keeps the ranges of files of a folder or a table, next to those kept before.

  Args:
    root: the folder or the table.
    stamps: of the files, from before they were read.
    ranges: the smallest and the largest value of each file, `[2]`. Those of other types than uint8
      and uint16 are not kept.
  """
  known = _known(root)
  for file, found in ranges.items():
    if file in stamps and found.dtype in _TYPES:
      known[stamps[file]] = found
  cache = _open_cache()
  if cache is None or not known:
    return
  arrays = {
    "files": np.stack([np.frombuffer(stamp, np.uint8) for stamp in known]),
    "ranges": np.stack([found.astype(np.uint16) for found in known.values()]),
    "types": np.array([_TYPES.index(found.dtype) for found in known.values()], np.uint8),
  }
  cache.put(_key(root), arrays)


def _known(root: Path) -> dict[bytes, np.ndarray]:
  """Returns the ranges that are kept for a folder or a table, by the stamps of the files."""
  cache = _open_cache()
  kept = None if cache is None else cache.get(_key(root))
  known = {}
  if kept is not None:
    for stamp, extremes, number in zip(kept["files"], kept["ranges"], kept["types"], strict=True):
      known[stamp.tobytes()] = extremes.astype(_TYPES[number])
  return known


def _open_cache() -> ArrayCache | None:
  """Returns the cache of this user; None where there can be none."""
  caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  try:
    return ArrayCache(Path(caches) / "gating_jax" / "checked_files", _MOST_BYTES)
  # Everything works without it.
  except (ValueError, ImportError):
    return None


def _key(root: Path) -> str:
  """Returns the key of a folder's entry."""
  text = f"{_VERSION} {PIL.__version__} ".encode() + os.fsencode(root.absolute())
  return hashlib.sha256(text).hexdigest()
