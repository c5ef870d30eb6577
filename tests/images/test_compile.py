import json

import numpy as np
import pytest
from PIL import Image

from configs import digits_resnet20
from gating_jax import runner
from gating_jax.images import classification
from gating_jax.inference.conditional import CompiledConditional
from gating_jax.inference.exits import CompiledExits
from gating_jax.models import resnets
from gating_jax.reports import compile_report, page, surroundings, timings
from gating_jax.training import rundir
from gating_jax.training.evaluation import Evaluation
from tests.helpers import tiny_cli


def test_an_absent_kernel_is_named_with_the_tables_that_lack_it(monkeypatch, capsys):
  monkeypatch.setattr(compile_report, "why_not", lambda name: f"no compiler for {name}")
  for kind, said in (
    (CompiledConditional, True),
    (CompiledExits, False),
  ):  # a program with exits has no such strategy
    made = kind.__new__(kind)
    made.report = lambda: ()
    list(
      compile_report.time_images(lambda made=made, **_: made, np.zeros((2, 8, 8, 1), np.float32))
    )
    assert (
      "the strategy native is not tried: no compiler for native" in capsys.readouterr().out
    ) == said


def test_what_takes_long_is_on_the_edge_of_the_picture():
  row = {"part": 1, "strategy": "masked", "mac_ratio": 0.5, "time_ratio": 1.0}
  figure = timings.draw_timings(
    {"a table": [row, row | {"strategy": "switch", "time_ratio": 5.0}]}, columns=2
  )
  (axes,) = figure.axes
  heights = [float(points.get_offsets()[0, 1]) for points in axes.collections]
  assert heights == pytest.approx([100.0, axes.get_ylim()[1]])


def test_times_of_an_older_checkpoint_are_put_aside_and_those_of_the_same_stay(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(page, "save_figure", lambda _, path: path.write_bytes(b"a picture"))
  (tmp_path / "config.json").write_text('{"experiment": "segmentation"}')
  (tmp_path / "report.html").write_text("a page of an older checkpoint")
  monkeypatch.setattr(surroundings, "refresh_times", lambda _: False)
  tables = [("1 image at a time", [])]
  write = lambda step: compile_report.write_times(
    rundir.RunDir(tmp_path), step, tables, pixels=(8, 12)
  )
  write(7)
  write(9)
  steps = {
    file.name: json.loads(file.read_text())["step"] for file in tmp_path.glob("compile*.json")
  }
  assert steps == {"compile.json": 9, "compile_of_step_7.json": 7}
  assert {file.name for file in tmp_path.glob("*.png")} == {"compile.png", "compile_of_step_7.png"}
  assert "--mode=report    # writes the page of the newest checkpoint" in capsys.readouterr().out
  with pytest.raises(rundir.RunDirError, match=r"compile\.json exists; rename it"):
    write(9)


@pytest.mark.parametrize(
  ("gates", "refused"), [("experts", "model must be ResNet or VGG; got ExpertNet"), ("none", "")]
)
def test_the_page_of_what_is_not_compiled_says_why(tmp_path, monkeypatch, gates, refused):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  pages = []
  monkeypatch.setattr(classification.image_report, "write_report", lambda _, run: pages.append(run))
  built = classification.build(digits_resnet20.get_config(f"gates={gates},model=tiny"))

  class OneRow(classification.Classification):
    def rows(self, result):
      return [("a row", "1")]

  programme, run_dir = OneRow(built), rundir.RunDir(tmp_path)
  programme.write_report(run_dir, 3, Evaluation({}, None, None), drawn={})
  assert (pages[0].around.step, pages[0].around.not_compiled) == (3, refused)
  assert "mode=compile" not in runner.closing_lines(programme, run_dir, {}, done="Tested")


@pytest.mark.slow
def test_a_run_is_compiled_and_what_was_measured_is_kept(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(resnets.RESNETS, "tiny", tiny_cli.TINY)
  monkeypatch.setattr(compile_report, "_REPEATS", 1)
  monkeypatch.setattr(compile_report, "_BATCHES", (1, 3))
  config = digits_resnet20.get_config()
  config.update_from_flattened_dict({"model.name": "tiny", "optim.epochs": 1})
  classification.run(config, tmp_path / "run", "train")
  before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json")}
  capsys.readouterr()
  classification.run(config, tmp_path / "run", "compile")
  said = capsys.readouterr().out
  found = json.loads((tmp_path / "run" / "compile.json").read_text())
  assert found["step"] == 11
  assert found["timings"].keys() == {"1 image at a time", "3 images at a time"}
  for rows in found["timings"].values():
    assert {"masked", "switch", "cluster"} <= {row["strategy"] for row in rows if row["part"] == 1}
    assert {"masked", "ungated"} <= {row["strategy"] for row in rows if row["part"] is None}
    assert sum(row["chosen"] for row in rows if row["part"] is None) == 1
    assert all((row["open_ratio"] is None) == (row["part"] is not None) for row in rows)
    for row in rows:
      assert row["efficiency"] == pytest.approx(row["mac_ratio"] / row["time_ratio"])
      assert f"{1e3 * row['seconds']:.2f}" in said
  last = said.rstrip().split("\n\n")[-1].splitlines()
  assert last[0].startswith("Timed the checkpoint of step 11")
  assert [line.split("  ")[1].strip() for line in last[1:4]] == [
    "made",
    "1 image at a time",
    "3 images at a time",
  ]
  assert last[4:] == [
    f"next: gating-jax --workdir={tmp_path / 'run'} --mode=export"
    "    # writes files that run without this package; some minutes"
  ]
  with Image.open(tmp_path / "run" / "compile.png") as picture:
    assert picture.width > picture.height > 300
  assert all(path.read_bytes() == content for path, content in before.items())
  with pytest.raises(rundir.RunDirError, match=r"compile\.json exists; rename it"):
    classification.run(config, tmp_path / "run", "compile")
