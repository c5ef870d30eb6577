import io
import os
import subprocess
import sys

import pytest

from gating_jax.terminal import is_terminal, progress_bar
from tests.helpers import ROOT

# Opens the streams, then a file, and says which number the file has, by its exit status.
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
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                        env=os.environ | {"PYTHONIOENCODING": "ascii"})
  assert (done.returncode, done.stdout) == (0, "\\udcff \\xfc\n")


def test_no_stream_or_a_closed_one_is_no_terminal():
  closed = io.StringIO()
  closed.close()
  assert not any(map(is_terminal, (None, closed, io.StringIO(), object())))


def test_bars_without_stderr_show_nothing_and_count(monkeypatch):
  monkeypatch.setattr(sys, "stderr", None)
  for _ in range(2):
    assert list(progress_bar(range(3), desc="reading")) == [0, 1, 2]
