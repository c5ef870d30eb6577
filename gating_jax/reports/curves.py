"""Learning curves: the loss and the accuracies of each phase of a training, from its journal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.reports import page
from gating_jax.training.journal import METRICS_FILE, read_lines

# Metrics of a journal that are drawn, with their names; the loss has its own axis.
_LOSS = "loss"
_FRACTIONS = {
  "accuracy": "accuracy",
  "light_accuracy": "accuracy of the light net",
  "heavy_accuracy": "accuracy of the heavy net",
  "share": "segments chosen",
}
_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def make_section(folders: Mapping[str, Path]) -> page.Section:
  """Returns the part of a page with a learning curve for each phase.

  Args:
    folders: those of the phases' journals, by the phase's name; phases without lines are left out.
  """
  parts = []
  for phase, folder in folders.items():
    lines = read_lines(folder / METRICS_FILE)
    # The journal of a training that has just begun is empty.
    if not any(line["split"] == "train" for line in lines):
      continue
    terms = [
      ("step", "updates of the parameters so far, in this phase"),
      ("loss", "of training, with all its terms, mean over the steps since the last point"),
      (
        "fraction",
        "accuracies and the fraction of segments chosen, from 0 to 1: in training of all segments "
        "of the batches, elsewhere the mean over videos",
      ),
    ]
    figure = draw_curves(lines)
    caption = f"Learning curves of the phase {phase}."
    parts.append(page.embed_figure(figure, caption, terms=() if parts else terms))
  if not parts:
    return page.Section("Learning curves", "No step has been noted yet.")
  return page.Section("Learning curves", parts=parts)


def draw_curves(lines: Sequence[Mapping[str, Any]]) -> Any:
  """Draws the loss above, and the fractions of all splits below, over the steps of one phase.

  Args:
    lines: of the journal, each with `step`, `split` and metrics.
  Returns:
    The matplotlib figure.
  """
  from matplotlib.figure import Figure  # imports slowly

  figure = Figure(figsize=(page.WIDTH, 4.0), layout="constrained")
  losses, fractions = figure.subplots(2, 1, sharex=True)
  steps, values = _points(lines, "train", _LOSS)
  losses.plot(steps, values, color="tab:blue", marker=".")
  losses.set(ylabel="loss")
  for split, shown in _SPLITS.items():
    for metric, name in _FRACTIONS.items():
      steps, values = _points(lines, split, metric)
      if steps:
        # A test alone is a point: lines without markers would hide it.
        fractions.plot(steps, values, marker=".", label=f"{name}, {shown}")
  fractions.set(xlabel="step", ylabel="fraction", ylim=(0, 1.02))
  if fractions.get_lines():
    # Below the axes: curves may be anywhere in them.
    figure.legend(
      handles=fractions.get_lines(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
    )
  for axes in (losses, fractions):
    axes.spines[["top", "right"]].set_visible(False)
  return figure


def _points(
  lines: Sequence[Mapping[str, Any]], split: str, metric: str
) -> tuple[list[int], list[float]]:
  """Returns steps and values of a metric, of the lines of a split that have it."""
  steps, values = [], []
  for line in lines:
    # A line that was damaged may have another value.
    if line["split"] == split and isinstance(line.get(metric), (int, float)):
      steps.append(line["step"])
      values.append(line[metric])
  return steps, values
