"""Pictures of gates: per layer, over training, by class, and against the prior.

Axes: N examples, L layers, T tests during training, G gates, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from gating_jax.analysis.outcomes import OUTCOMES, Diagnosis
from gating_jax.ops.priors import Prior
from gating_jax.reports.page import WIDTH
from gating_jax.reports.text import plain

# The most layers and classes in one picture, and the most classes with a bar.
MOST_LAYERS, MOST_CLASSES, _BARS = 24, 40, 12
_TALLEST = 7.0  # inches of all layers' bars, at most
_NAMED = 36  # layers with a name, at most


class _Kind(NamedTuple):
  """A kind of gates: its label in a picture, and its colour."""

  label: str
  colour: str


# The colours differ in lightness too.
_KINDS = (
  _Kind("< 1 % (always closed)", "#c3cad3"),
  _Kind("1 to 25 % (conditional)", "#b7e4c7"),
  _Kind("25 to 50 % (cond.)", "#74c69d"),
  _Kind("50 to 75 % (cond.)", "#40916c"),
  _Kind("75 to 99 % (cond.)", "#1b4332"),
  _Kind("> 99 % (always open)", "#4c78a8"),
  _Kind("random, by noise", "#f2a541"),
)
_GREEN = "#2a9d6f"
_COLUMNS = 3
_FONT_SIZE = 8.5  # points


def layer_names(layers: Sequence[tuple[str, int]]) -> list[str]:
  """Returns number and name of each layer, without a first folder that all of them share."""
  folder, names = _shared_folder(layers), []
  for i, (name, _) in enumerate(layers):
    names.append(f"{i:02d} {plain(name.removeprefix(folder), 24)}")
  return names


def _shared_folder(layers: Sequence[tuple[str, int]]) -> str:
  """Returns the first folder of several layers' names, with its slash; empty if they differ."""
  # Names of layers are paths of modules; the first module is often the same for all.
  first, slash, _ = layers[0][0].partition("/")
  if not slash or len(layers) == 1:
    return ""
  shared = all(name.startswith(first + slash) for name, _ in layers)
  return first + slash if shared else ""


def shown_layers(count: int) -> np.ndarray:
  """Returns the numbers of the layers that panels show: all, or `MOST_LAYERS` evenly spaced."""
  return np.unique(np.linspace(0, count - 1, min(count, MOST_LAYERS)).astype(int))


def draw_outcomes(found: Diagnosis, sizes: Sequence[int], names: Sequence[str]) -> Any:
  """Draws bars of gate outcomes, in % of each layer's gates.

  Conditional gates are split by their open rates. With many layers, only every few have a name.

  Args:
    found: diagnosis of all gates.
    sizes: number of gates of each layer.
    names: one per layer.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  count, kinds = len(sizes), _kinds(found)
  figure = Figure(
    figsize=(WIDTH, 1.7 + max(0.5, min(0.24 * count, _TALLEST))), layout="constrained"
  )
  axes = figure.subplots()
  layer = np.repeat(np.arange(count), sizes)
  left = np.zeros(count)
  for i, kind in enumerate(_KINDS):
    counts = np.bincount(layer[kinds == i], minlength=count)
    percent = 100 * counts / np.maximum(sizes, 1)
    axes.barh(
      np.arange(count),
      percent,
      left=left,
      color=kind.colour,
      label=f"{kind.label}: {counts.sum():,}",
      height=0.82,
    )
    # The next kind is stacked to the right of this one.
    left += percent
  # Names of more layers would overlap.
  every = math.ceil(count / _NAMED)
  axes.set_yticks(np.arange(0, count, every), names[::every], fontsize=_FONT_SIZE)
  axes.invert_yaxis()
  axes.margins(y=0.01)
  axes.set_xlim(0, 100)
  axes.set_xlabel("gates of the layer (%)")
  axes.set_ylabel("layer")
  axes.spines[["top", "right"]].set_visible(False)
  figure.legend(
    loc="outside upper left",
    ncols=2,
    frameon=False,
    fontsize=9,
    columnspacing=1.2,
    title=f"{len(kinds):,} gates, each open for",
    alignment="left",
  )
  return figure


def _kinds(found: Diagnosis) -> np.ndarray:
  """Returns the kind of each gate, as `[G]` positions in `_KINDS`."""
  # 1 to 4, the positions of the conditional kinds.
  kinds = np.digitize(found.open_rates, (0.25, 0.5, 0.75)) + 1
  for outcome, kind in (("always_closed", 0), ("always_open", 5), ("random_dropout", 6)):
    kinds[np.asarray(found.outcomes) == OUTCOMES.index(outcome)] = kind
  return kinds


def draw_histograms(
  history: Sequence[Mapping[str, Any]], names: Sequence[str], measure: str
) -> Any:
  """Draws, in a panel for each layer, how histograms change during training.

  A column is a test, a row is a part of [0, 1], and darker cells hold more values.

  Args:
    history: lines of `histograms.jsonl`, at least one.
    names: of all layers.
    measure: `probs` or `open_rates`.
  Returns:
    The matplotlib figure.
  """
  ylabel = {"probs": "probability", "open_rates": "open rate"}[measure]
  figure, panels = _panels(names, xlabel="test at step", ylabel=ylabel)
  for panel in panels:
    # [T, bins]
    counts = np.array([_of_layer(line, panel.layer, measure) for line in history], np.float64)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root keeps small fractions visible next to a bin that holds most values.
    panel.axes.imshow(
      np.sqrt(fractions.T),
      cmap="Greens",
      vmin=0,
      vmax=0.6,
      origin="lower",
      aspect="auto",
      extent=(-0.5, len(history) - 0.5, 0, 1),
      interpolation="nearest",
    )
    _label_ends(panel.axes, history)
    # Below the steps, which leave no room between them.
    panel.axes.xaxis.labelpad = 1
    panel.axes.set_yticks([0, 1], ["0", "1"], fontsize=_FONT_SIZE)
  return figure


def _label_ends(axes: Any, history: Sequence[Mapping[str, Any]]) -> None:
  """Labels the first and the last step only."""
  first, last = f"{history[0]['step']:,}", f"{history[-1]['step']:,}"
  if len(history) == 1:
    axes.set_xticks([0], [first], fontsize=_FONT_SIZE)
    return
  axes.set_xticks([0, len(history) - 1], [first, last], fontsize=_FONT_SIZE)
  # Towards the middle, so that neighbouring panels' labels do not overlap.
  left, right = axes.get_xticklabels()
  left.set_horizontalalignment("left")
  right.set_horizontalalignment("right")


def draw_cdfs(
  history: Sequence[Mapping[str, Any]], names: Sequence[str], prior: Prior | None
) -> Any:
  """Draws the CDF of open probabilities at up to four tests, and the prior's, for each layer.

  Args:
    history: lines of `histograms.jsonl`, at least one.
    names: of all layers.
    prior: of the gates; None leaves it out.
  Returns:
    The matplotlib figure.
  """
  from matplotlib import colormaps

  figure, panels = _panels(names, xlabel="probability", ylabel="below it")
  times = np.unique(np.linspace(0, len(history) - 1, min(len(history), 4)).astype(int))
  # Later tests are darker; a single one is green.
  tones = [_GREEN]
  if len(times) > 1:
    tones = colormaps["viridis_r"](np.linspace(0.15, 0.95, len(times)))
  for layer, axes in panels:
    for i, time in enumerate(times):
      counts = np.array(_of_layer(history[time], layer, "probs"), np.float64)
      # The CDF at the edges of the bins, from 0 to 1.
      below = np.concatenate([[0], np.cumsum(counts) / max(counts.sum(), 1)])
      label = f"step {history[time]['step']:,}"
      axes.plot(np.linspace(0, 1, len(below)), below, color=tones[i], label=label)
    if prior is not None:
      x = np.linspace(0, 1, 200, dtype=np.float32)
      axes.plot(
        x, np.asarray(prior.cdf(x)), color="#d1495b", linestyle="--", label=f"prior {prior.name}"
      )
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.set_xticks([0, 1], ["0", "1"], fontsize=_FONT_SIZE)
    axes.set_yticks([0, 1], ["0", "1"], fontsize=_FONT_SIZE)
  # The same for all panels.
  handles, labels = panels[0].axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
  return figure


def draw_class_map(rates: np.ndarray, gates: Sequence[str], class_names: Sequence[str]) -> Any:
  """Draws the open rates by class: a row for each gate and a column for each class.

  A darker cell means that more images of the class open the gate. Similar rows and columns are
  neighbours. With many classes, those whose rates differ most are shown.

  Args:
    rates: `[G, K]` open rates in [0, 1], without NaN.
    gates: G names.
    class_names: K names.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  # A class whose rates are equal for all gates shows nothing about single gates, so of many classes
  # the most selective are shown, again in the order of the classes.
  classes = np.sort(np.argsort(-rates.std(axis=0), kind="stable")[:MOST_CLASSES])
  rates = rates[:, classes]
  rows, columns = _similar_order(rates), _similar_order(rates.T)
  figure = Figure(figsize=(WIDTH, 1.7 + 0.15 * len(rates)), layout="constrained")
  axes = figure.subplots()
  image = axes.imshow(
    rates[rows][:, columns], cmap="YlGnBu", vmin=0, vmax=1, aspect="auto", interpolation="nearest"
  )
  shown_names = [plain(class_names[k], 14) for k in classes[columns]]
  axes.set_xticks(np.arange(len(columns)), shown_names, rotation=90, fontsize=_FONT_SIZE)
  axes.xaxis.tick_top()
  axes.set_yticks(np.arange(len(rows)), np.asarray(gates)[rows], fontsize=7.5)
  axes.set_ylabel("gate (layer:number)")
  axes.set_xlabel("class")
  axes.xaxis.set_label_position("top")
  figure.colorbar(
    image,
    ax=axes,
    orientation="horizontal",
    aspect=40,
    pad=0.01,
    label="images of the class that open the gate (fraction)",
  )
  return figure


def draw_class_bars(rates: np.ndarray, titles: Sequence[str], class_names: Sequence[str]) -> Any:
  """Draws bars of each gate's open rate on each class, or on those with the highest rates.

  Args:
    rates: `[G, K]` open rates in [0, 1], without NaN.
    titles: one per gate.
    class_names: K names.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  shown = min(rates.shape[1], _BARS)
  figure = Figure(figsize=(WIDTH, (0.5 + 0.16 * shown) * len(rates)), layout="constrained")
  grid = figure.subplots(len(rates), 1, squeeze=False).ravel()
  for axes, rate, title in zip(grid, rates, titles, strict=True):
    # The classes of the highest rates, then again in the order of the classes.
    classes = np.sort(np.argsort(-rate, kind="stable")[:shown])
    names = [plain(class_names[k], 18) for k in classes]
    axes.barh(np.arange(shown), 100 * rate[classes], color=_GREEN)
    axes.set_yticks(np.arange(shown), names, fontsize=_FONT_SIZE)
    # Bars start at the bottom; the first class belongs on top.
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(0, 100)
    axes.set_ylabel("class", fontsize=_FONT_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
  axes.set_xlabel("images of the class that open the gate (%)")
  return figure


def _of_layer(line: Mapping[str, Any], number: int, measure: str) -> Sequence[int]:
  """Returns a layer's counts by its position, since an older run may name its layers otherwise."""
  of_layers = [counts for name, counts in line.items() if name.endswith(f"/{measure}")]
  return of_layers[number]


class _Panel(NamedTuple):
  """Axes of a layer, and its number."""

  layer: int
  axes: Any


def _panels(names: Sequence[str], *, xlabel: str, ylabel: str) -> tuple[Any, list[_Panel]]:
  """Returns a figure of labelled panels, and the panel of each layer that is shown."""
  from matplotlib.figure import Figure  # imports slowly

  shown = shown_layers(len(names))
  rows = math.ceil(len(shown) / _COLUMNS)
  figure = Figure(figsize=(WIDTH, 0.6 + 1.55 * rows), layout="constrained")
  grid = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
  panels = []
  for place, layer in enumerate(shown.tolist()):
    axes = grid[place]
    axes.set_title(names[layer], fontsize=7.5)
    # Each panel has its own labels, small and close to the axis: a reader sees one at a time.
    axes.set_xlabel(xlabel, fontsize=_FONT_SIZE, labelpad=-6)
    axes.set_ylabel(ylabel, fontsize=_FONT_SIZE, labelpad=-4)
    panels.append(_Panel(layer, axes))
  # The grid may have more places than layers.
  for axes in grid[len(shown) :]:
    axes.axis("off")
  return figure, panels


def _similar_order(rows: np.ndarray) -> np.ndarray:
  """Returns an order of `[n, ...]` rows in which similar rows are neighbours."""
  from scipy.cluster import hierarchy

  # Any order of one or two rows will do, and a linkage needs at least two.
  if len(rows) < 3:
    return np.arange(len(rows))
  return hierarchy.leaves_list(hierarchy.linkage(rows, "average", optimal_ordering=True))


def draw_gate_statistics(logits: np.ndarray, open_rates: np.ndarray, prior: Prior) -> Any:
  """Draws two histograms and the empirical CDFs.

  The histograms show open rates and open probabilities; the CDFs are drawn with the prior's.

  Args:
    logits: `[N, G]` log-odds of the gates on some test images.
    open_rates: `[G]` fraction of test images for which each gate is open.
    prior: its CDF is drawn next to the empirical ones.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  # In float64: in float32 the sigmoid is exactly 1 from a logit of 17 on.
  probs = special.expit(logits.astype(np.float64))
  figure = Figure(figsize=(13, 4), layout="constrained")
  rates, values, cdfs = figure.subplots(1, 3)
  rates.hist(open_rates, bins=np.linspace(0, 1, 41), color="tab:blue")
  rates.set(
    title=f"How often each of {len(open_rates)} gates is open",
    xlabel="fraction of test images",
    ylabel="gates",
  )
  values.hist(probs.ravel(), bins=np.linspace(0, 1, 41), density=True, color="tab:green")
  values.set(title=f"Open probabilities on {len(probs)} images", xlabel="P(open)", ylabel="density")
  _draw_gate_cdfs(cdfs, probs, prior)
  return figure


def _draw_gate_cdfs(axes, probs: np.ndarray, prior: Prior) -> None:
  """Draws the empirical CDFs of single gates and of all gates together, and the prior's."""
  n, gates = probs.shape
  # The expected CDF at the i-th of n sorted samples, i / (n + 1), as in the batch-shaping loss.
  level = np.arange(1, n + 1) / (n + 1)
  # At most 60 single gates and 500 points of the pooled CDF: more could not be distinguished.
  for gate in np.unique(np.linspace(0, gates - 1, min(gates, 60)).astype(int)):
    axes.plot(np.sort(probs[:, gate]), level, color="tab:gray", linewidth=0.5, alpha=0.5)
  pooled = np.sort(probs.ravel())
  shown = np.linspace(0, pooled.size - 1, 500).astype(int)
  axes.plot(
    pooled[shown],
    (shown + 1) / (pooled.size + 1),
    color="tab:green",
    linewidth=2,
    label="all gates together",
  )
  x = np.linspace(0, 1, 500)
  axes.plot(
    x,
    np.asarray(prior.cdf(x.astype(np.float32))),
    color="tab:red",
    linewidth=2,
    label=f"prior {prior.name}",
  )
  axes.set(
    title="Empirical CDF of single gates (grey)",
    xlabel="P(open)",
    ylabel="fraction of images",
    ylim=(0, 1),
  )
  axes.legend(loc="upper left")
