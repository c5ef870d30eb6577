"""Tables of gate outcomes: one row per layer for readers, one row per gate for programs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.analysis.outcomes import OUTCOMES, Diagnosis
from gating_jax.reports.text import columns

_MEASURES = ("open_rates", "disagreement", "input_information", "class_information")


# By the header of `rows`: the page's title of the column, and its definition.
TITLES = {
  "layer": ("layer", "number and name of the gated layer, the first on top"),
  "gates": ("gates", "the number of units of the layer that have a gate"),
  "open": ("open (%)", "open gates of an example, mean over gates and the test set"),
  "always open": ("always open", "gates that are open for more than 99 % of the test set"),
  "always closed": ("always closed", "gates that are open for less than 1 % of the test set"),
  "random dropout": (
    "random",
    "gates that noise, not the input, decides in training, as in dropout",
  ),
  "conditional": ("conditional", "gates that the input decides"),
  "draws differ": (
    "draws differ (%)",
    "examples on which two draws of the training's noise would open a gate once "
    "and close it once, mean over gates",
  ),
  "on input": (
    "information on the input (bits)",
    "mutual information of a gate drawn with that noise and the input, mean over gates; 1 at most",
  ),
  "on class": (
    "information on the class (bits)",
    "mutual information of a gate and the class, mean over gates, minus what chance adds",
  ),
}


def render(layers: Sequence[Mapping[str, Any]]) -> str:
  """Renders the table of `rows` as text."""
  return "\n".join(columns(rows(layers)))


def rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Returns a header and a row per layer.

  Args:
    layers: of `analysis.outcomes.by_layer`; information is in bits, means are over gates.
  """
  # Information about the class is missing if there is only one class.
  information = [name for name in _MEASURES if name.endswith("_information") and name in layers[0]]
  found = [
    [
      "layer",
      "gates",
      "open",
      *(name.replace("_", " ") for name in OUTCOMES),
      "draws differ",
      *(f"on {name.removesuffix('_information')}" for name in information),
    ]
  ]
  for layer in layers:
    is_open, differ = (f"{100 * layer[name]:.1f} %" for name in ("mean_open", "disagreement"))
    found.append(
      [
        layer["layer"],
        str(layer["gates"]),
        is_open,
        *(str(layer[name]) for name in OUTCOMES),
        differ,
        *(f"{layer[name]:.3f}" for name in information),
      ]
    )
  return found


def write(path: Path, found: Diagnosis, layers: Sequence[tuple[str, int]]) -> None:
  """Writes a CSV file with a row per gate.

  Columns: layer, number of the gate in its layer, outcome, and the measures of `Diagnosis`.

  Args:
    path: of the file.
    found: the diagnosis of all gates.
    layers: name and number of gates of each layer, in the gates' order.
  """
  measures = [name for name in _MEASURES if getattr(found, name) is not None]
  # Gates of a layer are adjacent, so a gate's position gives its layer and its number there.
  places = [(name, number) for name, size in layers for number in range(size)]
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["layer", "gate", "outcome", *(name.removesuffix("s") for name in measures)])
    for i, place in enumerate(places):
      writer.writerow(
        [*place, OUTCOMES[found.outcomes[i]], *(f"{getattr(found, m)[i]:.6g}" for m in measures)]
      )
