"""Comparison of runs: scores, costs, differences of config, pictures and learning curves.

Runs that are tested on different sets share no picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gating_jax.analysis import scores
from gating_jax.programmes import Score, example_noun
from gating_jax.reports import conclusion, frame, page, tables
from gating_jax.reports.compared_runs import (
  MISSING,
  SCORES,
  Run,
  RunGroup,
  differing_settings,
  group_runs,
  read_runs,
)
from gating_jax.reports.measured_times import time_number
from gating_jax.reports.text import (
  align_columns,
  capitalise,
  format_count,
  format_percent,
  plain,
)
from gating_jax.terminal import say, working
from gating_jax.training import provenance

TITLE = "Comparison of runs"
_LETTERS = 40  # in a cell in a terminal, at most
# Marks a score that may be as good as the best.
_ALIKE = "≈"
_MEANING_OF_ALIKE = (
  "The score differs from the best among runs that are tested alike by no more than the 95 % "
  "interval of the difference: it may be chance."
)


def compare_runs(folders: Sequence[Path], page_file: Path) -> None:
  """Prints the comparison and writes its page.

  Args:
    folders: run directories, at least one.
    page_file: a new file, or the page of an earlier comparison.
  Raises:
    RunDirError: a folder holds no run, or a damaged one.
    ValueError: a folder is given twice, or `page_file` holds something else.
  """
  with working("reading the runs and drawing the comparison", "up to a minute"):
    runs = read_runs(folders)
    # Checked before anything is drawn; never overwrites another file, such as a run's own page.
    if page_file.exists() and not _is_comparison(page_file):
      raise ValueError(
        f"page must be new or the page of an earlier comparison; {page_file} is neither"
      )
    begin, sections = page_content(runs)
    sections.append(_about_section(runs))
    page.write_page(page_file, TITLE, sections, subtitle=", ".join(_names(runs)), opening=begin)
  say(render_comparison(runs))
  say(f"\npage: {page_file}")
  rows = [("page", str(page_file))]
  for run in runs:
    rows.append((run.name, _summary(run)))
  said = conclusion.closing_text(
    f"Compared {len(runs)} runs.", rows, [f"open {page_file} in a browser"]
  )
  say(said)


def _is_comparison(file: Path) -> bool:
  """Checks that a file is the page of a comparison."""
  # The title is near the beginning; the rest may be megabytes of pictures.
  return file.is_file() and f"<title>{TITLE}</title>".encode() in file.read_bytes()[:2000]


def _names(named: Sequence[Run | RunGroup]) -> list[str]:
  """Returns the names of runs or groups."""
  return [one.name for one in named]


def _about_section(runs: Sequence[Run]) -> page.Section:
  """Returns the section on when, and by which command, the runs and the page were made."""
  origins = []
  for run in runs:
    origins.append(frame.Origin(run.name, run.starts, run.config.get("seed")))
  return frame.about_runs_section(origins, provenance.describe())


# By their names in results, which differ between programmes; a run has some of them.
_SUMMARISED = {
  "accuracy": "accuracy {}",
  "mean_iou": "mean IoU {}",
  "mean_average_precision": "mean average precision {}",
  "task_aware.average_accuracy": "accuracy, task known {}",
  "mac_ratio": "{} of the ungated net's MACs",
}


def _summary(run: Run) -> str:
  """Summarises the scores and MACs of a run in one line."""
  if run.result is None:
    return "not finished"
  found = []
  for name, words in _SUMMARISED.items():
    if name in run.result:
      found.append(words.format(format_percent(run.result[name], 2)))
  return ", ".join(found)


def render_comparison(runs: Sequence[Run]) -> str:
  """Renders the results and the settings that differ as text for a terminal."""
  names, results = _names(runs), _result_rows(runs)
  text = [_render_table([["", *names], *results])]
  if any(cell.endswith(_ALIKE) for row in results for cell in row):
    text.append(f"{_ALIKE}  {_MEANING_OF_ALIKE}")
  if len(runs) > 1:
    settings = _differing_rows(runs)
    if settings:
      text.append(_render_table([["config", *names], *settings]))
    else:
      text.append(_NO_DIFFERENCE)
  groups = group_runs(runs)
  if len(groups) > 1:
    text.append(_not_comparable(groups))
  return "\n\n".join(text)


def _render_table(rows: Sequence[Sequence[str]]) -> str:
  """Renders rows as text, in columns."""
  # The terminal cuts long cells; the page shows them in full.
  shown = []
  for row in rows:
    shown.append([plain(cell, _LETTERS) for cell in row])
  return "\n".join(align_columns(shown))


def page_content(runs: Sequence[Run]) -> tuple[page.Opening, list[page.Section]]:
  """Returns the top of the page and its sections.

  Args:
    runs: in the order of the columns.
  """
  # The group whose numbers mean most comes first, whatever the order of the runs.
  groups = sorted(group_runs(runs), key=_rank)
  sections = [_results_section(runs)]
  if len(runs) > 1:
    sections.append(_configs_section(runs))
  # The first picture is at the top of the page.
  costs = draw_costs(runs, groups)
  picture = costs[0] if costs else None
  if costs[1:]:
    sections.append(page.Section("Score and cost", "Upper left is better.", costs[1:]))
  courses = draw_courses(runs, groups)
  if courses:
    sections.append(page.Section("During training", "", courses))
  alone = len(groups) == 1
  said, numbers = [] if alone else [_not_comparable(groups)], []
  for group in groups:
    pair = _best_pair(group)
    # A group without a gated run has no large numbers.
    if pair is not None:
      said.append(_describe_pair(group, pair, alone=alone))
      numbers += _large_numbers(group, pair, alone=alone)
  return page.Opening(numbers, picture, " ".join(said)), sections


def _not_comparable(groups: Sequence[RunGroup]) -> str:
  """States that runs with different test sets are not compared."""
  return (
    f"These runs learn {len(groups)} different things: {', '.join(_names(groups))}. "
    "Scores are comparable only within each of them."
  )


# Results.


def _results_section(runs: Sequence[Run]) -> page.Section:
  """Returns the section of the results."""
  rows = _result_rows(runs)
  finished = all(run.result for run in runs)
  text = "" if finished else "For runs that are not finished, the newest test is shown."
  header = ["measure", *_names(runs)]
  return page.Section(
    "Results", text, [page.Table(header, rows, terms=_definitions(rows))], open=True
  )


class _Measure(NamedTuple):
  """A row of results.

  Attributes:
    label: of the row.
    numbers: names of the numbers of a run that the row shows.
    form: formats these numbers as a cell.
  """

  label: str
  numbers: tuple[str, ...]
  form: Callable[..., str]


def _percent(fraction: float) -> str:
  """Formats a fraction in %, with two decimals."""
  return format_percent(fraction, 2)


def _tenths_of_percent(fraction: float) -> str:
  """Formats a fraction in %, with one decimal."""
  return format_percent(fraction, 1)


def _ratio(part: float, whole: float) -> str:
  """Formats a part of a whole in %; a dash where the whole is 0."""
  return format_percent(part / whole, 1) if whole else MISSING


def _whole(number: float) -> str:
  """Formats a number without decimals."""
  return f"{number:,.0f}"


def _of_all(number: float, gates: float) -> str:
  """Formats a number of gates, and that of all gates."""
  return f"{number:,.0f} of {gates:,.0f}"


_MEASURES = (
  *(_Measure(score.label, (score.key,), _percent) for score in SCORES),
  _Measure("forgetting, task known", ("task_aware.forgetting",), _percent),
  _Measure("forgetting, task unknown", ("task_agnostic.forgetting",), _percent),
  _Measure("MACs", ("macs",), _whole),
  _Measure("fraction of the ungated net's", ("mac_ratio",), _tenths_of_percent),
  _Measure("MACs, task known", ("task_aware_macs",), _whole),
  _Measure("fraction, task known", ("task_aware_macs", "dense_macs"), _ratio),
  _Measure("MACs, task unknown", ("task_agnostic_macs",), _whole),
  _Measure("fraction, task unknown", ("task_agnostic_macs", "dense_macs"), _ratio),
  _Measure("parameters", ("params",), _whole),
  _Measure("parameters of gates, separately", ("gate_params",), _whole),
  _Measure("gates conditional", ("conditional", "gates"), _of_all),
  _Measure("gates always open", ("always_open", "gates"), _of_all),
  _Measure("gates always closed", ("always_closed", "gates"), _of_all),
  _Measure("gates at random", ("random_dropout", "gates"), _of_all),
  _Measure("units that two tasks share", ("mean_gate_overlap",), _percent),
  _Measure("segments chosen", ("share",), _percent),
  _Measure("seconds since the last start", ("seconds_since_last_start",), _whole),
)


def _result_rows(runs: Sequence[Run]) -> list[list[str]]:
  """Returns rows of a measure and a cell for each run; rows that no run has are left out."""
  tested_on, state, step = ["tested on"], ["state"], ["last step"]
  for run in runs:
    tested_on.append(run.tested.get("data.name", MISSING))
    state.append("not finished" if run.result is None else "finished")
    step.append(f"{run.step:,}")
  rows, alike = [tested_on, state, step], _like_the_best(runs)
  for measure in _MEASURES:
    row = [measure.label]
    for run in runs:
      marked = (run.name, measure.numbers[0]) in alike
      row.append(_cell(run.numbers, measure) + (f" {_ALIKE}" if marked else ""))
    rows.append(row)
  return [row for row in rows if set(row[1:]) != {MISSING}]


def _like_the_best(runs: Sequence[Run]) -> set[tuple[str, str]]:
  """Returns the scores, by run and key, whose distance from the best of the group may be chance."""
  found = set()
  for group in group_runs(runs):
    for score in SCORES:
      scored = []
      for run in group.runs:
        interval = scores.interval_of(run.numbers, score.key)
        # Runs of earlier versions have no interval.
        if score.key in run.numbers and interval is not None:
          scored.append((run.numbers[score.key], interval, run.name))
      if len(scored) < 2:
        continue
      best, of_best, _ = max(scored, key=lambda entry: entry[0])
      for value, interval, name in scored:
        # Runs that share the best score do not differ.
        if value != best and scores.may_be_chance(value, best, (interval, of_best)):
          found.add((name, score.key))
  return found


def _cell(numbers: Mapping[str, Any], measure: _Measure) -> str:
  """Returns the cell of a run in the row of a measure."""
  values = [numbers.get(name) for name in measure.numbers]
  # One missing number leaves the whole cell empty.
  return MISSING if None in values else measure.form(*values)


def _definitions(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
  """Returns the definitions of the given rows, and of the columns."""
  runs = "The runs, by the names of their directories; a dash means that a run has no such number."
  definitions = [("columns", runs)]
  for start, meaning in tables.COMPARED_MEANINGS.items():
    if any(row[0].startswith(start) for row in rows):
      definitions.append((start, meaning))
  if any(cell.endswith(_ALIKE) for row in rows for cell in row):
    definitions.append((_ALIKE, _MEANING_OF_ALIKE))
  return definitions


# Configs.

_NO_DIFFERENCE = "The configs do not differ."


def _configs_section(runs: Sequence[Run]) -> page.Section:
  """Returns the section of the settings that differ."""
  rows = _differing_rows(runs)
  if not rows:
    return page.Section("Configs", _NO_DIFFERENCE, [], open=True)
  text = "The settings in which runs differ. Settings of only one kind of experiment are left out."
  header = ["setting", *_names(runs)]
  terms = [
    ("setting", "a field of the config, with its sections"),
    ("–", "not a field of that run"),
  ]
  table = page.Table(header, rows, numeric=False, terms=terms)
  return page.Section("Configs", text, [table], open=True)


def _differing_rows(runs: Sequence[Run]) -> list[list[str]]:
  """Returns a row for each setting that differs, with a cell for each run."""
  return [[setting, *values] for setting, values in differing_settings(runs)]


# Large numbers.

_MACS = "Multiply-accumulate operations, mean over the test set, gate networks included."
_NO_BASELINE = "ungated: none among these runs"


class _Pair(NamedTuple):
  """The best gated run of a group, and the best ungated one; None where there is none."""

  score: Score
  gated: Run
  ungated: Run | None


def _best_pair(group: RunGroup) -> _Pair | None:
  """Finds the best runs by the first score that gated and ungated runs both have.

  If no score has both, it is the first one of a gated run. Returns None where no run is gated.
  """
  only_gated = None
  for score in SCORES:
    scored = group.scored(score)
    gated, ungated = _highest(scored, score, ungated=False), _highest(scored, score, ungated=True)
    if gated and ungated:
      return _Pair(score, gated, ungated)
    if gated and only_gated is None:
      only_gated = _Pair(score, gated, None)
  return only_gated


def _highest(runs: Sequence[Run], score: Score, *, ungated: bool) -> Run | None:
  """Returns the gated or ungated run with the highest score; None where there is none."""
  best = None
  for run in runs:
    if run.ungated != ungated:
      continue
    # The first of equals stays.
    if best is None or run.numbers[score.key] > best.numbers[score.key]:
      best = run
  return best


def _rank(group: RunGroup) -> int:
  """Ranks groups: first those with a gated and an ungated run, last those without a gated one."""
  pair = _best_pair(group)
  if pair is None:
    return 2
  return 1 if pair.ungated is None else 0


def _describe_pair(group: RunGroup, pair: _Pair, *, alone: bool) -> str:
  """States which runs the large numbers belong to."""
  numbers = "The numbers" if alone else f"Those of {group.name}"
  text = (
    f"{numbers} belong to {plain(pair.gated.name, 60)}, the gated run with the highest "
    f"{pair.score.label}"
  )
  if pair.ungated is None:
    none = "None of these runs" if alone else "None of its runs"
    return f"{text}. {none} is ungated, so there is no baseline to compare it with."
  return f"{text}, next to {plain(pair.ungated.name, 60)}, the best ungated one."


def _large_numbers(group: RunGroup, pair: _Pair, *, alone: bool) -> list[page.Number]:
  """Returns a group's large numbers, named by the group unless it is alone."""
  numbers = [_score_number(pair), _macs_number(pair), _time_number(pair)]
  if alone:
    return numbers
  # Several groups share the top of the page, so each number names its group.
  named = []
  for number in numbers:
    named.append(dataclasses.replace(number, name=f"{number.name}, {group.name}"))
  return named


def _score_number(pair: _Pair) -> page.Number:
  """Returns the score of the gated run, next to the ungated run's."""
  score, baseline = pair.score, _NO_BASELINE
  if pair.ungated:
    baseline = f"ungated: {format_percent(pair.ungated.numbers[score.key], 2)}"
  value = format_percent(pair.gated.numbers[score.key], 2)
  return page.Number(capitalise(score.label), value, baseline, meaning="On the test set.")


def _macs_number(pair: _Pair) -> page.Number:
  """Returns the MACs of the gated run, in % of the ungated run's where there is one."""
  noun, macs = example_noun(pair.gated.experiment), pair.gated.numbers[pair.score.macs]
  if pair.ungated is None:
    return page.Number(f"MACs per {noun}", format_count(macs), _NO_BASELINE, meaning=_MACS)
  # In % of the ungated run's MACs, not of this run's own network without gates, which may be wider.
  dense = pair.ungated.numbers[pair.score.macs]
  return page.Number(
    "MACs",
    format_percent(macs / dense if dense else 0.0, 1),
    f"ungated: 100 %, {format_count(dense)} per {noun}",
    meaning=f"{_MACS} Here {format_count(macs)}, in % of those of the ungated run.",
  )


def _time_number(pair: _Pair) -> page.Number:
  """Returns the milliseconds per example, next to the ungated run's.

  Without times of the ungated run on the same device, the baseline is the gated run's own network
  without gates.
  """
  noun, mine = example_noun(pair.gated.experiment), pair.gated.tested_times
  # A comparison is not filled in later, and its reader runs no command for a single run.
  found = dataclasses.replace(time_number(mine, noun), command="", place="")
  if mine is None:
    return dataclasses.replace(
      found, meaning=f"Time of one {noun}, as --mode=compile of the tested step measures it."
    )
  theirs = pair.ungated.tested_times if pair.ungated else None
  # Times on different devices are not comparable.
  if theirs is None or theirs.device != mine.device:
    return found
  return dataclasses.replace(found, baseline=f"ungated: {time_number(theirs, noun).value}")


# Pictures.

_COLOURS = ("#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#f2a541", "#7a5195", "#17a3b8", "#9d6b53")
_MARKERS = "os^Dvp*"
_UNGATED = "#5b5b5b"
# The most points with their names next to them, and the most settings of a point.
_NAMED, _MOST_LINES = 12, 10


class _Style(NamedTuple):
  """Colour and mark of a run, which are the same in every picture."""

  colour: str
  marker: str


class _Point(NamedTuple):
  """A run in a picture of score against cost; the score is in %."""

  run: Run
  macs: float
  percent: float


class _Curve(NamedTuple):
  """A run in a picture of a course over training."""

  run: Run
  steps: list[int]
  values: list[float]


def draw_costs(runs: Sequence[Run], groups: Sequence[RunGroup]) -> list[page.EmbeddedPicture]:
  """Draws score against MACs, a picture for each group and score that some run has."""
  styles, pictures = _styles(runs), []
  for group in groups:
    for score in SCORES:
      points = []
      for run in group.scored(score):
        points.append(_Point(run, run.numbers[score.macs], 100 * run.numbers[score.key]))
      if points:
        pictures.append(_draw_cost(points, group, score, styles=styles))
  return pictures


def draw_courses(runs: Sequence[Run], groups: Sequence[RunGroup]) -> list[page.EmbeddedPicture]:
  """Draws each group's scores at the tests during training, and its training cross-entropy."""
  styles, pictures = _styles(runs), []
  for group in groups:
    for score in SCORES:
      curves = _curves(group, "test", score.key, scale=100)
      if _have_a_course(curves):
        pictures.append(
          _draw_curves(
            curves,
            styles,
            ylabel=f"{score.label} (%)",
            meaning="on the test set",
            caption=f"{capitalise(group.name)}: {score.label} at each test during training.",
          )
        )
    curves = _curves(group, "train", "cross_entropy")
    if _have_a_course(curves):
      pictures.append(
        _draw_curves(
          curves,
          styles,
          ylabel="cross-entropy",
          meaning="mean over training examples, in nats",
          caption=f"{capitalise(group.name)}: mean cross-entropy on training data.",
          marked=False,
        )
      )
  return pictures


def _styles(runs: Sequence[Run]) -> dict[str, _Style]:
  """Returns the style of each run by its name."""
  styles = {}
  for i, run in enumerate(runs):
    styles[run.name] = _Style(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)])
  return styles


def _curves(group: RunGroup, split: str, name: str, *, scale: int = 1) -> list[_Curve]:
  """Returns the curve of each run whose journal has the number.

  Args:
    group: of runs.
    split: of the journal's lines, `train` or `test`.
    name: of the number.
    scale: by which the number is multiplied.
  """
  curves = []
  for run in group.runs:
    curve = _Curve(run, [], [])
    for line in run.lines_of(split):
      if name in line:
        curve.steps.append(line["step"])
        curve.values.append(scale * line[name])
    if curve.steps:
      curves.append(curve)
  return curves


def _have_a_course(curves: Sequence[_Curve]) -> bool:
  """Checks that some curve has more than one point."""
  # A single point makes no curve.
  return any(len(curve.steps) > 1 for curve in curves)


def _draw_cost(
  points: Sequence[_Point], group: RunGroup, score: Score, *, styles: Mapping[str, _Style]
) -> page.EmbeddedPicture:
  """Draws runs as named points, the ungated ones joined by a line."""
  figure, axes = _axes(len(points))
  # Sorted by MACs, so that the line through ungated networks never turns back.
  family = sorted((point.macs, point.percent) for point in points if point.run.ungated)
  if family:
    macs, percents = np.transpose(family)
    axes.plot(macs, percents, label="ungated networks", color=_UNGATED, linewidth=1.5, zorder=1)
  for point in points:
    _draw_point(axes, point, styles[point.run.name])
    # Names of more points would overlap; the legend and the hover text have them.
    if len(points) <= _NAMED:
      _name_point(axes, point)
  noun = example_noun(group.experiment)
  example = f"an {noun}" if noun == "image" else f"a {noun}"
  # A wide margin keeps the names of points at the edge inside the axes.
  _label(figure, axes, xlabel=f"MACs of {example}", ylabel=f"{score.label} (%)", margin=0.18)
  line = " The line joins the ungated networks." if len(family) > 1 else ""
  caption = (
    f"{capitalise(group.name)}: {score.label} against multiply-accumulates.{line} Upper left is "
    "better; point at a run to see how its config differs."
  )
  macs = f"multiply-accumulate operations of {example}, mean over the test set, with gate networks"
  picture = page.embed_figure(
    figure, caption, terms=[(score.label, "on the test set, in %"), ("MACs", macs)]
  )
  return dataclasses.replace(picture, points=_hover_texts(points, score, figure, axes=axes))


def _draw_point(axes: Any, point: _Point, style: _Style) -> None:
  """Draws the mark of a run."""
  # Baselines are grey and hollow.
  colour = _UNGATED if point.run.ungated else style.colour
  axes.plot(
    point.macs,
    point.percent,
    label=plain(point.run.name, 50),
    color=colour,
    linewidth=0,
    marker=style.marker,
    markersize=8,
    markerfacecolor="white" if point.run.ungated else colour,
  )


def _name_point(axes: Any, point: _Point) -> None:
  """Writes the name of a run next to its mark."""
  axes.annotate(
    plain(point.run.name, 24),
    (point.macs, point.percent),
    xytext=(8, 7),
    textcoords="offset points",
    fontsize=8.5,
    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
  )


def _hover_texts(
  points: Sequence[_Point], score: Score, figure: Any, *, axes: Any
) -> list[page.Point]:
  """Returns the text that each point shows: its numbers, and its values of settings that differ."""
  # The constrained layout places the axes only when the figure is drawn.
  figure.draw_without_rendering()
  width, height = figure.bbox.size
  differences = differing_settings([point.run for point in points])
  texts = []
  for i, point in enumerate(points):
    lines = [f"{score.label}: {point.percent:.2f} %", f"MACs: {format_count(point.macs)}"]
    for difference in differences[:_MOST_LINES]:
      lines.append(f"{difference.setting}: {plain(difference.values[i], 60)}")
    # A longer text would cover the picture.
    if len(differences) > _MOST_LINES:
      lines.append(f"and {len(differences) - _MOST_LINES} more settings")
    x, y = axes.transData.transform((point.macs, point.percent))
    # HTML counts from the top, matplotlib from the bottom.
    left, top = round(100 * x / width, 2), round(100 * (1 - y / height), 2)
    texts.append(page.Point(left, top, name=plain(point.run.name, 60), lines=lines))
  return texts


def _draw_curves(
  curves: Sequence[_Curve],
  styles: Mapping[str, _Style],
  *,
  ylabel: str,
  meaning: str,
  caption: str,
  marked: bool = True,
) -> page.EmbeddedPicture:
  """Draws a curve for each run, with a legend below.

  Args:
    curves: of runs.
    styles: of each run, by its name.
    ylabel: of the axis of values.
    meaning: defines the values.
    caption: of the picture.
    marked: marks the points.
  """
  figure, axes = _axes(len(curves))
  for curve in curves:
    style = styles[curve.run.name]
    axes.plot(
      curve.steps,
      curve.values,
      label=plain(curve.run.name, 50),
      color=style.colour,
      linewidth=1.3,
      marker=style.marker if marked else None,
      markersize=6,
    )
  _label(figure, axes, xlabel="step", ylabel=ylabel, margin=0.08)
  terms = [("step", "updates of the parameters so far"), (ylabel, meaning)]
  return page.embed_figure(figure, caption, terms=terms)


def _axes(runs: int) -> tuple[Any, Any]:
  """Returns a figure with room for a legend of so many runs, and its axes."""
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(page.WIDTH, 3.4 + 0.2 * runs), layout="constrained")
  return figure, figure.subplots()


def _label(figure: Any, axes: Any, *, xlabel: str, ylabel: str, margin: float) -> None:
  """Labels the axes of a figure, and draws their grid and the legend."""
  from matplotlib.ticker import EngFormatter

  axes.set(xlabel=xlabel, ylabel=ylabel)
  # "40 M" in place of 4e7.
  axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
  # Without an offset such as "+9.1e1", which is hard to read, on scores close to each other.
  axes.ticklabel_format(axis="y", useOffset=False)
  axes.margins(margin)
  axes.grid(alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(loc="outside lower left", frameon=False)
