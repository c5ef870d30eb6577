"""Comparison of runs: scores, costs, differences of config, pictures and learning curves.

Runs that are tested on different sets share no picture.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax.reports import conclusion, opening, page
from gating_jax.reports.compared_runs import (
  MISSING,
  SCORES,
  Group,
  Run,
  Score,
  differing_settings,
  group_runs,
  read_run,
  unique_names,
)
from gating_jax.reports.opening import example_noun, format_count
from gating_jax.reports.text import align_columns, plain
from gating_jax.reports.timings import time_number
from gating_jax.terminal import say, working
from gating_jax.training import provenance

TITLE = "Comparison of runs"
_LETTERS = 40  # of a cell in a terminal
_COLOURS = ("#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#f2a541", "#7a5195", "#17a3b8", "#9d6b53")
_MARKERS = "os^Dvp*"
_UNGATED = "#5b5b5b"
_NAMED, _MOST_LINES = 12, 10  # most points with their names next to them; settings of a point


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
    runs = [
      read_run(folder, name) for folder, name in zip(folders, unique_names(folders), strict=True)
    ]
    # Checked before anything is drawn; never overwrites another file, such as a run's own page.
    if page_file.exists() and not _is_comparison(page_file):
      raise ValueError(
        f"page must be new or the page of an earlier comparison; {page_file} is neither"
      )
    begin, sections = page_content(runs)
    sections.append(_about(folders, runs))
    page.write_page(page_file, TITLE, sections, ", ".join(run.name for run in runs), begin)
  say(render_comparison(runs))
  say(f"\npage: {page_file}")
  rows = [(run.name, _summary(run)) for run in runs]
  say(
    conclusion.text(
      f"Compared {len(runs)} runs.",
      [("page", str(page_file)), *rows],
      [f"open {page_file} in a browser"],
    )
  )


def _about(folders: Sequence[Path], runs: Sequence[Run]) -> page.Section:
  """Returns the section on when, and by which command, the runs and the page were made."""
  return opening.about_runs_section(
    {
      run.name: (provenance.read_starts(folder), run.config.get("seed"))
      for folder, run in zip(folders, runs, strict=True)
    },
    provenance.describe(),
  )


def _summary(run: Run) -> str:
  """Summarises the scores and MACs of a run in one line."""
  if run.result is None:
    return "not finished"
  # By their names in results, which differ between kinds of experiment; a run has some of them.
  names = {
    "accuracy": "accuracy",
    "mean_iou": "mean IoU",
    "mean_average_precision": "mean average precision",
    "task_aware.average_accuracy": "accuracy, task known",
    "mac_ratio": "MACs of the ungated net",
  }
  found = [
    f"{words} {100 * run.result[name]:.2f} %" for name, words in names.items() if name in run.result
  ]
  return ", ".join(found)


def _is_comparison(file: Path) -> bool:
  # The title is near the beginning; the rest may be megabytes of pictures.
  return file.is_file() and f"<title>{TITLE}</title>".encode() in file.read_bytes()[:2000]


def render_comparison(runs: Sequence[Run]) -> str:
  """Renders the results and the settings that differ as text for a terminal."""
  shown = lambda rows: "\n".join(
    align_columns([[plain(cell, _LETTERS) for cell in row] for row in rows])
  )
  # The terminal cuts long cells; the page shows them in full.
  names = [run.name for run in runs]
  text = [shown([["", *names], *_results(runs)])]
  if len(runs) > 1:
    differ = differing_settings(runs)
    text.append(shown([["config", *names], *differ]) if differ else "The configs do not differ.")
  if len(found := group_runs(runs)) > 1:
    text.append(_apart(found))
  return "\n\n".join(text)


def page_content(runs: Sequence[Run]) -> tuple[page.Opening, list[page.Section]]:
  """Returns the top of the page and its sections.

  Args:
    runs: in the order of the columns.
  """
  # The group whose numbers mean most comes first, whatever the order of the runs.
  found = sorted(group_runs(runs), key=_rank)
  names, costs = [run.name for run in runs], draw_costs(runs, found)
  text = (
    ""
    if all(run.result for run in runs)
    else "For runs that are not finished, the newest test is shown."
  )
  rows = _results(runs)
  made = [
    page.Section(
      "Results", text, [page.Table(["measure", *names], rows, terms=_defined(rows))], open=True
    )
  ]
  if len(runs) > 1:
    differ = differing_settings(runs)
    text = (
      "The settings in which runs differ. Settings of only one kind of experiment are left out."
    )
    made.append(
      page.Section(
        "Configs",
        text if differ else "The configs do not differ.",
        [page.Table(["setting", *names], differ, numeric=False)] if differ else [],
        open=True,
      )
    )
  # The first picture is at the top of the page.
  if costs[1:]:
    made.append(page.Section("Score and cost", "Upper left is better.", costs[1:]))
  if courses := draw_courses(runs, found):
    made.append(page.Section("During training", "", courses))
  said = [_apart(found)] * (len(found) > 1) + [
    _which(group, alone=len(found) == 1) for group in found
  ]
  numbers = [number for group in found for number in _numbers(group, alone=len(found) == 1)]
  return page.Opening(numbers, costs[0] if costs else None, " ".join(filter(None, said))), made


def _apart(found: Sequence[Group]) -> str:
  """States that runs with different test sets are not compared."""
  return (
    f"These runs learn {len(found)} different things: {', '.join(group.name for group in found)}. "
    "Scores are comparable only within each of them."
  )


# Definitions of rows of results, by the beginnings of their names.
_TERMS = {
  "tested on": "the data set; scores on different ones are not comparable",
  "state": "whether the run is finished",
  "last step": "the newest step with a record, in updates of the parameters",
  "mean IoU": "intersection over union, mean over classes, on the test set",
  "accuracy": "on the test set; of a sequence of tasks the mean over tasks at the end",
  "mean average precision": "mean over classes, on the test set",
  "forgetting": "mean over all tasks but the last of the best accuracy minus the final one",
  "MACs": "multiply-accumulate operations of one image or video, mean over the test set, gate "
  "networks included",
  "share": "MACs in % of those of the run's own network without gates",
  "parameters": "trainable parameters of the network; those of gates are counted separately",
  "gates": "open for 1 to 99 % of the test set (conditional), for more, for less, or decided by "
  "noise (at random)",
  "units that two tasks share": "in % of those that either uses, mean over pairs of tasks",
  "segments chosen": "in % of a video's segments, mean over videos",
  "seconds": "of the training since it was last started or resumed",
}


def _defined(rows: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
  """Returns the definitions of the given rows, and of the columns."""
  runs = (
    "columns",
    "the runs, by the names of their directories; a dash means that a run has no such number",
  )
  return [
    runs,
    *(
      (start, meaning)
      for start, meaning in _TERMS.items()
      if any(name.startswith(start) for name, *_ in rows)
    ),
  ]


class _Pair(NamedTuple):
  """The best gated run of a group, and the best ungated one; None where there is none."""

  score: Score
  gated: Run
  ungated: Run | None


def _best(group: Group) -> _Pair | None:
  """Finds the best runs by the first score that gated and ungated runs both have.

  If no score has both, it is the first one of a gated run. Returns None where no run is gated.
  """
  pairs = []
  for score in SCORES:
    scored = group.scored(score).values()
    value = lambda run: run.numbers[score.share]  # noqa: B023
    gated = max((run for run in scored if not run.ungated), key=value, default=None)
    ungated = max((run for run in scored if run.ungated), key=value, default=None)
    if gated:
      pairs.append(_Pair(score, gated, ungated))
  # `min` keeps the first of equals, so the order of `SCORES` decides.
  return min(pairs, key=lambda pair: pair.ungated is None, default=None)


def _rank(group: Group) -> int:
  """Ranks groups: first those with a gated and an ungated run, last those without a gated one."""
  pair = _best(group)
  return 2 if pair is None else int(pair.ungated is None)


def _which(group: Group, *, alone: bool) -> str:
  """States which runs the large numbers belong to."""
  pair = _best(group)
  if pair is None:
    return ""
  of = "The numbers" if alone else f"Those of {group.name}"
  text = (
    f"{of} belong to {plain(pair.gated.name, 60)}, the gated run with the highest "
    f"{pair.score.label}"
  )
  if pair.ungated is None:
    none = "None of these runs" if alone else "None of its runs"
    return f"{text}. {none} is ungated, so there is no baseline to compare it with."
  return f"{text}, next to {plain(pair.ungated.name, 60)}, the best ungated one."


def _numbers(group: Group, *, alone: bool) -> list[page.Number]:
  """Returns a group's large numbers, named by the group unless it is alone.

  A group without a gated run has none.
  """
  pair = _best(group)
  if pair is None:
    return []
  # Several groups share the top of the page, so each number tells its group.
  numbers = _against(pair) if pair.ungated else _without_baseline(pair)
  return (
    numbers
    if alone
    else [dataclasses.replace(number, name=f"{number.name}, {group.name}") for number in numbers]
  )


def _score_title(score: Score) -> str:
  return f"{score.label[:1].upper()}{score.label[1:]}"


def _without_baseline(pair: _Pair) -> list[page.Number]:
  score, mine, none = pair.score, pair.gated.numbers, "ungated: none among these runs"
  spent = page.Number(
    f"MACs per {example_noun(pair.gated.experiment)}", format_count(mine[score.macs]), none, _MACS
  )
  return [
    page.Number(_score_title(score), f"{100 * mine[score.share]:.2f} %", none, "On the test set."),
    spent,
    _time(pair),
  ]


def _against(pair: _Pair) -> list[page.Number]:
  """Returns the large numbers of the gated run, next to those of the ungated run."""
  score, mine, theirs = pair.score, pair.gated.numbers, pair.ungated.numbers
  # In % of the ungated run's MACs, not of this run's own network without gates, which may be wider.
  ratio = 100 * mine[score.macs] / theirs[score.macs] if theirs[score.macs] else 0.0
  return [
    page.Number(
      _score_title(score),
      f"{100 * mine[score.share]:.2f} %",
      f"ungated: {100 * theirs[score.share]:.2f} %",
      "On the test set.",
    ),
    page.Number(
      "MACs",
      f"{ratio:.1f} %",
      f"ungated: 100 %, {format_count(theirs[score.macs])} per {example_noun(pair.gated.experiment)}",
      f"{_MACS} Here {format_count(mine[score.macs])}, in % of those of the ungated run.",
    ),
    _time(pair),
  ]


_MACS = "Multiply-accumulate operations, mean over the test set, gate networks included."


def _time(pair: _Pair) -> page.Number:
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


def _results(runs: Sequence[Run]) -> list[list[str]]:
  """Returns rows of a measure and a cell for each run; rows that no run has are left out."""
  sets = [run.tested.get("data.name") for run in runs]
  rows = [["tested on", *(MISSING if name is None else name for name in sets)]] if any(sets) else []
  rows += [
    ["state", *("finished" if run.result is not None else "not finished" for run in runs)],
    ["last step", *(f"{run.step:,}" for run in runs)],
  ]
  for name, text in _measures().items():
    cells = [text(run.numbers) for run in runs]
    if any(cell is not None for cell in cells):
      rows.append([name, *(MISSING if cell is None else cell for cell in cells)])
  return rows


def _measures() -> dict[str, Callable[[Mapping[str, Any]], str | None]]:
  """Returns, by a row's name, functions from a run's numbers to a cell.

  They return None where the run lacks a number.
  """

  def text(form, *names):
    """Returns a function from a run's numbers to its cell: `form` of those called `names`."""

    def cell(numbers):
      """Returns the cell, or None where a number is missing."""
      # One missing number leaves the whole cell empty.
      values = [numbers.get(name) for name in names]
      return None if None in values else form(*values)

    return cell

  # The format `z` writes -0.00 as 0.00: forgetting may be a rounding error below 0.
  percent = lambda share: f"{100 * share:z.2f} %"
  ratio = lambda part, whole: f"{100 * part / whole:.1f} %" if whole else None
  count = lambda number, gates: f"{number:,.0f} of {gates:,.0f}"
  whole = lambda number: f"{number:,.0f}"
  return {
    **{score.label: text(percent, score.share) for score in SCORES},
    "forgetting, task known": text(percent, "task_aware.forgetting"),
    "forgetting, task unknown": text(percent, "task_agnostic.forgetting"),
    "MACs": text(whole, "macs"),
    "share of the dense net's": text(lambda share: f"{100 * share:.1f} %", "mac_ratio"),
    "MACs, task known": text(whole, "task_aware_macs"),
    "share, task known": text(ratio, "task_aware_macs", "dense_macs"),
    "MACs, task unknown": text(whole, "task_agnostic_macs"),
    "share, task unknown": text(ratio, "task_agnostic_macs", "dense_macs"),
    "parameters": text(whole, "params"),
    "parameters of gates, separately": text(whole, "gate_params"),
    "gates conditional": text(count, "conditional", "gates"),
    "gates always open": text(count, "always_open", "gates"),
    "gates always closed": text(count, "always_closed", "gates"),
    "gates at random": text(count, "random_dropout", "gates"),
    "units that two tasks share": text(percent, "mean_gate_overlap"),
    "segments chosen": text(percent, "share"),
    "seconds since the last start": text(whole, "seconds_since_last_start"),
  }


def draw_costs(runs: Sequence[Run], found: Sequence[Group]) -> list[page.Picture]:
  """Draws score against MACs, a picture for each group and score that some run has."""
  pictures = []
  for group, score in itertools.product(found, SCORES):
    points = {
      i: (run.numbers[score.macs], 100 * run.numbers[score.share])
      for i, run in group.scored(score).items()
    }
    if points:
      pictures.append(_cost(runs, points, score, group))
  return pictures


def _cost(
  runs: Sequence[Run], points: Mapping[int, tuple[float, float]], score: Score, group: Group
) -> page.Picture:
  """Draws runs as named points, the ungated ones joined by a line."""
  figure, axes = _axes(len(points))
  # Sorted by MACs, so that the line of the ungated networks of several widths runs to the right.
  family = sorted(point for i, point in points.items() if runs[i].ungated)
  if family:
    axes.plot(
      *zip(*family, strict=True), label="ungated networks", color=_UNGATED, linewidth=1.5, zorder=1
    )
  # Baselines are grey and hollow. A run has the same colour and mark in every picture.
  for i, point in points.items():
    colour = _UNGATED if runs[i].ungated else _COLOURS[i % len(_COLOURS)]
    axes.plot(
      *point,
      label=plain(runs[i].name, 50),
      color=colour,
      linewidth=0,
      marker=_MARKERS[i % len(_MARKERS)],
      markersize=8,
      markerfacecolor="white" if runs[i].ungated else colour,
    )
    # Names of more points would overlap; the legend and the hover text have them.
    if len(points) <= _NAMED:
      axes.annotate(
        plain(runs[i].name, 24),
        point,
        xytext=(8, 7),
        textcoords="offset points",
        fontsize=8.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
      )
  # A wide margin keeps the names of points at the edge inside the axes.
  noun = example_noun(group.experiment)
  article = "an" if noun == "image" else "a"
  _label(figure, axes, f"MACs of {article} {noun}", f"{score.label} (%)", margin=0.18)
  line = " The line joins the ungated networks." if len(family) > 1 else ""
  caption = (
    f"{_group_title(group)}: {score.label} against multiply-accumulates.{line} Upper left is "
    "better; point at a run to see how its config differs."
  )
  return dataclasses.replace(
    page.embed_figure(
      figure,
      caption,
      terms=[
        (score.label, "on the test set, in %"),
        (
          "MACs",
          f"multiply-accumulate operations of {article} {noun}, mean over the test set, with gate "
          "networks",
        ),
      ],
    ),
    points=_hover(runs, points, score, figure, axes),
  )


def _hover(
  runs: Sequence[Run],
  points: Mapping[int, tuple[float, float]],
  score: Score,
  figure: Any,
  axes: Any,
) -> list[page.Point]:
  """Returns the text that each point shows: its numbers, and its values of settings that differ."""
  # The constrained layout places the axes only when the figure is drawn.
  figure.draw_without_rendering()
  width, height = figure.bbox.size
  differ, found = differing_settings([runs[i] for i in points]), []
  for place, (i, (spent, share)) in enumerate(points.items(), 1):
    x, y = axes.transData.transform((spent, share))
    lines = [f"{score.label}: {share:.2f} %", f"MACs: {format_count(spent)}"]
    settings = [f"{name}: {plain(values[place - 1], 60)}" for name, *values in differ[:_MOST_LINES]]
    # A longer text would cover the picture.
    if len(differ) > _MOST_LINES:
      settings.append(f"and {len(differ) - _MOST_LINES} more settings")
    # HTML counts from the top, matplotlib from the bottom.
    found.append(
      page.Point(
        round(100 * x / width, 2),
        round(100 * (1 - y / height), 2),
        plain(runs[i].name, 60),
        lines + settings,
      )
    )
  return found


def draw_courses(runs: Sequence[Run], found: Sequence[Group]) -> list[page.Picture]:
  """Draws each group's scores at the tests during training, and its training cross-entropy."""
  # A single point makes no curve; such pictures are left out.
  pictures = []
  for group in found:
    for score in SCORES:
      lines = {
        i: [(test["step"], 100 * test[score.share]) for test in run.tests if score.share in test]
        for i, run in group.runs.items()
      }
      if any(len(points) > 1 for points in lines.values()):
        pictures.append(
          _picture(
            runs,
            lines,
            "step",
            f"{score.label} (%)",
            f"{_group_title(group)}: {score.label} at each test during training.",
          )
        )
    lines = {
      i: [
        (line["step"], line["cross_entropy"])
        for line in run.lines
        if line["split"] == "train" and "cross_entropy" in line
      ]
      for i, run in group.runs.items()
    }
    if any(len(points) > 1 for points in lines.values()):
      pictures.append(
        _picture(
          runs,
          lines,
          "step",
          "cross-entropy",
          f"{_group_title(group)}: mean cross-entropy on training data.",
          marked=False,
        )
      )
  return pictures


def _group_title(group: Group) -> str:
  return group.name[:1].upper() + group.name[1:]


def _picture(
  runs: Sequence[Run],
  lines: Mapping[int, Sequence[tuple[float, float]]],
  xlabel: str,
  ylabel: str,
  caption: str,
  *,
  marked: bool = True,
) -> page.Picture:
  """Draws a curve for each run, with a legend below.

  Args:
    runs: all runs; a run's position decides its colour and mark in every picture.
    lines: points `(x, y)` of each run, by its position.
    xlabel, ylabel: of the axes.
    caption: of the picture.
    marked: marks the points.
  """
  shown = {i: points for i, points in lines.items() if points}
  figure, axes = _axes(len(shown))
  for i, points in shown.items():
    axes.plot(
      *zip(*points, strict=True),
      label=plain(runs[i].name, 50),
      color=_COLOURS[i % len(_COLOURS)],
      linewidth=1.3,
      marker=_MARKERS[i % len(_MARKERS)] if marked else None,
      markersize=6,
    )
  _label(figure, axes, xlabel, ylabel, margin=0.08)
  meaning = (
    "mean over training examples, in nats" if ylabel == "cross-entropy" else "on the test set"
  )
  return page.embed_figure(
    figure, caption, terms=[(xlabel, "updates of the parameters so far"), (ylabel, meaning)]
  )


def _axes(runs: int) -> tuple[Any, Any]:
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(page.WIDTH, 3.4 + 0.2 * runs), layout="constrained")
  return figure, figure.subplots()


def _label(figure: Any, axes: Any, xlabel: str, ylabel: str, *, margin: float) -> None:
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
