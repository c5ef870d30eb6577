"""Tables of results: of images, scenes, videos and tasks, and of the gates of each layer.

On pages each measure of a result has its definition next to it, for first-time readers.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gating_jax.analysis.outcomes import OUTCOMES, Diagnosis
from gating_jax.checks import printable
from gating_jax.data.checked_files import UNREADABLE_FILE
from gating_jax.reports import page, score_parts
from gating_jax.reports.text import align_columns, format_percent, plain


class Row(NamedTuple):
  """A row of a table of results.

  Attributes:
    name: of the measure; `meaning` defines it.
    value: with its unit, and what it is compared with.
  """

  name: str
  value: str


def render_rows(
  rows: Sequence[tuple[str, str]], layers: Sequence[Mapping[str, Any]] | None = None
) -> str:
  """Renders a result as text.

  Args:
    rows: of name and value; the values are aligned.
    layers: of the result, for a table of each layer's gates below the rows; None leaves it out.
  """
  # Names of classes come from the data set and may hold control characters.
  shown, width = [], 0
  for name, value in rows:
    row = Row(printable(name), printable(value))
    shown.append(row)
    width = max(width, len(row.name))
  lines = [f"{row.name:<{width}}  {row.value}" for row in shown]
  if layers:
    lines += ["", render_gate_table(layers)]
  return "\n".join(lines)


# Images and scenes.


def classification_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows of name and value, from the result of `training.evaluation.evaluate`."""
  accuracy = f"{format_percent(result['accuracy'], 2)}  ({result['images']:,} images)"
  return [
    Row("test accuracy", accuracy),
    *_as_rows(score_parts.score_rows(result, "accuracy")),
    *_as_rows(score_parts.set_rows(result)),
    *_size_and_gate_rows(result),
    *_teacher_rows(result),
    *_unreadable_rows(result),
    *_as_rows(score_parts.class_rows(result)),
  ]


def _unreadable_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns a row on files of folders that cannot be read; none where all can."""
  count = result.get("unreadable_files")
  if not count:
    return []
  return [Row("files that cannot be read", f"{count:,}, listed in {UNREADABLE_FILE}")]


def _teacher_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows about the teacher of a network; none without one."""
  if "teacher_macs" not in result:
    return []
  ratio = format_percent(result["teacher_mac_ratio"], 1)
  rows = [Row("MACs of the teacher", f"{result['teacher_macs']:,.0f}  (this net has {ratio})")]
  if "teacher_accuracy" in result:
    rows.append(Row("accuracy of the teacher", format_percent(result["teacher_accuracy"], 2)))
  return rows


def scene_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows of name and value of a segmentation run.

  Args:
    result: of `training.evaluation.evaluate` with the summary of
      `images.segmentation.summarise_pixels`.
  """
  class_rows = []
  for key, value in result.items():
    if key.startswith("iou/"):
      # The name of a class may itself contain a slash.
      name = key.removeprefix("iou/")
      class_rows.append(Row(f"IoU of {plain(name, 20)}", format_percent(value, 1)))
  mean_iou = format_percent(result["mean_iou"], 2)
  return [
    # The mean first: it is the score by which runs are compared.
    Row("mean IoU", f"{mean_iou}  ({len(class_rows)} classes, {result['images']:,} scenes)"),
    *_as_rows(score_parts.score_rows(result, "mean_iou")),
    Row("pixels that are right", format_percent(result["accuracy"], 2)),
    *_size_and_gate_rows(result),
    Row("MACs of the head, always run", f"{result['head_macs']:,}"),
    *class_rows,
  ]


def _as_rows(pairs: Sequence[tuple[str, str]]) -> list[Row]:
  """Returns pairs of name and value as rows."""
  return [Row(*pair) for pair in pairs]


def _size_and_gate_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows about the net's cost and its gates."""
  mac_ratio = format_percent(result["mac_ratio"], 1)
  rows = [
    Row("parameters", f"{result['params']:,} + {result['gate_params']:,} of gates"),
    Row("MACs per image, ungated net", f"{result['ungated_macs']:,}"),
    Row("MACs per image, this net", f"{result['macs']:,.0f}  ({mac_ratio}, gates included)"),
  ]
  if "budget" in result:
    budget = format_percent(result["budget"], 1)
    rows.append(Row("budget", f"{budget} of the ungated net's MACs"))
  # An ungated net has no gate outcomes.
  if "gates" in result:
    rows += _outcome_rows(result)
  # Undefined if the test set has a single class.
  if "class_information" in result:
    chance = f"(chance, subtracted: {result['class_information_floor']:.3f})"
    information = f"{result['class_information']:.3f} bits per gate  {chance}"
    rows.append(Row("information on the class", information))
  return rows


def _outcome_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows about the MACs of single images and the outcomes of gates."""
  gates = result["gates"]
  spread = f"{result['macs_p10']:,.0f} to {result['macs_p90']:,.0f}"
  rows = [
    Row("MACs over images, 10 to 90 %", f"{spread}  (deviation {result['macs_std']:,.0f})"),
  ]
  # Absent in tests of fewer than four images.
  if "macs_of_quarter4" in result:
    easy_and_hard = f"{result['macs_of_quarter1']:,.0f} and {result['macs_of_quarter4']:,.0f}"
    rows.append(
      Row("MACs of easy and hard images", f"{easy_and_hard}  (quarters of least and largest loss)")
    )
  return [
    *rows,
    Row("gates always open (> 99 %)", f"{result['always_open']} of {gates}"),
    Row("gates always closed (< 1 %)", f"{result['always_closed']} of {gates}"),
    Row("gates at random, like dropout", f"{result['random_dropout']} of {gates}"),
    Row("gates conditional", f"{result['conditional']} of {gates}"),
    Row("mean fraction of open gates", format_percent(result["mean_open"], 1)),
  ]


# Long videos.

# Rows of videos that are counted where there are any, by the entry of a result.
_COUNTED_VIDEOS = {
  "unreadable": "videos that could not be read",
  "training_unreadable": "training videos that could not be read",
  "validation_unreadable": "validation videos that could not be read",
  "copies": "test videos that are copies of training videos",
  "validation_copies": "validation videos that are copies of training videos",
}


def video_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows of name and value, from the result of `video.evaluate.test_network`."""
  mac_ratio = format_percent(result["mac_ratio"], 1)
  fraction = format_percent(result["share"], 1)
  low, high = format_percent(result["share_p10"], 1), format_percent(result["share_p90"], 1)
  key = "accuracy" if "accuracy" in result else "mean_average_precision"
  rows = [
    _video_score(result),
    *_as_rows(score_parts.score_rows(result, key)),
    Row("MACs per video, heavy net on all segments", f"{result['all_segments_macs']:,.0f}"),
    Row(
      "MACs per video, this net",
      f"{result['macs']:,.0f}  ({mac_ratio}, light net and gate included)",
    ),
    Row("segments chosen", f"{fraction}  (10 to 90 % of videos: {low} to {high})"),
    *_split_rows(result),
  ]
  # Only made videos know which of their segments the label depends on.
  if "precision" in result:
    precision = format_percent(result["precision"], 1)
    chance = format_percent(result["relevant_share"], 1)
    rows.append(Row("chosen segments that matter", f"{precision}  (by chance {chance})"))
    rows.append(Row("segments that matter, chosen", format_percent(result["recall"], 1)))
  for key, row in _COUNTED_VIDEOS.items():
    if result.get(key):
      value = _count_names(result[key], result.get(f"{key}_names", ()))
      rows.append(Row(row, value))
  if result["missing"]:
    rows.append(Row("videos without a file", f"{result['missing']}"))
  if result.get("classes_left_out"):
    rows.append(Row("classes without a test video", ", ".join(result["classes_left_out"])))
  if "videos_per_second" in result:
    baseline = f"heavy net on all segments: {result['all_segments_videos_per_second']:.1f}"
    # The speed depends on the timed videos, which are few.
    if "timed_share" in result:
      timed = format_percent(result["timed_share"], 1)
      baseline += f"; {result['timed_videos']} videos, {timed} of their segments chosen"
    rows.append(Row("videos per second", f"{result['videos_per_second']:.1f}  ({baseline})"))
  return rows + _as_rows(score_parts.class_rows(result))


def _split_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows that compare training, validation and test videos; none without a validation."""
  splits = result.get("splits")
  if not splits:
    return []
  scores, fractions = [], []
  for of_split in splits.values():
    score = "accuracy" if "accuracy" in of_split else "mean_average_precision"
    scores.append(format_percent(of_split[score], 1))
    fraction, spread = format_percent(of_split["share"], 1), 100 * of_split["share_std"]
    fractions.append(f"{fraction} (± {spread:.1f})")
  names = " / ".join(splits)
  return [
    Row(f"score: {names}", " / ".join(scores)),
    Row(f"fraction of segments: {names}", " / ".join(fractions)),
  ]


def _count_names(count: int, names: Sequence[str]) -> str:
  """Returns a number with the first names of what is counted."""
  if not names:
    return f"{count}"
  more = f" and {count - len(names)} more" if count > len(names) else ""
  return f"{count}  ({plain(', '.join(names), 200)}{more})"


def render_video(result: Mapping[str, Any]) -> str:
  """Renders the rows of `video_rows` as text."""
  return render_rows(video_rows(result))


def video_headline(result: Mapping[str, Any]) -> str:
  """Summarises the result of a run on videos in one line."""
  score = _video_score(result)
  fraction, mac_ratio = format_percent(result["share"], 1), format_percent(result["mac_ratio"], 1)
  return f"{score.name} {score.value}  {fraction} of segments  {mac_ratio} of MACs"


def _video_score(result: Mapping[str, Any]) -> Row:
  """Returns the row of the score of a run on videos."""
  # Videos with a single label have an accuracy; with several labels, a mean average precision.
  key = "accuracy" if "accuracy" in result else "mean_average_precision"
  value = f"{format_percent(result[key], 2)}  ({result['videos']:,} videos)"
  return Row(f"test {key.replace('_', ' ')}", value)


# Sequences of tasks.

_TASK_SETTINGS = {"task_aware": "task-aware", "task_agnostic": "task-agnostic"}
_TASK_MEASURES = ("average_accuracy", "forgetting", "backward_transfer")


class AccuracyTable(NamedTuple):
  """A table of accuracies, task by task, and of measures over tasks."""

  header: list[str]
  rows: list[list[str]]


def render_tasks(result: Mapping[str, Any]) -> str:
  """Renders a table of accuracies, task by task, and lines of name and value.

  Args:
    result: plain numbers, as they come back from JSON:
      task_names: in the order of learning.
      task_aware: with the task known at the test, a mapping of
        accuracies: T rows of T, row i after learning task i, column j on task j; values above the
          diagonal are not read, and None marks what was not tested;
        average_accuracy, forgetting, backward_transfer: fractions, None where undefined;
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
  settings = _tested_settings(result)
  # The header has two lines: a setting stands above its two columns, right-aligned with the second.
  first_line, second_line = ["accuracy (%)"], ["task"]
  for setting in settings:
    first_line += ["", _TASK_SETTINGS[setting]]
    second_line += ["when learnt", "at the end"]
  lines = align_columns([first_line, second_line, *_task_scores(result, settings)])
  return "\n".join([*lines, *task_reasons(result), "", render_rows(task_rows(result))])


def task_tables(result: Mapping[str, Any]) -> list[AccuracyTable]:
  """Returns a table for the task known at the test, and one for the task unknown.

  Rows are the accuracies on each task, then the measures over tasks.

  Args:
    result: as in `render_tasks`.
  """
  tables = []
  for setting in _tested_settings(result):
    header = [f"{_TASK_SETTINGS[setting]} accuracy (%)", "when learnt", "at the end"]
    tables.append(AccuracyTable(header, _task_scores(result, [setting])))
  return tables


def task_reasons(result: Mapping[str, Any]) -> list[str]:
  """Returns the reasons why measures are undefined, a line each."""
  lines = []
  for setting in _tested_settings(result):
    reasons = result[setting]["reasons"]
    # Older results have reasons for a measure that tables no longer have.
    for measure in filter(reasons.get, _TASK_MEASURES):
      line = f"{measure.replace('_', ' ')} n/a: {reasons[measure]}"
      # Both settings often have the same reason, which is then given once.
      if line not in lines:
        lines.append(line)
  return lines


def task_rows(result: Mapping[str, Any]) -> list[Row]:
  """Returns rows of name and value: the cost of images, and the memory between tasks."""
  rows = []
  if "task_classifier_accuracy" in result:
    accuracy = format_percent(result["task_classifier_accuracy"], 2)
    rows.append(Row("accuracy of the task classifier", accuracy))
  dense = f"{result['dense_macs']:,.0f}"
  # Abati et al. count a convolution as if it had one input channel, so both counts are given.
  reduced = result.get("dense_macs_reduced")
  if reduced is not None:
    dense += f"  ({reduced:,.0f} if all inputs of a convolution count as one)"
  rows.append(Row("MACs per image, dense net", dense))
  for setting, words in _TASK_SETTINGS.items():
    macs = result.get(f"{setting}_macs")
    if macs is not None:
      ratio = format_percent(macs / result["dense_macs"], 1)
      rows.append(Row(f"MACs per image, {words}", f"{macs:,.0f}  ({ratio} of dense)"))
  for setting in _tested_settings(result):
    for name, value in score_parts.score_rows(result[setting], "average_accuracy"):
      rows.append(Row(f"{name}, {_TASK_SETTINGS[setting]}", value))
    for name, value in score_parts.class_rows(result[setting]):
      rows.append(Row(f"{name}, {_TASK_SETTINGS[setting]}", value))
  rows += _unreadable_rows(result)
  rows.append(Row("parameters", f"{result['params']:,}"))
  rows.append(Row("memory beyond the parameters", f"{result['memory_mb']:,.2f} MB"))
  overlap = result.get("mean_gate_overlap")
  if overlap is not None:
    rows.append(Row("units that two tasks share", format_percent(overlap, 1)))
  for layer, (free, units) in result.get("free_units", {}).items():
    value = f"{free:,} of {units:,}  ({format_percent(free / units, 1)})"
    rows.append(Row(f"free units, {plain(layer, 30)}", value))
  return rows


def _tested_settings(result: Mapping[str, Any]) -> list[str]:
  """Returns the settings, task known and task unknown, that a result has."""
  return [setting for setting in _TASK_SETTINGS if setting in result]


def _task_scores(result: Mapping[str, Any], settings: Sequence[str]) -> list[list[str]]:
  """Returns a row for each task, then one for each measure; each setting has two cells of a row."""
  rows = []
  for task, name in enumerate(result["task_names"]):
    row = [plain(name, 30)]
    for setting in settings:
      accuracies = result[setting]["accuracies"]
      # Row i of the accuracies is after learning task i, so the last row is at the end.
      row += [_points(accuracies[task][task]), _points(accuracies[-1][task])]
    rows.append(row)
  for measure in _TASK_MEASURES:
    unit = "" if measure == "average_accuracy" else " (points)"
    row = [measure.replace("_", " ") + unit]
    for setting in settings:
      row += ["", _points(result[setting][measure])]
    rows.append(row)
  return rows


def _points(fraction: float | None) -> str:
  """Formats a fraction in %, or a difference of fractions in points."""
  # The format `z` writes -0.00 as 0.00: forgetting may be a rounding error below 0.
  return "n/a" if fraction is None else f"{100 * fraction:z.2f}"


# Gates.


class Column(NamedTuple):
  """A column of the page's table of gates: its title, and a sentence that defines it."""

  title: str
  meaning: str


# By the header of `gate_rows`.
GATE_COLUMNS = {
  "layer": Column("layer", "number and name of the gated layer, the first on top"),
  "gates": Column("gates", "the number of units of the layer that have a gate"),
  "open": Column("open (%)", "open gates of an example, mean over gates and the test set"),
  "always open": Column("always open", "gates that are open for more than 99 % of the test set"),
  "always closed": Column("always closed", "gates that are open for less than 1 % of the test set"),
  "random dropout": Column(
    "random", "gates that noise, not the input, decides in training, as in dropout"
  ),
  "conditional": Column("conditional", "gates that the input decides"),
  "draws differ": Column(
    "draws differ (%)",
    "examples on which two draws of the training's noise would open a gate once "
    "and close it once, mean over gates",
  ),
  "on input": Column(
    "information on the input (bits)",
    "mutual information of a gate drawn with that noise and the input, mean over gates; 1 at most",
  ),
  "on class": Column(
    "information on the class (bits)",
    "mutual information of a gate and the class, mean over gates, minus what chance adds",
  ),
}
_GATE_MEASURES = ("open_rates", "disagreement", "input_information", "class_information")


def render_gate_table(layers: Sequence[Mapping[str, Any]]) -> str:
  """Renders the table of `gate_rows` as text."""
  return "\n".join(align_columns(gate_rows(layers)))


def gate_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
  """Returns a header and a row per layer.

  Args:
    layers: of `analysis.outcomes.by_layer`; information is in bits, means are over gates.
  """
  rows = []
  for layer in layers:
    cells = _layer_cells(layer)
    # The header: all layers have the same columns.
    if not rows:
      rows.append(list(cells))
    rows.append(list(cells.values()))
  return rows


def _layer_cells(layer: Mapping[str, Any]) -> dict[str, str]:
  """Returns the cells of a layer by the names of their columns."""
  cells = {
    "layer": layer["layer"],
    "gates": str(layer["gates"]),
    "open": format_percent(layer["mean_open"], 1),
  }
  for outcome in OUTCOMES:
    cells[outcome.replace("_", " ")] = str(layer[outcome])
  cells["draws differ"] = format_percent(layer["disagreement"], 1)
  # Information about the class is missing if there is only one class.
  for about in ("input", "class"):
    information = layer.get(f"{about}_information")
    if information is not None:
      cells[f"on {about}"] = f"{information:.3f}"
  return cells


def write_gate_csv(path: Path, found: Diagnosis, layers: Sequence[tuple[str, int]]) -> None:
  """Writes a CSV file with a row per gate.

  Columns: layer, number of the gate in its layer, outcome, and the measures of `Diagnosis`.

  Args:
    path: of the file.
    found: the diagnosis of all gates.
    layers: name and number of gates of each layer, in the gates' order.
  """
  measures = {}
  for name in _GATE_MEASURES:
    values = getattr(found, name)
    # Information about the class is missing if there is only one class.
    if values is not None:
      measures[name.removesuffix("s")] = values
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["layer", "gate", "outcome", *measures])
    # The gates of a layer are adjacent: `gate` counts those of all layers.
    gate = 0
    for layer, size in layers:
      for number in range(size):
        cells = [f"{values[gate]:.6g}" for values in measures.values()]
        writer.writerow([layer, number, OUTCOMES[found.outcomes[gate]], *cells])
        gate += 1


# Definitions of the measures.


_MACS = "multiply-accumulate operations (MACs)"

# Keyed by the beginning of a row's name: `IoU of` serves the rows of all classes (see `meaning`).
_MEANINGS = {
  "test accuracy": "Fraction of the test set whose most likely class is the true one.",
  "95 % interval": "Range of the score that other test examples of the same kind would give; runs "
  "whose scores differ by less may be alike.",
  "majority rate": "The accuracy of always predicting the most common class of the test set.",
  "average precision by chance": "That of a random ranking: the mean over classes of the fraction "
  "of videos that have the class.",
  "classes without training": "No training example has them, so that they cannot be learnt.",
  "classes without test examples": "No test example has them, so that nothing is known of them.",
  "class ": "Score on the test examples of this class alone: the fraction that is right, or the "
  "average precision.",
  "classes above these": "Classes with higher scores than those that are listed.",
  "test mean average precision": "Mean over classes of the average precision of a ranking of the "
  "test videos.",
  "mean IoU": "Mean over classes of intersection over union: pixels of a class that are found, "
  "over all pixels that are of this class or predicted as it.",
  "IoU of": "Intersection over union of this class.",
  "pixels that are right": "Fraction of pixels with a known class whose predicted class is the "
  "true one.",
  "files that cannot be read": "Files of the splits in use that are damaged, empty or closed to "
  "this user. They are left out. For those that became so during the training, the next was read.",
  "parameters": "Trainable parameters of the network, and of its gates if counted separately.",
  "MACs per image, ungated net": f"The {_MACS} of one image with every unit computed and no gates: "
  "the baseline.",
  "MACs per image, this net": f"The {_MACS} of one image, mean over the test set, of open units "
  "and gate networks; in parentheses the fraction of the ungated net's.",
  "MACs of the head": "The part of the MACs that gates cannot save.",
  "budget": "The mean fraction of MACs, gate networks left out, that training aims at.",
  "MACs over images": "The 10th and the 90th percentile over test images, and the standard "
  "deviation.",
  "MACs of easy and hard": "Mean MACs of the quarter of test images with the least loss, and of "
  "that with the largest. Easy and hard mean this everywhere on the page.",
  "gates always open": "Gates that are open for more than 99 % of test images: their units are "
  "always computed.",
  "gates always closed": "Gates that are open for fewer than 1 % of test images: their units "
  "are unused.",
  "gates at random": "Gates that noise, not the image, decides in training, as in dropout.",
  "gates conditional": "Gates that the image decides: open for some images and closed for others.",
  "mean fraction of open gates": "Fraction of gates that are open, mean over gates and test "
  "images.",
  "set ": "The accuracy among the classes of all sets, or with a head a set among its own; the "
  "MACs of an image and the fraction of open gates; on the test images of this set alone.",
  "mean over sets": "Means of the accuracies and of the MACs of the sets, whatever their sizes: "
  "as in training, where all have equal shares.",
  "gates that two sets share": "Sum over gates of the smaller of two sets' open rates, over that "
  "of the larger; mean over pairs of sets.",
  "information on the set": "Mutual information of a gate and the set of an image, mean over "
  "gates, minus what chance adds.",
  "information on the class": "Mutual information of a gate and the class, mean over gates: 0 "
  "bits if a gate opens equally often for every class, at most 1.",
  "MACs per video, heavy net on all": f"The {_MACS} of one video if the heavy network runs on "
  "every segment and nothing is selected: the ungated baseline.",
  "MACs per video, this net": f"The {_MACS} of one video, mean over the test set; in parentheses "
  "the fraction of the baseline's.",
  "segments chosen": "Fraction of a video's segments that the heavy network runs on: the mean, "
  "and the 10th and 90th percentile over videos.",
  "score:": "The score on each split: what training has seen, what thresholds and epoch were "
  "chosen on, and what neither has seen.",
  "fraction of segments:": "Fraction of a video's segments that the heavy network runs on, on each "
  "split: the mean over videos, and in parentheses the standard deviation over videos, in points.",
  "chosen segments that matter": "Precision: of the chosen segments, the fraction that the label "
  "depends on.",
  "segments that matter, chosen": "Recall: of the segments that the label depends on, the "
  "fraction that is chosen.",
  "videos that could not be read": "Excluded from all numbers.",
  "test videos that are copies": "Their files are those of training videos, byte for byte, so that "
  "the score says less about new videos.",
  "validation videos that are copies": "Their files are those of training videos, byte for byte: "
  "thresholds and the choice of the epoch say less about new videos.",
  "validation videos that could not be read": "Excluded from thresholds and from the choice of "
  "the epoch.",
  "training videos that could not be read": "Since the last start of the training; other training "
  "videos took their places.",
  "videos without a file": "Named in the table of videos but missing; excluded from all numbers.",
  "classes without a test video": "Excluded from the mean over classes.",
  "videos per second": "On this machine, light network and gate included; in parentheses for the "
  "ungated baseline, on all timed videos at once or one by one, whichever is quicker. The timed "
  "videos are spread over the test set.",
  "accuracy of the task classifier": "Fraction of test images whose task is recognised.",
  "MACs per image, dense net": f"The {_MACS} of one image in the network without gates: the "
  "baseline.",
  "MACs per image, task-aware": f"The {_MACS} of one image where its task is known, mean over "
  "tasks.",
  "MACs per image, task-agnostic": f"The {_MACS} of one image where its task must be inferred "
  "first.",
  "memory beyond the parameters": "Memory kept between tasks: images, generators, importances, "
  "teachers (10^6 bytes).",
  "units that two tasks share": "Of the units that either of two tasks uses, the fraction that "
  "both use; mean over pairs.",
  "free units": "Units of this layer that no task uses so far, left for tasks to come.",
}

# Measures of a sequence of tasks.
TASK_MEANINGS = {
  "average accuracy": "Mean over the tasks of the accuracy on each.",
  "forgetting (points)": "Mean over all tasks but the last of the best accuracy minus the final "
  "one.",
  "backward transfer (points)": "Mean over all tasks but the last of the final accuracy minus that "
  "when the task was learnt; below 0 where tasks are forgotten.",
}

# Rows of comparisons, keyed as `_MEANINGS`.
COMPARED_MEANINGS = {
  "tested on": "The data set; scores on different ones are not comparable.",
  "state": "Whether the run is finished.",
  "last step": "The newest step with a record, in updates of the parameters.",
  "mean IoU": _MEANINGS["mean IoU"],
  "accuracy": "On the test set; of a sequence of tasks the mean over tasks at the end.",
  "mean average precision": _MEANINGS["test mean average precision"],
  "forgetting": TASK_MEANINGS["forgetting (points)"],
  "MACs": f"The {_MACS} of one image or video, mean over the test set, gate networks included.",
  "fraction": "The MACs as a fraction of those of the run's own network without gates.",
  "parameters": _MEANINGS["parameters"],
  "gates": "Open for 1 to 99 % of the test set (conditional), for more, for less, or decided by "
  "noise (at random).",
  "units that two tasks share": _MEANINGS["units that two tasks share"],
  "segments chosen": "Fraction of a video's segments that the heavy network runs on, mean over "
  "videos.",
  "seconds": "Of the training since it was last started or resumed.",
}


def meaning(name: str) -> str:
  """Returns the definition of a row of a table of results; empty if there is none.

  >>> meaning("budget")
  'The mean fraction of MACs, gate networks left out, that training aims at.'
  """
  # No beginning is that of another, so at most one fits.
  for start, definition in _MEANINGS.items():
    if name.startswith(start):
      return definition
  return ""


def defined_table(rows: Sequence[tuple[str, str]]) -> page.Table:
  """Returns a table of names and values, each with its definition."""
  defined = [(name, value, meaning(name)) for name, value in rows]
  return page.Table(("measure", "value", "definition"), defined, numeric=False)
