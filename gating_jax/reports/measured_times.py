"""The measured times of a run: read from its directory, and shown as text, picture and page.

A row is a mapping with the fields of `gating_jax.inference.compiled.Timing`.

Reference: Verelst and Tuytelaars, 2020 (time against MACs).
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax.reports import page
from gating_jax.reports.text import align_columns, format_milliseconds, plain
from gating_jax.timing import CHOSEN, EXIT_DISPATCH, MASKED, SEGMENTS, UNGATED
from gating_jax.training.journal import read_json

Rows = Sequence[Mapping[str, Any]]
TIMES_FILE, PICTURE_FILE = "compile.json", "compile.png"
_TITLE = re.compile(r"(?:^|: )(\d+) (image|video)s? at a time$")
# Definitions of the ways to run a network that have their own name.
_WAYS = {
  UNGATED: "the network without gates, all units computed: the baseline",
  MASKED: "every unit is computed, and closed ones are multiplied by zero: no time is saved",
  CHOSEN: "each part in its fastest way; this is what the compiled program does",
  SEGMENTS: "the heavy network runs on chosen segments only",
  EXIT_DISPATCH: "images leave at the exits; the rest of the network runs for the others only",
}


@dataclasses.dataclass(frozen=True)
class Times:
  """The measured times of a run.

  Attributes:
    step: of the checkpoint.
    device: on which it was measured.
    timings: rows by title, such as `1 image at a time`; titles of a task begin with its name.
    pixels: height and width of the timed images; None where they were not recorded.
  """

  step: int
  device: str
  timings: Mapping[str, Rows]
  pixels: tuple[int, int] | None = None

  def belong_to(self, step: int | None) -> bool:
    """Checks that the times belong to this step; None stands for any step."""
    return step is None or self.step == step


def parse_times(found: Any) -> Times | None:
  """Parses the contents of the file; returns None where it is damaged or holds no times."""
  # An old or hand-edited file may hold anything; the page is then written without times.
  try:
    timings = {}
    for title, rows in found["timings"].items():
      timings[str(title)] = [_parse_row(row) for row in rows]
    times = Times(
      step=int(found["step"]),
      device=str(found["device"]),
      timings=timings,
      pixels=_parse_pixels(found.get("pixels")),
    )
  except (KeyError, TypeError, ValueError, AttributeError):
    return None
  return times if times.timings else None


def read_times(path: Path) -> Times | None:
  """Reads the times in a run directory; None if they are missing or damaged."""
  return parse_times(read_json(path / TIMES_FILE))


def timing_title(count: int, noun: str) -> str:
  """Returns the title of a table of times, such as `64 images at a time`.

  `time_number` finds the tables of one example by this title.
  """
  return f"{count} {noun}{'' if count == 1 else 's'} at a time"


def time_number(
  times: Times | None, noun: str, *, step: int | None = None, workdir: str = "", refused: str = ""
) -> page.Number:
  """Returns the time per example of the compiled program: the mean over tables of one example.

  Args:
    times: measured times; None before.
    noun: word for an example, such as `image`.
    step: of the page, which shows no times of another step; None accepts any.
    workdir: the run directory.
    refused: why `--mode=compile` refuses the run; empty where it accepts it.
  """
  # For scenes only the backbone is timed, so the number has another name.
  name = "Milliseconds of the backbone" if noun == "scene" else f"Milliseconds per {noun}"
  timed, place = _timed_input(noun, times), _place("time", step)
  pairs = _single_examples(times) if times is not None and times.belong_to(step) else []
  if times is not None and pairs:
    compiled = statistics.fmean(pair.compiled for pair in pairs)
    ungated = statistics.fmean(pair.ungated for pair in pairs)
    over = f", mean over {len(pairs)} tasks" if len(pairs) > 1 else ""
    meaning = (
      f"Median time of a call with {timed} in the compiled program that skips closed units{over}, "
      f"next to the network without gates in the same process, on {plain(times.device, 120)}."
    )
    return page.Number(
      name,
      f"{format_milliseconds(compiled)} ms",
      f"ungated: {format_milliseconds(ungated)} ms",
      meaning=meaning,
      place=place,
    )
  # A run that cannot be compiled shows the reason instead of a command that would fail.
  if refused:
    meaning = f"--mode=compile cannot time this run: {refused}."
    return page.Number(name, "–", "not measured", meaning=meaning, place=place)
  # Times of another step are mentioned but not shown: all numbers of a page are of one checkpoint.
  found = "not measured, nor was the ungated network"
  if times is not None and not times.belong_to(step):
    found = f"measured at step {times.step:,}, not at step {step:,} like the rest of the page"
  return page.Number(
    name,
    "–",
    found,
    meaning=f"Time of {timed} with closed units skipped. This measures it and writes it here:",
    command=f"gating-jax --mode=compile --workdir={shlex.quote(workdir)}",
    place=place,
  )


def times_section(
  times: Times | None, noun: str, *, step: int | None = None, refused: str = ""
) -> page.Section:
  """Returns the section of times of each way to run the network; arguments as in `time_number`."""
  place = _place("times", step)
  if times is None:
    text = (
      "The network is not compiled yet. gating-jax --mode=compile measures the time of each way to "
      "skip closed units, and writes it here."
    )
    if refused:
      text = f"gating-jax --mode=compile cannot time this run: {refused}."
    return page.Section("Time", text, place=place)
  figure = page.embed_figure(
    draw_timings(times.timings, columns=1),
    "Time against MACs of each way to run each part of the network (small) and the whole (large), "
    "both in % of computing everything.",
    terms=_PICTURE_TERMS,
  )
  text = f"The checkpoint of step {times.step:,}, on {plain(times.device, 120)}."
  if not times.belong_to(step):
    text += (
      f" The rest of this page is of step {step:,}, so these times belong to a different network."
    )
  # For scenes only the backbone is compiled.
  if noun == "scene":
    text += f" Only the backbone is timed, without the head, on training images{_size(times)}."
  return page.Section("Time", text, [_page_table(times.timings), figure], place=place)


_TABLE_TERMS = (
  ("inputs", "how many examples a call has"),
  ("way to run it", "how closed units are skipped; ✓ is what the compiled program does"),
  ("time of a call", "median over repeated calls, all ways in turn, in milliseconds"),
  ("of ungated", "the same, in % of the network without gates"),
  ("computed MACs", "multiply-accumulates that are computed, padding included, in % of all"),
  (
    "all open",
    "time if every unit of every input were open, in % of the faster of masked and ungated: "
    "the worst case",
  ),
)
_PICTURE_TERMS = (
  ("MACs of open units", "multiply-accumulates of open units, in % of those of all units"),
  (
    "time",
    "in % of the quickest way to compute everything; below the dashed line time is saved, on the "
    "diagonal by the same fraction as MACs",
  ),
)


def _page_table(timings: Mapping[str, Rows]) -> page.Table:
  """Returns a row for each way to run the whole network, and definitions of these ways."""
  rows, timed = [], set()
  for title, measured in timings.items():
    whole = _of_whole_net(measured)
    rows += _page_rows(title, whole)
    for row in whole:
      timed.add(row["strategy"])
  # Only the strategies that were timed are explained below the table.
  terms = list(_TABLE_TERMS)
  for strategy, meaning in _WAYS.items():
    if strategy in timed:
      terms.append((strategy, meaning))
  header = (
    "inputs",
    "way to run it",
    "time of a call (ms)",
    "of ungated (%)",
    "computed MACs (%)",
    "all open (%)",
  )
  return page.Table(header, rows, terms=terms)


def _page_rows(title: str, whole: Rows) -> list[list[str]]:
  """Returns the rows of the page's table for one table of times."""
  ungated = _seconds_where(whole, "strategy", UNGATED)
  rows = []
  for row in whole:
    chosen = " ✓" if row["chosen"] else ""
    of_ungated = f"{100 * row['seconds'] / ungated:.0f}" if ungated else "–"
    all_open = row.get("open_ratio")
    rows.append(
      [
        plain(title, 60),
        plain(row["strategy"], 30) + chosen,
        format_milliseconds(row["seconds"]),
        of_ungated,
        f"{100 * row['computed_ratio']:.1f}",
        "–" if all_open is None else f"{100 * all_open:.0f}",
      ]
    )
  return rows


def _place(name: str, step: int | None) -> str:
  """Returns the place for times of a step.

  A page of another step lacks this place, so `page.fill_page` cannot put the times next to wrong
  numbers.
  """
  return name if step is None else f"{name} of step {step}"


def _timed_input(noun: str, times: Times | None) -> str:
  """Describes the input of a timed call.

  For segmentation it is a training image, and only the backbone runs.
  """
  if noun != "scene":
    return f"one {noun}"
  return f"one training image{_size(times)}, by the backbone without the head,"


def _size(times: Times | None) -> str:
  """Returns the size of the timed images in words; empty where it is not recorded."""
  if times is None or times.pixels is None:
    return ""
  height, width = times.pixels
  return f" of {height} x {width} pixels"


class _Pair(NamedTuple):
  """Seconds of the compiled program and of the ungated network in one table."""

  compiled: float
  ungated: float


def _single_examples(times: Times) -> list[_Pair]:
  """Returns the times of each table of one example; tables of batches are skipped."""
  pairs = []
  for title, rows in times.timings.items():
    found = _TITLE.search(title)
    if found is None or found[1] != "1":
      continue
    whole = _of_whole_net(rows)
    compiled = _seconds_where(whole, "chosen", True)
    ungated = _seconds_where(whole, "strategy", UNGATED)
    if compiled is not None and ungated is not None:
      pairs.append(_Pair(compiled, ungated))
  return pairs


def _of_whole_net(rows: Rows) -> Rows:
  """Returns the rows of the whole network, without those of its parts."""
  return [row for row in rows if row["part"] is None]


def _seconds_where(rows: Rows, field: str, value: Any) -> float | None:
  """Returns the time of the first row whose field has the value; None where there is none."""
  for row in rows:
    if row[field] == value:
      return row["seconds"]
  return None


def _parse_pixels(found: Any) -> tuple[int, int] | None:
  """Parses height and width; None where they were not recorded."""
  if found is None:
    return None
  height, width = found
  return int(height), int(width)


def _parse_row(row: Mapping[str, Any]) -> dict[str, Any]:
  """Reduces a row to what the page shows.

  Raises:
    KeyError, TypeError, ValueError: a field is missing or has another type.
  """
  part, all_open = row["part"], row.get("open_ratio")
  return {
    "part": None if part is None else int(part),
    "strategy": str(row["strategy"]),
    "mac_ratio": float(row["mac_ratio"]),
    "computed_ratio": float(row["computed_ratio"]),
    "seconds": float(row["seconds"]),
    "time_ratio": float(row["time_ratio"]),
    "chosen": bool(row["chosen"]),
    "open_ratio": None if all_open is None else float(all_open),
  }


_MARKS = "os^Dvph*X"
# Mostly those of Okabe and Ito, which colour-blind readers can distinguish.
_COLOURS = (
  "#5b6770",
  "#0072b2",
  "#d55e00",
  "#009e73",
  "#cc79a7",
  "#e69f00",
  "#56b4e9",
  "#000000",
  "#8a6d3b",
)


def render_timings(rows: Rows) -> str:
  """Renders a table as text; a star marks the strategy that the compiled program uses.

  >>> print(render_timings([{"part": None, "strategy": "masked", "mac_ratio": 0.5,
  ...                        "computed_ratio": 1.01, "seconds": 0.002, "time_ratio": 1.0,
  ...                        "efficiency": 0.5, "chosen": True, "open_ratio": 1.02}]))
  part   strategy   MACs  computed    ms   time  efficiency  all open
  whole  masked *  0.500     1.010  2.00  1.000        0.50     1.020
  """
  table = [["part", "strategy", "MACs", "computed", "ms", "time", "efficiency", "all open"]]
  for row in rows:
    table.append(
      [
        "whole" if row["part"] is None else str(row["part"] + 1),
        row["strategy"] + (" *" if row["chosen"] else ""),
        f"{row['mac_ratio']:.3f}",
        f"{row['computed_ratio']:.3f}",
        f"{1e3 * row['seconds']:.2f}",
        f"{row['time_ratio']:.3f}",
        f"{row['efficiency']:.2f}",
        "" if row["open_ratio"] is None else f"{row['open_ratio']:.3f}",
      ]
    )
  return "\n".join(align_columns(table))


def draw_timings(timings: Mapping[str, Rows], *, columns: int) -> Any:
  """Draws time against MACs, both in % of computing everything, in a panel for each title.

  A small mark is a part, a large one the whole network. On the diagonal, time falls in proportion
  to MACs. Marks above 200 % of the time are drawn on the upper edge.

  Args:
    timings: rows by title.
    columns: of panels.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  rows_of_panels = math.ceil(len(timings) / columns)
  figure = Figure(figsize=(page.WIDTH * columns, 4.6 * rows_of_panels), layout="constrained")
  # A strategy keeps its colour and mark in all panels, also where some lack it.
  strategies = []
  for rows in timings.values():
    for row in rows:
      if row["strategy"] not in strategies:
        strategies.append(row["strategy"])
  for place, (title, rows) in enumerate(timings.items(), 1):
    axes = figure.add_subplot(rows_of_panels, columns, place)
    _draw_panel(axes, rows, strategies)
    axes.set_title(plain(title, 60))
  # One legend serves all panels.
  if strategies:
    figure.axes[-1].legend(fontsize=8)
  return figure


def _draw_panel(axes: Any, rows: Rows, strategies: Sequence[str]) -> None:
  """Draws the marks of one table of times."""
  # Both axes end 5 % beyond the largest value, so that the diagonal joins two corners.
  largest = 1.0
  for row in rows:
    largest = max(largest, row["mac_ratio"], min(row["time_ratio"], 2.0))
  top = 105 * largest
  for i, strategy in enumerate(strategies):
    macs, times, sizes = [], [], []
    for row in rows:
      if row["strategy"] == strategy:
        macs.append(100 * row["mac_ratio"])
        # Clipped: one slow strategy must not squeeze all others into a corner.
        times.append(min(100 * row["time_ratio"], top))
        sizes.append(110 if row["part"] is None else 28)
    axes.scatter(
      macs,
      times,
      sizes,
      color=_COLOURS[i % len(_COLOURS)],
      marker=_MARKS[i % len(_MARKS)],
      edgecolors="white",
      linewidths=0.5,
      label=strategy,
      clip_on=False,
    )
  axes.plot([0, top], [0, top], color="#aab4be", linewidth=1, zorder=0)
  axes.axhline(100, color="#aab4be", linewidth=1, linestyle="--", zorder=0)
  axes.set(
    xlim=(0, top),
    ylim=(0, top),
    xlabel="MACs of open units (% of all)",
    ylabel="time (% of computing all)",
  )
