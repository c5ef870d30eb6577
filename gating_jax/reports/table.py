"""A run's result as a table for people."""

from __future__ import annotations

from collections.abc import Mapping


def render(result: Mapping[str, float]) -> str:
  """Lines of name and value, from what `training.evaluation.evaluate` returns."""
  rows = [
      ("test accuracy", f"{100 * result['accuracy']:.2f} %  ({result['images']:,} images)"),
      ("parameters", f"{result['params']:,} + {result['gate_params']:,} of gates"),
      ("MACs per image, ungated net", f"{result['ungated_macs']:,}"),
      ("MACs per image, this net", f"{result['macs']:,.0f}  ({100 * result['mac_ratio']:.1f} %, gates included)"),
  ]
  if "gates" in result:
    rows += [
        ("gates always open (> 99 %)", f"{result['always_open']} of {result['gates']}"),
        ("gates always closed (< 1 %)", f"{result['always_closed']} of {result['gates']}"),
        ("gates conditional", f"{result['conditional']} of {result['gates']}"),
        ("mean share of open gates", f"{100 * result['mean_open']:.1f} %"),
    ]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
