"""Predictions of a test, one row for each example: a CSV file, and a table on the page.

Axes: N examples, K classes.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from gating_jax.reports import page
from gating_jax.reports.text import plain

FILE = "predictions.csv"
# Rows on a page, and letters of a cell there.
_ROWS, _LETTERS = 50, 60
_YES_OR_NO = ("no", "yes")
# Meanings of columns that several programmes have.
_TERMS = {
  "class": "the true class",
  "prediction": "the likeliest class",
  "loss": "the cross-entropy of the example, in nats",
  "MACs": "multiply-accumulates of the example, gate networks included",
}


@dataclasses.dataclass(frozen=True)
class Predictions:
  """Predictions for N examples.

  Attributes:
    columns: N texts by the name of each column, the example's own name first.
    right: `[N]` bool, whether the prediction is the true class; None where an example has several
      labels.
    terms: a sentence for each column, by its name.
  """

  columns: Mapping[str, Sequence[str]]
  right: np.ndarray | None
  terms: Mapping[str, str]

  def __post_init__(self):
    lengths = {name: len(texts) for name, texts in self.columns.items()}
    if self.right is not None:
      lengths["right"] = len(self.right)
    if len(set(lengths.values())) != 1:
      raise ValueError(f"columns and right must have one length; got {lengths}")

  def rows(self) -> list[list[str]]:
    """Returns the rows of the table, without its header."""
    columns = list(self.columns.values())
    if self.right is not None:
      columns.append([_YES_OR_NO[int(right)] for right in self.right])
    return [list(row) for row in zip(*columns, strict=True)]

  def header(self) -> list[str]:
    """Returns the names of the columns."""
    return [*self.columns, *(["right"] if self.right is not None else [])]


def of_classes(
  noun: str,
  labels: np.ndarray,
  predicted: np.ndarray,
  class_names: Sequence[str],
  *,
  names: Sequence[str] = (),
  more: Mapping[str, Sequence[str]] | None = None,
) -> Predictions:
  """Returns predictions of one class for each example.

  Args:
    noun: the word for an example, such as `image`.
    labels, predicted: `[N]` classes, as integers.
    class_names: one per class.
    names: of the examples; without names they are numbered from 0 in the test's order.
    more: further columns, after these.
  """
  columns = {
    noun: [*names] if names else [str(number) for number in range(len(labels))],
    "class": [class_names[c] for c in labels],
    "prediction": [class_names[c] for c in predicted],
  }
  terms = {noun: "its file" if names else "its number in the test set, from 0"}
  for name in (*columns, *(more or {})):
    if name in _TERMS:
      terms[name] = _TERMS[name]
  right = np.asarray(labels) == np.asarray(predicted)
  return Predictions({**columns, **(more or {})}, right, terms)


def write_csv(folder: Path, predictions: Predictions) -> None:
  """Writes `predictions.csv`, with a header, into a run directory.

  Bytes of a name that are not UTF-8 are written as Python's surrogates, such as `\\udcff`.
  """
  with (folder / FILE).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
    writer = csv.writer(file)
    writer.writerow(predictions.header())
    writer.writerows(predictions.rows())


def make_section(predictions: Predictions, noun: str) -> page.Section:
  """Returns the part of a page with predictions, the wrong ones first.

  Args:
    predictions: of all examples.
    noun: the word for an example, such as `image`.
  """
  rows, right = predictions.rows(), predictions.right
  # Stable: within right and wrong ones the order stays.
  order = range(len(rows)) if right is None else np.argsort(right, kind="stable")
  shown = []
  for row in list(order)[:_ROWS]:
    shown.append([plain(cell, _LETTERS) for cell in rows[row]])
  text = f"All {len(rows):,} test {noun}s are in {FILE}."
  if len(rows) > len(shown):
    text = f"The first {len(shown)} of {len(rows):,} test {noun}s; all are in {FILE}."
  if right is not None:
    text += f" {int(np.sum(~right)):,} predictions are wrong; they come first."
  terms = list(predictions.terms.items())
  if right is not None:
    terms.append(("right", "whether the prediction is the true class"))
  table = page.Table(predictions.header(), shown, numeric=False, terms=terms)
  return page.Section("Predictions", text, [table])
