"""Tables of results: of images, scenes, videos and tasks, and of the gates of each layer."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gating_jax.analysis.outcomes import OUTCOMES, Diagnosis
from gating_jax.checks import printable
from gating_jax.reports.text import align_columns, plain


def classification_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns rows of name and value, from the result of `training.evaluation.evaluate`."""
  return [
    ("test accuracy", f"{100 * result['accuracy']:.2f} %  ({result['images']:,} images)"),
    *size_and_gate_rows(result),
  ]


def size_and_gate_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def render_rows(
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
  return "\n".join([*text, "", render_gate_table(layers)] if layers else text)


def scene_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
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
    *size_and_gate_rows(result),
    ("MACs of the head, always run", f"{result['head_macs']:,}"),
    *((f"IoU of {plain(name, 20)}", f"{100 * value:.1f} %") for name, value in classes.items()),
  ]


def render_video(result: Mapping[str, Any]) -> str:
  """Returns lines of name and value, from the result of `video.evaluate.test`."""
  return render_rows(video_rows(result))


def video_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns the same as pairs of name and value."""
  percent = lambda name: f"{100 * result[name]:.1f} %"
  rows = [
    _video_score(result),
    ("MACs per video, heavy net on all segments", f"{result['all_segments_macs']:,.0f}"),
    (
      "MACs per video, this net",
      f"{result['macs']:,.0f}  ({percent('mac_ratio')}, light net and gate included)",
    ),
    (
      "segments chosen",
      f"{percent('share')}  (10 to 90 % of videos: {percent('share_p10')} "
      f"to {percent('share_p90')})",
    ),
  ]
  # Only made videos know which of their segments the label depends on.
  if "precision" in result:
    rows.append(
      (
        "chosen segments that matter",
        f"{percent('precision')}  (by chance {percent('relevant_share')})",
      )
    )
    rows.append(("segments that matter, chosen", percent("recall")))
  if result["unreadable"]:
    rows.append(("videos that could not be read", f"{result['unreadable']}"))
  if result["missing"]:
    rows.append(("videos without a file", f"{result['missing']}"))
  if result.get("classes_left_out"):
    rows.append(("classes without a test video", ", ".join(result["classes_left_out"])))
  if "videos_per_second" in result:
    rows.append(
      (
        "videos per second",
        f"{result['videos_per_second']:.1f}  (heavy net on all segments: "
        f"{result['all_segments_videos_per_second']:.1f})",
      )
    )
  return rows


def video_headline(result: Mapping[str, Any]) -> str:
  """Summarises the result in one line."""
  name, value = _video_score(result)
  return (
    f"{name} {value}  {100 * result['share']:.1f} % of "
    f"segments  {100 * result['mac_ratio']:.1f} % of MACs"
  )


def _video_score(result: Mapping[str, Any]) -> tuple[str, str]:
  # Videos with a single label have an accuracy; with several labels, a mean average precision.
  name = "accuracy" if "accuracy" in result else "mean_average_precision"
  return (
    f"test {name.replace('_', ' ')}",
    f"{100 * result[name]:.2f} %  ({result['videos']:,} videos)",
  )


_TASK_SETTINGS = {"task_aware": "task-aware", "task_agnostic": "task-agnostic"}
_TASK_MEASURES = ("average_accuracy", "forgetting", "backward_transfer", "forward_transfer")


def render_tasks(result: Mapping[str, Any]) -> str:
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
  lines = align_columns(
    [
      ["accuracy (%)", *(cell for name in settings for cell in ("", _TASK_SETTINGS[name]))],
      ["task", *("when learned", "at the end") * len(settings)],
      *_scores(result, settings),
    ]
  )
  return "\n".join([*lines, *task_reasons(result), "", render_rows(task_rows(result))])


def task_tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
  """Returns header and rows for the task known at the test, and for the task unknown.

  Rows are the accuracies on each task, then the measures over tasks.

  Args:
    result: as in `render_tasks`.
  """
  return [
    (
      [f"{_TASK_SETTINGS[name]} accuracy (%)", "when learned", "at the end"],
      _scores(result, [name]),
    )
    for name in _settings(result)
  ]


def task_reasons(result: Mapping[str, Any]) -> list[str]:
  """Returns the reasons why measures are undefined, a line each."""
  # Both settings often have the same reason, which is then given once.
  found = [
    (name, why) for setting in _settings(result) for name, why in result[setting]["reasons"].items()
  ]
  return [f"{name.replace('_', ' ')} n/a: {why}" for name, why in dict.fromkeys(found)]


def task_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
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
  for name, label in _TASK_SETTINGS.items():
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


def _settings(result: Mapping[str, Any]) -> list[str]:
  return [name for name in _TASK_SETTINGS if name in result]


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
    for measure in _TASK_MEASURES
  ]


def _percent(share: float | None) -> str:
  return "n/a" if share is None else f"{100 * share:.2f}"


def _points(share: float | None) -> str:
  # The format `z` writes -0.00 as 0.00.
  return "n/a" if share is None else f"{100 * share:z.2f}"


_GATE_MEASURES = ("open_rates", "disagreement", "input_information", "class_information")


# By the header of `gate_rows`: the page's title of the column, and its definition.
GATE_COLUMNS = {
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


def render_gate_table(layers: Sequence[Mapping[str, Any]]) -> str:
  """Renders the table of `gate_rows` as text."""
  return "\n".join(align_columns(gate_rows(layers)))


def gate_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Returns a header and a row per layer.

  Args:
    layers: of `analysis.outcomes.by_layer`; information is in bits, means are over gates.
  """
  # Information about the class is missing if there is only one class.
  information = [
    name for name in _GATE_MEASURES if name.endswith("_information") and name in layers[0]
  ]
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


def write_gate_csv(path: Path, found: Diagnosis, layers: Sequence[tuple[str, int]]) -> None:
  """Writes a CSV file with a row per gate.

  Columns: layer, number of the gate in its layer, outcome, and the measures of `Diagnosis`.

  Args:
    path: of the file.
    found: the diagnosis of all gates.
    layers: name and number of gates of each layer, in the gates' order.
  """
  measures = [name for name in _GATE_MEASURES if getattr(found, name) is not None]
  # Gates of a layer are adjacent, so a gate's position gives its layer and its number there.
  places = [(name, number) for name, size in layers for number in range(size)]
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["layer", "gate", "outcome", *(name.removesuffix("s") for name in measures)])
    for i, place in enumerate(places):
      writer.writerow(
        [*place, OUTCOMES[found.outcomes[i]], *(f"{getattr(found, m)[i]:.6g}" for m in measures)]
      )
