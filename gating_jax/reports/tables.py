"""Table of a classification run's result, and rows that other tables share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gating_jax.checks import printable
from gating_jax.reports import gate_table


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of name and value, from the result of `training.evaluation.evaluate`."""
  return [
    ("test accuracy", f"{100 * result['accuracy']:.2f} %  ({result['images']:,} images)"),
    *size_and_gates(result),
  ]


def size_and_gates(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of name and value about the net's cost and its gates."""
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
  # Ungated nets have the rows above only.
  if "gates" in result:
    rows += [
      (
        "MACs over images, 10 to 90 %",
        f"{result['macs_p10']:,.0f} to {result['macs_p90']:,.0f}"
        f"  (deviation {result['macs_std']:,.0f})",
      ),
    ]
    # Absent in tests of fewer than four images.
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
      ("mean fraction of open gates", f"{100 * result['mean_open']:.1f} %"),
    ]
  # Undefined if the test set has a single class.
  if "class_information" in result:
    rows.append(
      (
        "information on the class",
        f"{result['class_information']:.3f} bits per gate"
        f"  (chance, subtracted: {result['class_information_floor']:.3f})",
      )
    )
  return rows


def lines(
  rows: Sequence[tuple[str, str]], layers: Sequence[Mapping[str, Any]] | None = None
) -> str:
  """Renders a result as text.

  Args:
    rows: of name and value; the values are aligned.
    layers: of the result, for a table of each layer's gates below the rows; None leaves it out.
  """
  # Names of classes come from the data set and may hold control characters.
  rows = [(printable(name), printable(value)) for name, value in rows]
  width = max(len(name) for name, _ in rows)
  text = [f"{name:<{width}}  {value}" for name, value in rows]
  return "\n".join([*text, "", gate_table.render(layers)] if layers else text)
