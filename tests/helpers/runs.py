"""Runs of a programme within this process."""

import contextlib
import io
import json
import shutil

import pytest

from gating_jax import terminal
from gating_jax.continual import report as continual_report
from gating_jax.images.classification import Classification
from gating_jax.inference import compiled as compiled_nets
from gating_jax.inference import conditional
from gating_jax.reports import timings
from gating_jax.video import report as video_report
from gating_jax.video import speed


def said(programme, config, workdir, mode):
  """Returns the output of a programme, such as `classification`, in a mode."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    programme.run(config, workdir, mode)
  return out.getvalue()


def announced(patch):
  """Announces every operation from here on, even a short one, so that `said` has all."""
  patch.setattr(terminal, "_AFTER", 0.0)


def without_reports(patch):
  """Lets runs write no pictures and no pages, and time no programs, which takes a third of a run.

  Pages that are asked for by `--mode=report` are drawn all the same in runs on images.
  """
  patch.setattr(Classification, "_write_files", lambda *_: None)
  for report in (continual_report, video_report):
    patch.setattr(report, "write_pictures", lambda *_: None)
    patch.setattr(report, "write_report", lambda *_, **__: None)
  patch.setattr(speed, "speed", lambda *_: {})


def race_by(patch, race):
  """Replaces the race of programs, of parts and of whole networks."""
  for module in (compiled_nets, conditional):
    patch.setattr(module, "race", race)


def compiled(programme, finished, folder):
  """Times programs that skip, for a copy of a finished run; returns the times and the output."""
  made, workdir, _ = finished
  copy = shutil.copytree(workdir, folder / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timings, "_REPEATS", 1)
    # One call of each program is no measurement.
    patch.setattr(timings, "MAX_EFFICIENCY", float("inf"))
    patch.setattr(timings, "_BATCHES", (3,))
    announced(patch)
    printed = said(programme, made, copy, "compile")
  return json.loads((copy / "compile.json").read_text()), printed


class Stopping:
  """A replacement of `StopRequest` that asks to stop after some steps."""

  interrupted = False

  def __init__(self, steps):
    self._left = steps

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  def answer(self):
    pass

  @property
  def requested(self):
    self._left -= 1
    return self._left < 0
