"""Parts of a score, in tables and on pages: its interval, its classes, and the sets of a union.

A result has the entries of `gating_jax.analysis.scores`, and that of a union those of
`gating_jax.analysis.sources`. A result without them, as older ones are, gives no rows and no
section.

Axes: K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gating_jax.analysis import scores
from gating_jax.checks import few
from gating_jax.reports import page
from gating_jax.reports.text import format_percent, plain

# Classes that have a row each in tables; of more, so many with the lowest scores have one.
_ROWS, _WORST = 20, 10
# Classes whose names and numbers are written next to a picture of confusions.
_NAMED = 20


def score_rows(result: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
  """Returns rows of name and value about a score: its interval, baseline and classes.

  Args:
    result: of a run.
    key: of the score in the result.
  """
  rows = []
  interval = scores.interval_of(result, key)
  if interval is not None:
    low, high = format_percent(interval.low, 1), format_percent(interval.high, 1)
    rows.append(("95 % interval", f"{low} to {high}"))
  if "majority_rate" in result:
    rows.append(("majority rate", format_percent(result["majority_rate"], 1)))
  if "chance_average_precision" in result:
    chance = format_percent(result["chance_average_precision"], 1)
    rows.append(("average precision by chance", chance))
  for split in ("training", "test"):
    names = result.get(f"classes_without_{split}")
    if names:
      shown = few([plain(name, 30) for name in names])
      rows.append((f"classes without {split} examples", shown))
  return rows


def class_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns a row of name and value for each class; for the worst of them where there are many."""
  of_class = result.get("class_accuracy") or result.get("class_average_precision") or {}
  names = list(of_class)
  if len(names) > _ROWS:
    names = sorted(names, key=lambda name: of_class[name])[:_WORST]
  rows = []
  for name in names:
    rows.append((f"class {plain(name, 30)}", format_percent(of_class[name], 1)))
  if len(names) < len(of_class):
    rows.append(("classes above these", f"{len(of_class) - len(names)} more"))
  return rows


def confusion_section(
  result: Mapping[str, Any], class_names: Sequence[str], noun: str
) -> list[page.Section]:
  """Returns the section with the confusions of classes; none for results without them.

  Args:
    result: of a run.
    class_names: K names.
    noun: word for what is counted, such as `image`.
  """
  if "confusion" in result:
    figure = draw_confusion(np.asarray(result["confusion"]), class_names)
    picture = page.embed_figure(
      figure,
      f"Test {noun}s of each true class (row) by predicted class (column), in % of the row.",
      terms=[("diagonal", f"{noun}s that are right"), ("row", "the true class")],
    )
    return [page.Section("Confusions of classes", parts=[picture])]
  if result.get("confusions"):
    rows = []
    for true, given, count in result["confusions"]:
      rows.append([plain(true, 40), plain(given, 40), f"{count:,}"])
    table = page.Table(("true class", "predicted class", f"{noun}s"), rows, numeric=False)
    return [page.Section("Confusions of classes", "The most frequent ones.", [table])]
  return []


def draw_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> Any:
  """Draws confusions `[K, K]`, in % of each true class; returns the matplotlib figure."""
  from matplotlib.figure import Figure  # imports slowly

  count = len(confusion)
  side = min(page.WIDTH, 2.5 + 0.35 * count)
  figure = Figure(figsize=(side, side), layout="constrained")
  axes = figure.subplots()
  # A class without examples has an empty row.
  percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
  axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
  axes.set(xlabel="predicted class", ylabel="true class")
  if count > _NAMED:
    return figure
  names = [plain(name, 16) for name in class_names]
  axes.set_xticks(range(count), names, rotation=60, ha="right", rotation_mode="anchor")
  axes.set_yticks(range(count), names)
  for true in range(count):
    for given in range(count):
      if confusion[true, given]:
        # White on dark cells.
        colour = "white" if percent[true, given] > 60 else "black"
        text = f"{percent[true, given]:.0f}"
        axes.text(given, true, text, color=colour, ha="center", va="center", fontsize=8)
  return figure


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
  terms = _set_terms(known=known, gated=gated)
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


def _set_terms(*, known: bool, gated: bool) -> list[tuple[str, str]]:
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
