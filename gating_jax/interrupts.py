"""Ctrl-C while a command loads its libraries, and how messages name the command that resumes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

# The exit status of a command that Ctrl-C ended, as shells count it.
STATUS = 128 + signal.SIGINT
# What resumes a training that was stopped. The command adds the run directory that it chose itself.
same_command = "the same command"


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
  """Lets Ctrl-C end the process in the block with one line, and with status 130.

  A KeyboardInterrupt in the middle of an import prints a traceback, or becomes another error on its
  way through a library. Whoever ignores or handles Ctrl-C continues to do so.
  """
  ours = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
  )
  if ours:
    signal.signal(signal.SIGINT, _end)
  try:
    yield
  finally:
    if ours:
      signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
  """Ends the process; writes past Python's streams, which the interrupted code may hold."""
  with contextlib.suppress(OSError):
    os.write(2, b"interrupted before anything was read or written\n")
  os._exit(STATUS)
