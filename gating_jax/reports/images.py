"""Pictures of images and scenes, and of a run's score against MACs.

Axes: N images or scenes, K images in a row, H and W pixels, D colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import format_percent, plain

_COLUMNS = 4  # images in a row
_SIDE = 128  # pixels of an image shown, at most
_LABEL, _CAPTION = 1.25, 0.2  # inches, of a row of images
_LETTERS = 12  # in a caption, at most
_SCENE = 1.6  # inches
_GREEN, _BLUE = "#2a9d6f", "#4c78a8"
_IGNORED = "#d0d4d9"  # colour of pixels without a class


def draw_images(pixels: np.ndarray, texts: Sequence[str]) -> Any:
  """Draws images in rows of four, each with its text below.

  Args:
    pixels: `[N, H, W, D]` uint8, D = 1 or 3.
    texts: one per image, all with the same number of lines.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  rows = math.ceil(len(pixels) / _COLUMNS)
  # Inches of a row: an image, 0.18 for each line of its text, and a margin.
  image = (WIDTH / _COLUMNS - 0.1) * pixels.shape[1] / pixels.shape[2]
  height = image + 0.18 * (1 + texts[0].count("\n")) + 0.1
  figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
  grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
  # The last row of the grid may have places without an image.
  for axes in grid:
    axes.axis("off")
  for i, text in enumerate(texts):
    axes = grid[i]
    axes.imshow(_small(pixels[i]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.text(
      0.5, -0.04, text, fontsize=9, transform=axes.transAxes, ha="center", va="top", linespacing=1.1
    )
  return figure


def draw_training(
  steps: Sequence[int], scores: Sequence[float], mac_ratios: Sequence[float], *, score_name: str
) -> Any:
  """Draws the score and the fraction of MACs at each test during training.

  Args:
    steps: of the tests.
    scores: in [0, 1].
    mac_ratios: MACs as a fraction of the ungated net's.
    score_name: label of the score's axis.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  # A net without gates has 100 % of the MACs throughout: its panel would show a straight line.
  gated = min(mac_ratios) < 1
  figure = Figure(figsize=(WIDTH, 3.6 if gated else 2.4), layout="constrained")
  panels = figure.subplots(2 if gated else 1, 1, sharex=True, squeeze=False)[:, 0]
  panels[0].plot(steps, 100 * np.asarray(scores), color=_BLUE, marker="o", markersize=4)
  panels[0].set_ylabel(f"{score_name} (%)")
  if gated:
    panels[1].plot(steps, 100 * np.asarray(mac_ratios), color=_GREEN, marker="o", markersize=4)
    panels[1].set_ylabel("MACs (% of ungated)")
    # Without an offset, which would hide how small the changes are.
    panels[1].ticklabel_format(axis="y", useOffset=False)
  for axes in panels:
    axes.grid(alpha=0.3)
  panels[-1].set_xlabel("training step")
  return figure


def draw_trajectory(
  steps: Sequence[int], scores: Sequence[float], mac_ratios: Sequence[float], *, score_name: str
) -> Any:
  """Draws the score against the fraction of MACs, a point for each test during training.

  Args: as in `draw_training`.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
  axes = figure.subplots()
  # The line shows the order of the tests, the colour their steps.
  x, y = 100 * np.asarray(mac_ratios), 100 * np.asarray(scores)
  axes.plot(x, y, color="#b8c0cc", linewidth=1, zorder=1)
  points = axes.scatter(x, y, c=steps, cmap="viridis_r", zorder=2)
  axes.set(xlabel="MACs (% of the ungated network's)", ylabel=f"{score_name} (%)")
  axes.ticklabel_format(useOffset=False)
  axes.grid(alpha=0.3)
  figure.colorbar(points, ax=axes, label="training step")
  return figure


def draw_quarters(macs: np.ndarray, quarters: Sequence[np.ndarray], noun: str) -> Any:
  """Draws the MACs of easy and hard images.

  A mark is the mean of a quarter of the images; its bar spans the 10th to the 90th percentile.

  Args:
    macs: `[N]` of each image.
    quarters: indices of the images of each quarter, the easiest first.
    noun: word for an image, such as `scene`.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
  axes = figure.subplots()
  names = []
  for i, quarter in enumerate(quarters):
    low, high = np.percentile(macs[quarter], (10, 90)) / 1e6
    axes.vlines(i, low, high, color="#b8c0cc", linewidth=7)
    names.append(f"quarter {i + 1}")
  places, means = np.arange(len(quarters)), [macs[quarter].mean() / 1e6 for quarter in quarters]
  axes.plot(places, means, color=_GREEN, marker="o", markersize=6)
  for i, mean in enumerate(means):
    axes.annotate(
      f"{mean:.4g}",
      (i, mean),
      xytext=(9, 0),
      textcoords="offset points",
      fontsize=9,
      va="center",
    )
  names[0] += "\n(easiest)"
  if len(names) > 1:
    names[-1] += "\n(hardest)"
  axes.set_xticks(places, names)
  axes.set(xlabel=f"quarters of the test {noun}s, by loss", ylabel=f"MACs per {noun} (millions)")
  axes.margins(x=0.15, y=0.15)
  axes.grid(axis="y", alpha=0.3)
  axes.spines[["top", "right"]].set_visible(False)
  return figure


def draw_image_rows(
  rows: Sequence[np.ndarray], labels: Sequence[str], captions: Sequence[Sequence[str]] | None = None
) -> Any:
  """Draws a figure as wide as a phone.

  Args:
    rows: `[K, H, W, D]` uint8 images with D = 1 or 3; at least one row, and K may differ by row.
    labels: one per row, drawn to its left; may have several lines.
    captions: one per image, drawn below it.
  Returns:
    The matplotlib figure.
  Raises:
    ValueError: there is no row.
  """
  from matplotlib.figure import Figure  # imports slowly

  if not rows:
    raise ValueError("rows must hold at least one row of images; got none")
  # All images have the size of those in the longest row, so that the columns are aligned.
  columns = max(max(map(len, rows)), 1)
  # In inches; a row of few images is not stretched to the whole width.
  side = min((WIDTH - _LABEL) / columns, 1.2)
  height = side + (_CAPTION if captions else 0.06)
  whole = height * len(rows)
  figure = Figure(figsize=(WIDTH, whole))
  # Texts and axes are placed in fractions of the figure, from the bottom left.
  for i, (images, label) in enumerate(zip(rows, labels, strict=True)):
    top = whole - i * height
    lines = [plain(line, 18) for line in label.split("\n")]
    figure.text(0.01, (top - 0.5 * side) / whole, "\n".join(lines), va="center", fontsize=9)
    for k, image in enumerate(images):
      left, bottom = (_LABEL + k * side) / WIDTH, (top - side) / whole
      # The 6 % left free separate the images.
      axes = figure.add_axes((left, bottom, 0.94 * side / WIDTH, 0.94 * side / whole))
      axes.imshow(_without_colours(image), cmap="gray", vmin=0, vmax=255)
      axes.set_axis_off()
      if captions:
        axes.text(
          0.5,
          -0.04,
          plain(captions[i][k], _LETTERS),
          transform=axes.transAxes,
          ha="center",
          va="top",
          fontsize=6.5,
        )
  return figure


def draw_scenes(
  images: np.ndarray,
  *,
  truth: np.ndarray,
  predicted: np.ndarray,
  mac_ratios: np.ndarray,
  class_names: Sequence[str],
) -> Any:
  """Draws a figure with a column for each scene.

  Args:
    images: `[N, H, W, D]` uint8, D = 1 or 3.
    truth: `[N, H, W]` integer classes; other values are drawn grey.
    predicted: `[N, H, W]` integer classes, also drawn where the ground truth is unknown.
    mac_ratios: `[N]` MACs of each scene as a fraction of the ungated net's.
    class_names: one per class.
  Returns:
    The matplotlib figure.
  """
  from matplotlib import colormaps  # imports slowly
  from matplotlib.colors import BoundaryNorm, ListedColormap
  from matplotlib.figure import Figure
  from matplotlib.patches import Patch

  count, classes = len(images), len(class_names)
  # One colour per class, and a last one for pixels without a class; "tab20" repeats after 20.
  colours = colormaps["tab20"](np.arange(classes) % 20)
  pixels = {
    "cmap": ListedColormap([*colours, _IGNORED]),
    "norm": BoundaryNorm(np.arange(classes + 2) - 0.5, classes + 1),
    "interpolation": "nearest",
  }
  height = _SCENE * images.shape[1] / images.shape[2]
  # Columns of the legend: one entry takes about 1.3 inches.
  columns = max(1, round(_SCENE * count / 1.3))
  legend = 0.5 + 0.2 * math.ceil(classes / columns)
  figure = Figure(figsize=(_SCENE * count, 3 * height + legend), layout="constrained")
  top, middle, bottom = figure.subplots(3, count, squeeze=False)
  for i in range(count):
    top[i].imshow(_without_colours(images[i]), cmap="gray", vmin=0, vmax=255)
    top[i].set_title(f"{format_percent(mac_ratios[i], 1)} of MACs", fontsize=9)
    # All values that are no class become one, that of the grey colour.
    middle[i].imshow(np.minimum(truth[i], classes), **pixels)
    bottom[i].imshow(np.minimum(predicted[i], classes), **pixels)
  for row, name in ((top, "image"), (middle, "truth"), (bottom, "prediction")):
    row[0].set_ylabel(name)
    # Numbers of pixels would only take room.
    for axes in row:
      axes.set(xticks=[], yticks=[])
  handles = []
  for name, colour in zip(class_names, colours, strict=True):
    handles.append(Patch(color=colour, label=plain(name, 16)))
  figure.legend(
    handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
  )
  return figure


def _small(image: np.ndarray) -> np.ndarray:
  """Shrinks an image to the size that is shown, and drops the axis of a single colour."""
  image = _without_colours(image)
  # Pixels beyond this size would be invisible, but each of them is part of the page.
  if max(image.shape[:2]) <= _SIDE:
    return image
  picture = Image.fromarray(image)
  picture.thumbnail((_SIDE, _SIDE))
  return np.asarray(picture)


def _without_colours(image: np.ndarray) -> np.ndarray:
  """Drops the axis of a single colour, which matplotlib and Pillow refuse."""
  return image[..., 0] if image.shape[-1] == 1 else image
