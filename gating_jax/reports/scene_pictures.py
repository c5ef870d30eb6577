"""Picture of scenes: the image, the true and the predicted class of every pixel.

Axes: N scenes, H and W pixels, D colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gating_jax.reports.text import plain

_NOTHING, _SIDE = "#d0d4d9", 1.6  # colour of ignored pixels; inches of a scene


def draw(
  images: np.ndarray,
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

  n, classes = len(images), len(class_names)
  # One colour per class, and a last one for pixels without a class; "tab20" repeats after 20.
  colours = colormaps["tab20"](np.arange(classes) % 20)
  cmap = ListedColormap([*colours, _NOTHING])
  norm = BoundaryNorm(np.arange(classes + 2) - 0.5, classes + 1)
  height = _SIDE * images.shape[1] / images.shape[2]
  # Columns of the legend: one entry takes about 1.3 inches.
  columns = max(1, round(_SIDE * n / 1.3))
  figure = Figure(
    figsize=(_SIDE * n, 3 * height + 0.5 + 0.2 * -(-classes // columns)),
    layout="constrained",
    dpi=150,
  )
  grid = figure.subplots(3, n, squeeze=False)
  for i in range(n):
    grid[0, i].imshow(
      images[i].squeeze(-1) if images.shape[-1] == 1 else images[i], cmap="gray", vmin=0, vmax=255
    )
    grid[0, i].set_title(f"{100 * mac_ratios[i]:.1f} % of MACs", fontsize=9)
    for row, classes_of in ((1, truth), (2, predicted)):
      # All values that are no class become one, that of the grey colour.
      known = np.where(classes_of[i] < classes, classes_of[i], classes)
      grid[row, i].imshow(known, cmap=cmap, norm=norm, interpolation="nearest")
  for row, name in enumerate(("image", "truth", "prediction")):
    grid[row, 0].set_ylabel(name)
  # Numbers of pixels would only take room.
  for axes in grid.ravel():
    axes.set(xticks=[], yticks=[])
  handles = [
    Patch(color=colour, label=plain(name, 16))
    for name, colour in zip(class_names, colours, strict=True)
  ]
  figure.legend(
    handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
  )
  return figure
