"""Pictures of the gates of a network, for its report.

Axes: K classes, G gates of the network, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gating_jax.reports.lettering import plain, save
from gating_jax.training.diagnosis import OUTCOMES

_COLOURS = dict(zip(OUTCOMES, ("tab:blue", "tab:gray", "tab:orange", "tab:green"), strict=True))


def draw_layers(file: Path | BinaryIO, layers: Sequence[Mapping[str, Any]]) -> None:
  """Writes a PNG: for each layer, what share of its gates came out how; `layers` as of `diagnosis.by_layer`."""
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(6.5, 1.2 + 0.24 * len(layers)), layout="constrained", dpi=110)
  axes, left = figure.subplots(), np.zeros(len(layers))
  for outcome, colour in _COLOURS.items():
    share = np.array([100 * layer[outcome] / layer["gates"] for layer in layers])
    axes.barh(np.arange(len(layers)), share, left=left, color=colour, label=outcome.replace("_", " "))
    left += share
  axes.set_yticks(np.arange(len(layers)), [plain(layer["layer"], 24) for layer in layers], fontsize=8)
  axes.invert_yaxis()
  axes.set(xlim=(0, 100), xlabel="% of the layer's gates")
  figure.legend(loc="outside upper center", ncols=len(_COLOURS), fontsize=8, frameon=False)
  save(figure, file)


def draw_classes(
    file: Path | BinaryIO, rates: np.ndarray, information: np.ndarray, class_names: Sequence[str], *, most: int = 60
) -> None:
  """Writes a PNG: how often the most informative gates are open for images of each class.

  Args:
    file: of the picture.
    rates: `[K, G]` share of the images of each class for which each gate is open.
    information: `[G]` bits of each gate about the class.
    class_names: K of them.
    most: gates drawn at most, in the order of the class that opens them most.
  """
  from matplotlib.figure import Figure  # imports slowly

  chosen = np.argsort(-information, kind="stable")[:most]
  chosen = chosen[np.lexsort((-rates[:, chosen].max(axis=0), rates[:, chosen].argmax(axis=0)))]
  classes = len(class_names)
  figure = Figure(figsize=(6.5, min(1.4 + 0.24 * classes, 14)), layout="constrained", dpi=110)
  axes = figure.subplots()
  image = axes.imshow(100 * rates[:, chosen], aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
  every = max(1, -(-classes // 50))
  axes.set_yticks(np.arange(0, classes, every), [plain(name, 16) for name in class_names[::every]], fontsize=8)
  axes.set_xticks([])
  axes.set_xlabel(f"the {len(chosen)} gates that tell most of the class")
  figure.colorbar(image, label="% of images that open it", pad=0.02)
  save(figure, file)


def draw_costs(file: Path | BinaryIO, macs: np.ndarray, correct: np.ndarray | None, *, parts: int = 5) -> None:
  """Writes a PNG: how many multiply-accumulates images cost, and how accurate the net is on cheap and on dear ones.

  Args:
    file: of the picture.
    macs: `[M]` of each image, as a share of the ungated net's.
    correct: `[M]` whether it was classified correctly; None where that means nothing.
    parts: of equally many images, from cheap to dear.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(6.5, 2.8), layout="constrained", dpi=110)
  spread, *scored = figure.subplots(1, 1 if correct is None else 2, squeeze=False)[0]
  spread.hist(100 * macs, bins=40, color="tab:blue")
  spread.set(xlabel="MACs of an image, % of the ungated net's", ylabel="images")
  for axes in scored:
    groups = [g for g in np.array_split(np.argsort(macs, kind="stable"), parts) if len(g)]
    axes.plot([100 * macs[g].mean() for g in groups], [100 * correct[g].mean() for g in groups], marker="o")
    axes.set(xlabel=f"MACs, {len(groups)} groups from cheap to dear (%)", ylabel="accuracy (%)")
  save(figure, file)


def draw_histories(file: Path | BinaryIO, macs: Sequence[float], accuracies: Sequence[float]) -> None:
  """Writes a PNG: shares of MACs and accuracies at the tests of a training, in their order, the last one marked."""
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(6.5, 3), layout="constrained", dpi=110)
  axes = figure.subplots()
  axes.plot(100 * np.asarray(macs), 100 * np.asarray(accuracies), marker=".", color="tab:gray")
  axes.plot(100 * macs[-1], 100 * accuracies[-1], marker="o", color="tab:red")
  axes.set(xlabel="MACs, % of the ungated net's", ylabel="test accuracy (%)")
  save(figure, file)
