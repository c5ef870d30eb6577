"""A figure of rows of images, each row with a label and each image with a caption.

Axes: K images of a row, H and W pixels, D channels.
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
  """A figure as wide as a phone is.

  Args:
    rows: `[K, H, W, D]` uint8 images with D = 1 or 3, K of each row's own, at least one row.
    labels: of each row, to its left; may have several lines.
    captions: of each image, below it.
  """
  from matplotlib.figure import Figure  # imports slowly

  if not rows:
    raise ValueError("rows must hold at least one row of images; got none")
  columns = max(max(map(len, rows)), 1)
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
