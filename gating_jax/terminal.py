"""Standard streams that may be no terminal, closed, or missing.

A thread of a server or `2>&-` has such streams.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from absl import logging
from tqdm import tqdm


def prepare_streams() -> None:
  """Opens the standard streams that are closed, for a command, and lets them take any text.

  Otherwise the next file that is opened gets the number of the missing stream, and what a library
  writes to the stream lands in that file. Characters that the encoding of stdout lacks, such as
  bytes of a path that are not UTF-8, are written as `\\xff`.
  """
  for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
    try:
      os.fstat(number)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)
      os.dup2(nowhere, number)
      if nowhere != number:
        os.close(nowhere)
    # Python sets the stream to None where its number was closed at the start.
    if not is_open(getattr(sys, name)):
      setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")


def is_open(stream: Any) -> bool:
  """Returns whether the stream can be written to; `sys.stdout` may be None or closed."""
  return stream is not None and not getattr(stream, "closed", False)


def is_terminal(stream: Any) -> bool:
  """Returns whether the stream is open and shown to someone as it is written."""
  return is_open(stream) and hasattr(stream, "isatty") and stream.isatty()


# The log then shows the caller's line, not one of this function.
@logging.skip_log_prefix
def warn(text: str, *parts: Any) -> None:
  """Logs the warning `text % parts`; without stderr, only other handlers receive it.

  The handlers of absl and of Python itself take stderr for granted, and raise where it is None or
  closed.
  """
  try:
    logging.warning(text, *parts)
  except (AttributeError, OSError, ValueError):
    # With stderr in place the error has another cause.
    if is_open(sys.stderr):
      raise


def progress_bar(*items: Any, hidden: bool = False, **settings: Any) -> tqdm:
  """Returns a `tqdm` on stderr; it shows nothing without a terminal, or where `hidden`.

  tqdm itself fails on a stream that is None, and then keeps its lock: the next bar would wait
  forever.

  Args:
    items, settings: the arguments of `tqdm`.
    hidden: shows nothing on a terminal either.
  """
  return tqdm(*items, disable=hidden or not is_terminal(sys.stderr), **settings)
