import functools
import json

import pytest

from configs import split_digits
from gating_jax import programmes
from gating_jax.continual import registry
from gating_jax.reports import frame, page
from gating_jax.training.rundir import RunDir, flatten
from tests.helpers import tiny_tasks

CONFIG = {
  "experiment": "classification",
  "seed": 0,
  "model": {"name": "tiny", "gating": "channel", "init_from": None, "gate": {"hidden": 16}},
  "optim": {"epochs": 3},
}

ROW = {
  "part": None,
  "mac_ratio": 0.5,
  "computed_ratio": 0.75,
  "seconds": 0.002,
  "time_ratio": 0.8,
  "efficiency": 1.0,
  "chosen": True,
  "open_ratio": 1.02,
  "strategy": "switch",
}

UNGATED = ROW | {"strategy": "ungated", "mac_ratio": 1.0, "seconds": 0.004, "chosen": False}

TIMES = {
  "step": 7,
  "device": "a machine",
  "timings": {
    "1 image at a time": [ROW, UNGATED, ROW | {"part": 0}],
    "64 images at a time": [ROW | {"seconds": 9.0}, UNGATED],
  },
}


@pytest.fixture
def made(tmp_path):
  """`(name, changes of the config, result) -> folder` of a run."""

  def make(name, result=None, **changes):
    folder = tmp_path / name
    folder.mkdir()
    config = flatten(CONFIG) | changes
    (folder / "config.json").write_text(json.dumps(config))
    if result is not None:
      (folder / "result.json").write_text(json.dumps(result))
    return folder

  return make


def baseline_of(folder):
  mine = json.loads((folder / "config.json").read_text())
  found = frame.find_baseline(folder, mine, programmes.PROGRAMMES["classification"])
  return found and found.name


NONE, DONE = {"model.gating": "none"}, {"step": 9, "accuracy": 0.5}


def test_a_baseline_is_a_finished_neighbour_that_differs_in_gates_alone(made):
  mine = made("mine", DONE)
  made("gated", DONE)
  made("larger", DONE, **NONE, **{"model.name": "large"})
  made("not_finished", **NONE)
  made("damaged", **NONE).joinpath("result.json").write_text("{")
  assert baseline_of(mine) is None
  made("other_seed", DONE, **NONE, seed=1)
  assert baseline_of(mine) == "other_seed"
  made("same_seed", DONE, **NONE, **{"model.gate.hidden": 4, "log_every": 3})
  assert baseline_of(mine) == "same_seed"


def test_the_ungated_run_that_a_run_started_from_is_its_baseline(made, tmp_path):
  made("dense", DONE, **NONE)
  start = made("start", DONE, **NONE, **{"optim.epochs": 90})
  assert baseline_of(made("mine", DONE, **{"model.init_from": str(start)})) == "start"
  assert baseline_of(made("lost", DONE, **{"model.init_from": str(tmp_path / "gone")})) == "dense"


@pytest.mark.parametrize(
  "theirs",
  [
    {"model.gating": "channel"},
    {**NONE, "data.test_split": "train"},
    {**NONE, "data.name": "letters"},
    {**NONE, "experiment": "segmentation"},
  ],
)
def test_a_start_that_is_gated_or_tested_on_something_else_is_no_baseline(made, theirs):
  start = made("start", DONE, **theirs)
  assert baseline_of(made("mine", DONE, **{"model.init_from": str(start)})) is None


def test_a_baseline_of_an_older_version_may_lack_fields_that_are_none(made):
  made("older", DONE, **NONE)
  assert baseline_of(made("mine", DONE, **{"data.new": None})) == "older"
  assert baseline_of(made("changed", DONE, **{"data.new": 3})) is None


@pytest.mark.parametrize(
  ("experiment", "field", "gated", "ungated"),
  [
    ("classification", "model.gating", ("layer", "exits"), ("none",)),
    ("segmentation", "model.gating", ("channel",), ("none",)),
    (
      "long_video",
      "model.selection",
      ("gate", "confidence", "prefix", "oracle"),
      ("all", "uniform", "random", "light"),
    ),
  ],
)
def test_a_network_is_ungated_that_computes_the_same_for_all(experiment, field, gated, ungated):
  is_ungated = lambda value, **more: frame.is_ungated(
    {"experiment": experiment, field: value, **more}
  )
  assert [value for value in (*gated, *ungated) if is_ungated(value)] == list(ungated)
  if experiment == "long_video":
    assert not is_ungated("all", **{"model.heavy.gating": "channel"})


def test_methods_whose_network_is_built_without_gates_are_ungated(monkeypatch):
  """The first network that a method makes is the one that predicts."""

  class Made(Exception):
    pass

  def network(*_, gated, **__):
    raise Made(gated)

  monkeypatch.setattr(registry, "build_network", network)
  monkeypatch.setattr(registry, "column", functools.partial(network, gated=False))
  config = split_digits.get_config()
  for method in registry.METHODS:
    config.method = method
    with pytest.raises(Made) as made:
      registry.build_method(config, tiny_tasks.problem())
    assert frame.is_ungated({"experiment": "continual", "method": method}) != made.value.args[0], (
      method
    )
  assert not frame.is_ungated({"experiment": "continual", "method": "of a newer version"})


def test_measured_times_are_written_into_the_page_of_their_step(tmp_path, monkeypatch):
  monkeypatch.setattr(
    page, "embed_figure", lambda figure, caption, **_: page.EmbeddedPicture(b"", caption)
  )
  file = tmp_path / "report.html"

  def page_of(step):
    around = frame.Surroundings(step=step, workdir="a run")
    begin = page.Opening([frame.run_time_number("image", around)])
    page.write_page(file, "A run", [frame.run_times_section("image", around)], opening=begin)
    return file.read_text()

  (tmp_path / "compile.json").write_text(json.dumps(TIMES))
  older = page_of(6)
  assert not frame.refresh_times(tmp_path)
  assert file.read_text() == older
  assert "gating-jax --mode=compile --workdir=&#39;a run&#39;" in page_of(7)
  assert frame.refresh_times(tmp_path)
  html = file.read_text()
  assert '<p class="value">2 ms</p>' in html
  assert "ungated: 4 ms" in html
  assert "The checkpoint of step 7, on a machine." in html
  assert (
    "<td>1 image at a time</td><td>switch ✓</td><td>2</td><td>50</td><td>75.0</td><td>102</td>"
    in html
  )


START = {
  "date": "2026-01-02T03:04:05+00:00",
  "command": "gating-jax --config=a.py",
  "commit": "abc-dirty",
  "versions": {"jax": "1.2"},
  "hardware": "a machine",
  "devices": 8,
  "processes": 2,
}


def cells(section):
  return dict(section.parts[0].rows)


def test_the_page_says_where_the_run_comes_from():
  found = cells(
    frame.about_section(
      frame.Surroundings(starts=[START, START], report=START, seed=3, workdir="runs/a")
    )
  )
  assert found == {
    "started": START["date"],
    "command": START["command"],
    "commit": "abc-dirty",
    "versions": "jax 1.2",
    "seed": "3",
    "hardware": "a machine; devices: 8, processes: 2",
    "run directory": "runs/a",
    "resumed (1)": f"{START['date']}, a machine; devices: 8, processes: 2",
    "page written": START["date"],
    "by": START["command"],
    "with commit": "abc-dirty",
    "on": "a machine; devices: 8, processes: 2",
  }


@pytest.mark.parametrize("starts", [[], [{}], [{"versions": 3, "commit": None, "hardware": ""}]])
def test_what_an_old_run_does_not_tell_is_not_recorded(starts):
  found = cells(frame.about_section(frame.Surroundings(starts=starts)))
  assert {
    found[name].partition(" (")[0]
    for name in ("started", "command", "commit", "versions", "hardware")
  } == {"not recorded"}


def test_only_the_process_that_writes_reads_the_runs_nearby(tmp_path, monkeypatch):
  config = split_digits.get_config()
  (tmp_path / "compile.json").write_text(json.dumps(TIMES))
  run_dir = RunDir(tmp_path)
  assert frame.read_surroundings(run_dir, config, step=3).times is not None
  monkeypatch.setattr(frame.hosts, "is_writer", lambda: False)
  around = frame.read_surroundings(run_dir, config, step=3)
  assert (around.times, around.starts, around.baseline) == (None, (), None)
  assert (around.step, around.seed, around.workdir) == (3, config.seed, str(tmp_path))


def test_a_folder_that_cannot_be_listed_has_no_neighbours(made, tmp_path):
  other = made("other")
  assert frame._neighbours(tmp_path / "mine") == [other]
  assert frame._neighbours(tmp_path / "gone" / "mine") == []


def test_an_ungated_run_is_its_own_baseline():
  around = frame.Surroundings(ungated=True)
  assert (
    frame.score_number("accuracy", 0.5, key="accuracy", around=around, meaning="").baseline
    == "this run is ungated: it is a baseline"
  )
  assert (
    frame.macs_number(1, executed=5, dense=5, noun="image", around=around).baseline
    == "this run is ungated, 5 per image"
  )
  assert frame.why_no_baseline(around, "somehow") == ""
