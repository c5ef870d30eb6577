import shlex
from pathlib import Path

import pytest

from gating_jax.reports import conclusion


def test_a_conclusion_has_at_most_twelve_lines_and_keeps_the_next_command():
  rows = [(f"row {i}", str(i)) for i in range(30)]
  lines = conclusion.text("Done.", rows, ["one", "two"]).splitlines()
  assert lines[:3] == ["", "Done.", "  row 0  0"]
  assert lines[-2:] == ["next: one", "      two"]
  assert len(lines) == 1 + 12


def test_the_next_command_is_what_was_not_called_yet(tmp_path):
  run = tmp_path / "a run"
  run.mkdir()
  both = conclusion.following(run, ["compile", "export"])
  assert [shlex.split(line, comments=True) for line in both] == [
    ["gating-jax", f"--workdir={run}", f"--mode={mode}"] for mode in ("compile", "export")
  ]
  for newest, left in (
    (7, both[1:]),
    (8, both),
  ):  # times of an older checkpoint do not count for the newest
    (run / "checkpoints" / str(newest)).mkdir(parents=True)
    (run / "compile.json").write_text(
      '{"step": 7, "device": "a cpu", "timings": {"1 image at a time": []}}'
    )
    assert conclusion.following(run, ["compile", "export"]) == left
  (run / "compile.json").write_text(
    '{"step": 8, "device": "a cpu", "timings": {"1 image at a time": []}}'
  )
  (run / "export").mkdir()
  (line,) = conclusion.following(run, ["compile", "export"])
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
  assert conclusion.times({"1 image at a time": rows}) == [("1 image at a time", expected)]


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
  assert conclusion.gates(result) == [
    ("MACs per image", "1,000, 50.0 % of the ungated net's, gate networks included"),
    ("gates", "10: 7 conditional, 2 always open, 1 always closed, 0 random dropout"),
  ]
  assert conclusion.gates({}) == []
  assert conclusion.following(Path("run"), [])[0].startswith(
    "gating-jax --workdir=run,ANOTHER_RUN --mode=compare"
  )
