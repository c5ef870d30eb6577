"""Pictures of several runs: score against cost, and learning curves.

Runs that are tested on different sets share no picture.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gating_jax.reports import page
from gating_jax.reports.compared_runs import SCORES, Group, Run, Score, differences
from gating_jax.reports.opening import example, short
from gating_jax.reports.text import plain

_COLOURS = ("#4c78a8", "#e4572e", "#2a9d6f", "#b279a2", "#f2a541", "#7a5195", "#17a3b8", "#9d6b53")
_MARKERS = "os^Dvp*"
_UNGATED = "#5b5b5b"
_NAMED, _MOST_LINES = 12, 10  # most points with their names next to them; settings of a point


def costs(runs: Sequence[Run], found: Sequence[Group]) -> list[page.Picture]:
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
  noun = example(group.experiment)
  article = "an" if noun == "image" else "a"
  _label(figure, axes, f"MACs of {article} {noun}", f"{score.label} (%)", margin=0.18)
  line = " The line joins the ungated networks." if len(family) > 1 else ""
  caption = (
    f"{_title(group)}: {score.label} against multiply-accumulates.{line} Upper left is "
    "better; point at a run to see how its config differs."
  )
  return dataclasses.replace(
    page.pictured(
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
  differ, found = differences([runs[i] for i in points]), []
  for place, (i, (spent, share)) in enumerate(points.items(), 1):
    x, y = axes.transData.transform((spent, share))
    lines = [f"{score.label}: {share:.2f} %", f"MACs: {short(spent)}"]
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


def courses(runs: Sequence[Run], found: Sequence[Group]) -> list[page.Picture]:
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
            f"{_title(group)}: {score.label} at each test during training.",
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
          f"{_title(group)}: mean cross-entropy on training data.",
          marked=False,
        )
      )
  return pictures


def _title(group: Group) -> str:
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
  return page.pictured(
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
