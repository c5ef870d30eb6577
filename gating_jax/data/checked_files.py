"""Files that are checked before they are needed, and the ranges of pictures that were.

Files that cannot be read are listed with the reasons, in `unreadable_files.csv` of a run directory.

A folder of many pictures is not decoded again by each command. Of every folder or table there is an
entry in the user's cache (`XDG_CACHE_HOME`; by default `~/.cache`), with a stamp of each file's
path, size and time of change, and the range of its values. A file that changed is decoded again,
and so are those that could not be read. A damaged entry is made again. Without the library
safetensors, or a folder that can be written, nothing is kept.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL

from gating_jax.checks import printable
from gating_jax.cores import usable_cores
from gating_jax.data.array_cache import ArrayCache, stamp_of
from gating_jax.data.text_files import write_atomically
from gating_jax.terminal import progress_bar, warn

UNREADABLE_FILE = "unreadable_files.csv"

# Bytes of all entries. A picture takes 21, and the longest unused entries go first.
_MOST_BYTES = 256_000_000
# Part of every key: a change of what is read must change it. So does another decoder.
_VERSION = 2
_DIGEST = 16
_TYPES = (np.dtype(np.uint8), np.dtype(np.uint16))
# Held while a reading thread notes a file, so that each is reported once.
_NOTING = threading.Lock()


class UnreadableFileError(ValueError):
  """Error for a file of a data set that cannot be read.

  Attributes:
    file: the file.
    reason: why it cannot be read, such as `is empty`.
  """

  def __init__(self, file: Path, reason: str):
    super().__init__(f"{printable(file)} cannot be read: {reason}")
    self.file, self.reason = file, reason


class FaultNotes:
  """Files that cannot be read, with the reasons: those of a check, and those noted since.

  Attributes:
    checked, later: the first reason for each file, by its path or name.
  """

  def __init__(
    self,
    checked: Mapping[str, str],
    message: str = "%s could be read when the data were opened, but not any more: it %s. The next "
    "image is read instead",
  ):
    """Begins with the files of a check.

    Args:
      checked: the reason for each file.
      message: the warning of a file that is noted later, with places for file and reason.
    """
    self.checked, self._message = dict(checked), message
    self.later: dict[str, str] = {}
    # A copy in a worker process has its own notes; the process that made the notes reports.
    self._process = os.getpid()

  def note(self, reasons: Mapping[str, str]) -> None:
    """Keeps the first reason for each file, and reports it in the main process."""
    with _NOTING:
      for file in reasons.keys() - self.later.keys():
        self.later[file] = reasons[file]
        if os.getpid() == self._process:
          warn(self._message, printable(file), printable(reasons[file]))


def write_unreadable(folder: Path, reasons: Mapping[str, str]) -> None:
  """Writes `unreadable_files.csv`, with a header, into a run directory; removes it for no files.

  Bytes of a name that are not UTF-8 are written as Python's surrogates, such as `\\udcff`.

  Args:
    folder: the run directory.
    reasons: the reason for each file, by its path.
  """
  path = folder / UNREADABLE_FILE
  if not reasons:
    path.unlink(missing_ok=True)
    return
  table = io.StringIO(newline="")
  writer = csv.writer(table)
  writer.writerow(("path", "reason"))
  writer.writerows(sorted(reasons.items()))
  write_atomically(path, table.getvalue().encode("utf-8", errors="backslashreplace"))


def find_faults(
  files: Sequence[Path],
  read: Callable[[Path], object],
  desc: str,
  *,
  describe: Callable[[Exception], str],
) -> list[str | None]:
  """Reads files in several threads; returns why each cannot be read, None where it can.

  An interruption waits for files that are being read, and for no others.

  Args:
    files: the files.
    read: reads a file; what it returns is dropped. Its errors, of any type, are the faults.
    desc: of the progress bar.
    describe: returns the text of an error.

  >>> texts = {Path("a"): "1", Path("b"): "one"}
  >>> name = lambda error: type(error).__name__
  >>> find_faults(list(texts), lambda file: int(texts[file]), "checking", describe=name)
  [None, 'ValueError']
  """
  # More threads than cores gain nothing: decoders work without Python's lock.
  pool = ThreadPoolExecutor(usable_cores())
  try:
    found = pool.map(functools.partial(_fault_of, read, describe), files)
    return list(progress_bar(found, total=len(files), desc=desc, leave=False))
  finally:
    # Otherwise Ctrl-C would wait for every file.
    pool.shutdown(cancel_futures=True)


def _fault_of(
  read: Callable[[Path], object], describe: Callable[[Exception], str], file: Path
) -> str | None:
  """Returns why a file cannot be read; None if it can."""
  try:
    read(file)
  # Damaged files make decoders raise errors of many types.
  except Exception as error:
    return describe(error)
  return None


def stamp_files(files: Iterable[Path]) -> dict[Path, bytes]:
  """Returns for each file that is there 16 bytes that change with its path, size and time."""
  stamps = {}
  for file in files:
    try:
      path, size, changed = stamp_of(file)
    # It has just been removed.
    except OSError:
      continue
    text = os.fsencode(path) + f"\0{size} {changed}".encode()
    stamps[file] = hashlib.blake2b(text, digest_size=_DIGEST).digest()
  return stamps


def recall_ranges(root: Path, stamps: Mapping[Path, bytes]) -> dict[Path, np.ndarray]:
  """Returns the ranges of those files that `keep_ranges` has kept and that have not changed since.

  Args:
    root: the folder or the table.
    stamps: of any files, as `stamp_files` returns them now.
  """
  cache, ranges = _open_cache(), {}
  known = {} if cache is None else _known(cache, root)
  for file, stamp in stamps.items():
    if stamp in known:
      ranges[file] = known[stamp]
  return ranges


def keep_ranges(
  root: Path,
  stamps: Mapping[Path, bytes],
  ranges: Mapping[Path, np.ndarray],
  *,
  listed: Iterable[Path],
) -> None:
  """Keeps the ranges of files of a folder or a table, next to those kept before.

  Args:
    root: the folder or the table.
    stamps: of the files, from before they were read.
    ranges: the smallest and the largest value of each file, `[2]`. Those of other types than uint8
      and uint16 are not kept.
    listed: all files of the folder or the table. What was kept of one that changed or went away is
      dropped.
  """
  cache = _open_cache()
  if cache is None:
    return
  others = stamp_files(file for file in listed if file not in stamps)
  present = {*stamps.values(), *others.values()}
  known = {}
  # Another process may have kept those of another split meanwhile.
  for stamp, found in _known(cache, root).items():
    if stamp in present:
      known[stamp] = found
  for file, found in ranges.items():
    if file in stamps and found.dtype in _TYPES:
      known[stamps[file]] = found
  if not known:
    return
  arrays = {
    "files": np.stack([np.frombuffer(stamp, np.uint8) for stamp in known]),
    "ranges": np.stack([found.astype(np.uint16) for found in known.values()]),
    "types": np.array([_TYPES.index(found.dtype) for found in known.values()], np.uint8),
  }
  cache.put(_key(root), arrays)


def _known(cache: ArrayCache, root: Path) -> dict[bytes, np.ndarray]:
  """Returns the ranges that are kept for a folder or a table, by the stamps of the files."""
  kept, known = cache.get(_key(root)), {}
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
