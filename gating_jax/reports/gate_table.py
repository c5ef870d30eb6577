"""What became of a net's gates: a table with a row per layer for people, a file with a row per gate for programs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.reports.lettering import columns
from gating_jax.training.diagnosis import OUTCOMES, Diagnosis

_MEASURES = ("open_rates", "disagreement", "input_information", "class_information")


def render(layers: Sequence[Mapping[str, Any]]) -> str:
  """The lines of `rows`."""
  return "\n".join(columns(rows(layers)))


def rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """A header and a row per layer, from what `training.diagnosis.by_layer` returns; information in bits, means over
  gates."""
  information = [name for name in _MEASURES if name.endswith("_information") and name in layers[0]]
  found = [["layer", "gates", "open", *(name.replace("_", " ") for name in OUTCOMES), "draws differ",
            *(f"on {name.removesuffix('_information')}" for name in information)]]
  for layer in layers:
    is_open, differ = (f"{100 * layer[name]:.1f} %" for name in ("mean_open", "disagreement"))
    found.append([layer["layer"], str(layer["gates"]), is_open, *(str(layer[name]) for name in OUTCOMES), differ,
                  *(f"{layer[name]:.3f}" for name in information)])
  return found


def write(path: Path, found: Diagnosis, layers: Sequence[tuple[str, int]]) -> None:
  """A CSV file: the layer of each gate, its number there, its outcome and what `Diagnosis` measures."""
  measures = [name for name in _MEASURES if getattr(found, name) is not None]
  places = [(name, number) for name, size in layers for number in range(size)]
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["layer", "gate", "outcome", *(name.removesuffix("s") for name in measures)])
    for i, place in enumerate(places):
      writer.writerow([*place, OUTCOMES[found.outcomes[i]], *(f"{getattr(found, m)[i]:.6g}" for m in measures)])
