"""`benchmarks/frontier.py`: its tables, their runs, and what it says of them."""

import argparse
import importlib
import json
import sys

import pytest

from tests.helpers import ROOT

# MACs, accuracy and training accuracy of each row, by seed.
RUNS = {
  "narrow": [(100.0, 0.50, 0.60), (100.0, 0.52, 0.60)],
  "wide": [(400.0, 0.70, 0.80), (400.0, 0.74, 0.80)],
  "scale": [(200.0, 0.61, 0.70), (200.0, 0.63, 0.70)],
  "open": [(800.0, 0.80, 0.90), (800.0, 0.80, 0.90)],
  "gates": [(200.0, 0.65, 0.75), (200.0, 0.69, 0.75)],
}


@pytest.fixture
def frontier(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  for module in ("frontier", "side_by_side"):
    monkeypatch.delitem(sys.modules, module, raising=False)
  import frontier

  row = frontier.Row
  table = [
    row("narrow", frontier.FAMILY, "c:width=1"),
    row("wide", frontier.FAMILY, "c:width=4"),
    row("scale", frontier.BASELINE, "c"),
    row("open", frontier.PARAMETERS, "c"),
    row("gates", frontier.GATED, "c:from={start}", ("a.b=1",), wide="open", start="narrow"),
  ]
  monkeypatch.setitem(frontier.TABLES, "made", table)
  return frontier


@pytest.fixture
def taken(frontier, monkeypatch):
  """The commands that were run; each leaves the result of its row and seed."""
  commands = []

  def call(_, folder, command):
    commands.append(command)
    name, seed = folder.name.rsplit("-", 1)
    macs, accuracy, training = RUNS[name][int(seed)]
    folder.mkdir(parents=True, exist_ok=True)
    result = {"accuracy": accuracy, "macs": macs, "params": 3000, "gate_params": 0}
    result["sets"] = {"a": {"accuracy": accuracy / 2, "macs": macs}}
    result |= {"mean_set_accuracy": accuracy, "mean_set_macs": macs}
    if name == "gates":
      result |= dict.fromkeys(frontier.OUTCOMES, 2) | {"gates": 8, "input_information": 0.5}
      result["sets"]["a"]["mean_open"] = 0.25
    (folder / "result.json").write_text(json.dumps(result))
    line = {"step": 10, "split": "train", "accuracy": training}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return True

  monkeypatch.setattr(frontier.Family, "_call", call)
  return commands


def run(frontier, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["frontier.py", *arguments])
  frontier.main()


def test_every_row_of_every_table_is_a_config(frontier):
  for name, table in frontier.TABLES.items():
    names = [row.name for row in table]
    assert len(set(names)) == len(names)
    if name == "made":
      continue
    assert len([row for row in table if row.kind == frontier.FAMILY]) >= 4
    for row in table:
      file, _, variants = row.config.partition(":")
      module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
      config = module.get_config(f"{variants},epochs=2")
      config.update_from_flattened_dict(
        {field.partition("=")[0]: float(field.partition("=")[2]) for field in row.fields}
      )
      assert config.optim.epochs == 2
      if row.together:
        assert config.data.name == f"union({row.name.removesuffix(' alone')})"
      ungated = config.model.gating in ("none", "scale", "bias", "kernels") or "static" in row.name
      assert ungated == (row.kind != frontier.GATED)
      assert row.wide in names


def test_gains_are_over_the_family_at_equal_macs_and_of_the_same_seed(
  frontier, taken, monkeypatch, tmp_path, capsys
):
  run(frontier, monkeypatch, "made", f"--out={tmp_path}", "--seeds=0,1", "--epochs=3")
  found = json.loads((tmp_path / "made.json").read_text())
  rows = {row["name"]: row for row in found["rows"]}
  # 200 MACs are half-way between 100 and 400, where the family has 0.60 and 0.63.
  gates = rows["gates"]
  assert gates["gain"]["values"] == pytest.approx([0.05, 0.06])
  assert gates["gain"]["standard_error"] == pytest.approx(0.005)
  assert gates["over"]["scale"]["values"] == pytest.approx([0.04, 0.06])
  assert gates["training_gain"]["mean"] == pytest.approx(0.05)
  assert gates["capture"] == pytest.approx((0.05 + 0.06) / (0.2 + 0.17))
  assert gates["training_capture"] == pytest.approx(0.05 / 0.2)
  assert gates["sets"]["a"]["gain"]["values"] == pytest.approx([0.025, 0.03])
  # Beyond the widest net nothing is known.
  assert rows["open"]["gain"] is None
  assert "gain" not in rows["narrow"]
  printed = capsys.readouterr().out
  assert "| gates | 67.00 ± 2.00 | +5.50 ± 0.50 | 75.00 ± 0.00 | 30 %, 25 % | 0.2 |" in printed
  assert "gates over scale: +5.00 ± 1.00" in printed
  assert "| gates | 33.50 ± 1.00, +2.75 ± 0.25, 0.2, 25 % |" in printed
  assert (tmp_path / "made.png").stat().st_size > 1000


def test_values_stay_with_their_seeds_where_some_have_none(frontier):
  def row(kind, macs, training):
    return {
      "name": kind,
      "kind": kind,
      "seeds": [0, 1],
      "wide": "parameters",
      "sets": {},
      "macs": frontier.spread([macs, macs]),
      "accuracy": frontier.spread([0.5, 0.5]),
      "training": frontier.spread(training),
    }

  gated = row(frontier.GATED, 200, [0.7, 0.8])
  rows = [
    # One run left no lines of training.
    row(frontier.FAMILY, 100, [None, 0.6]),
    row(frontier.FAMILY, 400, [0.3, 0.8]),
    row(frontier.PARAMETERS, 800, [None, 0.9]),
    gated,
  ]
  frontier.compare(rows)
  assert gated["training_gain"]["values"] == [None, pytest.approx(0.1)]
  assert gated["training_gain"]["mean"] == pytest.approx(0.1)
  assert gated["training_capture"] == pytest.approx(0.1 / 0.2)


def test_runs_have_their_seed_data_and_start(frontier, taken, monkeypatch, tmp_path):
  options = [f"--out={tmp_path}", "--seeds=1", f"--data={tmp_path}", "--optim.batch_size=8"]
  run(frontier, monkeypatch, "made", "--only=gates", *options)
  first, gated = taken
  assert "--config=c:width=1" in first
  assert f"--config=c:from={tmp_path}/made/narrow-1" in gated
  assert {"--config.seed=1", "--config.a.b=1", "--config.optim.batch_size=8"} <= set(gated)
  assert f"--config.data.data_dir={tmp_path}" in gated


def test_what_is_missing_is_named_and_the_rest_is_written(frontier, taken, monkeypatch, tmp_path):
  with pytest.raises(SystemExit, match="not finished: narrow of seed 0, wide of seed 0"):
    run(
      frontier,
      monkeypatch,
      "made",
      f"--out={tmp_path}",
      "--only=r?ow|wide",
      "--seeds=0",
      "--minutes=0",
    )
  assert not taken
  assert json.loads((tmp_path / "made.json").read_text())["rows"] == []
  assert not (tmp_path / "made.png").exists()


def test_results_are_read_when_time_is_up(frontier, taken, tmp_path):
  args = argparse.Namespace(out=tmp_path, table="made", jobs=1, minutes=1, epochs=None, data=None)
  rows = frontier.TABLES["made"][:1]
  frontier.Family(args, []).run(rows, [0])
  (command,) = taken
  (tmp_path / "made" / "narrow-0.txt").write_text(f"{' '.join(command)}\nits output\n")
  args.minutes = 0
  assert frontier.Family(args, []).run(rows, [0])["narrow", 0]["accuracy"] == 0.5
  # That of another config is not.
  assert frontier.Family(args, ["--config.seed=3"]).run(rows, [0]) == {("narrow", 0): None}
  assert len(taken) == 1


def test_a_job_ends_with_the_program_that_waits_for_it(frontier, monkeypatch, tmp_path):
  import side_by_side

  ended = []

  class Job:
    def wait(self, timeout=None):
      # As the handler of SIGTERM does.
      if not ended:
        sys.exit(143)

    def poll(self):
      return None

    def terminate(self):
      ended.append(self)

  monkeypatch.setattr(side_by_side.subprocess, "Popen", lambda *_, **__: Job())
  family = side_by_side.SideBySide(jobs=1, minutes=1)
  with pytest.raises(SystemExit):
    family._call(tmp_path / "run", ["job"])
  assert len(ended) == 1
  assert not family.running


def test_nets_of_a_set_each_are_one_row_together(frontier):
  rows = [frontier.Row(name, frontier.BASELINE, "c", together="both") for name in ("a", "b")]
  run = lambda name, accuracy, macs: {
    "accuracy": accuracy,
    "macs": macs,
    "training": accuracy,
    "params": 5,
    "gate_params": 0,
    "sets": {name: {"accuracy": accuracy, "macs": macs}},
  }
  results = {("a", 0): run("a", 0.5, 10), ("b", 0): run("b", 0.9, 30), ("a", 1): run("a", 1, 10)}
  results["b", 1] = None
  ((row, finished),) = frontier.group(rows, [0, 1], results)
  assert row.name == "both"
  assert list(finished) == [0]
  assert finished[0]["accuracy"] == pytest.approx(0.7)
  assert finished[0]["macs"] == 20
  assert finished[0]["params"] == 10
  assert list(finished[0]["sets"]) == ["a", "b"]


def test_rows_that_are_one_together_are_chosen_together(frontier, monkeypatch):
  table = [frontier.Row(f"{name} alone", frontier.BASELINE, "c", together="both") for name in "ab"]
  monkeypatch.setitem(frontier.TABLES, "made", table)
  monkeypatch.setattr(sys, "argv", ["frontier.py", "made", "--only=both"])
  assert frontier.parse()[1] == table
  monkeypatch.setattr(sys, "argv", ["frontier.py", "made", "--only=a alone"])
  with pytest.raises(SystemExit):
    frontier.parse()


def test_times_are_those_of_the_compiled_and_the_ungated_program(frontier, monkeypatch, tmp_path):
  program = lambda strategy, seconds, chosen=False: {
    "part": None,
    "strategy": strategy,
    "mac_ratio": 0.5,
    "computed_ratio": 0.5,
    "seconds": seconds,
    "time_ratio": 0.5,
    "efficiency": 1.0,
    "chosen": chosen,
    "open_ratio": 1.0,
  }
  calls = []

  def call(_, folder, command):
    calls.append(command)
    folder.mkdir(parents=True)
    programs = [program("masked", 0.004, True), program("ungated", 0.002)]
    content = {"step": 1, "device": "cpu", "timings": {"1 image at a time": programs}}
    (folder / "compile.json").write_text(json.dumps(content))

  monkeypatch.setattr(frontier.Family, "_call", call)
  args = argparse.Namespace(out=tmp_path, table="made", jobs=1, minutes=1)
  # Of several nets together, no time is shown.
  part = frontier.Row("a alone", frontier.BASELINE, "c", together="both")
  rows = [frontier.TABLES["made"][0], part]
  results = {("narrow", 0): None, ("narrow", 1): {}, ("a alone", 0): {}}
  family = frontier.Family(args, [])
  for _ in range(2):
    found = family.time_rows(rows, [0, 1], results)
  assert found == {"narrow": {"1 image at a time": {"compiled": 4, "ungated": 2}}}
  assert len(calls) == 1
  assert calls[0][-1] == "--mode=compile"
  assert frontier.milliseconds(tmp_path) is None


@pytest.mark.parametrize("argument", ["--only=no such row", "--seed=3", "--epochs=0", "fields"])
def test_arguments_that_mean_nothing_are_errors(frontier, monkeypatch, capsys, argument):
  with pytest.raises(SystemExit):
    run(frontier, monkeypatch, "made", argument)
  assert argument.strip("-").partition("=")[0] in capsys.readouterr().err
