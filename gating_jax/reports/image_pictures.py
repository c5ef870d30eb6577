"""Pictures of a run's images and of its score against multiply-accumulates, narrow enough for a phone.

Axes: N images, H and W pixels, D colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from gating_jax.reports.gate_pictures import WIDTH

_COLUMNS = 4
_SIDE = 128  # pixels of an image shown, at most
_GREEN, _BLUE = "#2a9d6f", "#4c78a8"


def draw_images(pixels: np.ndarray, texts: Sequence[str]) -> Any:
  """Images in rows of four, each with its text below.

  Args:
    pixels: `[N, H, W, D]` uint8, D 1 or 3.
    texts: N, of as many lines each.
  """
  from matplotlib.figure import Figure  # imports slowly

  rows = -(-len(pixels) // _COLUMNS)
  height = (WIDTH / _COLUMNS - 0.1) * pixels.shape[1] / pixels.shape[2] + 0.18 * (1 + texts[0].count("\n")) + 0.1
  figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
  grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
  for axes in grid:
    axes.axis("off")
  for axes, image, text in zip(grid, pixels, texts, strict=False):
    axes.imshow(_small(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.text(0.5, -0.04, text, fontsize=9, transform=axes.transAxes, ha="center", va="top", linespacing=1.1)
  return figure


def draw_training(steps: Sequence[int], scores: Sequence[float], mac_ratios: Sequence[float], score_name: str) -> Any:
  """The score and the share of multiply-accumulates at each test during training."""
  from matplotlib.figure import Figure  # imports slowly

  gated = min(mac_ratios) < 1
  figure = Figure(figsize=(WIDTH, 3.6 if gated else 2.4), layout="constrained")
  top, *below = np.atleast_1d(figure.subplots(1 + gated, 1, sharex=True))
  top.plot(steps, 100 * np.asarray(scores), color=_BLUE, marker="o", markersize=4)
  top.set_ylabel(f"{score_name}, %")
  for axes in below:
    axes.plot(steps, 100 * np.asarray(mac_ratios), color=_GREEN, marker="o", markersize=4)
    axes.set_ylabel("MACs, %")
  for axes in (top, *below):
    axes.grid(alpha=0.3)
  (*_, last) = (top, *below)
  last.set_xlabel("step")
  return figure


def draw_path(steps: Sequence[int], scores: Sequence[float], mac_ratios: Sequence[float], score_name: str) -> Any:
  """The score against the share of multiply-accumulates, a point for each test during training."""
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
  axes = figure.subplots()
  x, y = 100 * np.asarray(mac_ratios), 100 * np.asarray(scores)
  axes.plot(x, y, color="#b8c0cc", linewidth=1, zorder=1)
  points = axes.scatter(x, y, c=steps, cmap="viridis_r", zorder=2)
  axes.set(xlabel="MACs, % of the ungated net's", ylabel=f"{score_name}, %")
  axes.grid(alpha=0.3)
  figure.colorbar(points, ax=axes, label="step")
  return figure


def draw_groups(macs: Sequence[float], values: Sequence[float], value_name: str) -> Any:
  """A value of equally many images each, ordered by what is spent on them.

  Args:
    macs: mean of each group.
    values: the same.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
  axes = figure.subplots()
  axes.plot(np.asarray(macs) / 1e6, values, color=_GREEN, marker="o", markersize=5)
  axes.set(xlabel="millions of MACs an image, mean of the group", ylabel=value_name)
  axes.margins(y=0.15)
  axes.grid(alpha=0.3)
  return figure


def _small(image: np.ndarray) -> np.ndarray:
  """The image, not larger than is shown, without an axis for one colour."""
  image = image.squeeze(-1) if image.shape[-1] == 1 else image
  if max(image.shape[:2]) <= _SIDE:
    return image
  picture = Image.fromarray(image)
  picture.thumbnail((_SIDE, _SIDE))
  return np.asarray(picture)
