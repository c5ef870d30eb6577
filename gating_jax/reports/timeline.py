"""Pictures of the choice of segments: time lines of videos, histograms, and chosen segments.

Axes: M videos, T segments of a video, S valid segments of all videos, H and W pixels, D colours.
Reference: Hussein et al., 2020 (TimeGate): the chosen segments are the explanation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import plain

if TYPE_CHECKING:
  from matplotlib.figure import Figure

TIME_AXIS = 11.0  # inches
_LEFT, _RIGHT, _TOP, _LEGEND_LINE = 0.75, 0.25, 0.15, 0.24
_HEADER, _BARS, _STRIP, _GAP, _AFTER = 0.3, 0.85, 0.2, 0.07, 0.25
_THUMBNAIL = 1.0  # inches of its height, at most; its width may be twice this
_MOST_THUMBNAILS = 24
_CHOSEN, _CLOSED, _RELEVANT, _INK = "#e4572e", "#b8c4d0", "#2e9e6b", "#30363d"
_NO_UNIT = "#eceff2"

_MARK = -0.06  # place of a mark below the bars, as a probability
_BINS = 20  # in a histogram


class _Entry(NamedTuple):
  """A name in a legend, and its colour: of a unit action, or of a kind of segment."""

  name: str
  colour: str | tuple[float, float, float]


_Units = Mapping[int, _Entry]  # by their numbers


@dataclasses.dataclass(frozen=True)
class TimeLine:
  """One video; padding is not drawn.

  Attributes:
    probs: `[T]` probability that the gate opens.
    gates: `[T]`; a segment is chosen where it is above 0.
    valid: `[T]` bool; False is padding.
    title: written above, next to the number of chosen segments; an empty title hides both.
    thumbnails: `[T, H, W, D]` uint8 centre frames, D = 1 or 3; None for features.
    relevant: `[T]` bool; None where the ground truth is unknown.
    units: `[T]` int unit action of each segment, -1 for none; None where unknown.
  """

  probs: np.ndarray
  gates: np.ndarray
  valid: np.ndarray
  title: str = ""
  thumbnails: np.ndarray | None = None
  relevant: np.ndarray | None = None
  units: np.ndarray | None = None


def draw_time_lines(lines: Sequence[TimeLine], *, unit_names: Sequence[str] | None = None) -> Any:
  """Draws a figure with one video below the other, each as in `draw_each_time_line`.

  Args:
    lines: the videos, at least one.
    unit_names: of `TimeLine.units`; their numbers if None.
  Returns:
    The matplotlib figure.
  Raises:
    ValueError: there is no video, shapes do not fit each other, all of a video is padding, or a
      unit has no name.
  """
  if not lines:
    raise ValueError("lines must hold at least one TimeLine; got none")
  shown = [_without_padding(line) for line in lines]
  return _draw_figure(shown, _shown_units(shown, unit_names), TIME_AXIS)


def draw_each_time_line(
  lines: Sequence[TimeLine], *, unit_names: Sequence[str] | None = None, width: float = TIME_AXIS
) -> list[Any]:
  """Draws a figure for each video: thumbnails, probabilities below them, and the ground truth.

  In a long video, a thumbnail stands for a few neighbouring segments: it shows the chosen one with
  the highest probability, or the middle one if none is chosen. Every segment has its own bar. A
  unit has the same colour in all figures.

  Args:
    lines: the videos.
    unit_names: of `TimeLine.units`; their numbers if None.
    width: of the time axis, in inches.
  Returns:
    The matplotlib figures.
  Raises:
    ValueError: shapes do not fit each other, all of a video is padding, or a unit has no name.
  """
  shown = [_without_padding(line) for line in lines]
  # Colours are assigned over all videos, but a figure's legend has only its own units.
  units, figures = _shown_units(shown, unit_names), []
  for line in shown:
    own = {number: units[number] for number in _unit_numbers([line])}
    figures.append(_draw_figure([line], own, width))
  return figures


def _draw_figure(lines: Sequence[TimeLine], units: _Units, width: float) -> Any:
  """Draws videos one below the other, and a legend."""
  from matplotlib.figure import Figure  # imports slowly

  legend = _legend_entries(lines, units)
  columns = _legend_columns(legend, width)
  of_lines = sum(_height(line, width) for line in lines)
  height = _TOP + of_lines + _LEGEND_LINE * (math.ceil(len(legend) / columns) + 0.5)
  # Rounded, since a sum such as 1.6799999 would lose the picture its last row of pixels.
  figure = Figure(figsize=(_LEFT + width + _RIGHT, round(height, 6)))
  # Videos are placed from the top downwards; the legend has the rest at the bottom.
  top = height - _TOP
  for line in lines:
    _draw_line(_Canvas(figure, height, width, segments=len(line.gates)), line, units, top=top)
    top -= _height(line, width)
  _draw_legend(figure, legend, columns)
  return figure


@dataclasses.dataclass(frozen=True)
class _Canvas:
  """A figure whose axes are placed by inches; their x axis is time in segments.

  Attributes:
    figure: of matplotlib.
    height: of the figure, in inches.
    width: of the time axis, in inches.
    segments: of the video.
  """

  figure: Figure
  height: float
  width: float
  segments: int

  def axes(self, top: float, height: float):
    """Adds axes of this height; their upper edge is at `top`, both in inches."""
    # matplotlib places axes in fractions of the figure, from the bottom left.
    whole = self.figure.get_figwidth()
    place = (_LEFT / whole, (top - height) / self.height, self.width / whole, height / self.height)
    axes = self.figure.add_axes(place)
    axes.set(xlim=(0, self.segments), ylim=(0, 1), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def _draw_line(canvas: _Canvas, line: TimeLine, units: _Units, *, top: float) -> None:
  """Draws one video from `top` downwards; `_height` has the sum of the heights."""
  chosen = line.gates > 0
  if line.title:
    _draw_header(canvas, canvas.axes(top, _HEADER), line.title, chosen=chosen)
    top -= _HEADER
  if line.thumbnails is not None:
    width, height = _thumbnail_size(line.thumbnails, canvas.width)
    in_segments = width / canvas.width * len(chosen)
    _draw_thumbnails(
      canvas.axes(top, height), line.thumbnails, line.probs, chosen=chosen, width=in_segments
    )
    top -= height + _GAP
  _draw_bars(canvas.axes(top, _BARS), line.probs, chosen)
  top -= _BARS + _GAP
  # The ground truth, where known, is in strips below the bars, on the same time axis.
  if line.relevant is not None:
    _draw_strip(canvas.axes(top, _STRIP / 2), np.where(line.relevant, _RELEVANT, _NO_UNIT))
    top -= _STRIP / 2 + _GAP / 2
  if line.units is not None:
    colours = []
    for number in line.units:
      colours.append(units[number].colour if number >= 0 else _NO_UNIT)
    axes = canvas.axes(top, _STRIP)
    _draw_strip(axes, colours)
    _name_runs(axes, line.units, units, width=canvas.width)


def _draw_header(canvas: _Canvas, axes: Any, title: str, *, chosen: np.ndarray) -> None:
  """Writes the title of a video, and how many of its segments are chosen."""
  # 90 letters fit on the widest time axis.
  letters = int(90 * canvas.width / TIME_AXIS)
  style = {"transform": axes.transAxes, "color": _INK}
  axes.text(0, 0.45, plain(title, letters), weight="bold", **style)
  axes.text(1, 0.45, f"{chosen.sum()} of {len(chosen)} segments chosen", ha="right", **style)


def _draw_thumbnails(
  axes: Any, thumbnails: np.ndarray, probs: np.ndarray, *, chosen: np.ndarray, width: float
) -> None:
  """Draws the thumbnails; `width` is that of one, in segments."""
  segments = len(thumbnails)
  # Edges of the blocks of neighbouring segments that share a thumbnail.
  edges = np.linspace(0, segments, min(segments, _MOST_THUMBNAILS) + 1)
  for start, end in itertools.pairwise(edges):
    block = np.arange(int(start), int(end))
    shown = _representative(block, probs, chosen)
    image = thumbnails[shown]
    centre = (start + end) / 2
    picture = axes.imshow(
      image[..., 0] if image.shape[-1] == 1 else image,
      cmap="gray",
      vmin=0,
      vmax=255,
      extent=(centre - width / 2, centre + width / 2, 0, 1),
      aspect="auto",
      alpha=1.0 if chosen[shown] else 0.3,
    )
    # A chosen segment is opaque (see `alpha`) and has a frame.
    if chosen[shown]:
      left, right, low, high = picture.get_extent()
      axes.plot(
        [left, right, right, left, left],
        [low, low, high, high, low],
        color=_CHOSEN,
        linewidth=2.5,
        clip_on=False,
        solid_joinstyle="miter",
      )
    # Fewer thumbnails than segments: a mark shows which segment a thumbnail belongs to.
    if len(edges) <= segments:
      axes.plot(
        shown + 0.5,
        -0.06,
        marker="v",
        markersize=4,
        clip_on=False,
        markeredgewidth=0,
        color=_CHOSEN if chosen[shown] else _CLOSED,
      )
  # `imshow` has changed the limits to those of its image.
  axes.set(xlim=(0, segments), ylim=(0, 1))


def _draw_bars(axes, probs: np.ndarray, chosen: np.ndarray) -> None:
  """Draws a bar for the probability of each segment."""
  # A probability that is NaN has no bar.
  axes.bar(
    np.arange(len(probs)) + 0.5,
    np.nan_to_num(probs),
    width=0.86,
    color=np.where(chosen, _CHOSEN, _CLOSED),
    linewidth=0,
  )
  axes.axhline(0.5, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
  axes.axhline(0, color=_INK, linewidth=1)
  # Below the axis, so that a chosen segment shows where its bar is low.
  axes.plot(
    np.flatnonzero(chosen) + 0.5,
    np.full(np.sum(chosen), _MARK),
    linestyle="none",
    marker="^",
    markersize=4,
    markeredgewidth=0,
    color=_CHOSEN,
    clip_on=False,
  )
  axes.set(yticks=[0, 0.5, 1])
  axes.tick_params(axis="y", labelsize=8, length=2, color=_INK, labelcolor=_INK)
  axes.set_ylabel("P(open)", fontsize=9, color=_INK)


def _draw_strip(axes: Any, colours: Sequence[Any] | np.ndarray) -> None:
  """Draws a strip of colours, one for each segment."""
  axes.bar(np.arange(len(colours)) + 0.5, 1, width=1.0, color=colours, linewidth=0)


def _name_runs(axes: Any, numbers: np.ndarray, units: _Units, *, width: float) -> None:
  """Writes a unit's name into each of its runs of segments that is wide enough."""
  # A run begins where the unit changes; -2 is no unit, so that the first segment begins one too.
  starts = np.flatnonzero(np.diff(numbers, prepend=-2))
  for start, end in itertools.pairwise([*starts, len(numbers)]):
    # A letter takes 0.062 inches at this font size.
    letters = int((end - start) / len(numbers) * width / 0.062)
    # The unit -1 is none, and has no name.
    unit = units.get(numbers[start])
    if unit is not None and letters >= min(3, len(unit.name)):
      axes.text(
        (start + end) / 2,
        0.45,
        plain(unit.name, letters),
        ha="center",
        va="center",
        fontsize=7,
        color="white",
      )


def _draw_legend(figure: Any, entries: Sequence[_Entry], columns: int) -> None:
  """Draws the legend at the bottom of the figure."""
  from matplotlib.patches import Patch

  figure.legend(
    handles=[Patch(color=entry.colour, label=entry.name) for entry in entries],
    ncols=columns,
    loc="lower left",
    bbox_to_anchor=(_LEFT / figure.get_figwidth(), 0),
    borderaxespad=0,
    frameon=False,
    fontsize=9,
    handlelength=1.2,
    handleheight=0.9,
    labelcolor=_INK,
  )


def _legend_entries(lines: Sequence[TimeLine], units: _Units) -> list[_Entry]:
  """Returns the entries of the legend: kinds of segments, then unit actions."""
  entries = [_Entry("chosen", _CHOSEN), _Entry("not chosen", _CLOSED)]
  if any(line.relevant is not None for line in lines):
    entries.append(_Entry("relevant", _RELEVANT))
  for unit in units.values():
    entries.append(_Entry(plain(unit.name, 28), unit.colour))
  return entries


def _legend_columns(entries: Sequence[_Entry], width: float) -> int:
  """Returns the number of columns of the legend that fit the width, in inches."""
  # A colour patch takes 0.45 inches, a letter 0.085.
  letters = max(len(entry.name) for entry in entries)
  return max(1, min(len(entries), int(width / (0.45 + 0.085 * letters))))


def _unit_numbers(lines: Sequence[TimeLine]) -> list[int]:
  """Returns the numbers of the units in some videos, sorted."""
  numbers = set()
  for line in lines:
    if line.units is not None:
      # -1 is no unit.
      numbers.update(line.units[line.units >= 0].tolist())
  return sorted(numbers)


def _shown_units(lines: Sequence[TimeLine], unit_names: Sequence[str] | None) -> _Units:
  """Returns name and colour of every unit in the picture, with hues as far apart as possible."""
  from matplotlib.colors import hsv_to_rgb

  numbers = _unit_numbers(lines)
  if unit_names is not None and numbers and numbers[-1] >= len(unit_names):
    raise ValueError(
      f"unit_names must name every unit; got {len(unit_names)} names, unit {numbers[-1]}"
    )
  units = {}
  for i, number in enumerate(numbers):
    name = str(number) if unit_names is None else unit_names[number]
    # Hues are evenly spaced, and neighbouring ones also differ in brightness.
    hue, brightness = (0.55 + i / len(numbers)) % 1, 0.75 if i % 2 == 0 else 0.55
    units[number] = _Entry(name, tuple(hsv_to_rgb((hue, 0.55, brightness))))
  return units


def _without_padding(line: TimeLine) -> TimeLine:
  """Returns a video without its padding.

  Raises:
    ValueError: shapes do not fit each other, or all of the video is padding.
  """
  valid = np.asarray(line.valid, bool)
  if not valid.any():
    raise ValueError(f"valid must be True for some segment; got none ({line.title!r})")
  cut = {"valid": valid[valid]}
  for name in ("probs", "gates", "thumbnails", "relevant", "units"):
    values = getattr(line, name)
    if values is None:
      continue
    values = np.asarray(values)
    if values.shape[:1] != valid.shape:
      raise ValueError(
        f"{name} must be [T, ...] like valid; got {values.shape}, valid {valid.shape} "
        f"({line.title!r})"
      )
    cut[name] = values[valid]
  shape = () if line.thumbnails is None else np.shape(line.thumbnails)
  if line.thumbnails is not None and (len(shape) != 4 or shape[-1] not in (1, 3)):
    raise ValueError(f"thumbnails must be [T, H, W, D], D 1 or 3; got {shape} ({line.title!r})")
  return dataclasses.replace(line, **cut)


def _representative(block: np.ndarray, probs: np.ndarray, chosen: np.ndarray) -> int:
  """Returns the segment of a block that its thumbnail shows."""
  # The chosen segment with the highest probability; without one, the middle of the block.
  candidates = block[chosen[block]]
  return candidates[np.argmax(probs[candidates])] if len(candidates) else block[len(block) // 2]


def _thumbnail_size(thumbnails: np.ndarray, width: float) -> tuple[float, float]:
  """Returns width and height in inches, in the frames' proportion."""
  segments, rows, columns, _ = thumbnails.shape
  # 8 % of the room separates thumbnails.
  room = width / min(segments, _MOST_THUMBNAILS) * 0.92
  scale = min(room / columns, _THUMBNAIL / rows, 2 * _THUMBNAIL / columns)
  return columns * scale, rows * scale


def _height(line: TimeLine, width: float) -> float:
  """Returns the inches that `_draw_line` takes for a video, with the gaps between its parts."""
  header = _HEADER if line.title else 0.0
  height = header + _BARS + _GAP + _AFTER
  if line.thumbnails is not None:
    height += _thumbnail_size(line.thumbnails, width)[1] + _GAP
  if line.relevant is not None:
    height += _STRIP / 2 + _GAP / 2
  if line.units is not None:
    height += _STRIP + _GAP
  return height


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

  bins = np.linspace(0, 1, _BINS + 1)
  figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
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
  # The y axis points down (see `ylim`), so that the first video is on top.
  for row, chosen in enumerate(gates):
    colours = np.where(chosen, _CHOSEN, _CLOSED)
    _draw_boxes(axes, colours, top=row - 0.4, height=0.8 if relevant is None else 0.55)
    if relevant is not None:
      colours = np.where(relevant[row], _RELEVANT, "white")
      _draw_boxes(axes, colours, top=row + 0.2, height=0.2)
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


def _draw_boxes(axes: Any, colours: np.ndarray, *, top: float, height: float) -> None:
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
