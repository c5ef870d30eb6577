"""Files that cannot be read, found before they are needed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gating_jax.cores import usable_cores
from gating_jax.terminal import progress_bar


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
