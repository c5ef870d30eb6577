"""Videos as files of features, one array a video.

A file that cannot be read raises; `data/videos.py` turns that into weight 0.

Axes: T segments of an example, T_i rows of video i's file.
"""

from __future__ import annotations

import collections
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from gating_jax.checks import check_unpacked, few
from gating_jax.data.video_tables import FEATURE_SUFFIXES, VideoTable
from gating_jax.data.videos import (
  Batch,
  Segments,
  VideoSet,
  find_file,
  segment_starts,
)

# Unreadable files that an error names.
_NAMED = 5
# Number of readable files that settle the shape of features.
_PROBED = 16
# First bytes of a `.npz` file.
_ZIP = b"PK\3\4"

# Held while NumPy parses a header, with `ast.literal_eval`. CPython before 3.12 counts the depth of
# that recursion once for all threads (python/cpython#106905): two threads that parse at the same
# time may both fail on good files.
_PARSING = threading.Lock()
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class FeatureFolder(VideoSet):
  """Set of videos as features: `.npy` or `.npz` arrays `[T_i, ...]`, one file a video.

  The inputs are `light` and `heavy`, `[T, ...]` float32. From a longer video T rows are taken,
  uniformly spaced; a shorter one is repeated, with `valid` False.

  Args:
    table: table whose names are files in the folders, without suffix or with that of a video.
    light: folder of the features that the gate sees.
    heavy: folder of the features that the classifier sees; None for the same.
    segments: T.
    seed, jitter, workers: as in `VideoFolder`.
  Raises:
    ValueError: a name would leave the folder, or no file is there or can be read.
  """

  def __init__(
    self,
    table: VideoTable,
    light: str | Path,
    heavy: str | Path | None = None,
    *,
    segments: int,
    seed: int = 0,
    jitter: bool = False,
    workers: int = 0,
  ):
    folders = {"light": light}
    if heavy is not None:
      folders["heavy"] = heavy

    def find(name):
      """Returns the video's feature files as `{key: path}`, or None if one is missing."""
      found = {}
      for key, folder in folders.items():
        found[key] = find_file(folder, name, FEATURE_SUFFIXES)
        # A video needs both of its files.
        if found[key] is None:
          return None
      return found

    super().__init__(table, find, segments=segments, seed=seed, jitter=jitter, workers=workers)
    self._shapes = {}
    for key in folders:
      self._shapes[key] = _common_shape([file[key] for file in self._files])

  def _inputs(self) -> Batch:
    """Returns zeros in place of the features of a video."""
    arrays = {}
    for key, shape in self._shapes.items():
      arrays[key] = np.zeros((self._segments, *shape), np.float32)
    # Without a folder of its own, `heavy` is `light`.
    return {"heavy": arrays["light"]} | arrays

  def _load(self, index: int, rng: np.random.Generator | None) -> Segments:
    """Reads the features of a video's segments."""
    arrays = {}
    for key, file in self._files[index].items():
      array = arrays[key] = read_features(file)
      if array.shape[1:] != self._shapes[key]:
        raise ValueError(
          f"{key} features of a segment must be {self._shapes[key]}, like most of them; got "
          f"{array.shape[1:]}"
        )
    arrays = {"heavy": arrays["light"]} | arrays
    own = len(arrays["light"])
    if own != len(arrays["heavy"]):
      raise ValueError(
        f"light and heavy must have the same number of segments; got {own} and "
        f"{len(arrays['heavy'])}"
      )
    rows = np.arange(self._segments) % own
    if own > self._segments:
      rows = segment_starts(own, self._segments, length=1, rng=rng)
    # Rows are spread over the video's length: row i is shown around (i + 1/2) / T_i of it.
    seconds = np.nan if self.table.seconds is None else self.table.seconds[index]
    return Segments(
      inputs={key: array[rows] for key, array in arrays.items()},
      valid=np.arange(self._segments) < own,
      middles=(rows + 0.5) / own * seconds,
    )


def read_features(path: Path) -> np.ndarray:
  """Reads `[T, ...]` numbers as finite float32 from a `.npy` file, or a `.npz` file of one array.

  Nothing is unpickled.

  Args:
    path: the file.
  Returns:
    `[T, ...]` float32.
  Raises:
    ValueError: no such array, or an archive that unpacks to far more than its own size.
    OSError: a file that cannot be read.
  """
  with open(path, "rb") as file:
    # By content and not by suffix.
    is_archive = file.peek(len(_ZIP)).startswith(_ZIP)
    features = _read_only_member(file) if is_archive else _read_array(file)
  # Float64 values too large for float32 become infinite, and are refused below.
  with np.errstate(over="ignore"):
    features = features.astype(np.float32)
  if not np.isfinite(features).all():
    raise ValueError("holds NaN or infinite numbers")
  return features


def _read_only_member(file: BinaryIO) -> np.ndarray:
  """Reads the array of a `.npz` file of one array."""
  # `np.load` lists the arrays; it opens none of them.
  with np.load(file, allow_pickle=False) as archive:
    if len(archive.files) != 1:
      raise ValueError(f"must hold one array; got {sorted(archive.files)}")
    # Their sizes first: a small archive may unpack to more than memory holds.
    check_unpacked(
      [member.file_size for member in archive.zip.infolist()], os.fstat(file.fileno()).st_size
    )
    (name,) = archive.zip.namelist()
    with archive.zip.open(name) as member:
      return _read_array(member)


def _read_array(file: BinaryIO) -> np.ndarray:
  """Reads the numbers of a `.npy` file, of any real type.

  Threads read at the same time, but parse headers one at a time.
  """
  version = npy.read_magic(file)
  if version not in _HEADERS:
    raise ValueError(f"must be a .npy file of version 1.0 or 2.0; got {version[0]}.{version[1]}")
  with _PARSING:
    shape, by_columns, dtype = _HEADERS[version](file)
  if dtype.kind not in "fiu" or len(shape) < 2 or min(shape) < 1:
    raise ValueError(f"must hold real numbers [T, ...]; got {dtype} {shape}")
  # `np.fromfile` needs a real file; a member of an archive is none.
  content, count = file.read(), math.prod(shape)
  if len(content) < count * dtype.itemsize:
    raise ValueError(
      f"must hold {count} numbers of {dtype}; it ends after {len(content) // dtype.itemsize}"
    )
  return np.frombuffer(content, dtype, count).reshape(shape, order="F" if by_columns else "C")


def _common_shape(files: Sequence[Path]) -> tuple[int, ...]:
  """Returns the shape `[...]` that most of the first readable files have.

  Args:
    files: files of features `[T, ...]`.
  Raises:
    ValueError: no file can be read; the first five are named with their reasons.
  """
  shapes, reasons = [], []
  for file in files:
    try:
      shapes.append(read_features(file).shape[1:])
    # A damaged file makes its reader raise errors of many types.
    except Exception as error:
      reasons.append(f"{file} ({error})")
    if len(shapes) == _PROBED:
      break
  if not shapes:
    raise ValueError(f"the folder must hold readable features; {few(reasons, _NAMED)}")
  return collections.Counter(shapes).most_common(1)[0][0]
