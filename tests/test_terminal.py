"""Messages of a command while it works, and streams that are closed or missing."""

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
import threading

import absl.logging
import pytest
from tqdm import tqdm

from gating_jax import terminal
from gating_jax.terminal import is_terminal, progress_bar, warn
from tests.helpers import ROOT

# Opens the streams, then a file, and returns the file's number as exit status.
OPENS_A_FILE = """
from gating_jax.terminal import prepare_streams
prepare_streams()
import sys
print("to stdout"); print("to stderr", file=sys.stderr)
sys.exit(open("/dev/null").fileno())
"""


@pytest.mark.thin(2)
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_no_file_takes_the_number_of_a_closed_stream(closed):
  words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", OPENS_A_FILE]
  assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode > 2


def test_streams_that_are_missing_are_opened_and_take_any_text(monkeypatch):
  placed, fstat = [], os.fstat

  def closed(number):
    if number == 2:
      raise OSError("bad file descriptor")
    return fstat(number)

  # The stream of this test itself must stay.
  monkeypatch.setattr(terminal.os, "fstat", closed)
  monkeypatch.setattr(terminal.os, "dup2", lambda nowhere, number: placed.append(number))
  written = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
  monkeypatch.setattr(sys, "stdout", written)
  monkeypatch.setattr(sys, "stdin", None)
  monkeypatch.setattr(sys, "stderr", closed_stream())
  terminal.prepare_streams()
  assert placed == [2]
  assert sys.stdin.read() == ""
  sys.stderr.write("lost")
  print("\udcff \xfc")
  assert written.buffer.getvalue() == b"\\udcff \\xfc\n"
  for stream in (sys.stdin, sys.stderr):
    stream.close()


def test_texts_that_the_encoding_lacks_are_written_nevertheless():
  program = "from gating_jax.terminal import prepare_streams; prepare_streams(); print('\\udcff ü')"
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONIOENCODING": "ascii"},
  )
  assert (done.returncode, done.stdout) == (0, "\\udcff \\xfc\n")


def closed_stream():
  stream = io.StringIO()
  stream.close()
  return stream


def test_no_stream_or_a_closed_one_is_no_terminal():
  closed = closed_stream()
  assert not any(map(is_terminal, (None, closed, io.StringIO(), object())))


def test_bars_without_stderr_show_nothing_and_count(monkeypatch):
  monkeypatch.setattr(sys, "stderr", None)
  for _ in range(2):
    assert list(progress_bar(range(3), desc="reading")) == [0, 1, 2]


def absl_handler():
  """Returns a new handler: the global one keeps the stream of its first use."""
  return absl.logging.ABSLHandler(absl.logging.PythonFormatter())


@pytest.mark.parametrize("handler", [logging.StreamHandler, absl_handler], ids=["Python", "absl"])
def test_warnings_without_stderr_end_nothing(monkeypatch, handler):
  for stream in (None, closed_stream(), io.StringIO()):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.root, "handlers", [handler()])
    warn("%d of %d", 1, 2)
  assert "1 of 2\n" in stream.getvalue()


def test_a_warning_that_fails_with_stderr_in_place_is_an_error(monkeypatch):
  def fail(*_):
    raise ValueError("not all arguments converted")

  monkeypatch.setattr(terminal.logging, "warning", fail)
  monkeypatch.setattr(sys, "stderr", None)
  warn("%d of %d", 1)
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  with pytest.raises(ValueError, match="not all arguments converted"):
    warn("%d of %d", 1)


def test_warnings_are_of_the_line_that_they_come_from(caplog):
  warn("%d of %d", 1, 2)
  assert [(record.getMessage(), record.filename) for record in caplog.records] == [
    ("1 of 2", "test_terminal.py")
  ]


@pytest.mark.parametrize(
  ("call", "homes"),
  [
    # The card's line is of a script that an export brings with it.
    (r"^\s+print\(", {"cli.py", "images/model_card.py", "native/build.py", "terminal.py"}),
    (r"logging\.(warning|error|info)\(", {"terminal.py"}),
  ],
)
def test_lines_and_warnings_have_one_home_each_which_heeds_closed_streams(call, homes):
  package = ROOT / "gating_jax"
  sources = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
  assert {name for name, text in sources.items() if re.search(call, text, re.MULTILINE)} == homes


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(terminal, "_AFTER", 0.0)
  monkeypatch.setattr(terminal, "_EVERY", 0.01)


def test_work_says_what_is_done_how_far_it_is_and_what_is_left():
  said, twice = [], threading.Event()

  def tell(line):
    said.append(line)
    if line.startswith("  2 of 8"):
      twice.set()

  with terminal.working("timing programs", "some minutes", tell) as advance:
    advance(1, 8)
    advance(2, 8)
    assert twice.wait(30)
  assert said[0] == "timing programs (some minutes) ..."
  assert re.fullmatch(r"  2 of 8 after \d+ s, about \d+ s to go", said[-1])
  silent = len(said)
  assert not threading.Event().wait(0.05)
  assert len(said) == silent


def test_counted_work_has_a_bar_on_a_terminal_in_place_of_lines(monkeypatch):
  bars, said = [], []

  def kept(**settings):
    bars.append(tqdm(**settings))
    return bars[-1]

  monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
  monkeypatch.setattr(terminal, "tqdm", kept)
  with terminal.working("timing programs", tell=said.append) as advance:
    advance(1, 8)
    advance(3, 8)
    threading.Event().wait(0.05)
    assert (bars[0].n, bars[0].total, bars[0].desc) == (3, 8, "timing programs")
  assert len(bars) == 1
  assert not [line for line in said if line.startswith("  ")]


def test_work_of_unknown_size_says_for_how_long_it_goes_on():
  assert terminal._how_far(75, []) == "1 min 15 s so far"
  assert terminal._how_far(60, [(50, 1, 4)]) == "1 of 4 after 1 min"
  assert terminal._how_far(60, [(50, 1, 4), (58, 2, 4)]) == "2 of 4 after 1 min, about 20 s to go"
  assert terminal._how_far(60, [(50, 1, 4), (58, 4, 4)]) == "4 of 4 after 1 min"


def test_work_of_a_moment_is_silent(monkeypatch):
  monkeypatch.setattr(terminal, "_AFTER", 30.0)
  said = []
  with terminal.working("work", tell=said.append):
    pass
  assert said == []


def test_work_that_fails_says_no_more():
  said = []
  with pytest.raises(KeyError), terminal.working("work", tell=said.append):
    raise KeyError
  silent = len(said)
  threading.Event().wait(0.05)
  assert len(said) == silent


def test_a_training_says_that_it_compiles_and_once_how_long_it_takes(monkeypatch):
  clock = iter(range(0, 1000, 2))  # seconds, at each call but the first
  said = []
  pace = terminal.Pace(lambda step, line: said.append((step, line)), total_steps=200)
  monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(clock)))
  monkeypatch.setattr(
    terminal, "working", lambda *_: contextlib.nullcontext(said.append("compiling"))
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
  pace = terminal.Pace(lambda step, line: said.append((step, line)), 40, generators_left)
  monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(
    terminal, "working", lambda what, *_: contextlib.nullcontext(said.append(what))
  )

  def train(program, seconds, steps):
    def advance(state, step):
      clock[0] += seconds

    paced = pace(advance, program)
    for step in steps:
      paced(None, step)

  for first in (0, 20):
    train("generator step", 1.0, range(first, first + 10))
    train(terminal.TRAINING, 5.0, range(first + 10, first + 20))
  ahead = terminal.lasting(17 * 5.0 + 10 * 1.0)  # from step 13 on
  compiled = ["compiling the generator step", "compiling the training step"]
  assert said == [*compiled, (13, f"about {ahead} of training to go")]


def test_a_program_with_no_steps_left_does_not_keep_the_time_left_from_being_said(monkeypatch):
  said, clock = [], [0.0]
  pace = terminal.Pace(lambda step, line: said.append(line), 20, lambda step: {"generator": 0})
  monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
  monkeypatch.setattr(terminal, "working", lambda *_: contextlib.nullcontext())

  def advance(state, step):
    clock[0] += 2

  paced = pace(advance)
  for step in range(5):
    paced(None, step)
  assert said == ["about 32 s of training to go"]
