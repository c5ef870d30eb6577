import json

import numpy as np
import pytest

from gating_jax.inference.compiled import Timing
from gating_jax.inference.conditional import CompiledConditional
from gating_jax.inference.exits import CompiledExits
from gating_jax.reports import conclusion, frame, measured_times, page, timings
from gating_jax.training import rundir


def test_an_absent_kernel_is_named_with_the_tables_that_lack_it(monkeypatch, capsys):
  monkeypatch.setattr(timings, "why_not", lambda name: f"no compiler for {name}")
  # A program with exits has no such strategy.
  for kind, said in (
    (CompiledConditional, True),
    (CompiledExits, False),
  ):
    made = kind.__new__(kind)
    made.report = lambda: ()
    list(timings.time_images(lambda made=made, **_: made, np.zeros((2, 8, 8, 1), np.float32)))
    assert (
      "the strategy native is not tried: no compiler for native" in capsys.readouterr().out
    ) == said


def test_times_of_an_older_checkpoint_are_put_aside_and_those_of_the_same_stay(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(page, "save_figure", lambda _, path: path.write_bytes(b"a picture"))
  (tmp_path / "config.json").write_text('{"experiment": "segmentation"}')
  (tmp_path / "report.html").write_text("a page of an older checkpoint")
  monkeypatch.setattr(frame, "refresh_times", lambda _: False)
  tables = [("1 image at a time", [])]
  run_dir = rundir.RunDir(tmp_path)

  def write(step):
    conclusion.conclude_times(
      run_dir, step, timings.write_times(run_dir, step, tables, pixels=(8, 12))
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


def timed(strategy, *, mac_ratio, time_ratio, part=None, computed_ratio=1.0):
  """Returns a row of a table of times."""
  return Timing(
    part=part,
    strategy=strategy,
    mac_ratio=mac_ratio,
    computed_ratio=computed_ratio,
    seconds=time_ratio,
    time_ratio=time_ratio,
    efficiency=mac_ratio / time_ratio,
    chosen=True,
  )


def test_more_time_saved_than_multiply_accumulates_is_refused_and_nothing_is_written(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(page, "save_figure", lambda _, path: path.write_bytes(b"a picture"))
  run_dir = rundir.RunDir(tmp_path)
  # The figures of a run on videos whose baseline was not the quickest way.
  rows = [timed("segments", mac_ratio=0.81, time_ratio=0.455)]
  message = "efficiency of segments, 8 videos at a time, must be at most 1.05.*; got 1.78, an error"
  with pytest.raises(ValueError, match=message):
    timings.write_times(run_dir, 1, [("8 videos at a time", rows)])
  assert not list(tmp_path.glob("compile*"))
  kept = [
    timed("segments", mac_ratio=0.81, time_ratio=0.78),
    # A part has no such baseline, and gate networks no share in what is saved.
    timed("native", mac_ratio=0.5, time_ratio=0.2, part=1),
    timed("masked", mac_ratio=1.3, time_ratio=1.0),
  ]
  # Half of the baseline's segments are padding of shorter videos.
  padded = [
    timed("segments", mac_ratio=0.5, time_ratio=0.25),
    timed("ungated", mac_ratio=1.0, time_ratio=1.0, computed_ratio=2.0),
  ]
  tables = [("8 videos at a time", kept), ("8 short videos at a time", padded)]
  assert list(timings.write_times(run_dir, 1, tables)) == [title for title, _ in tables]


@pytest.mark.parametrize(
  "text",
  [
    None,
    "",
    "[]",
    "{}",
    '{"step": 1, "device": "a", "timings": [1]}',
    '{"step": 1, "device": "a", "timings": {}}',
    '{"step": 1, "device": "a", "timings": {"a": [{"part": 0}]}}',
  ],
)
def test_missing_and_damaged_times_are_no_times(tmp_path, text):
  if text is not None:
    (tmp_path / "compile.json").write_text(text)
  assert timings.read_times(tmp_path) is None
  assert not frame.refresh_times(tmp_path)  # there is no page either


def row(seconds, strategy, *, chosen=False):
  return {
    "part": None,
    "strategy": strategy,
    "mac_ratio": 0.5,
    "computed_ratio": 0.5,
    "seconds": seconds,
    "time_ratio": 1.0,
    "chosen": chosen,
  }


def test_the_time_of_tasks_is_the_mean_over_tasks_of_single_images():
  measured = {
    f"task {i}, a: {n} at a time": [row(i / 1000, "switch", chosen=True), row(i / 500, "ungated")]
    for i in (1, 3)
    for n in ("1 image", "64 images")
  }
  found = measured_times.time_number(
    measured_times.parse_times({"step": 1, "device": "d", "timings": measured}), "image"
  )
  assert (found.value, found.baseline) == ("2 ms", "ungated: 4 ms")
  assert "mean over 2 tasks" in found.meaning


def test_without_an_ungated_network_there_is_nothing_to_compare_a_time_with():
  timings = {"1 image at a time": [row(0.001, "switch", chosen=True)]}
  alone = measured_times.parse_times({"step": 1, "device": "d", "timings": timings})
  assert measured_times.time_number(alone, "image").value == "–"
  assert measured_times._page_rows("a", alone.timings["1 image at a time"]) == [
    ["a", "switch ✓", "1", "–", "50.0", "–"]
  ]


def one_image(step, pixels=None):
  rows = [row(0.001, "switch", chosen=True), row(0.002, "ungated")]
  return measured_times.parse_times(
    {"step": step, "device": "d", "pixels": pixels, "timings": {"1 image at a time": rows}}
  )


def test_times_of_another_step_are_said_to_be(monkeypatch):
  monkeypatch.setattr(
    page, "embed_figure", lambda figure, caption, **_: page.EmbeddedPicture(b"", caption)
  )
  around = frame.Surroundings(step=2, times=one_image(1), workdir="a")
  shown = frame.run_time_number("image", around)
  assert (shown.value, shown.baseline) == (
    "–",
    "measured at step 1, not at step 2 like the rest of the page",
  )
  assert shown.command == "gating-jax --mode=compile --workdir=a"
  assert (
    "The rest of this page is of step 2, so these times belong to a different network"
    in frame.run_times_section("image", around).text
  )
  assert (
    frame.run_time_number("image", frame.Surroundings(step=1, times=one_image(1))).value == "1 ms"
  )


def test_a_mode_that_refuses_the_run_is_not_advised():
  around = frame.Surroundings(
    step=2, not_compiled="model must be ResNet; got ExpertNet", workdir="a"
  )
  shown = frame.run_time_number("image", around)
  said = "--mode=compile cannot time this run: model must be ResNet; got ExpertNet."
  assert (shown.value, shown.command, shown.meaning) == ("–", "", said)
  assert frame.run_times_section("image", around).text == f"gating-jax {said}"


def test_times_of_scenes_are_said_to_be_of_the_backbone_on_training_images():
  shown = frame.run_time_number("scene", frame.Surroundings(step=1, times=one_image(1, [8, 12])))
  assert (shown.name, shown.value) == ("Milliseconds of the backbone", "1 ms")
  assert (
    "a call with one training image of 8 x 12 pixels, by the backbone without the head, in the"
    in shown.meaning
  )


def test_what_takes_long_is_on_the_edge_of_the_picture():
  row = {"part": 1, "strategy": "masked", "mac_ratio": 0.5, "time_ratio": 1.0}
  figure = timings.draw_timings(
    {"a table": [row, row | {"strategy": "switch", "time_ratio": 5.0}]}, columns=2
  )
  (axes,) = figure.axes
  heights = [float(points.get_offsets()[0, 1]) for points in axes.collections]
  assert heights == pytest.approx([100.0, axes.get_ylim()[1]])
