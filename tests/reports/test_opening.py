import pytest

from gating_jax.reports import opening, page, tables, timings

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
    opening.about_section(
      opening.Surroundings(starts=[START, START], report=START, seed=3, workdir="runs/a")
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
  found = cells(opening.about_section(opening.Surroundings(starts=starts)))
  assert {
    found[name].partition(" (")[0]
    for name in ("started", "command", "commit", "versions", "hardware")
  } == {"not recorded"}


def test_an_ungated_run_is_its_own_baseline():
  around = opening.Surroundings(ungated=True)
  assert (
    opening.score_number("accuracy", 0.5, key="accuracy", around=around, meaning="").baseline
    == "this run is ungated: it is a baseline"
  )
  assert (
    opening.macs_number(1, executed=5, dense=5, noun="image", around=around).baseline
    == "this run is ungated, 5 per image"
  )
  assert opening.why_no_baseline(around, "somehow") == ""


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
  found = timings.time_number(
    timings.parse_times({"step": 1, "device": "d", "timings": measured}), "image"
  )
  assert (found.value, found.baseline) == ("2 ms", "ungated: 4 ms")
  assert "mean over 2 tasks" in found.meaning


def one_image(step, pixels=None):
  rows = [row(0.001, "switch", chosen=True), row(0.002, "ungated")]
  return timings.parse_times(
    {"step": step, "device": "d", "pixels": pixels, "timings": {"1 image at a time": rows}}
  )


def test_times_of_another_step_are_said_to_be(monkeypatch):
  monkeypatch.setattr(page, "embed_figure", lambda figure, caption, **_: page.Picture(b"", caption))
  around = opening.Surroundings(step=2, times=one_image(1), workdir="a")
  shown = opening.time_number("image", around)
  assert (shown.value, shown.baseline) == (
    "–",
    "measured at step 1, not at step 2 like the rest of the page",
  )
  assert shown.command == "gating-jax --mode=compile --workdir=a"
  assert (
    "The rest of this page is of step 2, so these times belong to a different network"
    in opening.times_section("image", around).text
  )
  assert (
    opening.time_number("image", opening.Surroundings(step=1, times=one_image(1))).value == "1 ms"
  )


def test_a_mode_that_refuses_the_run_is_not_advised():
  around = opening.Surroundings(
    step=2, not_compiled="model must be ResNet; got ExpertNet", workdir="a"
  )
  shown = opening.time_number("image", around)
  said = "--mode=compile cannot time this run: model must be ResNet; got ExpertNet."
  assert (shown.value, shown.command, shown.meaning) == ("–", "", said)
  assert opening.times_section("image", around).text == f"gating-jax {said}"


def test_times_of_scenes_are_said_to_be_of_the_backbone_on_training_images():
  shown = opening.time_number("scene", opening.Surroundings(step=1, times=one_image(1, [8, 12])))
  assert (shown.name, shown.value) == ("Milliseconds of the backbone", "1 ms")
  assert (
    "a call with one training image of 8 x 12 pixels, by the backbone without the head, in the"
    in shown.meaning
  )


RESULT = dict(
  accuracy=0.5,
  mean_iou=0.5,
  images=3,
  params=3,
  gate_params=1,
  ungated_macs=10,
  macs=5.0,
  mac_ratio=0.5,
  budget=0.5,
  gates=4,
  macs_p10=1.0,
  macs_p90=2.0,
  macs_std=0.1,
  macs_of_quarter1=1.0,
  macs_of_quarter4=2.0,
  always_open=1,
  always_closed=1,
  random_dropout=1,
  conditional=1,
  mean_open=0.5,
  class_information=0.1,
  class_information_floor=0.0,
  head_macs=1,
)
VIDEO = dict(
  accuracy=0.5,
  videos=3,
  all_segments_macs=10,
  macs=5.0,
  mac_ratio=0.5,
  share=0.5,
  share_p10=0.1,
  share_p90=0.9,
  precision=0.5,
  recall=0.5,
  relevant_share=0.1,
  unreadable=1,
  missing=1,
  classes_left_out=["a"],
  videos_per_second=1.0,
  all_segments_videos_per_second=2.0,
)
TASKS = dict(
  task_classifier_accuracy=0.5,
  dense_macs=10,
  dense_macs_reduced=5,
  task_aware_macs=5.0,
  task_agnostic_macs=9.0,
  params=3,
  memory_mb=1.0,
  mean_gate_overlap=0.5,
  free_units={"conv": (1, 2)},
)


def test_every_row_of_every_result_is_defined():
  rows = [
    *tables.classification_rows(RESULT),
    *tables.scene_rows(RESULT | {"iou/a": 0.5}),
    *tables.video_rows(VIDEO),
    *tables.video_rows(
      {"mean_average_precision": 0.5} | {k: v for k, v in VIDEO.items() if k != "accuracy"}
    ),
    *tables.task_rows(TASKS),
  ]
  assert [name for name, _ in rows if not tables.meaning(name)] == []


def test_every_measure_of_tasks_is_defined():
  accuracies = {
    "accuracies": [[0.5]],
    "average_accuracy": 0.5,
    "forgetting": None,
    "backward_transfer": None,
    "forward_transfer": None,
    "reasons": {},
  }
  ((_, rows),) = tables.task_tables({"task_names": ["one"], "task_aware": accuracies})
  assert {name for name, *_ in rows} == {"one", *tables.TASK_MEANINGS}
