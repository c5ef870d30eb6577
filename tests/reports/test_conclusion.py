import html
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import ml_collections
import pytest

from gating_jax import runner
from gating_jax.reports import conclusion
from gating_jax.training import rundir
from gating_jax.training.hosts import PeerError
from gating_jax.training.journal import Journal
from gating_jax.training.loop import NonFiniteError
from tests.helpers.programmes import StandIn


def test_a_conclusion_has_at_most_twelve_lines_and_keeps_the_next_command():
  rows = [(f"row {i}", str(i)) for i in range(30)]
  lines = conclusion.closing_text("Done.", rows, ["one", "two"]).splitlines()
  assert lines[:3] == ["", "Done.", "  row 0  0"]
  assert lines[-2:] == ["next: one", "      two"]
  assert len(lines) == 1 + 12


def test_the_next_command_is_what_was_not_called_yet(tmp_path):
  run = tmp_path / "a run"
  run.mkdir()
  both = conclusion.next_commands(run, ["compile", "export"])
  assert [shlex.split(line, comments=True) for line in both] == [
    ["gating-jax", f"--workdir={run}", f"--mode={mode}"] for mode in ("compile", "export")
  ]
  # Times of an older checkpoint do not count for the newest.
  for newest, left in (
    (7, both[1:]),
    (8, both),
  ):
    (run / "checkpoints" / str(newest)).mkdir(parents=True)
    (run / "compile.json").write_text(
      '{"step": 7, "device": "a cpu", "timings": {"1 image at a time": []}}'
    )
    assert conclusion.next_commands(run, ["compile", "export"]) == left
  (run / "compile.json").write_text(
    '{"step": 8, "device": "a cpu", "timings": {"1 image at a time": []}}'
  )
  (run / "export").mkdir()
  (line,) = conclusion.next_commands(run, ["compile", "export"])
  assert "--mode=compare" in line


def row(strategy, seconds, chosen=False, part=None):
  return {"part": part, "strategy": strategy, "seconds": seconds, "chosen": chosen}


@pytest.mark.parametrize(
  ("chosen", "expected"),
  [
    ("switch", "1.00 ms by skipping (switch); ungated 2.50 ms, 2.50 x"),
    ("chosen", "0.50 ms by skipping, each part in its fastest way; ungated 2.50 ms, 5.00 x"),
    ("masked", "2.00 ms by computing everything; ungated 2.50 ms, 1.25 x"),
  ],
)
def test_times_are_of_the_whole_network_that_runs(chosen, expected):
  rows = [
    row("switch", 0.5, True, part=1),
    *(
      row(name, seconds, name == chosen)
      for name, seconds in (
        ("masked", 0.002),
        ("switch", 0.001),
        ("chosen", 0.0005),
        ("ungated", 0.0025),
      )
    ),
  ]
  assert conclusion.time_rows({"1 image at a time": rows}) == [("1 image at a time", expected)]


def test_the_numbers_of_images_are_macs_and_gates():
  result = {
    "mac_ratio": 0.5,
    "macs": 1000.4,
    "gates": 10,
    "conditional": 7,
    "always_open": 2,
    "always_closed": 1,
    "random_dropout": 0,
  }
  assert conclusion.outcome_rows(result) == [
    ("MACs per image", "1,000, 50.0 % of the ungated net's, gate networks included"),
    ("gates", "10: 7 conditional, 2 always open, 1 always closed, 0 random dropout"),
  ]
  assert conclusion.outcome_rows({}) == []
  assert conclusion.next_commands(Path("run"), [])[0].startswith(
    "gating-jax --workdir=run,ANOTHER_RUN --mode=compare"
  )


CONFIG = ml_collections.ConfigDict({"experiment": "classification", "seed": 3})
FULL = ValueError("layer 1 is full;\nmore")
SAID = r"This run failed and is not finished: (.*) \(\d{4}-\d\d-\d\d \d\d:\d\d UTC\)"


def run(path, error, report=SimpleNamespace, journal="", mode="train"):
  """Runs a training that opens its journal in that folder, unless None, and then fails.

  Without an error it finishes.
  """

  def train(run_dir):
    if journal is not None:
      (run_dir.path / journal).mkdir(exist_ok=True)
      Journal(run_dir.path / journal, 0, 9).close()
    if error:
      raise error
    run_dir.finish({"step": 9})

  runner.run(StandIn(CONFIG, train=train, report=report), path, mode)


def texts(page):
  """Returns the texts of a page, in their order."""
  body = page.read_text().partition("<body>")[2]
  return [html.unescape(text) for text in re.split(r"\s*<[^>]*>\s*", body) if text]


def test_pages_say_that_the_run_has_failed_until_it_is_finished(tmp_path):
  notices = []

  def report(run_dir, notice):
    notices.append(notice)

  with pytest.raises(ValueError, match="layer 1 is full"):
    run(tmp_path, FULL, report)
  run(tmp_path, None, report, mode="report")
  with pytest.raises(RuntimeError):
    run(tmp_path, RuntimeError("out of memory"), report)
  run(tmp_path, None, report, mode="report")
  assert [re.fullmatch(SAID, said)[1] for said in notices] == ["layer 1 is full;"] * 2 + [
    "out of memory"
  ] * 2
  run(tmp_path, None, report)
  run(tmp_path, None, report, mode="report")
  assert notices[4:] == [""]


@pytest.mark.parametrize("error", [NonFiniteError("loss is nan"), RuntimeError("out of <memory>")])
def test_a_run_without_a_checkpoint_leaves_a_page_that_says_why(tmp_path, error):
  def report(run_dir, notice):
    raise ValueError("no checkpoint in checkpoints yet")

  with pytest.raises(type(error), match=str(error)):
    run(tmp_path, error, report, journal="pretrain")
  first, _, *rest = texts(tmp_path / "report.html")
  assert re.fullmatch(SAID, first)[1] == str(error)
  assert "No checkpoint could be tested: no checkpoint in checkpoints yet" in rest
  # As far as the run came, and where it came from.
  assert {"Learning curves", "seed", "About this run"} <= set(rest)


def test_the_page_of_a_failed_run_has_each_journal_under_its_name(tmp_path, monkeypatch):
  shown = {}
  monkeypatch.setattr(conclusion.curves, "make_section", lambda phases: shown.update(phases))
  monkeypatch.setattr(conclusion.page, "write_page", lambda *_, **__: None)
  for folder in (tmp_path, tmp_path / "pretrain"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("")
  conclusion._write_journal(rundir.RunDir(tmp_path), CONFIG, conclusion.page.Opening())
  assert shown == {"training": tmp_path, "pretrain": tmp_path / "pretrain"}


@pytest.mark.parametrize(
  "error", [ValueError("model.init_from must name a run"), RuntimeError("out of memory")]
)
def test_what_fails_before_the_first_step_leaves_no_page(tmp_path, error):
  with pytest.raises(type(error), match=str(error)):
    run(tmp_path, error, journal=None)
  assert not (tmp_path / "report.html").exists()
  assert conclusion.failure_notice(rundir.RunDir(tmp_path)) == ""


def test_what_keeps_the_page_from_being_written_does_not_hide_the_error(tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError("no space left on device")

  monkeypatch.setattr(conclusion.page, "write_page", full)
  monkeypatch.setattr(conclusion, "write_json", full)
  monkeypatch.setattr(conclusion, "warn", lambda *_: None)
  with pytest.raises(OSError, match="a checkpoint cannot be written"):
    run(tmp_path, OSError("a checkpoint cannot be written"), full)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PeerError("process 1 failed")])
def test_who_is_stopped_by_hand_or_by_another_has_not_failed(tmp_path, error):
  with pytest.raises(type(error)):
    run(tmp_path, error)
  assert not (tmp_path / "report.html").exists()
  assert not (tmp_path / conclusion.FAILURE_FILE).exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"reason": "nan"})])
def test_a_damaged_note_of_a_failure_is_none(tmp_path, text):
  (tmp_path / conclusion.FAILURE_FILE).write_text(text)
  assert conclusion.failure_notice(rundir.RunDir(tmp_path)) == ""
