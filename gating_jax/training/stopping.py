"""SIGTERM and Ctrl-C during a training: asked to stop, it saves a checkpoint and ends in time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from types import FrameType

import jax

from gating_jax import interrupts
from gating_jax.terminal import say

# Seconds after which a SIGTERM that is not answered ends the process.
_PATIENCE = 8.0
# The same after a second Ctrl-C, from someone who waits.
_PATIENCE_AGAIN = 1.0


class Interrupted(KeyboardInterrupt):
  """The interrupt of a training that Ctrl-C has stopped, after its checkpoint was saved."""


class StopRequest:
  """A context that turns SIGTERM and Ctrl-C into a flag for the loop.

  The first Ctrl-C is confirmed at once; a second one interrupts. Python handles signals on the main
  thread alone: on another thread, as in a server, whoever started that thread handles them, and
  nothing is changed here.

  Where the loop is alone in its job and does not `answer` a SIGTERM or a second Ctrl-C in time,
  since a program is compiled or a test runs, the process ends without another checkpoint: whoever
  sent it would kill the process soon. The newest checkpoint is whole, and training resumes from it.

  Attributes:
    requested: whether the loop was asked to stop.
    interrupted: whether the first to ask was a Ctrl-C, from someone who waits for the process. A
      launch script starts its processes with Ctrl-C ignored, since it stops them itself.
  """

  def __init__(self):
    self.requested = self.interrupted = False
    self._previous = {}
    self._deadline: _Deadline | None = None

  def __enter__(self) -> StopRequest:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        # A handler that was not set from Python is seen as None, and could not be restored.
        if signal.getsignal(number) is not None:
          self._previous[number] = signal.signal(number, self._request)
      # Several processes stop at one step, which is not up to this one.
      if signal.SIGTERM in self._previous and jax.process_count() == 1:
        self._deadline = _Deadline()
    return self

  def answer(self) -> None:
    """Says that the loop has seen the request: from here on it may take its time."""
    if self._deadline is not None:
      self._deadline.meet()

  def __exit__(self, *_: object) -> None:
    if self._deadline is not None:
      self._deadline.close()
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _request(self, number: int, _frame: FrameType | None) -> None:
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    if number == signal.SIGINT and not self.requested:
      self.interrupted = self._previous.get(number) != signal.SIG_IGN
      # The thread that watches has confirmed it already, even while a program is compiled.
      if self._deadline is None or not self._deadline.armed:
        _confirm_interrupt()
    self.requested = True


def _confirm_interrupt() -> None:
  """Says that Ctrl-C was seen; writes past Python's streams, which may be held."""
  with contextlib.suppress(OSError):
    # On a line of its own, below a progress bar.
    os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")


class _Deadline:
  """A thread that confirms a Ctrl-C, and ends the process where a signal is not met in time.

  Python runs a handler between two of its own instructions, so not while the main thread waits for
  a compiler or a program. The number of a signal is written to a pipe at once.
  """

  def __init__(self):
    self._met = threading.Event()
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    self.armed = before == -1
    # An event loop, as in a notebook, has a pipe of its own, which must stay.
    if not self.armed:
      signal.set_wakeup_fd(before)
    # A daemon, so that it cannot hold up the end of the process.
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def meet(self) -> None:
    """Lets the process live on."""
    self._met.set()

  def close(self) -> None:
    """Ends the watch."""
    self.meet()
    if self.armed:
      signal.set_wakeup_fd(-1)
    # The thread reads the end of the pipe.
    os.close(self._write)
    self._thread.join()
    os.close(self._read)

  def _watch(self) -> None:
    """Waits for a SIGTERM, or for a second Ctrl-C, and then for an answer."""
    asked = False
    while numbers := os.read(self._read, 16):
      for number in numbers:
        if number not in (signal.SIGINT, signal.SIGTERM):
          continue
        if number == signal.SIGINT and not asked:
          _confirm_interrupt()
        elif not self._met.wait(_PATIENCE if number == signal.SIGTERM else _PATIENCE_AGAIN):
          _end_process(number)
          return
        asked = True


def _end_process(number: int) -> None:
  """Ends this process at once, after its workers, with the status of this signal."""
  say(
    "asked to stop while busy: ended without another checkpoint; run "
    f"{interrupts.same_command} to resume from the newest one"
  )
  # Closed pools free their shared memory, but each waits for its workers, perhaps forever.
  closing = threading.Thread(target=_close_pools, daemon=True)
  closing.start()
  closing.join(1.0)
  # Workers would live on. Python frees the shared memory of a job whose processes have all ended.
  for worker in multiprocessing.active_children():
    worker.kill()
  os._exit(128 + number)


def _close_pools() -> None:
  """Ends the workers that read data, where any have been started."""
  streaming = sys.modules.get("gating_jax.data.streaming")
  if streaming is not None:
    streaming.close_pools()
