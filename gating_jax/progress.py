"""What a command says while it works: what it does, how far it is, and about how long the rest takes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gating_jax.terminal import is_open

Advance = Callable[[int, int], None]  # of pieces done, and of all
_AFTER, _EVERY = (
  1.0,
  10.0,
)  # seconds until the first line of a piece of work, and between those that follow
TRAINING = "training step"  # a program of a training, as people are told of it
_PACE = 3.0  # seconds of training after which the time of the rest is estimated


def lasting(seconds: float) -> str:
  """A time for people.

  >>> lasting(0.2), lasting(75), lasting(4000)
  ('1 s', '1 min 15 s', '1 h 6 min')
  """
  whole = max(1, round(seconds))
  if whole < 60:
    return f"{whole} s"
  if whole < 3600:
    return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
  return f"{whole // 3600} h" + (f" {whole % 3600 // 60} min" if whole % 3600 >= 60 else "")


def say(text: str) -> None:
  """Prints a line at once, where there is anything to print to."""
  if is_open(sys.stdout):
    print(text, flush=True)


@contextlib.contextmanager
def working(what: str, about: str = "", tell: Callable[[str], None] = say) -> Iterator[Advance]:
  """Says what is done and about how long it takes, and every ten seconds, until the block ends, how far it is.

  What is done within a second is done in silence.

  Args:
    what: is done in the block.
    about: how long it takes, such as `about a minute`.
    tell: takes a line.
  Yields:
    A function to call with the pieces that are done and the number of all: the lines then say what time is left.
  """
  started, ended, pieces = time.monotonic(), threading.Event(), []

  def tick():
    if ended.wait(_AFTER):
      return
    tell(f"{what} ({about}) ..." if about else f"{what} ...")
    while not ended.wait(_EVERY):
      tell("  " + _how_far(time.monotonic() - started, pieces))

  ticker = threading.Thread(target=tick, daemon=True)
  ticker.start()
  try:
    yield lambda done, total: pieces.append((time.monotonic() - started, done, total))
  finally:
    ended.set()
    ticker.join()


def _how_far(spent: float, pieces: Sequence[tuple[float, int, int]]) -> str:
  """A line after so many seconds; pieces have the seconds at which they were done, their number and that of all."""
  if not pieces:
    return f"{lasting(spent)} so far"
  (begun, first, _), (_, done, total) = pieces[0], pieces[-1]
  line = f"{done} of {total} after {lasting(spent)}"
  if first < done < total:  # what came before the first piece says nothing of the others
    line += f", about {lasting((spent - begun) * (total - done) / (done - first))} to go"
  return line


class Pace:
  """Says of a training that its step is compiled and, when a few seconds of steps show it, how long it takes.

  Of trainings that follow each other, as of tasks, one serves for all. Each of their programs is compiled and takes its
  own time.

  Args:
    tell: takes a step and a line.
    total_steps: of all trainings.
    others: `step -> ` how many of the steps from this one on are of programs that are not `TRAINING`, by program.
  """

  def __init__(
    self,
    tell: Callable[[int, str], None],
    total_steps: int,
    others: Callable[[int], Mapping[str, int]] = lambda step: {},
  ):
    self._tell, self._total, self._others = tell, total_steps, others
    self._compiled, self._told = set(), False
    self._seconds = {}  # of a step, by program

  def __call__(
    self, advance: Callable[[Any, int], Any], program: str = TRAINING
  ) -> Callable[[Any, int], Any]:
    """`advance`, `(state, step) -> ...`, with these lines; `program` is the name of what it runs."""
    calls, begun = 0, (0.0, 0)

    def paced(state, step):
      nonlocal calls, begun
      calls += 1
      if program not in self._compiled:
        self._compiled.add(program)
        tell = lambda text: self._tell(step, text)
        with working(f"compiling the {program}", "up to a minute or two on a CPU, once", tell):
          return advance(state, step)
      now = time.monotonic()
      if calls == 3:  # before that, what is compiled takes more than the steps
        begun = now, step
      elif calls > 3:
        spent, steps = now - begun[0], step - begun[1]
        self._seconds[program] = spent / steps
        if spent > _PACE:
          self._estimate(step)
      return advance(state, step)

    return paced

  def _estimate(self, step: int) -> None:
    """Says once how long the rest takes, as soon as a step of each program in it has been timed."""
    left = dict(self._others(step))
    left[TRAINING] = self._total - step - sum(left.values())
    if self._told or any(steps and program not in self._seconds for program, steps in left.items()):
      return
    self._told = True
    seconds = sum(steps * self._seconds[program] for program, steps in left.items() if steps)
    if seconds > _PACE:
      self._tell(step, f"about {lasting(seconds)} of training to go")
