"""What a run on long videos leaves for people: histograms, pictures and its page.

Axes: M videos, T segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from gating_jax.experiments import settings
from gating_jax.experiments.video_build import VideoExperiment
from gating_jax.experiments.video_trial import Arrays
from gating_jax.reports import lettering, page, segment_pictures, timeline, video_table
from gating_jax.training import evaluation, rundir
from gating_jax.training.journal import Journal

_DRAWN = 6  # videos whose time lines are shown
_SEGMENT = 0.4  # inches of a segment on the page, at least, as long as there is room on a desk


def draw(experiment: VideoExperiment, done: Arrays, run_dir: rundir.RunDir, journal: Journal, step: int) -> None:
  """Writes the pictures of what `video_trial.test` found, in files and in TensorBoard."""
  names = ("segments", "timeline")
  shares, lines = (run_dir.path / f"{name}.png" for name in names)
  lettering.save(_figure_of_shares(experiment, done), shares)
  timeline.draw(lines, _lines(experiment, done), unit_names=experiment.test.unit_names)
  for name, path in zip(names, (shares, lines), strict=True):
    journal.write_picture(step, f"pictures/{name}", path)


def histograms(done: Arrays) -> dict[str, np.ndarray]:
  """Counts for `Journal.write_histograms`: of the probabilities of segments, of the shares chosen of each video, and of
  the open probabilities of each layer of channel gates, where the heavy net has any, in the chosen segments."""
  counts = {"gates/segments/probs": evaluation.histogram(done["probs"][done["valid"].astype(bool)]),
            "gates/segments/shares": evaluation.histogram(_shares(done))}
  if "channels" in done:
    layers = done["channels"].sum(axis=0)
    counts |= {f"gates/layer{i:02d}/probs": layer for i, layer in enumerate(layers)}
  return counts


def write(
    experiment: VideoExperiment, result: Mapping[str, Any], done: Arrays, run_dir: rundir.RunDir, step: int
) -> None:
  """Writes the run's page."""
  config = experiment.config
  configured = [(name, str(value)) for name, value in settings.flatten(config)]
  sections = [
      page.Section("Result", parts=[page.Table(("", ""), video_table.rows(result), numeric=False)]),
      page.Section("Segments", parts=[page.pictured(
          _figure_of_shares(experiment, done),
          "Probabilities of being chosen over all segments of the test videos, and shares chosen of each video.")]),
      page.Section(
          "Time lines", "What was chosen of the first test videos, and what mattered where that is known. Bars are the "
          "probabilities that segments are chosen, the dashed line is 0.5.", _time_lines(experiment, done)),
      page.Section("Settings", parts=[page.Table(("setting", "value"), configured, numeric=False)])]
  page.write(run_dir.report, f"{config.model.selection} on {config.data.name} videos", sections,
             f"{run_dir.path.name}, step {step}")


def _shares(done: Arrays) -> np.ndarray:
  """`[M]`, chosen of each video's segments."""
  valid = done["valid"].astype(bool)
  return np.sum((done["gates"] > 0) & valid, axis=1) / np.maximum(valid.sum(axis=1), 1)


def _figure_of_shares(experiment: VideoExperiment, done: Arrays) -> Any:
  correct = None if experiment.test.multi_label else np.argmax(done["logits"], axis=1) == done["label"]
  return segment_pictures.draw_shares(done["probs"][done["valid"].astype(bool)], _shares(done), correct)


def _time_lines(experiment: VideoExperiment, done: Arrays) -> list[page.Picture]:
  """A picture of each of the first videos, its title below it."""
  lines, parts = _lines(experiment, done), []
  width = min(_SEGMENT * max(int(line.valid.sum()) for line in lines), timeline.WIDTH - 1.5)
  untitled = [dataclasses.replace(line, title="") for line in lines]
  figures = timeline.figures(untitled, unit_names=experiment.test.unit_names, width=max(width, 4.0))
  for line, figure in zip(lines, figures, strict=True):
    valid = line.valid.astype(bool)
    chosen = f"{np.sum(line.gates[valid] > 0)} of {np.sum(valid)} segments chosen"
    parts.append(page.pictured(figure, f"{lettering.plain(line.title, 200)}: {chosen}.", scrolls=True))
  return parts


def _lines(experiment: VideoExperiment, done: Arrays) -> list[timeline.TimeLine]:
  """The first test videos that could be read."""
  batch = experiment.test.read(done["index"][:_DRAWN])
  row = lambda arrays, name, i: arrays[name][i] if name in arrays else None
  return [
      timeline.TimeLine(
          probs=done["probs"][i], gates=done["gates"][i], valid=done["valid"][i], title=_title(experiment, done, i),
          thumbnails=batch["clips"][i][:, batch["clips"].shape[2] // 2] if "clips" in batch else None,
          relevant=row(done, "relevant", i), units=row(batch, "units", i))
      for i in range(len(batch["weight"]))]


def _title(experiment: VideoExperiment, done: Arrays, i: int) -> str:
  label, names = done["label"][i], experiment.test.class_names
  return ", ".join(names[c] for c in np.flatnonzero(label)) if experiment.test.multi_label else names[label]
