"""What a run on long videos leaves for people: pictures and its page.

Axes: T segments.
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
from gating_jax.training import rundir

_DRAWN = 6  # videos whose time lines are shown
_SEGMENT = 0.4  # inches of a segment on the page, at least, as long as there is room on a desk


def draw(experiment: VideoExperiment, done: Arrays, run_dir: rundir.RunDir) -> list[str]:
  """Writes the pictures of what `video_trial.test` found; returns the names of their files."""
  lettering.save(_shares(experiment, done), run_dir.path / "segments.png")
  timeline.draw(run_dir.path / "timeline.png", _lines(experiment, done), unit_names=experiment.test.unit_names)
  return ["segments.png", "timeline.png"]


def write(
    experiment: VideoExperiment, result: Mapping[str, Any], done: Arrays, run_dir: rundir.RunDir, step: int
) -> None:
  """Writes the run's page."""
  config = experiment.config
  configured = [(name, str(value)) for name, value in settings.flatten(config)]
  sections = [
      page.Section("Result", parts=[page.Table(("", ""), video_table.rows(result), numeric=False)]),
      page.Section("Segments", parts=[page.pictured(
          _shares(experiment, done),
          "Probabilities of being chosen over all segments of the test videos, and shares chosen of each video.")]),
      page.Section(
          "Time lines", "What was chosen of the first test videos, and what mattered where that is known. Bars are the "
          "probabilities that segments are chosen, the dashed line is 0.5.", _time_lines(experiment, done)),
      page.Section("Settings", parts=[page.Table(("setting", "value"), configured, numeric=False)])]
  page.write(run_dir.report, f"{config.model.selection} on {config.data.name} videos", sections,
             f"{run_dir.path.name}, step {step}")


def _shares(experiment: VideoExperiment, done: Arrays) -> Any:
  """A figure of all segments and videos."""
  valid = done["valid"].astype(bool)
  correct = None if experiment.test.multi_label else np.argmax(done["logits"], axis=1) == done["label"]
  shares = np.sum((done["gates"] > 0) & valid, axis=1) / np.maximum(valid.sum(axis=1), 1)
  return segment_pictures.draw_shares(done["probs"][valid], shares, correct)


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
