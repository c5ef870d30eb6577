"""A folder of bounded size that keeps arrays which were read from files, so that each is read once.

An entry is found by the file, its size and time of change, and the settings of the reading: where
one of these differs, the arrays are made again. So they are where an entry is damaged. Several
processes may share a folder. Entries are safetensors files.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gating_jax.checks import printable, user_path
from gating_jax.extras import naming_extra
from gating_jax.terminal import warn

# Part of every key: a change of what entries hold must change it.
_VERSION = 1
_SUFFIX, _UNFINISHED = ".safetensors", ".tmp"
# Name of the checksum among the arrays of an entry.
_CHECKSUM = "crc32"
# Entries written between two looks at the folder, in which other processes write too.
_LOOK_EVERY = 64
# Seconds after which a file that is being written was left by a process that was killed.
_ABANDONED = 3600.0


def stamp_of(path: Path) -> tuple[str, int, int]:
  """Returns a file's absolute path, size and time of change in nanoseconds.

  Raises:
    OSError: there is no such file.
  """
  stat = os.stat(path)
  return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


class ArrayCache:
  """Arrays on disk, of which the longest unused ones go first.

  Args:
    folder: made if missing.
    most_bytes: of all entries together. Each process that writes may exceed it by a few entries.
  Raises:
    ValueError: the folder cannot be written, or the bound is not positive.
    ModuleNotFoundError: safetensors is missing; the message says how to install it.
  """

  def __init__(self, folder: str | Path, most_bytes: int):
    if most_bytes <= 0:
      raise ValueError(f"most_bytes must be > 0; got {most_bytes}")
    # Named here, and not by the first video that is read.
    with naming_extra():
      import safetensors.numpy  # noqa: F401
    self._folder, self._most = user_path(folder).absolute(), most_bytes
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise ValueError(
        f"the cache must be a folder that can be written; {folder}: {error.strerror}"
      ) from error
    # Bytes in the folder as this process knows them, and entries written since it looked.
    self._bytes, self._written = 0, _LOOK_EVERY
    self._failed = False

  def key(self, path: Path, **settings: object) -> str:
    """Returns the key of what is read from a file with these settings.

    Args:
      path: the file, which must be there.
      **settings: anything that JSON can hold.
    """
    text = json.dumps([_VERSION, stamp_of(path), settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

  def get(self, key: str) -> dict[str, np.ndarray] | None:
    """Returns the arrays of an entry, or None where there is none or it is damaged."""
    file = self._file(key)
    try:
      data = file.read_bytes()
      # The time of change is that of the last use.
      os.utime(file)
    # It is missing, or another process has just removed it.
    except OSError:
      return None
    arrays = _unpacked(data)
    if arrays is None:
      warn("entry %s of the cache is damaged and is made again", printable(str(file)))
    return arrays

  def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps arrays, each of at least one element.

    Where the disk is full, nothing is kept and a warning is logged, once.
    """
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    data = save({**whole, _CHECKSUM: np.array([_checksum(whole)], np.uint32)})
    if len(data) > self._most:
      return
    # Written aside, so that no reader finds half of an entry.
    aside = self._folder / f"{key}.{os.getpid()}.{threading.get_ident()}{_UNFINISHED}"
    try:
      aside.write_bytes(data)
      aside.replace(self._file(key))
    except OSError as error:
      aside.unlink(missing_ok=True)
      if not self._failed:
        self._failed = True
        warn("the cache %s cannot be written: %s", printable(str(self._folder)), error.strerror)
      return
    self._bytes += len(data)
    self._written += 1
    if self._bytes > self._most or self._written >= _LOOK_EVERY:
      self._look()

  def _file(self, key: str) -> Path:
    """Returns the file of an entry."""
    return self._folder / f"{key}{_SUFFIX}"

  def _look(self) -> None:
    """Counts the bytes in the folder, and removes the longest unused entries beyond the bound."""
    entries, now = [], time.time()
    for file in self._folder.iterdir():
      try:
        stat = file.stat()
        if file.suffix == _UNFINISHED and now - stat.st_mtime > _ABANDONED:
          file.unlink()
      # Another process has just removed or renamed it.
      except OSError:
        continue
      if file.suffix == _SUFFIX:
        entries.append((stat.st_mtime_ns, stat.st_size, file))
    self._bytes, self._written = sum(size for _, size, _ in entries), 0
    for _, size, file in sorted(entries):
      if self._bytes <= self._most:
        return
      file.unlink(missing_ok=True)
      self._bytes -= size


def _checksum(arrays: Mapping[str, np.ndarray]) -> int:
  """Returns the CRC-32 of all arrays in the order of their names."""
  crc = 0
  for name in sorted(arrays):
    values = np.ascontiguousarray(arrays[name])
    # As bytes, without a copy.
    crc = zlib.crc32(values.reshape(-1).view(np.uint8).data, crc)
  return crc


def _unpacked(data: bytes) -> dict[str, np.ndarray] | None:
  """Returns the arrays in the bytes of an entry; None where they are damaged."""
  from safetensors.numpy import load

  try:
    arrays = load(data)
    expected = int(arrays.pop(_CHECKSUM)[0])
  # A damaged file raises errors of many types.
  except Exception:
    return None
  return arrays if _checksum(arrays) == expected else None
