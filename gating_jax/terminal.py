"""The standard streams, which may be no terminal, closed, or not there at all, as in a thread of a server or 2>&-."""

from __future__ import annotations

import os
import sys
from typing import Any

from absl import logging
from tqdm import tqdm


def prepare_streams() -> None:
  """Opens the standard streams that are closed, for a command, and lets them take any text.

  Else the next file that is opened has the number of the missing stream, and what a library writes to the stream lands
  in that file. What the encoding of stdout lacks, such as bytes of a path that are no UTF-8, is written as `\\xff`.
  """
  for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
    try:
      os.fstat(number)
    except OSError:
      nowhere = os.open(os.devnull, os.O_RDWR)
      os.dup2(nowhere, number)
      if nowhere != number:
        os.close(nowhere)
    if not is_open(getattr(sys, name)):
      setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")


def is_open(stream: Any) -> bool:
  """Whether anything can be written to the stream: `sys.stdout` and the like may be None or closed."""
  return stream is not None and not getattr(stream, "closed", False)


def is_terminal(stream: Any) -> bool:
  """Whether the stream is open and someone reads it as it is written."""
  return is_open(stream) and hasattr(stream, "isatty") and stream.isatty()


@logging.skip_log_prefix  # the line that it is logged from is that of its caller
def warn(text: str, *parts: Any) -> None:
  """Logs a warning, `text % parts`, of what goes on nevertheless; without stderr, only other handlers may have it.

  The handlers of absl and of Python itself take stderr for granted, and raise where it is None or closed.
  """
  try:
    logging.warning(text, *parts)
  except (AttributeError, OSError, ValueError):
    if is_open(sys.stderr):
      raise


def progress_bar(*items: Any, hidden: bool = False, **settings: Any) -> tqdm:
  """A `tqdm` of these arguments on stderr, where that is a terminal; elsewhere, or if `hidden`, one that shows nothing.

  tqdm itself fails on a stream that is None, and then keeps its lock: the next bar would wait for ever.
  """
  return tqdm(*items, disable=hidden or not is_terminal(sys.stderr), **settings)
