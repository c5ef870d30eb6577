"""Table of the result of a sequence of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gating_jax.reports import tables as report_tables
from gating_jax.reports.text import columns, plain

_SETTINGS = {"task_aware": "task-aware", "task_agnostic": "task-agnostic"}
_MEASURES = ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")


def render(result: Mapping[str, Any]) -> str:
  """Renders a table of accuracies, task by task, and lines of name and value.

  Args:
    result: plain numbers, as they come back from JSON:
      task_names: in the order of learning.
      task_aware: with the task known at the test, a mapping of
        accuracies: T rows of T, row i after learning task i, column j on task j; values above the
          diagonal are not read, and None marks what was not tested;
        average_accuracy, forgetting, backward_transfer, forward_transfer: fractions, None where
          undefined;
        reasons: why a measure is undefined, by its name.
      task_agnostic: the same with the task unknown; may be missing.
      task_classifier_accuracy: fraction of images whose task is inferred correctly; may be missing.
      dense_macs: per image, of the net without gates.
      dense_macs_reduced: of its convolutions, all inputs counted as one channel; may be missing.
      task_aware_macs, task_agnostic_macs: per image, mean over the test images; the latter may be
        missing.
      params: of the net with all tasks' gates and heads.
      memory_mb: 10^6 bytes kept between tasks in addition to the parameters: images, generators,
        importances, teachers.
      mean_gate_overlap: fraction of units that two tasks have in common, None for a single task;
        may be missing.
      free_units: `(free, units)` by layer after the last task; may be missing.
  """
  settings = _settings(result)
  # The header has two lines: a setting stands above its two columns, right-aligned with the second.
  lines = columns(
    [
      ["accuracy (%)", *(cell for name in settings for cell in ("", _SETTINGS[name]))],
      ["task", *("when learned", "at the end") * len(settings)],
      *_scores(result, settings),
    ]
  )
  return "\n".join([*lines, *reasons(result), "", report_tables.lines(costs(result))])


def tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
  """Returns header and rows for the task known at the test, and for the task unknown.

  Rows are the accuracies on each task, then the measures over tasks.

  Args:
    result: as in `render`.
  """
  return [
    ([f"{_SETTINGS[name]} accuracy (%)", "when learned", "at the end"], _scores(result, [name]))
    for name in _settings(result)
  ]


def reasons(result: Mapping[str, Any]) -> list[str]:
  """Returns the reasons why measures are undefined, a line each."""
  # Both settings often have the same reason, which is then given once.
  found = [
    (name, why) for setting in _settings(result) for name, why in result[setting]["reasons"].items()
  ]
  return [f"{name.replace('_', ' ')} n/a: {why}" for name, why in dict.fromkeys(found)]


def costs(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of name and value: the cost of images, and the memory between tasks."""
  rows = []
  if "task_classifier_accuracy" in result:
    rows.append(
      ("accuracy of the task classifier", f"{100 * result['task_classifier_accuracy']:.2f} %")
    )
  # Abati et al. count a convolution as if it had one input channel, so both counts are given.
  reduced = result.get("dense_macs_reduced")
  rows.append(
    (
      "MACs per image, dense net",
      f"{result['dense_macs']:,.0f}"
      + (
        f"  ({reduced:,.0f} if all inputs of a convolution count as one)"
        if reduced is not None
        else ""
      ),
    )
  )
  for name, label in _SETTINGS.items():
    if (macs := result.get(f"{name}_macs")) is not None:
      rows.append(
        (
          f"MACs per image, {label}",
          f"{macs:,.0f}  ({100 * macs / result['dense_macs']:.1f} % of dense)",
        )
      )
  rows += [
    ("parameters", f"{result['params']:,}"),
    ("memory beyond the parameters", f"{result['memory_mb']:,.2f} MB"),
  ]
  if (overlap := result.get("mean_gate_overlap")) is not None:
    rows.append(("units that two tasks share", f"{100 * overlap:.1f} %"))
  rows += [
    (f"free units, {plain(layer, 30)}", f"{free:,} of {units:,}  ({100 * free / units:.1f} %)")
    for layer, (free, units) in result.get("free_units", {}).items()
  ]
  return rows


def headline(result: Mapping[str, Any]) -> str:
  """Summarises the result in one line."""
  parts = [
    f"{_SETTINGS[name]} accuracy {100 * result[name]['average_accuracy']:.2f} %"
    f"  forgetting {_points(result[name]['forgetting'])}"
    for name in _SETTINGS
    if name in result
  ]
  return "  ".join(
    [*parts, f"{100 * result['task_aware_macs'] / result['dense_macs']:.1f} % of MACs"]
  )


def _settings(result: Mapping[str, Any]) -> list[str]:
  return [name for name in _SETTINGS if name in result]


def _scores(result: Mapping[str, Any], settings: list[str]) -> list[list[str]]:
  return [*_accuracies(result, settings), *_measures(result, settings)]


def _accuracies(result: Mapping[str, Any], settings: list[str]) -> list[list[str]]:
  rows = []
  for j, name in enumerate(result["task_names"]):
    # On task j: right after learning it (row j), and at the end (the last row).
    accuracies = [result[setting]["accuracies"] for setting in settings]
    rows.append([plain(name, 30), *(_percent(r[i][j]) for r in accuracies for i in (j, -1))])
  return rows


def _measures(result: Mapping[str, Any], settings: list[str]) -> list[list[str]]:
  name = lambda measure: (
    measure.replace("_", " ") + ("" if measure == "average_accuracy" else " (points)")
  )
  return [
    [name(measure), *(cell for s in settings for cell in ("", _points(result[s][measure])))]
    for measure in _MEASURES
  ]


def _percent(share: float | None) -> str:
  return "n/a" if share is None else f"{100 * share:.2f}"


def _points(share: float | None) -> str:
  # The format `z` writes -0.00 as 0.00.
  return "n/a" if share is None else f"{100 * share:z.2f}"
