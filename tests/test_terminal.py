import io
import logging
import os
import re
import subprocess
import sys

import absl.logging
import pytest

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


def test_warnings_are_of_the_line_that_they_come_from(caplog):
  warn("%d of %d", 1, 2)
  assert [(record.getMessage(), record.filename) for record in caplog.records] == [
    ("1 of 2", "test_terminal.py")
  ]


@pytest.mark.parametrize(
  ("call", "homes"),
  [
    (r"^\s+print\(", {"cli.py", "progress.py", "native/build.py"}),
    (r"logging\.(warning|error|info)\(", {"terminal.py"}),
  ],
)
def test_lines_and_warnings_have_one_home_each_which_heeds_closed_streams(call, homes):
  package = ROOT / "gating_jax"
  sources = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
  assert {name for name, text in sources.items() if re.search(call, text, re.MULTILINE)} == homes
