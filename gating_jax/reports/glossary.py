"""Definitions of the measures in tables of results, for first-time readers."""

from __future__ import annotations

from collections.abc import Sequence

from gating_jax.reports.page import Table

MACS = "multiply-accumulate operations (MACs)"

# Keyed by the beginning of a row's name: `IoU of` serves the rows of all classes (see `meaning`).
_MEANINGS = {
  "test accuracy": "Fraction of the test set whose most likely class is the true one.",
  "test mean average precision": "Mean over classes of the average precision of a ranking of the "
  "test videos.",
  "mean IoU": "Mean over classes of intersection over union: pixels of a class that are found, "
  "over all pixels that are of this class or predicted as it.",
  "IoU of": "Intersection over union of this class.",
  "pixels that are right": "Fraction of pixels with a known class whose predicted class is the "
  "true one.",
  "parameters": "Trainable parameters of the network, and of its gates if counted separately.",
  "MACs per image, ungated net": f"The {MACS} of one image with every unit computed and no gates: "
  "the baseline.",
  "MACs per image, this net": f"The {MACS} of one image, mean over the test set, of open units "
  "and gate networks; in parentheses the fraction of the ungated net's.",
  "MACs of the head": "The part of the MACs that gates cannot save.",
  "budget": "The mean fraction of MACs that training aims at.",
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
  "information on the class": "Mutual information of a gate and the class, mean over gates: 0 "
  "bits if a gate opens equally often for every class, at most 1.",
  "MACs per video, heavy net on all": f"The {MACS} of one video if the heavy network runs on "
  "every segment and nothing is selected: the ungated baseline.",
  "MACs per video, this net": f"The {MACS} of one video, mean over the test set; in parentheses "
  "the fraction of the baseline's.",
  "segments chosen": "Fraction of a video's segments that the heavy network runs on: the mean, "
  "and the 10th and 90th percentile over videos.",
  "chosen segments that matter": "Precision: of the chosen segments, the fraction that the label "
  "depends on.",
  "segments that matter, chosen": "Recall: of the segments that the label depends on, the "
  "fraction that is chosen.",
  "videos that could not be read": "Excluded from all numbers.",
  "videos without a file": "Named in the table of videos but missing; excluded from all numbers.",
  "classes without a test video": "Excluded from the mean over classes.",
  "videos per second": "On this machine, light network and gate included; in parentheses for the "
  "ungated baseline.",
  "accuracy of the task classifier": "Fraction of test images whose task is recognised.",
  "MACs per image, dense net": f"The {MACS} of one image in the network without gates: the "
  "baseline.",
  "MACs per image, task-aware": f"The {MACS} of one image where its task is known, mean over "
  "tasks.",
  "MACs per image, task-agnostic": f"The {MACS} of one image where its task must be inferred "
  "first.",
  "memory beyond the parameters": "Memory kept between tasks: images, generators, importances, "
  "teachers (10^6 bytes).",
  "units that two tasks share": "Of the units that either of two tasks uses, the fraction that "
  "both use; mean over pairs.",
  "free units": "Units of this layer that no task uses so far, left for tasks to come.",
}

# Measures of a sequence of tasks.
MEASURES = {
  "average accuracy": "Mean over the tasks of the accuracy on each.",
  "forgetting (points)": "Mean over all tasks but the last of the best accuracy minus the final "
  "one.",
  "backward transfer (points)": "Mean over all tasks but the last of the final accuracy minus that "
  "when the task was learned; below 0 where tasks are forgotten.",
  "forward transfer (points)": "Mean over all tasks but the first of the accuracy just before "
  "the task is learned, minus that of a random network.",
}


def meaning(name: str) -> str:
  """Returns the definition of a row of a table of results; empty if there is none.

  >>> meaning("budget")
  'The mean fraction of MACs that training aims at.'
  """
  # No beginning is that of another, so at most one fits.
  for start, definition in _MEANINGS.items():
    if name.startswith(start):
      return definition
  return ""


def defined_table(rows: Sequence[tuple[str, str]]) -> Table:
  """Returns a table of names and values, each with its definition."""
  defined = [(name, value, meaning(name)) for name, value in rows]
  return Table(("measure", "value", "definition"), defined, numeric=False)


def settings_table(rows: Sequence[tuple[str, str]]) -> Table:
  """Returns a table of names and values of settings."""
  terms = [
    (
      "setting",
      "a field of the config, its sections joined by dots; the comments in the config files "
      "explain each",
    ),
    ("value", "the one that this run was started with"),
  ]
  return Table(("setting", "value"), rows, numeric=False, terms=terms)
