"""Messages of a command while it works."""

import contextlib
import re
import threading

import pytest

from gating_jax import progress


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(progress, "_AFTER", 0.0)
  monkeypatch.setattr(progress, "_EVERY", 0.01)


def test_work_says_what_is_done_how_far_it_is_and_what_is_left():
  said, twice = [], threading.Event()

  def tell(line):
    said.append(line)
    if line.startswith("  2 of 8"):
      twice.set()

  with progress.working("timing programs", "some minutes", tell) as advance:
    advance(1, 8)
    advance(2, 8)
    assert twice.wait(30)
  assert said[0] == "timing programs (some minutes) ..."
  assert re.fullmatch(r"  2 of 8 after \d+ s, about \d+ s to go", said[-1])
  silent = len(said)
  assert not threading.Event().wait(0.05)
  assert len(said) == silent


def test_work_of_unknown_size_says_for_how_long_it_goes_on():
  assert progress._how_far(75, []) == "1 min 15 s so far"
  assert progress._how_far(60, [(50, 1, 4)]) == "1 of 4 after 1 min"
  assert progress._how_far(60, [(50, 1, 4), (58, 2, 4)]) == "2 of 4 after 1 min, about 20 s to go"
  assert progress._how_far(60, [(50, 1, 4), (58, 4, 4)]) == "4 of 4 after 1 min"


def test_work_of_a_moment_is_silent(monkeypatch):
  monkeypatch.setattr(progress, "_AFTER", 30.0)
  said = []
  with progress.working("work", tell=said.append):
    pass
  assert said == []


def test_work_that_fails_says_no_more():
  said = []
  with pytest.raises(KeyError), progress.working("work", tell=said.append):
    raise KeyError
  silent = len(said)
  threading.Event().wait(0.05)
  assert len(said) == silent


def test_a_training_says_that_it_compiles_and_once_how_long_it_takes(monkeypatch):
  clock = iter(range(0, 1000, 2))  # seconds, at each call but the first
  said = []
  pace = progress.Pace(lambda step, line: said.append((step, line)), total_steps=200)
  monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
  monkeypatch.setattr(
    progress, "working", lambda *_: contextlib.nullcontext(said.append("compiling"))
  )
  steps = iter(range(0, 200, 10))
  for task in range(2):  # the second continues where the first ends
    advance = pace(lambda state, step: state + step)
    for step in [next(steps) for _ in range(10)]:
      assert advance(task, step) == task + step
  assert said == ["compiling", (40, "about 32 s of training to go")]


def test_each_program_of_a_training_is_compiled_and_takes_its_own_time(monkeypatch):
  said, clock = [], [0.0]
  generators_left = lambda step: {"generator step": 10 * (2 - step // 20) - min(step % 20, 10)}
  pace = progress.Pace(lambda step, line: said.append((step, line)), 40, generators_left)
  monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(
    progress, "working", lambda what, *_: contextlib.nullcontext(said.append(what))
  )

  def train(program, seconds, steps):
    def advance(state, step):
      clock[0] += seconds

    paced = pace(advance, program)
    for step in steps:
      paced(None, step)

  for first in (0, 20):
    train("generator step", 1.0, range(first, first + 10))
    train(progress.TRAINING, 5.0, range(first + 10, first + 20))
  ahead = progress.lasting(17 * 5.0 + 10 * 1.0)  # from step 13 on
  compiled = ["compiling the generator step", "compiling the training step"]
  assert said == [*compiled, (13, f"about {ahead} of training to go")]
