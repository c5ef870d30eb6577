"""Pictures of the choice of segments, narrow enough for a phone.

Axes: S valid segments of all videos, M videos, T segments of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import plain

_BINS = 20  # of histograms
_CHOSEN, _CLOSED, _RELEVANT = "#e4572e", "#c3cad3", "#2e9e6b"


def draw_shares(probs: np.ndarray, shares: np.ndarray, correct: np.ndarray | None = None) -> Any:
  """Draws histograms of the segments' probabilities and of the chosen fraction per video.

  Args:
    probs: `[S]` probability in [0, 1] that a segment is chosen.
    shares: `[M]` chosen fraction of each video's segments.
    correct: `[M]` bool, each video is classified correctly; None where this is undefined.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure, bins = Figure(figsize=(WIDTH, 4.2), layout="constrained"), np.linspace(0, 1, _BINS + 1)
  segments, videos = figure.subplots(2, 1, sharex=True)
  segments.hist(probs, bins=bins, color="tab:green")
  segments.set(xlabel="probability that a segment is chosen", ylabel="segments")
  # `sharex` hides the upper axis' numbers, although its label is another one.
  segments.tick_params(labelbottom=True)
  if correct is None:
    videos.hist(shares, bins=bins, color="tab:blue")
  else:
    videos.hist(
      [shares[correct], shares[~correct]],
      bins=bins,
      # One on top of the other: the outline is the histogram of all videos.
      stacked=True,
      color=["tab:blue", "tab:orange"],
      label=["classified correctly", "wrongly"],
    )
    videos.legend(frameon=False)
  videos.set(xlabel="chosen segments of a video (fraction)", ylabel="videos")
  for axes in (segments, videos):
    axes.spines[["top", "right"]].set_visible(False)
  return figure


def draw_choices(
  gates: Sequence[np.ndarray], names: Sequence[str], relevant: Sequence[np.ndarray] | None = None
) -> Any:
  """Draws a row for each video: its chosen segments in colour, and those that matter below.

  Args:
    gates: one array per video, `[T]` bool, the segment is chosen; T may differ by video.
    names: one per video.
    relevant: one array per video, `[T]` bool, the label depends on the segment; None where this is
      unknown.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly
  from matplotlib.patches import Patch

  # Inches: 0.3 for each video, the rest for the axis and the legend.
  count = len(gates)
  figure = Figure(figsize=(WIDTH, 1.0 + 0.3 * count), layout="constrained")
  axes = figure.subplots()
  for row, chosen in enumerate(gates):
    # The y axis points down (see `ylim`), so that the first video is on top.
    colours = [_CHOSEN if gate else _CLOSED for gate in chosen]
    _draw_row(axes, row - 0.4, 0.55 if relevant is not None else 0.8, colours)
    if relevant is not None:
      _draw_row(
        axes, row + 0.2, 0.2, [_RELEVANT if matters else "white" for matters in relevant[row]]
      )
  axes.set(
    xlim=(0, 1),
    ylim=(count - 0.4, -0.6),
    xlabel="time (fraction of the video)",
    ylabel="test video",
  )
  axes.set_yticks(range(count), [plain(name, 24) for name in names], fontsize=8.5)
  axes.tick_params(axis="y", length=0)
  axes.spines[:].set_visible(False)
  handles = [Patch(color=_CHOSEN, label="chosen"), Patch(color=_CLOSED, label="not chosen")]
  if relevant is not None:
    handles.append(Patch(color=_RELEVANT, label="matters for the label"))
  figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9)
  return figure


def _draw_row(axes: Any, top: float, height: float, colours: Sequence[str]) -> None:
  """Draws a box for each segment, all of the same width."""
  # A video fills the axis whatever its length: time is a fraction of the video.
  width = 1 / len(colours)
  axes.bar(
    np.arange(len(colours)) * width,
    height,
    width=0.92 * width,
    bottom=top,
    color=colours,
    align="edge",
    linewidth=0,
  )
