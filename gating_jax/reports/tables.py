"""A run's result as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gating_jax.checks import printable
from gating_jax.reports import gate_table


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Of name and value, from what `training.evaluation.evaluate` returns."""
  return [
    ("test accuracy", f"{100 * result['accuracy']:.2f} %  ({result['images']:,} images)"),
    *size_and_gates(result),
  ]


def size_and_gates(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What the net costs and what its gates do: rows of name and value."""
  rows = [
    ("parameters", f"{result['params']:,} + {result['gate_params']:,} of gates"),
    ("MACs per image, ungated net", f"{result['ungated_macs']:,}"),
    (
      "MACs per image, this net",
      f"{result['macs']:,.0f}  ({100 * result['mac_ratio']:.1f} %, gates included)",
    ),
  ]
  if "budget" in result:
    rows.append(("budget", f"{100 * result['budget']:.1f} % of the ungated net's MACs"))
  if "gates" in result:
    rows += [
      (
        "MACs over images, 10 to 90 %",
        f"{result['macs_p10']:,.0f} to {result['macs_p90']:,.0f}"
        f"  (deviation {result['macs_std']:,.0f})",
      ),
    ]
    if "macs_of_quarter4" in result:
      rows.append(
        (
          "MACs of easy and hard images",
          f"{result['macs_of_quarter1']:,.0f} and {result['macs_of_quarter4']:,.0f}"
          "  (quarters of least and largest loss)",
        )
      )
    rows += [
      ("gates always open (> 99 %)", f"{result['always_open']} of {result['gates']}"),
      ("gates always closed (< 1 %)", f"{result['always_closed']} of {result['gates']}"),
      ("gates at random, like dropout", f"{result['random_dropout']} of {result['gates']}"),
      ("gates conditional", f"{result['conditional']} of {result['gates']}"),
      ("mean share of open gates", f"{100 * result['mean_open']:.1f} %"),
    ]
  if "class_information" in result:
    rows.append(
      (
        "information on the class",
        f"{result['class_information']:.3f} bits a gate"
        f"  (chance, taken off: {result['class_information_floor']:.3f})",
      )
    )
  return rows


def lines(
  rows: Sequence[tuple[str, str]], layers: Sequence[Mapping[str, Any]] | None = None
) -> str:
  """Rows of name and value, the values below each other, and a table of the gates of each layer, where there are."""
  rows = [
    (printable(name), printable(value)) for name, value in rows
  ]  # which may hold names of classes
  width = max(len(name) for name, _ in rows)
  text = [f"{name:<{width}}  {value}" for name, value in rows]
  return "\n".join([*text, "", gate_table.render(layers)] if layers else text)
