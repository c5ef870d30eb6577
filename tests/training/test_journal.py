import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from gating_jax import terminal
from gating_jax.training import journal
from gating_jax.training.journal import (
  HISTOGRAMS_FILE,
  METRICS_FILE,
  TENSORBOARD_DIR,
  Journal,
  describe_metrics,
  read_lines,
  write_atomically,
  write_json,
)
from tests.helpers.event_files import events, summaries


@pytest.fixture
def open_journal(tmp_path):
  """`(first_step) -> Journal` of ten steps in one folder; all are closed at the end."""
  opened = []

  def open_at(first_step):
    opened.append(Journal(tmp_path, first_step, 10))
    return opened[-1]

  yield open_at
  for one in opened:
    one.close()


def lines(folder):
  return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_one_line_per_write(tmp_path, open_journal):
  one = open_journal(0)
  one.write(2, "train", {"loss": 1.5, "gate_rate/layer00": 0.25})
  one.write(2, "test", {"accuracy": 1})
  assert lines(tmp_path) == [
    {"step": 2, "split": "train", "loss": 1.5, "gate_rate/layer00": 0.25},
    {"step": 2, "split": "test", "accuracy": 1.0},
  ]


def test_tensorboard_holds_the_same_points(tmp_path, open_journal):
  one = open_journal(0)
  one.write(2, "train", {"loss": 1.5, "gate_rate/layer00": 0.25})
  one.close()
  (file,) = (tmp_path / TENSORBOARD_DIR).iterdir()
  assert "tfevents" in file.name
  assert [e for e in events(tmp_path) if len(e) == 3] == [
    ("train/loss", 1.5, 2),
    ("gate_rate/layer00", 0.25, 2),
  ]


def test_lines_of_later_steps_are_dropped_when_training_goes_on(tmp_path, open_journal):
  killed = open_journal(0)
  for step in (2, 4, 6):
    killed.write(step, "train", {"loss": step})
  killed.close()
  resumed = open_journal(4)
  assert [line["step"] for line in lines(tmp_path)] == [2, 4]
  assert [(step, values["loss"]) for step, values in resumed.past] == [(2, 2), (4, 4)]
  resumed.write(6, "train", {"loss": 60})
  resumed.close()
  assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(2, 2), (4, 4), (6, 60)]
  assert (5,) in events(tmp_path)  # TensorBoard is told to drop points from step 5 on
  assert events(tmp_path)[-1] == ("train/loss", 60, 6)


def test_a_new_start_drops_everything(tmp_path, open_journal):
  open_journal(0).write(1, "train", {"loss": 1})
  open_journal(0)
  assert lines(tmp_path) == []


def test_a_last_line_cut_short_is_dropped(tmp_path, open_journal):
  open_journal(0).write(2, "train", {"loss": 1})
  file = tmp_path / METRICS_FILE
  whole = file.read_text()
  file.write_text(whole + '{"step": 3, "split": "tra')
  resumed = open_journal(4)
  assert file.read_text() == whole
  resumed.write(6, "train", {"loss": 2})
  assert [line["step"] for line in lines(tmp_path)] == [2, 6]


@pytest.mark.parametrize(
  "bad", ["", "12", "[]", "nonsense", '{"split": "train"}', '{"step": 1}', '{"step": "1"']
)
def test_lines_that_are_no_record_are_dropped(tmp_path, open_journal, bad):
  good = '{"step": 1, "split": "train", "loss": 2.0, "note": "no number"}'
  (tmp_path / METRICS_FILE).write_text(f"{bad}\n{good}\n{bad}\n")
  assert open_journal(4).past == [(1, {"step": 1, "loss": 2.0})]
  assert (tmp_path / METRICS_FILE).read_text() == good + "\n"


def test_a_step_and_split_are_written_once(tmp_path, open_journal):
  one = open_journal(0)
  one.write(2, "test", {"loss": 1})
  one.write(2, "train", {"loss": 2})
  one.write(2, "test", {"loss": 3})
  one.close()
  assert [e for e in events(tmp_path) if len(e) == 3] == [("test/loss", 1, 2), ("train/loss", 2, 2)]
  resumed = open_journal(2)
  resumed.write(2, "test", {"loss": 4})
  resumed.close()
  assert [(line["split"], line["loss"]) for line in lines(tmp_path)] == [("test", 1), ("train", 2)]


def test_lines_are_on_disk_before_the_journal_is_closed(tmp_path, open_journal):
  open_journal(0).write(1, "train", {"loss": 1})
  assert len(lines(tmp_path)) == 1


def test_plain_lines_where_there_is_no_terminal(open_journal, capfd):
  one = open_journal(0)
  one.progress(3)
  one.say(3, "loss 1.25")
  out, err = capfd.readouterr()
  assert out.endswith(" s] step 3/10  loss 1.25\n")
  assert out.startswith("[")
  assert out.count("\n") == 1
  assert err == ""


def test_a_bar_on_a_terminal(tmp_path, capfd, monkeypatch):
  bars = []

  def kept(**settings):
    bars.append(tqdm(**settings))
    return bars[-1]

  monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
  monkeypatch.setattr(terminal, "tqdm", kept)
  one = Journal(tmp_path, 4, 10)
  one.progress(7)
  one.progress(7)
  assert bars[0].n == 7
  one.say(7, "loss 1.25")
  one.close()
  out, err = capfd.readouterr()
  assert "step 7/10  loss 1.25\n" in out
  assert "7/10" in err


@pytest.mark.parametrize("closed", [False, True], ids=["none", "closed"])
def test_journals_work_without_standard_streams(tmp_path, monkeypatch, closed):
  stream = io.StringIO()
  stream.close()
  for name in ("stdout", "stderr"):
    monkeypatch.setattr(sys, name, stream if closed else None)
  for folder in ("one", "two"):  # a bar that failed would keep the lock from the next
    one = Journal(tmp_path / folder, 0, 10)
    one.progress(3)
    one.say(3, "loss 1.25")
    one.write(3, "train", {"loss": 1.25})
    one.close()
    assert lines(tmp_path / folder) == [{"step": 3, "split": "train", "loss": 1.25}]


def test_lines_go_nowhere_where_stdout_is_gone_and_the_bar_is_not(tmp_path, monkeypatch):
  monkeypatch.setattr(terminal, "is_terminal", lambda stream: True)
  monkeypatch.setattr(sys, "stdout", None)
  one = Journal(tmp_path, 0, 10)
  one.say(3, "loss 1.25")
  one.close()


def test_events_of_a_folder_with_a_colon_in_its_name_lie_in_it(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  one = Journal(Path("s3:"), 0, 10)
  one.write(2, "train", {"loss": 1.5})
  one.close()
  assert events(tmp_path / "s3:")


def test_atomic_writes_leave_one_file(tmp_path):
  file = tmp_path / "a.json"
  file.write_text("old")
  write_json(file, {"b": [1, 2]})
  assert json.loads(file.read_text()) == {"b": [1, 2]}
  assert [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  def full(_):
    raise OSError("disk")

  file = tmp_path / "a.txt"
  file.write_text("old")
  monkeypatch.setattr(journal.os, "fsync", full)
  with pytest.raises(OSError, match="disk"):
    write_atomically(file, "new")
  assert file.read_text() == "old"


def test_histograms_are_cut_back_as_metrics_are(tmp_path, open_journal):
  killed = open_journal(0)
  for step in (2, 4, 6):
    killed.write_histograms(step, "test", {"gates/layer00/probs": np.array([step, 1])})
  killed.write_histograms(6, "test", {"gates/layer00/probs": np.array([0, 0])})
  killed.close()
  resumed = open_journal(4)
  assert [line["step"] for line in read_lines(tmp_path / HISTOGRAMS_FILE)] == [2, 4]
  resumed.write_histograms(6, "test", {"gates/layer00/probs": np.array([60, 1])})
  resumed.close()
  assert [
    (line["step"], line["gates/layer00/probs"]) for line in read_lines(tmp_path / HISTOGRAMS_FILE)
  ] == [(2, [2, 1]), (4, [4, 1]), (6, [60, 1])]
  shown = [
    (step, value.histo) for step, value in summaries(tmp_path) if value.tag == "gates/layer00/probs"
  ]
  step, last = shown[-1]
  assert step == 6
  assert (list(last.bucket), list(last.bucket_limit), last.num) == ([60, 1], [0.5, 1.0], 61)
  assert (last.sum, last.sum_squares) == pytest.approx((60 / 4 + 3 / 4, 60 / 16 + 9 / 16))


def test_a_run_without_histograms_has_no_file_of_them(tmp_path, open_journal):
  one = open_journal(0)
  one.write(1, "train", {"loss": 1})
  one.close()
  assert not (tmp_path / HISTOGRAMS_FILE).exists()
  assert read_lines(tmp_path / HISTOGRAMS_FILE) == []


def test_a_picture_is_in_tensorboard(tmp_path, open_journal):
  Image.new("RGB", (5, 3), "red").save(tmp_path / "a.png")
  one = open_journal(0)
  one.write_picture(7, "pictures/a", tmp_path / "a.png")
  one.close()
  ((step, value),) = [
    (step, value) for step, value in summaries(tmp_path) if value.tag == "pictures/a"
  ]
  assert (step, value.image.width, value.image.height) == (7, 5, 3)


def test_what_is_no_character_is_written_as_a_question_mark(tmp_path):
  journal.write_atomically(tmp_path / "page.html", "n\udcffé")
  assert (tmp_path / "page.html").read_bytes() == "n?é".encode()


def test_a_line_of_training_is_in_words():
  line = describe_metrics(
    {
      "loss": 4.094,
      "cross_entropy": 2.167,
      "accuracy": 0.2553,
      "batch_shaping": 10.13,
      "batch_shaping_coefficient": 0.75,
      "l0": 0.8103,
      "l0_coefficient": 0.5,
      "mac_ratio": 0.816,
      "gates/batch_shaping_mean": 0.1,
      "gate_rate/a": 0.5,
      "gate_rate/b": 1.0,
      "gradient_norm": 1.8,
      "state_norm": 55.0,
    }
  )
  assert line == (
    "accuracy 25.5 %, loss 4.094 (cross-entropy 2.167, batch-shaping 10.13, L0 0.8103), MACs "
    "without gate networks 81.6 %, open gates 75.0 %"
  )


def test_a_line_of_long_videos_tells_segments_from_channels():
  line = describe_metrics(
    {
      "loss": 1.0,
      "classification": 0.5,
      "accuracy": 0.75,
      "share": 0.4,
      "mean": 0.4,
      "batch_shaping": 0.25,
      "channels_l0": 0.125,
      "channels_mac_ratio": 0.5,
      "gate_rate/segments": 0.1,
      "gate_rate/conv": 0.75,
    }
  )
  assert line == (
    "accuracy 75.0 %, loss 1 (classification 0.5, penalty on segments 0.4, batch-shaping 0.25, L0 "
    "of channel gates 0.125), MACs of the heavy net without gate networks 50.0 %, segments chosen "
    "40.0 %, open gates 75.0 %"
  )


def test_a_line_without_a_loss_has_its_terms():
  assert (
    describe_metrics({"critic_loss": -0.5, "distance": 2.0, "gradient_norm": 1.0})
    == "critic loss -0.5, distance 2"
  )


def test_lines_count_their_seconds_from_the_start_that_they_are_given(tmp_path, capsys):
  journal = Journal(tmp_path, 0, 10, started=time.monotonic() - 100)
  journal.say(0, "a line")
  journal.close()
  assert re.match(r"\[ +10\d s\] step 0/10  a line\n", capsys.readouterr().out)
