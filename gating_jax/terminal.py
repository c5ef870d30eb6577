"""Messages of a command: lines, warnings, progress bars, the work in hand and the time left.

Standard streams may be no terminal, closed, or missing: a thread of a server or `2>&-` has such.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import logging
from tqdm import tqdm

if TYPE_CHECKING:
  from gating_jax.timing import ReportProgress

# Seconds until the first line of a piece of work, and between the lines that follow.
_AFTER, _EVERY = 1.0, 10.0
# The main program of a training, as messages name it.
TRAINING = "training step"
# Seconds of training before the time left is estimated.
_PACE = 3.0


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
  reconfigure = getattr(sys.stdout, "reconfigure", None)
  if reconfigure is not None:
    reconfigure(errors="backslashreplace")


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


def lasting(seconds: float) -> str:
  """Formats a time in seconds as human-readable text.

  >>> lasting(0.2), lasting(75), lasting(4000)
  ('1 s', '1 min 15 s', '1 h 6 min')
  """
  whole = max(1, round(seconds))
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"
  hours, rest = divmod(whole // 60, 60)
  return f"{hours} h {rest} min" if rest else f"{hours} h"


def say(text: str) -> None:
  """Prints a line at once; does nothing where stdout is missing or closed."""
  if is_open(sys.stdout):
    print(text, flush=True)


def say_error(text: str) -> None:
  """Prints a line to stderr at once; does nothing where that is missing or closed."""
  if is_open(sys.stderr):
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ticking(tick: Callable[[], None], seconds: float) -> Iterator[None]:
  """Calls `tick` every so many seconds, on a thread of its own, while the block lasts."""
  ended = threading.Event()

  def run():
    """Calls `tick` until the block ends."""
    while not ended.wait(seconds):
      tick()

  # A daemon, so that it cannot hold up the end of the process.
  ticker = threading.Thread(target=run, daemon=True)
  ticker.start()
  try:
    yield
  finally:
    ended.set()
    ticker.join()


@contextlib.contextmanager
def working(
  what: str, about: str = "", tell: Callable[[str], None] = say
) -> Iterator[ReportProgress]:
  """Announces the work in the block, then reports every ten seconds how far it is.

  Work that ends within a second is silent. On a terminal a bar shows pieces of work that are
  counted, in place of these lines.

  Args:
    what: the work in the block.
    about: the time it takes, such as `about a minute`.
    tell: takes a line.
  Yields:
    a function to call with the pieces done and their total; the lines then estimate the time left.
  """
  started, ended, pieces = time.monotonic(), threading.Event(), []
  bar: tqdm | None = None

  def tick():
    """Announces the work, then reports its progress until it ends."""
    if ended.wait(_AFTER):
      return
    tell(f"{what} ({about}) ..." if about else f"{what} ...")
    while not ended.wait(_EVERY):
      # A line would break a bar that is shown.
      if bar is None or bar.disable:
        tell("  " + _how_far(time.monotonic() - started, pieces))

  # A daemon, so that it cannot hold up the end of the process.
  ticker = threading.Thread(target=tick, daemon=True)
  ticker.start()

  def advance(done, total):
    """Notes how many pieces are done."""
    nonlocal bar
    pieces.append((time.monotonic() - started, done, total))
    if bar is None:
      bar = progress_bar(total=total, desc=what, leave=False)
    bar.update(done - bar.n)

  try:
    yield advance
  finally:
    ended.set()
    ticker.join()
    if bar is not None:
      bar.close()


def _how_far(spent: float, pieces: Sequence[tuple[float, int, int]]) -> str:
  """Returns a progress line.

  Args:
    spent: seconds so far.
    pieces: `(seconds, done, total)` of each report: when it came, and what it said.
  """
  if not pieces:
    return f"{lasting(spent)} so far"
  (begun, first, _), (_, done, total) = pieces[0], pieces[-1]
  line = f"{done} of {total} after {lasting(spent)}"
  # The time before the first report includes the set-up: the estimate leaves it out.
  if first < done < total:
    line += f", about {lasting((spent - begun) * (total - done) / (done - first))} to go"
  return line


class Pace:
  """Messages on a training's pace: that its step is compiled, and how long the rest takes.

  One instance serves trainings that follow each other, such as those of tasks. Each program is
  compiled, and timed, on its own.

  Args:
    tell: takes a step and a line.
    total_steps: the steps of all trainings.
    others: `step -> ` the steps from this one on that run programs other than `TRAINING`, by
      program; None where there is no other.
  """

  def __init__(
    self,
    tell: Callable[[int, str], None],
    total_steps: int,
    others: Callable[[int], Mapping[str, int]] | None = None,
  ):
    self._tell, self._total, self._others = tell, total_steps, others
    self._compiled, self._told = set(), False
    # Seconds that a step takes, by program.
    self._seconds = {}

  def __call__(
    self, advance: Callable[[Any, int], Any], program: str = TRAINING
  ) -> Callable[[Any, int], Any]:
    """Wraps `advance`, `(state, step) -> ...`, with these messages.

    Args:
      advance: the function to time.
      program: the name of the program that it runs.
    Returns:
      a function with the arguments and results of `advance`.
    """
    calls, begun = 0, (0.0, 0)

    def paced(state, step):
      """Runs `advance`; reports that it compiles, or how long training still takes."""
      nonlocal calls, begun
      calls += 1
      # The first call of a program compiles it.
      if program not in self._compiled:
        self._compiled.add(program)
        tell = functools.partial(self._tell, step)
        with working(f"compiling the {program}", "up to a minute or two on a CPU, once", tell):
          return advance(state, step)
      now = time.monotonic()
      # The first two calls include compilation, so the clock starts at the third.
      if calls == 3:
        begun = now, step
      elif calls > 3:
        spent, steps = now - begun[0], step - begun[1]
        self._seconds[program] = spent / steps
        if spent > _PACE:
          self._estimate(step)
      return advance(state, step)

    return paced

  def _estimate(self, step: int) -> None:
    """Tells the time left, once, as soon as a step of each program in it has been timed."""
    if self._told:
      return
    left = dict(self._others(step)) if self._others else {}
    # All steps that no other program takes are of the main one.
    left[TRAINING] = self._total - step - sum(left.values())
    seconds = 0.0
    for program, steps in left.items():
      if not steps:
        continue
      # A program that has not been timed: the estimate comes later.
      if program not in self._seconds:
        return
      seconds += steps * self._seconds[program]
    self._told = True
    if seconds > _PACE:
      self._tell(step, f"about {lasting(seconds)} of training to go")
