import dataclasses
import re

import pytest

from gating_jax.reports import comparison, page
from gating_jax.reports.compared_runs import Run
from gating_jax.reports.timings import Times

RESULT = {
  "step": 40,
  "accuracy": 0.9,
  "macs": 1000.0,
  "mac_ratio": 0.5,
  "params": 5000,
  "gate_params": 70,
  "gates": 8,
  "conditional": 5,
  "always_open": 2,
  "always_closed": 1,
  "random_dropout": 0,
  "seconds_since_last_start": 12.3,
}
TASKS = {
  "step": 90,
  "task_aware.average_accuracy": 0.99,
  "task_agnostic.average_accuracy": 0.6,
  "task_aware.forgetting": None,
  "task_aware_macs": 250.0,
  "task_agnostic_macs": 750.0,
  "dense_macs": 1000,
  "params": 300,
}


@pytest.fixture(autouse=True)
def unsaved(monkeypatch):
  """Draws pictures without pixels, which take most of the time."""
  monkeypatch.setattr(page, "save_figure", lambda figure, file: None)


def image_run(name, result=RESULT, lines=(), **config):
  return Run(
    name,
    {"experiment": "classification", "seed": 0, "optim.epochs": 3, **config},
    result,
    [{"step": 20, "split": "train", "cross_entropy": 0.4}, *lines],
  )


def task_run(name, **config):
  return Run(
    name,
    {"experiment": "continual", "seed": 0, "method": "gates", **config},
    TASKS,
    [{"step": 20, "split": "train", "cross_entropy": 0.4}],
  )


def cells(rows):
  return {name: values for name, *values in rows}


def tables(runs):
  return {
    section.title: cells(part.rows)
    for section in comparison.page_content(runs)[1]
    for part in section.parts
    if isinstance(part, page.Table)
  }


def pictures(runs, title):
  """Returns the captions of pictures, up to the first colon or full stop."""
  begin, sections = comparison.page_content(runs)
  first = [begin.picture] if begin.picture and title == "Score and cost" else []
  found = first + [part for section in sections if section.title == title for part in section.parts]
  return [part.caption.partition(". ")[0].rstrip(".") + "." for part in found]


def test_results_stand_side_by_side():
  found = tables(
    [image_run("a"), image_run("b", RESULT | {"accuracy": 0.8, "gates": 0}), task_run("c")]
  )["Results"]
  assert found["accuracy"] == ["90.00 %", "80.00 %", "–"]
  assert found["accuracy, task known"] == ["–", "–", "99.00 %"]
  assert found["accuracy, task unknown"] == ["–", "–", "60.00 %"]
  assert found["fraction of the ungated net's"] == ["50.0 %", "50.0 %", "–"]
  assert found["fraction, task unknown"] == ["–", "–", "75.0 %"]
  assert found["gates conditional"] == ["5 of 8", "5 of 0", "–"]
  assert found["parameters"] == ["5,000", "5,000", "300"]
  assert found["last step"] == ["40", "40", "90"]
  assert "mean IoU" not in found
  assert "forgetting, task known" not in found  # of one task: not defined


def test_a_share_of_nothing_is_left_out():
  run = task_run("a")
  found = tables([dataclasses.replace(run, result=TASKS | {"dense_macs": 0}), run])["Results"]
  assert found["fraction, task known"] == ["–", "25.0 %"]


def test_a_run_that_goes_on_shows_its_newest_test():
  tests = [
    {"step": step, "split": "test", "accuracy": step / 100, "macs": 900.0} for step in (25, 50)
  ]
  last = {"step": 60, "split": "train", "cross_entropy": 0.1}
  found = tables([image_run("a", None, [*tests, last]), image_run("b", None)])["Results"]
  assert found["state"] == ["not finished", "not finished"]
  assert found["accuracy"] == ["50.00 %", "–"]
  assert found["last step"] == ["60", "20"]


def test_only_settings_that_differ_are_listed():
  runs = [image_run("a"), image_run("b", **{"optim.epochs": 4, "new": None}), image_run("c")]
  assert tables(runs)["Configs"] == {"optim.epochs": ["3", "4", "3"], "new": ["–", "None", "–"]}
  assert "Configs" not in tables(runs[:1])
  same = comparison.page_content([runs[0], runs[2]])[1][1]
  assert (same.text, same.parts) == ("The configs do not differ.", [])


def test_settings_of_one_kind_of_experiment_are_compared_among_its_runs_alone():
  runs = [image_run("a"), task_run("b", seed=1), task_run("c", method="ewc")]
  assert tables(runs)["Configs"] == {
    "experiment": ["classification", "continual", "continual"],
    "seed": ["0", "1", "0"],
    "method": ["–", "gates", "ewc"],
  }


def test_each_kind_of_experiment_and_score_has_its_picture():
  assert pictures([image_run("a"), image_run("b"), task_run("c")], "Score and cost") == [
    "Classification: accuracy against multiply-accumulates.",
    "Continual: accuracy, task known against multiply-accumulates.",
    "Continual: accuracy, task unknown against multiply-accumulates.",
  ]


def test_runs_on_different_test_sets_share_no_picture_and_no_numbers():
  on = lambda run, split: dataclasses.replace(
    run, tested={"data.name": "digits", "data.test_split": split}
  )
  dense = dataclasses.replace(
    image_run("dense", RESULT | {"accuracy": 0.95, "macs": 2000.0}), ungated=True
  )
  runs = [
    on(image_run("x"), "a"),
    on(dense, "b"),
    on(image_run("y", RESULT | {"accuracy": 0.8}), "b"),
  ]
  begin, (results, _, costs) = comparison.page_content(runs)
  names = [f"classification on digits (data.test_split {split})" for split in "ba"]
  assert [(number.name, number.value, number.baseline) for number in begin.numbers[::3]] == [
    (f"Accuracy, {names[0]}", "80.00 %", "ungated: 95.00 %"),
    (f"Accuracy, {names[1]}", "90.00 %", "ungated: none among these runs"),
  ]
  said = (
    f"These runs learn 2 different things: {', '.join(names)}. Scores are comparable only within "
    "each of them."
  )
  assert begin.text.startswith(said)
  assert (
    f"Those of {names[1]} belong to x, the gated run with the highest accuracy. None of its runs "
    "is ungated" in (begin.text)
  )
  assert [
    [point.name for point in picture.points] for picture in (begin.picture, *costs.parts)
  ] == [["dense", "y"], ["x"]]
  assert costs.parts[0].caption.startswith(f"C{names[1][1:]}: accuracy against")
  assert cells(results.parts[0].rows)["tested on"] == ["digits"] * 3
  assert comparison.render_comparison(runs).endswith(
    said.replace(", ".join(names), ", ".join(names[::-1]))
  )


def test_courses_need_more_than_one_point():
  assert pictures([image_run("a"), image_run("b")], "During training") == []
  longer = [{"step": 40, "split": "train", "cross_entropy": 0.3}]
  assert pictures([image_run("a"), image_run("b", lines=longer)], "During training") == [
    "Classification: mean cross-entropy on training data."
  ]
  tests = [{"step": step, "split": "test", "accuracy": 0.5} for step in (10, 20)]
  assert pictures([image_run("a", lines=tests)], "During training") == [
    "Classification: accuracy at each test during training."
  ]


@pytest.fixture
def figures(monkeypatch):
  """The pictures that are drawn."""
  found = []
  embed = page.embed_figure
  monkeypatch.setattr(
    page,
    "embed_figure",
    lambda figure, *args, **named: found.append(figure) or embed(figure, *args, **named),
  )
  return found


def test_every_run_is_named_in_the_picture_at_its_place(figures):
  comparison.page_content(
    [image_run("$a$"), image_run("b", RESULT | {"accuracy": 0.8, "macs": 2000.0})]
  )
  (figure,) = figures
  lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
  assert lines == {"$a$": [[1000, 90]], "b": [[2000, 80]]}
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ["$a$", "b"]
  figure.draw_without_rendering()
  # Below, not over the points.
  assert legend.get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0 + 1


def test_the_terminal_has_the_same_tables():
  text = comparison.render_comparison([image_run("a"), image_run("b", seed=7)])
  assert re.search(r"^accuracy +90\.00 % +90\.00 %$", text, re.MULTILINE)
  assert re.search(r"^seed +0 +7$", text, re.MULTILINE)
  assert "config" not in comparison.render_comparison([image_run("a")])
  summary = comparison._summary(image_run("a"))
  assert re.fullmatch(r"accuracy 90\.00 %, [0-9.]+ % of the ungated net's MACs", summary)


def test_a_run_named_like_a_script_is_text():
  runs = [
    image_run("<script>alert(1)</script>"),
    image_run("b", **{"data.name": "<script>alert(2)</script>"}),
  ]
  begin, sections = comparison.page_content(runs)
  html = page.render_page(comparison.TITLE, sections, subtitle=runs[0].name, opening=begin)
  # Subtitle, which runs, the point's text and two tables.
  assert html.count("&lt;script&gt;alert(1)") == 5
  assert "&lt;script&gt;alert(2)" in html
  assert "<script" not in html


UNGATED = RESULT | {"accuracy": 0.95, "macs": 2000.0}


def family():
  """A gated run between two ungated ones."""
  small = image_run(
    "small",
    RESULT | {"accuracy": 0.85, "macs": 500.0},
    **{"model.gating": "none", "model.width": 0.5},
  )
  return [
    image_run("gated", **{"model.gating": "channel", "model.width": 1.0}),
    *(
      dataclasses.replace(run, ungated=True)
      for run in (
        image_run("large", UNGATED, **{"model.gating": "none", "model.width": 1.0}),
        small,
      )
    ),
  ]


def test_ungated_runs_are_joined_by_a_line_in_the_order_of_their_macs(figures):
  comparison.page_content(family())
  (line,) = [line for line in figures[0].axes[0].lines if line.get_label() == "ungated networks"]
  assert line.get_xydata().tolist() == [[500, 85], [2000, 95]]
  assert [text.get_text() for text in figures[0].axes[0].texts] == ["gated", "large", "small"]


def test_a_point_says_how_the_config_of_its_run_differs():
  gated, large, small = comparison.page_content(family())[0].picture.points
  assert gated.name == "gated"
  assert gated.lines == [
    "accuracy: 90.00 %",
    "MACs: 1 k",
    "model.gating: channel",
    "model.width: 1.0",
  ]
  assert small.lines[2:] == ["model.gating: none", "model.width: 0.5"]
  assert small.left < gated.left < large.left
  assert large.top < gated.top < small.top
  assert all(
    0 < place < 100 for point in (gated, large, small) for place in (point.left, point.top)
  )


def test_a_point_counts_the_settings_for_which_it_has_no_room(monkeypatch):
  monkeypatch.setattr(comparison, "_MOST_LINES", 1)
  for point in comparison.page_content(family())[0].picture.points:
    assert len(point.lines) == 4
    assert point.lines[2].startswith("model.gating: ")
    assert point.lines[3] == "and 1 more settings"


def times(step, device="a cpu", seconds=0.002):
  row = {"part": None, "strategy": "masked", "chosen": True, "seconds": seconds}
  return Times(
    step, device, {"1 image at a time": [row, row | {"strategy": "ungated", "chosen": False}]}
  )


@pytest.mark.parametrize(
  ("mine", "theirs", "shown"),
  [
    (times(40), times(40, seconds=0.004), ("2 ms", "ungated: 4 ms")),
    # Its own network without gates.
    (
      times(40),
      times(40, "another cpu", 0.004),
      ("2 ms", "ungated: 2 ms"),
    ),
    (times(40), times(39, seconds=0.004), ("2 ms", "ungated: 2 ms")),
    (times(39), times(40), ("–", "not measured, nor was the ungated network")),
  ],
)
def test_times_of_another_step_or_machine_stand_next_to_no_score(mine, theirs, shown):
  gated, dense, _ = family()
  runs = [dataclasses.replace(gated, times=mine), dataclasses.replace(dense, times=theirs)]
  number = comparison.page_content(runs)[0].numbers[-1]
  assert (number.value, number.baseline) == shown


def test_the_best_gated_run_stands_next_to_the_best_ungated_one():
  begin = comparison.page_content(family())[0]
  assert [(number.value, number.baseline) for number in begin.numbers] == [
    ("90.00 %", "ungated: 95.00 %"),
    ("50.0 %", "ungated: 100 %, 2 k per image"),
    ("–", "not measured, nor was the ungated network"),
  ]
  assert begin.text == (
    "The numbers belong to gated, the gated run with the highest accuracy, next to large, the best "
    "ungated one."
  )
  alone = comparison.page_content([image_run("a"), image_run("b")])[0]
  assert "None of these runs is ungated, so there is no baseline" in alone.text
  assert alone.numbers[0].baseline == "ungated: none among these runs"
  assert comparison.page_content(family()[1:])[0].numbers == []


def with_interval(accuracy, low, high):
  return RESULT | {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}


def test_scores_whose_difference_from_the_best_may_be_chance_are_marked():
  runs = [
    image_run("best", with_interval(0.90, 0.88, 0.92)),
    image_run("near", with_interval(0.89, 0.87, 0.91)),
    image_run("far", with_interval(0.80, 0.78, 0.82)),
    image_run("as good", with_interval(0.90, 0.88, 0.92)),
    image_run("old"),
  ]
  cells = ["90.00 %", "89.00 % ≈", "80.00 %", "90.00 %", "90.00 %"]
  assert tables(runs)["Results"]["accuracy"] == cells
  text = comparison.render_comparison(runs)
  assert "≈  The score differs from the best" in text
  assert "≈" not in comparison.render_comparison([runs[0], runs[2]])
