"""Times of skipping strategies: a table, and a picture of time against MACs.

A row is a mapping with the fields of `gating_jax.inference.timings.Timing`.
Reference: Verelst and Tuytelaars, 2020 (time against MACs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import columns, plain, save

Rows = Sequence[Mapping[str, Any]]
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


def table(rows: Rows) -> str:
  """Renders a table as text; a star marks the strategy that the compiled program uses.

  >>> print(table([{"part": None, "strategy": "masked", "mac_ratio": 0.5, "computed_ratio": 1.01,
  ...               "seconds": 0.002, "time_ratio": 1.0, "efficiency": 0.5, "chosen": True,
  ...               "open_ratio": 1.02}]))
  part   strategy   MACs  computed    ms   time  efficiency  all open
  whole  masked *  0.500     1.010  2.00  1.000        0.50     1.020
  """
  head = ["part", "strategy", "MACs", "computed", "ms", "time", "efficiency", "all open"]
  return "\n".join(
    columns(
      [
        head,
        *(
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
          for row in rows
        ),
      ]
    )
  )


def draw(path: Path | BinaryIO, timings: Mapping[str, Rows]) -> None:
  """Writes `figure` with two columns as a PNG file."""
  save(figure(timings, columns=2), path)


def figure(timings: Mapping[str, Rows], *, columns: int) -> Any:
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

  down = -(-len(timings) // columns)
  # A strategy keeps its colour and mark in all panels, also where some lack it.
  figure = Figure(figsize=(WIDTH * columns, 4.6 * down), dpi=120, layout="constrained")
  names = list(dict.fromkeys(row["strategy"] for rows in timings.values() for row in rows))
  for place, (title, rows) in enumerate(timings.items(), 1):
    axes = figure.add_subplot(down, columns, place)
    # Both axes end 5 % beyond the largest value, so that the diagonal joins two corners.
    ratios = [row["mac_ratio"] for row in rows] + [min(row["time_ratio"], 2.0) for row in rows]
    top = 105 * max([1.0, *ratios])
    for i, name in enumerate(names):
      shown = [row for row in rows if row["strategy"] == name]
      # Times above 200 % are clipped: one slow strategy must not squeeze all others into a corner.
      axes.scatter(
        [100 * row["mac_ratio"] for row in shown],
        [min(100 * row["time_ratio"], top) for row in shown],
        [110 if row["part"] is None else 28 for row in shown],
        color=_COLOURS[i % len(_COLOURS)],
        marker=_MARKS[i % len(_MARKS)],
        edgecolors="white",
        linewidths=0.5,
        label=name,
        clip_on=False,
      )
    axes.plot([0, top], [0, top], color="#aab4be", linewidth=1, zorder=0)
    axes.axhline(100, color="#aab4be", linewidth=1, linestyle="--", zorder=0)
    axes.set(
      xlim=(0, top),
      ylim=(0, top),
      xlabel="MACs of open units (% of all)",
      ylabel="time (% of computing all)",
      title=plain(title, 60),
    )
  # One legend serves all panels.
  if names:
    figure.axes[-1].legend(fontsize=8)
  return figure
