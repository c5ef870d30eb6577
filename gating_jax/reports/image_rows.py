"""Rows of images, each row with a label and each image with a caption.

Axes: K images in a row, H and W pixels, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import plain

_LABEL, _CAPTION = 1.25, 0.2  # inches
_LETTERS = 12  # of a caption


def draw_rows(
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
  figure = Figure(figsize=(WIDTH, height * len(rows)), dpi=110)
  for i, (images, label) in enumerate(zip(rows, labels, strict=True)):
    top = 1 - i / len(rows)
    lines = [plain(line, 18) for line in label.split("\n")]
    figure.text(
      0.01, top - 0.5 * side / height / len(rows), "\n".join(lines), va="center", fontsize=9
    )
    for k, image in enumerate(images):
      # Axes are placed in fractions of the figure; the 6 % left free separate the images.
      axes = figure.add_axes(
        (
          (_LABEL + k * side) / WIDTH,
          top - side / height / len(rows),
          0.94 * side / WIDTH,
          0.94 * side / height / len(rows),
        )
      )
      axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
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
