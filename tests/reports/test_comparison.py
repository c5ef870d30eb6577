import dataclasses
import re

import pytest

from gating_jax.reports import comparison, page
from gating_jax.reports.comparison import Run

RESULT = {"step": 40, "accuracy": 0.9, "macs": 1000.0, "mac_ratio": 0.5, "params": 5000, "gate_params": 70, "gates": 8,
          "conditional": 5, "always_open": 2, "always_closed": 1, "random_dropout": 0, "seconds_since_last_start": 12.3}
TASKS = {"step": 90, "task_aware.average_accuracy": 0.99, "task_agnostic.average_accuracy": 0.6,
         "task_aware.forgetting": None, "task_aware_macs": 250.0, "task_agnostic_macs": 750.0, "dense_macs": 1000,
         "params": 300}


def image_run(name, result=RESULT, lines=(), **config):
  return Run(name, {"experiment": "classification", "seed": 0, "optim.epochs": 3, **config}, result,
             [{"step": 20, "split": "train", "cross_entropy": 0.4}, *lines])


def task_run(name, **config):
  return Run(name, {"experiment": "continual", "seed": 0, "method": "gates", **config}, TASKS,
             [{"step": 20, "split": "train", "cross_entropy": 0.4}])


def cells(rows):
  return {name: values for name, *values in rows}


def tables(runs):
  return {section.title: cells(part.rows) for section in comparison.sections(runs) for part in section.parts
          if isinstance(part, page.Table)}


def pictures(runs, title):
  return [part.caption for section in comparison.sections(runs) if section.title == title for part in section.parts]


def test_results_stand_side_by_side():
  found = tables([image_run("a"), image_run("b", RESULT | {"accuracy": 0.8, "gates": 0}), task_run("c")])["Results"]
  assert found["accuracy"] == ["90.00 %", "80.00 %", "–"]
  assert found["accuracy, task known"] == ["–", "–", "99.00 %"]
  assert found["accuracy, task unknown"] == ["–", "–", "60.00 %"]
  assert found["share of the dense net's"] == ["50.0 %", "50.0 %", "–"]
  assert found["share, task unknown"] == ["–", "–", "75.0 %"]
  assert found["gates conditional"] == ["5 of 8", "5 of 0", "–"]
  assert found["parameters"] == ["5,000", "5,000", "300"]
  assert found["last step"] == ["40", "40", "90"]
  assert "mean IoU" not in found
  assert "forgetting, task known" not in found  # of one task: not defined


def test_a_share_of_nothing_is_left_out():
  run = task_run("a")
  found = tables([dataclasses.replace(run, result=TASKS | {"dense_macs": 0}), run])["Results"]
  assert found["share, task known"] == ["–", "25.0 %"]


def test_a_run_that_goes_on_shows_its_newest_test():
  tests = [{"step": step, "split": "test", "accuracy": step / 100, "macs": 900.0} for step in (25, 50)]
  last = {"step": 60, "split": "train", "cross_entropy": 0.1}
  found = tables([image_run("a", None, [*tests, last]), image_run("b", None)])["Results"]
  assert found["state"] == ["not finished", "not finished"]
  assert found["accuracy"] == ["50.00 %", "–"]
  assert found["last step"] == ["60", "20"]


def test_only_settings_that_differ_are_listed():
  runs = [image_run("a"), image_run("b", **{"optim.epochs": 4, "new": None}), image_run("c")]
  assert tables(runs)["Configs"] == {"optim.epochs": ["3", "4", "3"], "new": ["–", "None", "–"]}
  assert "Configs" not in tables(runs[:1])
  same = comparison.sections([runs[0], runs[2]])[1]
  assert (same.text, same.parts) == ("The configs do not differ.", [])


def test_settings_of_one_kind_of_experiment_are_compared_among_its_runs_alone():
  runs = [image_run("a"), task_run("b", seed=1), task_run("c", method="ewc")]
  assert tables(runs)["Configs"] == {
      "experiment": ["classification", "continual", "continual"], "seed": ["0", "1", "0"],
      "method": ["–", "gates", "ewc"]}


def test_each_kind_of_experiment_and_score_has_its_picture():
  assert pictures([image_run("a"), image_run("b"), task_run("c")], "Score and cost") == [
      "Classification: accuracy against multiply-accumulates.",
      "Continual: accuracy, task known against multiply-accumulates.",
      "Continual: accuracy, task unknown against multiply-accumulates."]


def test_courses_need_more_than_one_point():
  assert pictures([image_run("a"), image_run("b")], "During training") == []
  longer = [{"step": 40, "split": "train", "cross_entropy": 0.3}]
  assert pictures([image_run("a"), image_run("b", lines=longer)], "During training") == [
      "Classification: mean cross-entropy on training data."]
  tests = [{"step": step, "split": "test", "accuracy": 0.5} for step in (10, 20)]
  assert pictures([image_run("a", lines=tests)], "During training") == [
      "Classification: accuracy at each test during training."]


@pytest.fixture
def figures(monkeypatch):
  """Those drawn."""
  found = []
  pictured = page.pictured
  monkeypatch.setattr(page, "pictured", lambda figure, caption: found.append(figure) or pictured(figure, caption))
  return found


def test_every_run_is_named_in_the_picture_at_its_place(figures):
  comparison.sections([image_run("$a$"), image_run("b", RESULT | {"accuracy": 0.8, "macs": 2000.0})])
  (figure,) = figures
  lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
  assert lines == {"$a$": [[1000, 90]], "b": [[2000, 80]]}
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == ["$a$", "b"]
  figure.draw_without_rendering()
  assert legend.get_window_extent().y1 <= figure.axes[0].get_tightbbox().y0 + 1  # below, not over the points


def test_the_terminal_has_the_same_tables():
  text = comparison.render([image_run("a"), image_run("b", seed=7)])
  assert re.search(r"^accuracy +90\.00 % +90\.00 %$", text, re.MULTILINE)
  assert re.search(r"^seed +0 +7$", text, re.MULTILINE)
  assert "config" not in comparison.render([image_run("a")])


def test_a_run_named_like_a_script_is_text():
  runs = [image_run("<script>alert(1)</script>"), image_run("b", **{"data.name": "<script>alert(2)</script>"})]
  html = page.render(comparison.TITLE, comparison.sections(runs), runs[0].name)
  assert html.count("&lt;script&gt;alert(1)") == 3  # subtitle and two tables
  assert "&lt;script&gt;alert(2)" in html
  assert "<script" not in html
