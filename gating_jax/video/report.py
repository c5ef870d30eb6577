"""What a run on long videos leaves for people: histograms, pictures and its page.

Axes: M videos, T segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gating_jax.reports import (
  conclusion,
  glossary,
  opening,
  page,
  segment_pictures,
  surroundings,
  text,
  timeline,
  times,
  video_table,
)
from gating_jax.training import evaluation, rundir
from gating_jax.training.journal import Journal
from gating_jax.video import speed
from gating_jax.video.build import VideoExperiment
from gating_jax.video.evaluate import Arrays

_DRAWN = 6  # videos whose time lines are shown
_LISTED = 12  # videos whose choices are shown at the top
_SEGMENT = 0.4  # inches of a segment on the page, at least, as long as there is room on a desk


def draw(
  experiment: VideoExperiment, done: Arrays, run_dir: rundir.RunDir, journal: Journal, step: int
) -> None:
  """Writes the pictures of what `video_trial.test` found, in files and in TensorBoard."""
  names = ("segments", "timeline")
  shares, lines = (run_dir.path / f"{name}.png" for name in names)
  text.save(_figure_of_shares(experiment, done), shares)
  timeline.draw(lines, _lines(experiment, done), unit_names=experiment.test.unit_names)
  for name, path in zip(names, (shares, lines), strict=True):
    journal.write_picture(step, f"pictures/{name}", path)


def histograms(experiment: VideoExperiment, done: Arrays) -> dict[str, np.ndarray]:
  """Counts for `Journal.write_histograms`: of the probabilities of segments, of the shares chosen of each video, and of
  the open probabilities of each layer of channel gates, where the heavy net has any, in the chosen segments."""
  counts = {
    "gates/segments/probs": evaluation.histogram(done["probs"][done["valid"].astype(bool)]),
    "gates/segments/shares": evaluation.histogram(_shares(done)),
  }
  if "channels" in done:
    layers = done["channels"].sum(axis=0)
    names = [name for name, _ in experiment.counts.heavy.gate_layers]
    counts |= {
      f"gates/heavy/{name}/probs": layer for name, layer in zip(names, layers, strict=True)
    }
  return counts


def write(
  experiment: VideoExperiment,
  result: Mapping[str, Any],
  done: Arrays,
  run_dir: rundir.RunDir,
  step: int,
  notice: str = "",
) -> None:
  """Writes the run's page; `notice` is what it says before all else."""
  config = experiment.config
  around = surroundings.read(
    run_dir,
    config,
    surroundings.VIDEOS,
    step=step,
    not_compiled=conclusion.refusal(speed.check, experiment),
  )
  configured = [(name, str(value)) for name, value in rundir.flatten(config).items()]
  sections = [
    page.Section("Result", parts=[glossary.defined(video_table.rows(result))]),
    page.Section(
      "Segments",
      parts=[
        page.pictured(
          _figure_of_shares(experiment, done),
          "Probabilities of all segments of the test videos, and how much is chosen of each video.",
          terms=[
            (
              "probability",
              "that the gate, or what selects in its place, chooses a segment, from 0 to 1",
            ),
            ("segments", "how many of all test videos have that probability"),
            ("chosen segments of a video", "as a fraction of the video's segments"),
            ("videos", "how many test videos have that fraction"),
          ],
        )
      ],
    ),
    page.Section(
      "Time lines",
      "What was chosen of the first test videos, and what mattered where that is known.",
      _time_lines(experiment, done),
    ),
    opening.times_section("video", around),
    opening.settings(configured),
    opening.about(around),
  ]
  page.write(
    run_dir.report,
    f"{config.model.selection} on {config.data.name} videos",
    sections,
    f"{run_dir.path.name}, step {step:,}",
    _begin(experiment, result, done, around, notice),
  )


def _begin(
  experiment: VideoExperiment,
  result: Mapping[str, Any],
  done: Arrays,
  around: opening.Surroundings,
  notice: str,
) -> page.Opening:
  """The large numbers, and a picture of what was chosen."""
  key = "accuracy" if "accuracy" in result else "mean_average_precision"
  name = key.replace("_", " ")
  meaning = {
    "accuracy": "Fraction of the {} test videos whose most likely class is the true one.",
    "mean_average_precision": "Mean over classes of the average precision on {} test videos.",
  }[key]
  numbers = [
    opening.score(
      f"test {name}", result[key], key, around, meaning.format(f"{result['videos']:,}")
    ),
    opening.macs(result["mac_ratio"], result["macs"], result["all_segments_macs"], "video", around),
    opening.time("video", around)
    if around.times and around.times.of(around.step)
    else _speed(result, around),
  ]
  return page.Opening(
    numbers,
    _choices(experiment, done),
    opening.why_no_baseline(around, surroundings.VIDEOS.how),
    notice,
  )


def _speed(result: Mapping[str, Any], around: opening.Surroundings) -> page.Number:
  """Milliseconds of a video as the run has measured them itself."""
  number = opening.time("video", around)
  if "videos_per_second" not in result:
    return number
  mine, dense = (
    times.milliseconds(1 / result[name])
    for name in ("videos_per_second", "all_segments_videos_per_second")
  )
  return dataclasses.replace(
    number,
    value=f"{mine} ms",
    baseline=f"ungated: {dense} ms",
    meaning="Time per video in a batch of test videos, measured at the end of the run; light network and gate "
    "included, next to the heavy network on all segments. For single videos:",
  )


def _choices(experiment: VideoExperiment, done: Arrays) -> page.Picture:
  """What was chosen of the first test videos."""
  valid = done["valid"].astype(bool)
  count = min(_LISTED, len(valid))
  of_each = lambda values: [values[i][valid[i]] for i in range(count)]
  relevant = of_each(done["relevant"].astype(bool)) if "relevant" in done else None
  titles = [_title(experiment, done, i) for i in range(count)]
  figure = segment_pictures.draw_choices(of_each(done["gates"] > 0), titles, relevant)
  terms = [
    ("time", "from the video's first segment to its last, a box for each"),
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
  return page.pictured(figure, f"What was chosen of {count} test videos.", terms=terms)


def _shares(done: Arrays) -> np.ndarray:
  """`[M]`, chosen of each video's segments."""
  valid = done["valid"].astype(bool)
  return np.sum((done["gates"] > 0) & valid, axis=1) / np.maximum(valid.sum(axis=1), 1)


def _figure_of_shares(experiment: VideoExperiment, done: Arrays) -> Any:
  correct = (
    None if experiment.test.multi_label else np.argmax(done["logits"], axis=1) == done["label"]
  )
  return segment_pictures.draw_shares(
    done["probs"][done["valid"].astype(bool)], _shares(done), correct
  )


def _time_lines(experiment: VideoExperiment, done: Arrays) -> list[page.Picture]:
  """A picture of each of the first videos, its title below it; the first one defines the axes."""
  lines, parts = _lines(experiment, done), []
  width = min(_SEGMENT * max(int(line.valid.sum()) for line in lines), timeline.WIDTH - 1.5)
  untitled = [dataclasses.replace(line, title="") for line in lines]
  figures = timeline.figures(untitled, unit_names=experiment.test.unit_names, width=max(width, 4.0))
  terms = [
    ("P(open)", "probability that a segment is chosen, from 0 to 1; the dashed line is 0.5"),
    ("across", "time, a bar for each segment"),
  ]
  if any(line.relevant is not None for line in lines):
    terms.append(("relevant", "the class depends on these segments"))
  if any(line.units is not None for line in lines):
    terms.append(("lowest strip", "the unit action of each segment, by name"))
  for line, figure in zip(lines, figures, strict=True):
    valid = line.valid.astype(bool)
    chosen = f"{np.sum(line.gates[valid] > 0)} of {np.sum(valid)} segments chosen"
    parts.append(
      page.pictured(
        figure,
        f"{text.plain(line.title, 200)}: {chosen}.",
        scrolls=True,
        photo=True,
        terms=() if parts else terms,
      )
    )
  return parts


def _lines(experiment: VideoExperiment, done: Arrays) -> list[timeline.TimeLine]:
  """The first test videos that could be read."""
  batch = experiment.test.read(done["index"][:_DRAWN])
  row = lambda arrays, name, i: arrays[name][i] if name in arrays else None
  return [
    timeline.TimeLine(
      probs=done["probs"][i],
      gates=done["gates"][i],
      valid=done["valid"][i],
      title=_title(experiment, done, i),
      thumbnails=batch["clips"][i][:, batch["clips"].shape[2] // 2] if "clips" in batch else None,
      relevant=row(done, "relevant", i),
      units=row(batch, "units", i),
    )
    for i in range(len(batch["weight"]))
  ]


def _title(experiment: VideoExperiment, done: Arrays, i: int) -> str:
  label, names = done["label"][i], experiment.test.class_names
  return (
    ", ".join(names[c] for c in np.flatnonzero(label))
    if experiment.test.multi_label
    else names[label]
  )
