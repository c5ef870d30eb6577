"""Sets of a union, in tables and on pages: score, cost and gates of each, and what they share.

A result has the entries of `gating_jax.analysis.sources`; other results have none, and give no
rows and no section.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gating_jax.reports import page
from gating_jax.reports.text import format_percent, plain


def set_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of name and value: one for each set of a union, then what its gates share."""
  rows = []
  for name, entry in result.get("sets", {}).items():
    cost = f"{entry['macs']:,.0f} MACs ({format_percent(entry['mac_ratio'], 1)})"
    gates = ""
    if "mean_open" in entry:
      gates = f", {format_percent(entry['mean_open'], 1)} of gates open"
    score = f"{format_percent(entry['accuracy'], 2)}  ({entry['images']:,} images)"
    rows.append((f"set {plain(name, 30)}", f"{score}, {cost}{gates}"))
  if "mean_set_accuracy" in result:
    score = format_percent(result["mean_set_accuracy"], 2)
    rows.append(("mean over sets", f"{score}, {result['mean_set_macs']:,.0f} MACs"))
  if "mean_set_overlap" in result:
    rows.append(("gates that two sets share", format_percent(result["mean_set_overlap"], 1)))
    bits = f"{result['source_information']:.3f} bits per gate"
    rows.append(("information on the set", bits))
  return rows


def sets_section(result: Mapping[str, Any]) -> list[page.Section]:
  """Returns the section with a table of the sets, and one of their gates; none without sets."""
  sets = result.get("sets")
  if not sets:
    return []
  gated = "set_overlap" in result
  # With a head a set, none of its images is taken for a class of another.
  known = all("recognised" not in entry for entry in sets.values())
  rows = []
  for name, entry in sets.items():
    low, high = format_percent(entry["accuracy_low"], 1), format_percent(entry["accuracy_high"], 1)
    row = [plain(name, 30), _points(entry["accuracy"], 2), f"{low} to {high}"]
    if not known:
      row.append(_points(entry["recognised"], 1))
    row += [f"{entry['macs']:,.0f}", _points(entry["mac_ratio"], 1)]
    if gated:
      row.append(_points(entry["mean_open"], 1))
    rows.append(row)
  terms = _terms(known=known, gated=gated)
  header = [title for title, _ in terms]
  parts = [page.Table(header, rows, terms=terms)]
  text = ""
  if gated and len(sets) == len(result["set_overlap"]) > 1:
    text = (
      "The second table has the overlap of the gates that two sets open, in %: the sum over gates "
      "of the smaller of the two open rates, over that of the larger. It is 100 where both open "
      "all gates equally often, and 0 where no gate opens for both."
    )
    overlaps = []
    for name, line in zip(sets, result["set_overlap"], strict=True):
      overlaps.append([plain(name, 30), *[_points(value, 1) for value in line]])
    terms = [("row and column", "two sets; their overlap, in %, is in the cell")]
    header = ["set", *[plain(name, 30) for name in sets]]
    parts.append(page.Table(header, overlaps, terms=terms))
  return [page.Section("Sets of the union", text, parts)]


def _terms(*, known: bool, gated: bool) -> list[tuple[str, str]]:
  """Returns the columns of the table of sets, each with its definition.

  Args:
    known: whether the set of an image is known, so that its own classes alone compete.
    gated: whether the network has gates.
  """
  competing = "those of the set, which is known" if known else "all"
  terms = [
    ("set", "one of those that the union is made of"),
    (
      "accuracy (%)",
      f"test images of the set whose most likely class, among {competing}, is the true one",
    ),
    ("95 % interval", "range that other test images of the same set would give"),
  ]
  if not known:
    terms.append(("set recognised (%)", "test images that are taken for a class of their own set"))
  terms += [
    ("MACs", "multiply-accumulates of an image of the set, mean, gate networks included"),
    ("of ungated (%)", "the same as a fraction of those with every unit and no gate networks"),
  ]
  if gated:
    terms.append(("open gates (%)", "mean over the gates and the set's test images"))
  return terms


def _points(fraction: float, digits: int) -> str:
  """Formats a fraction in %, without the sign."""
  return f"{100 * fraction:.{digits}f}"
