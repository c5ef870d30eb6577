"""`benchmarks/images.py`: the runs of a table, their order, and its contents."""

import _thread
import argparse
import json
import sys
import threading
import time

import numpy as np
import pytest

from tests.helpers import ROOT


@pytest.fixture
def images(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  monkeypatch.delitem(sys.modules, "images", raising=False)
  import images

  return images


@pytest.fixture
def taken(images, monkeypatch):
  """The commands that were run; each leaves a result that depends on its width."""
  commands = []

  def call(_, folder, command):
    commands.append(command)
    folder.mkdir(parents=True, exist_ok=True)
    wide = float(command[3].partition("width=")[2].partition(",")[0] or 1)
    result = {
      "accuracy": 0.5 + wide / 10,
      "params": 3000,
      "gate_params": 500,
      "macs": 100 * wide,
      "mac_ratio": 1.0,
      "seconds_since_last_start": 2.0,
    }
    (folder / "metrics.jsonl").write_text(
      "".join(
        json.dumps(line) + "\n"
        for line in (
          {"step": 90, "split": "train", "accuracy": 0.25},
          {"step": 96, "split": "train", "accuracy": 0.5},
          {"step": 100, "split": "train", "accuracy": 0.75},
          {"step": 100, "split": "test", "accuracy": 0.125},
        )
      )
    )
    if "regulariser" in command[3]:
      result |= {
        "gates": 8,
        "mean_open": 0.5,
        "always_open": 2,
        "always_closed": 0,
        "random_dropout": 0,
        "conditional": 6,
        "disagreement": 0.25,
        "input_information": 0.5,
        "class_information": 0.125,
        "macs_std": 8.0,
        "macs_of_quarter1": 90.0,
        "macs_of_quarter4": 115.0,
      }
    (folder / "result.json").write_text(json.dumps(result))
    return True

  monkeypatch.setattr(images.Job, "_call", call)
  return commands


def run(images, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["images.py", *arguments])
  images.main()


def test_every_run_of_every_table_is_a_config(images, monkeypatch):
  import throughput

  for table in images.TABLES.values():
    for name, one in table.items():
      config = throughput.config_of(
        f"{images.CONFIG}:model=resnet8,{one.variants}",
        dict(field.split("=", 1) for field in one.fields),
      )
      assert config.model.width == float(images.width(one))
      assert (config.model.gating == "none") == name.startswith("ungated")


def test_a_late_run_starts_from_half_of_the_epochs_without_gates(
  images, taken, monkeypatch, tmp_path, capsys
):
  arguments = [
    "levers",
    f"--out={tmp_path}",
    "--only=^late$|^early$",
    "--epochs=5",
    "--seeds=3",
    "--model=resnet8",
    "--optim.batch_size=64",
  ]
  run(images, monkeypatch, *arguments)
  start, *gated = taken
  early, late = sorted(gated, key=lambda command: any("init_from" in part for part in command))
  config = lambda command: next(part for part in command if part.startswith("--config="))
  assert config(start).endswith(":model=resnet8,gates=none,width=1,schedule=cosine,epochs=2")
  assert config(early).endswith("schedule=cosine,epochs=5")
  assert config(late).endswith("schedule=cosine,epochs=3")
  folder = next(part for part in start if part.startswith("--workdir=")).partition("=")[2]
  assert f"--config.model.init_from={folder}" in late
  assert all(
    {"--config.seed=3", "--config.optim.batch_size=64"} <= set(command) for command in taken
  )
  first = (tmp_path / "levers-resnet8.md").read_text()
  assert "| late | 60.00 | 60.00 | 62.50 | 3,500 |" in first
  assert first.strip() in capsys.readouterr().out

  # The command itself recognises finished runs and their configs.
  run(images, monkeypatch, *arguments)
  assert taken[3:] == taken[:3]


def test_outcomes_are_shares_of_the_gates(images, taken, monkeypatch, tmp_path):
  run(images, monkeypatch, "ablation", f"--out={tmp_path}", "--only=^L0 alone$", "--seeds=0")
  row = (
    "| L0 alone | 60.00 | 100.0 % | 25 % | 0 % | 0 % | 75 % | 25 % | 0.500 | 0.125 | 8.0 % | "
    "90.0 % → 115.0 % | 2 |"
  )
  assert (tmp_path / "ablation-resnet20.md").read_text().splitlines()[-1] == row


def test_rows_tell_how_macs_differ_between_images(images):
  result = {
    "accuracy": 0.5,
    "params": 3000,
    "gate_params": 500,
    "macs": 200.0,
    "mac_ratio": 0.5,
    "seconds_since_last_start": 2.0,
  }
  quarters = lambda *macs: {f"macs_of_quarter{i}": m for i, m in enumerate(macs, 1)}
  gates = dict(zip(images.OUTCOMES, (2, 1, 0, 5), strict=True), gates=8)
  gated = [
    result | gates | {"macs_std": 10.0} | quarters(180.0, 190.0, 210.0, 220.0),
    result | gates | {"macs_std": 20.0} | quarters(170.0, 190.0, 210.0, 230.0),
  ]
  rows = images.compared([images.row("gated", gated), images.row("ungated, width 1", [result])])
  assert rows[0]["macs_std"] == 15
  assert [rows[0][f"macs_of_quarter{i}"] for i in (1, 2, 3, 4)] == [175, 190, 210, 225]
  assert rows[1]["macs_std"] is None
  head, _, *lines = images.mac_table(rows).splitlines()
  cells = lambda line: [cell.strip() for cell in line.split("|")[1:-1]]
  columns = [
    cells(head).index(name)
    for name in (
      "deviation over images",
      "easy to hard quarter",
      "always open, closed, random, conditional",
    )
  ]
  assert [[cells(line)[i] for i in columns] for line in lines] == [
    ["7.5 %", "87.5 % → 112.5 %", "2, 1, 0, 5 of 8"],
    ["", "", ""],
  ]
  assert {len(cells(line)) for line in (head, *lines)} == {12}


def test_without_time_nothing_is_begun_and_what_is_missing_is_named(
  images, taken, monkeypatch, tmp_path
):
  out = tmp_path / "not" / "made"
  with pytest.raises(
    SystemExit, match="not finished: ungated, width 0.5 of seed 0, ungated, width 0.5 of seed 1"
  ):
    run(images, monkeypatch, "budgets", f"--out={out}", "--only=^ungated, width 0.5", "--minutes=0")
  assert taken == []
  assert json.loads((out / "budgets-resnet20.json").read_text()) == []


def job(images, out, minutes):
  return images.Job(
    argparse.Namespace(out=out, minutes=minutes, jobs=1, table="budgets", model="resnet8"), []
  )


def test_a_run_that_fails_or_takes_too_long_is_not_done(images, tmp_path):
  python = lambda code: [sys.executable, "-c", code]
  assert job(images, tmp_path, 1)._call(tmp_path / "good", python("print('all is well')"))
  assert "all is well" in (tmp_path / "good.txt").read_text()
  assert not job(images, tmp_path, 1)._call(tmp_path / "bad", python("raise SystemExit(3)"))
  started = time.monotonic()
  assert not job(images, tmp_path, 0.01)._call(
    tmp_path / "long", python("import time; time.sleep(60)")
  )
  assert time.monotonic() - started < 30


def test_an_interruption_begins_nothing_more(images, monkeypatch, tmp_path, ctrl_c):
  begun = []

  def call(self, folder, command):
    begun.append(folder)
    time.sleep(0.3)

  monkeypatch.setattr(images.Job, "_call", call)
  args = argparse.Namespace(
    out=tmp_path, minutes=1, jobs=1, table="levers", model="resnet8", epochs=2, data=None
  )
  threading.Timer(0.5, _thread.interrupt_main).start()
  with pytest.raises(KeyboardInterrupt):
    images.Job(args, []).run(images.TABLES["levers"], [0, 1])
  assert 1 <= len(begun) <= 10  # of 24


@pytest.mark.parametrize(
  "arguments",
  [
    ["--only=no such row"],
    ["fields"],
    ["--seed"],
    ["--seed=3"],
    ["--data.data_dir=x"],
    ["--epochs=1"],
  ],
)
def test_arguments_that_mean_nothing_are_errors(
  images, taken, monkeypatch, tmp_path, capsys, arguments
):
  with pytest.raises(SystemExit):
    run(images, monkeypatch, "budgets", f"--out={tmp_path}", *arguments)
  assert (
    arguments[0].removeprefix("--only=").removeprefix("--").partition("=")[0]
    in capsys.readouterr().err
  )


def test_gains_are_over_ungated_nets_of_equal_macs(images):
  made = lambda name, macs, accuracy: {"name": name, "macs": macs, "accuracy": accuracy}
  rows = images.compared(
    [
      made("ungated, width 1", 400.0, 0.9),
      made("ungated, width 0.5", 100.0, 0.8),
      made("gated", 200.0, 0.87),
      made("gated to nothing", 50.0, 0.8),
    ]
  )
  assert [row["gain"] for row in rows[:2]] == [None, None]
  np.testing.assert_allclose(rows[2]["gain"], 0.87 - 0.85, rtol=1e-9)  # half-way in log MACs
  assert rows[3]["gain"] is None
