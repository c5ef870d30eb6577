"""Pictures, histograms and the page of a run on long videos.

Axes: M videos, T segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gating_jax import programmes
from gating_jax.analysis import statistics
from gating_jax.reports import (
  conclusion,
  curves,
  frame,
  page,
  predictions,
  score_parts,
  tables,
  text,
  timeline,
)
from gating_jax.training import rundir
from gating_jax.training.journal import Journal
from gating_jax.video import speed
from gating_jax.video.build import VideoExperiment
from gating_jax.video.evaluate import Arrays
from gating_jax.video.nets import PRETRAIN_DIR

# Number of videos with time lines, and of those with choices at the top of the page.
_DRAWN = 6
_LISTED = 12
# Least width of a segment on the page, in inches, as long as the page is wide enough.
_SEGMENT = 0.4


def write_pictures(
  experiment: VideoExperiment, tested: Arrays, run_dir: rundir.RunDir, journal: Journal, step: int
) -> None:
  """Writes the predictions and pictures of a test to files, and the pictures to TensorBoard.

  Args:
    experiment: the experiment that was tested.
    tested: the arrays of `evaluate.test_network`.
    run_dir: receives the files.
    journal: writes to TensorBoard.
    step: the step of the checkpoint.
  """
  predictions.write_csv(run_dir.path, predict_videos(experiment, tested))
  lines = _lines(experiment, tested)
  figures = {
    "segments": _figure_of_shares(experiment, tested),
    "timeline": timeline.draw_time_lines(lines, unit_names=experiment.test.unit_names),
  }
  for name, figure in figures.items():
    path = run_dir.path / f"{name}.png"
    page.save_figure(figure, path)
    journal.write_picture(step, f"pictures/{name}", path)


def predict_videos(experiment: VideoExperiment, tested: Arrays) -> predictions.Predictions:
  """Returns the predictions for the test videos that could be read, with their chosen segments."""
  # Imported here: it loads slowly.
  from scipy import special

  videos, logits = experiment.test, tested["logits"].astype(np.float64)
  valid = tested["valid"].astype(bool)
  classes, predicted, probabilities, right = [], [], [], None
  if videos.multi_label:
    for own, probs in zip(tested["label"], special.expit(logits), strict=True):
      classes.append("; ".join(videos.class_names[c] for c in np.flatnonzero(own)))
      predicted.append("; ".join(videos.class_names[c] for c in np.flatnonzero(probs > 0.5)))
      probabilities.append(f"{probs.max():.3f}")
  else:
    likely, best = special.softmax(logits, axis=1), np.argmax(logits, axis=1)
    right = best == tested["label"]
    for own, c, probs in zip(tested["label"], best, likely, strict=True):
      classes.append(videos.class_names[own])
      predicted.append(videos.class_names[c])
      probabilities.append(f"{probs[c]:.3f}")
  segments, chosen = [], []
  for gates, known in zip(tested["gates"], valid, strict=True):
    segments.append(str(int(known.sum())))
    # Counted from 0 within the video: padding is left out.
    chosen.append(" ".join(map(str, np.flatnonzero(gates[known] > 0))))
  return predictions.Predictions(
    {
      "video": [videos.names[i] for i in tested["index"]],
      "class": classes,
      "prediction": predicted,
      "probability": probabilities,
      "segments": segments,
      "chosen": chosen,
    },
    right,
    {
      "video": "its name in the table, or its file's",
      "class": "the true class; all of them where a video has several",
      "prediction": "the likeliest class; all above 1/2 where a video may have several",
      "probability": "of the prediction, or of the likeliest class where a video may have several",
      "segments": "number of the video's segments",
      "chosen": "segments that the heavy network saw, counted from 0",
    },
  )


def count_histograms(experiment: VideoExperiment, tested: Arrays) -> dict[str, np.ndarray]:
  """Counts values for `Journal.write_histograms`.

  They are the probabilities of segments, the fractions chosen of each video, and, if the heavy net
  has channel gates, the open probabilities of each of its gated layers in the chosen segments.
  """
  counts = {
    "gates/segments/probs": statistics.histogram(tested["probs"][tested["valid"].astype(bool)]),
    "gates/segments/shares": statistics.histogram(_shares(tested)),
  }
  if "channels" in tested:
    # Summed over videos: one histogram for each gated layer.
    layers = tested["channels"].sum(axis=0)
    for (name, _), layer in zip(experiment.counts.heavy.gate_layers, layers, strict=True):
      counts[f"gates/heavy/{name}/probs"] = layer
  return counts


def write_report(
  experiment: VideoExperiment,
  result: Mapping[str, Any],
  tested: Arrays,
  run_dir: rundir.RunDir,
  step: int,
  notice: str = "",
) -> None:
  """Writes the run's page; `notice` is its first text."""
  config = experiment.config
  around = frame.read_surroundings(
    run_dir,
    config,
    step=step,
    # The reason why `--mode=compile` cannot add times to this run, if there is one.
    not_compiled=conclusion.refusal(speed.check_compilable, experiment),
  )
  configured = [(name, str(value)) for name, value in rundir.flatten(config).items()]
  sections = [
    page.Section("Result", parts=[tables.defined_table(tables.video_rows(result))]),
    *score_parts.confusion_section(result, experiment.test.class_names, "video"),
    page.Section(
      "Segments",
      parts=[
        page.embed_figure(
          _figure_of_shares(experiment, tested),
          "Probabilities of all segments of the test videos, and the chosen fraction of each.",
          terms=[
            (
              "probability",
              "that the gate, or another selection, chooses a segment, from 0 to 1",
            ),
            ("segments", "number of segments of all test videos with that probability"),
            ("chosen segments of a video", "as a fraction of the video's segments"),
            ("videos", "number of test videos with that fraction"),
          ],
        )
      ],
    ),
    page.Section(
      "Time lines",
      "Chosen segments of the first test videos, and the relevant ones where they are known.",
      _time_lines(experiment, tested),
    ),
    curves.make_section({"pretraining": run_dir.path / PRETRAIN_DIR, "training": run_dir.path}),
    predictions.make_section(predict_videos(experiment, tested), "video"),
    frame.run_times_section("video", around),
    frame.settings_section(configured),
    frame.about_section(around),
  ]
  page.write_page(
    run_dir.report,
    f"{config.model.selection} on {config.data.name} videos",
    sections,
    subtitle=f"{run_dir.path.name}, step {step:,}",
    opening=_make_opening(experiment, result, tested, around=around, notice=notice),
  )


def _make_opening(
  experiment: VideoExperiment,
  result: Mapping[str, Any],
  tested: Arrays,
  *,
  around: frame.Surroundings,
  notice: str,
) -> page.Opening:
  """Builds the large numbers, and the picture of chosen segments."""
  key = "accuracy" if "accuracy" in result else "mean_average_precision"
  name = key.replace("_", " ")
  meaning = {
    "accuracy": "Fraction of the {} test videos whose most likely class is the true one.",
    "mean_average_precision": "Mean over classes of the average precision on {} test videos.",
  }[key]
  numbers = [
    frame.score_number(
      f"test {name}",
      result[key],
      key=key,
      around=around,
      meaning=meaning.format(f"{result['videos']:,}"),
    ),
    frame.macs_number(
      result["mac_ratio"],
      executed=result["macs"],
      dense=result["all_segments_macs"],
      noun="video",
      around=around,
    ),
    frame.run_time_number("video", around)
    # Times of `--mode=compile` for this step; without them, those that the run measured itself.
    if around.times and around.times.belong_to(around.step)
    else _speed(result, around),
  ]
  return page.Opening(
    numbers,
    _choices(experiment, tested),
    frame.why_no_baseline(around, programmes.PROGRAMMES[experiment.config.experiment].how),
    notice=notice,
  )


def _speed(result: Mapping[str, Any], around: frame.Surroundings) -> page.Number:
  """Returns the milliseconds of a video as the run itself has measured them."""
  number = frame.run_time_number("video", around)
  if "videos_per_second" not in result:
    return number
  # The result has videos per second; the page shows time per video, like all pages.
  mine = text.format_milliseconds(1 / result["videos_per_second"])
  dense = text.format_milliseconds(1 / result["all_segments_videos_per_second"])
  return dataclasses.replace(
    number,
    value=f"{mine} ms",
    baseline=f"ungated: {dense} ms",
    meaning="Time per video in a batch of test videos, measured at the end of the run; "
    "including the light network and the gate, next to the heavy network on all segments. "
    "For single videos:",
  )


def _choices(experiment: VideoExperiment, tested: Arrays) -> page.EmbeddedPicture:
  """Draws the chosen segments of the first test videos."""
  count = min(_LISTED, len(tested["valid"]))
  titles, chosen, relevant = [], [], [] if "relevant" in tested else None
  for i in range(count):
    # Without the padding of shorter videos.
    valid = tested["valid"][i].astype(bool)
    titles.append(_class_of(experiment, tested, i))
    chosen.append(tested["gates"][i][valid] > 0)
    if relevant is not None:
      relevant.append(tested["relevant"][i][valid].astype(bool))
  figure = timeline.draw_choices(chosen, titles, relevant)
  terms = [
    ("time", "from the video's first segment to its last, one box each"),
    ("test video", "the first ones of the test set, named by their class"),
    ("chosen", "the heavy network runs on these segments only"),
  ]
  if relevant is not None:
    terms.append(
      (
        "matters for the label",
        "the class depends on these segments; the network is not told which",
      )
    )
  return page.embed_figure(figure, f"Chosen segments of {count} test videos.", terms=terms)


def _shares(tested: Arrays) -> np.ndarray:
  """Computes the fraction chosen of each video's segments, `[M]`."""
  valid = tested["valid"].astype(bool)
  # At least 1, so that a video without valid segments gives 0.
  return np.sum((tested["gates"] > 0) & valid, axis=1) / np.maximum(valid.sum(axis=1), 1)


def _figure_of_shares(experiment: VideoExperiment, tested: Arrays) -> Any:
  """Draws the probabilities of all segments, and the fraction chosen of each video."""
  correct = None
  # With several labels a video is neither right nor wrong.
  if not experiment.test.multi_label:
    correct = np.argmax(tested["logits"], axis=1) == tested["label"]
  return timeline.draw_shares(
    tested["probs"][tested["valid"].astype(bool)], _shares(tested), correct
  )


def _time_lines(experiment: VideoExperiment, tested: Arrays) -> list[page.EmbeddedPicture]:
  """Draws each of the first videos, with its title below; the first one defines the axes."""
  lines, parts = _lines(experiment, tested), []
  # The longest video sets the width of all, so that segments have one scale.
  longest = max(int(line.valid.sum()) for line in lines)
  width = min(_SEGMENT * longest, timeline.TIME_AXIS - 1.5)
  untitled = [dataclasses.replace(line, title="") for line in lines]
  figures = timeline.draw_each_time_line(
    untitled, unit_names=experiment.test.unit_names, width=max(width, 4.0)
  )
  terms = [
    ("P(open)", "probability that a segment is chosen, from 0 to 1; the dashed line is 0.5"),
    ("across", "time, one bar per segment; a triangle below marks each chosen one"),
  ]
  # The videos of a set are alike: the first one shows what is known of all.
  if lines[0].relevant is not None:
    terms.append(("relevant", "the class depends on these segments"))
  if lines[0].units is not None:
    terms.append(("lowest strip", "the unit action of each segment, by name"))
  for line, figure in zip(lines, figures, strict=True):
    valid = line.valid.astype(bool)
    chosen = f"{np.sum(line.gates[valid] > 0)} of {np.sum(valid)} segments chosen"
    parts.append(
      page.embed_figure(
        figure,
        f"{text.plain(line.title, 200)}: {chosen}.",
        scrolls=True,
        photo=True,
        # The terms are the same for all, so only the first picture has them.
        terms=() if parts else terms,
      )
    )
  return parts


def _lines(experiment: VideoExperiment, tested: Arrays) -> list[timeline.TimeLine]:
  """Reads the first test videos that could be read."""
  # `index`: the arrays have the videos that could be read only.
  batch = experiment.test.read(tested["index"][:_DRAWN])
  clips, lines = batch.get("clips"), []
  for i in range(len(batch["weight"])):
    line = timeline.TimeLine(
      probs=tested["probs"][i],
      gates=tested["gates"][i],
      valid=tested["valid"][i],
      title=_title(experiment, tested, i),
      # The centre frame of each clip, as the light net sees it.
      thumbnails=None if clips is None else clips[i][:, clips.shape[2] // 2],
      relevant=tested["relevant"][i] if "relevant" in tested else None,
      units=batch["units"][i] if "units" in batch else None,
    )
    lines.append(line)
  return lines


def _title(experiment: VideoExperiment, tested: Arrays, i: int) -> str:
  """Returns the name of a test video, its class and, where it is wrong, the prediction."""
  name = f"{experiment.test.names[tested['index'][i]]}: {_class_of(experiment, tested, i)}"
  if experiment.test.multi_label:
    return name
  predicted = int(np.argmax(tested["logits"][i]))
  if predicted == tested["label"][i]:
    return f"{name}, as predicted"
  return f"{name}, predicted as {experiment.test.class_names[predicted]}"


def _class_of(experiment: VideoExperiment, tested: Arrays, i: int) -> str:
  """Returns the class of a test video, or all of them."""
  label, names = tested["label"][i], experiment.test.class_names
  if experiment.test.multi_label:
    return ", ".join(names[c] for c in np.flatnonzero(label))
  return names[label]
