"""Figures of a sequence of tasks: accuracies, filters per task, and overlap of units.

They are as wide as a phone, or wider where many tasks need it.

Axes: T tasks.
Reference: Lopez-Paz and Ranzato, 2017 (the matrix of accuracies); Abati et al., 2020 (filters owned
by tasks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import plain

# New, reused and free filters of each task, `[T]` each.
_Counts = tuple[np.ndarray, np.ndarray, np.ndarray]

_MAP, _UNDEFINED = "cividis", "#e3e6ea"  # reads alike with every kind of colour vision
# From the bottom of a bar; the colours differ in lightness too.
_PARTS = {
  "reused from older tasks": "#0072b2",
  "new with this task": "#e69f00",
  "older tasks', not used": "#aab4be",
  "free": "#eceff2",
}
_LETTERS = 20  # in a name, at most
_LETTER = 0.085  # inches
_CELL = 0.42  # inches of a matrix's cell, at least


def draw_accuracies(
  aware: np.ndarray, agnostic: np.ndarray | None = None, *, task_names: Sequence[str] | None = None
) -> Any:
  """Draws the matrix of accuracies in %, with the task known and, below it, unknown.

  Args:
    aware: `[T, T]` in [0, 1], row i after learning task i, column j on task j; NaN where undefined,
      drawn grey.
    agnostic: the same with the task unknown; left out if None.
    task_names: in the order of learning; their numbers from 1 if None.
  Returns:
    The matplotlib figure.
  Raises:
    ValueError: shapes do not fit each other, or a value is outside [0, 1].
  """
  shown = {"task known (task-aware)": _check_matrix("aware", aware)}
  if agnostic is not None:
    shown["task not known (task-agnostic)"] = _check_matrix("agnostic", agnostic, tasks=len(aware))
  return _draw_matrices(
    shown,
    _names(task_names, len(aware)),
    xlabel="tested on task",
    ylabel="after learning task",
    unit="accuracy (%)",
  )


def draw_overlap(overlap: np.ndarray, *, task_names: Sequence[str] | None = None) -> Any:
  """Draws how far every two tasks use the same units, in %.

  Args:
    overlap: `[T, T]` in [0, 1], intersection over union; NaN where unknown, drawn grey.
    task_names: in the order of learning; their numbers from 1 if None.
  Returns:
    The matplotlib figure.
  Raises:
    ValueError: shapes do not fit each other, or a value is outside [0, 1].
  """
  shown = {"Units that two tasks share": _check_matrix("overlap", overlap)}
  return _draw_matrices(
    shown,
    _names(task_names, len(overlap)),
    xlabel="task",
    ylabel="task",
    unit="intersection over union (%)",
  )


def draw_filters(layers: Mapping[str, _Counts], *, task_names: Sequence[str] | None = None) -> Any:
  """Draws, for each layer and task, a bar of filters that are reused, new, not used, and free.

  Args:
    layers: by name, counts `(new, reused, free)`, each `[T]`: filters first used by this task, used
      by it and owned by an older task, and used by no task so far. The rest of the bar is owned by
      older tasks and not used by this one.
    task_names: in the order of learning; their numbers from 1 if None.
  Returns:
    The matplotlib figure.
  Raises:
    ValueError: there is no layer, layers or names have different numbers of tasks, or counts are
      not possible.
  """
  from matplotlib.figure import Figure  # imports slowly
  from matplotlib.patches import Patch

  if not layers:
    raise ValueError("layers must hold at least one layer; got none")
  parts, tasks = {}, []
  for layer, counts in layers.items():
    parts[layer] = _stack_parts(layer, counts)
    tasks.append(parts[layer].shape[1])
  if len(set(tasks)) > 1:
    raise ValueError(f"layers must all have counts of the same tasks; got {tasks} tasks")
  names = _names(task_names, tasks[0])
  # A bar takes 0.16 inches at least; panels that are wider than a phone stand one below the other.
  least = 0.16 * len(names) + 0.7
  columns = int(min(len(parts), max(1, WIDTH // max(least, 1.6))))
  rows, width = math.ceil(len(parts) / columns), max(WIDTH / columns, least)
  figure = Figure(figsize=(columns * width, rows * 1.9 + 1.1), layout="constrained")
  panels = figure.subplots(rows, columns, squeeze=False)
  for i, (layer, counts) in enumerate(parts.items()):
    axes = panels.flat[i]
    # Free filters are the last part, after the last task.
    free = f"{counts[-1, -1]} of {counts[:, -1].sum()} free"
    _draw_bars(axes, counts, title=f"{plain(layer, int(width / _LETTER))}\n{free}")
    rotation = _rotation(names, 0.75 * width / len(names))
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=rotation)
    # Names of tasks only below the last panel of each column, and "filters" at each row's left.
    if i + columns < len(parts):
      axes.set_xticklabels([])
    else:
      axes.set_xlabel("task")
    if i % columns == 0:
      axes.set_ylabel("filters")
  # The last row of the grid may have places left.
  for axes in panels.flat[len(parts) :]:
    axes.remove()
  figure.legend(
    handles=[Patch(color=colour, label=part) for part, colour in _PARTS.items()],
    loc="outside lower center",
    ncols=2,
    frameon=False,
    fontsize=9,
    columnspacing=1.2,
    handlelength=1.2,
  )
  return figure


def _draw_bars(axes, parts: np.ndarray, *, title: str) -> None:
  """Draws a stacked bar for each task."""
  from matplotlib.ticker import MaxNLocator

  below = np.zeros(parts.shape[1], int)
  # Parts are stacked: each begins where the one below it ends.
  for label, counts in zip(_PARTS, parts, strict=True):
    axes.bar(
      np.arange(len(counts)),
      counts,
      bottom=below,
      width=0.84,
      color=_PARTS[label],
      label=label,
    )
    below = below + counts
  axes.set_title(title, fontsize=9)
  axes.set(ylim=(0, below.max()), xlim=(-0.6, len(below) - 0.4))
  axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
  axes.tick_params(axis="y", labelsize=8)
  axes.tick_params(axis="x", length=0)
  axes.spines[["top", "right"]].set_visible(False)


def _draw_matrices(
  shown: Mapping[str, np.ndarray], names: Sequence[str], *, xlabel: str, ylabel: str, unit: str
) -> Any:
  """Draws matrices one below the other; `shown` has them by their titles."""
  from matplotlib.figure import Figure  # imports slowly

  # Left and below the matrix, names need room for the longest of them; a cell keeps its least size.
  margin = 0.6 + _LETTER * _longest(names)
  side = max(_CELL * len(names), WIDTH - 0.1 - margin, 3.2)
  cell = side / len(names)
  size = (side + margin + 0.1, len(shown) * (side + margin + 0.2) + 0.7)
  figure = Figure(figsize=size, layout="compressed")
  panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
  for axes, title in zip(panels, shown, strict=True):
    image = _draw_cells(axes, 100 * shown[title], fontsize=7.5 if cell < 0.55 else 10)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_xticks(range(len(names)), names, rotation=_rotation(names, cell))
    axes.set_yticks(range(len(names)), names)
  # One colour bar for all: every matrix has the same scale, 0 to 100 %.
  figure.colorbar(image, ax=list(panels), label=unit, orientation="horizontal", aspect=40, pad=0.01)
  return figure


def _draw_cells(axes, percent: np.ndarray, *, fontsize: float):
  """Draws a matrix of percentages, each as a coloured cell with its number."""
  from matplotlib import colormaps

  image = axes.imshow(percent, cmap=colormaps[_MAP].with_extremes(bad=_UNDEFINED), vmin=0, vmax=100)
  for (i, j), value in np.ndenumerate(percent):
    if not np.isnan(value):
      # "100.0" would not fit into a cell.
      number = f"{value:.1f}" if value < 99.95 else "100"
      # Below about half of the colour map, dark cells need white numbers.
      axes.text(
        j,
        i,
        number,
        ha="center",
        va="center",
        fontsize=fontsize,
        color="white" if value < 47 else "black",
      )
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  return image


def _check_matrix(name: str, values: np.ndarray, tasks: int | None = None) -> np.ndarray:
  """Checks a matrix of fractions; `tasks` is its size, or None where any will do."""
  values = np.asarray(values, np.float64)
  if tasks is None and values.ndim:
    tasks = len(values)
  if values.shape != (tasks, tasks) or not tasks:
    size = f", T = {tasks}" if tasks else ""
    raise ValueError(f"{name} must be [T, T]{size}; got {values.shape}")
  # NaN, an undefined value, passes: it is neither below 0 nor above 1.
  outside = (values < 0) | (values > 1)
  if outside.any():
    raise ValueError(f"{name} must be in [0, 1] or NaN; got {values[outside][0]}")
  return values


def _stack_parts(layer: str, counts: _Counts) -> np.ndarray:
  """Checks a layer's counts and returns `[4, T]`, in the order of `_PARTS`."""
  arrays = [np.asarray(array) for array in counts]
  shapes = [array.shape for array in arrays]
  alike = len(shapes) == 3 and len(set(shapes)) == 1
  if not alike or len(shapes[0]) != 1 or not arrays[0].size:
    raise ValueError(f"layers[{layer!r}] must be (new, reused, free), each [T]; got {shapes}")
  new, reused, free = np.stack(arrays).astype(np.float64)
  # Filters that older tasks own are the new ones of all tasks before; those not reused are unused.
  unused = np.cumsum(new) - new - reused
  parts = np.stack([reused, new, unused, free])
  if not ((parts >= 0) & (parts == np.round(parts))).all():
    new, reused, free = arrays
    raise ValueError(
      f"layers[{layer!r}] must be whole counts >= 0, reused at most what older tasks took; got "
      f"new {new.tolist()}, reused {reused.tolist()}, free {free.tolist()}"
    )
  return parts.astype(int)


def _names(task_names: Sequence[str] | None, tasks: int) -> list[str]:
  """Returns the names of the tasks, shortened; their numbers from 1 if they have no names."""
  names = range(1, tasks + 1) if task_names is None else task_names
  if len(names) != tasks:
    raise ValueError(f"task_names must name each of {tasks} tasks; got {len(names)} names")
  return [plain(name, _LETTERS) for name in names]


def _rotation(names: Sequence[str], room: float) -> int:
  """Returns the degrees by which names must turn to fit into `room` inches each."""
  return 90 if _LETTER * (_longest(names) + 1) > room else 0


def _longest(names: Sequence[str]) -> int:
  """Returns the number of letters of the longest name."""
  return max(map(len, names))
