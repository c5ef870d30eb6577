"""Table of a segmentation run's result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gating_jax.reports import tables
from gating_jax.reports.text import plain


def rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of name and value.

  Args:
    result: of `training.evaluation.evaluate` with the summary of `images.pixels.summarise`.
  """
  # One entry `iou/NAME` for each class; a name may itself contain a slash.
  classes = {
    name.partition("/")[2]: value for name, value in result.items() if name.startswith("iou/")
  }
  # The mean first: it is the score by which runs are compared.
  return [
    (
      "mean IoU",
      f"{100 * result['mean_iou']:.2f} %  ({len(classes)} classes, {result['images']:,} scenes)",
    ),
    ("pixels that are right", f"{100 * result['accuracy']:.2f} %"),
    *tables.size_and_gates(result),
    ("MACs of the head, always run", f"{result['head_macs']:,}"),
    *((f"IoU of {plain(name, 20)}", f"{100 * value:.1f} %") for name, value in classes.items()),
  ]
