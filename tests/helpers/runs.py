"""Runs of a programme within this process."""

import contextlib
import io
import json
import shutil

import pytest

from gating_jax import progress
from gating_jax.reports import compile_report


def said(programme, config, workdir, mode):
  """What a programme, such as `classification`, prints in a mode."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    programme.run(config, workdir, mode)
  return out.getvalue()


def announced(patch):
  """From here on what takes long is announced however little it takes, so that `said` has all of it."""
  patch.setattr(progress, "_AFTER", 0.0)


def compiled(programme, finished, folder):
  """`(what was measured of programs that skip, what was printed)` of a copy of a finished run, in little time."""
  made, workdir, _ = finished
  copy = shutil.copytree(workdir, folder / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(compile_report, "_REPEATS", 1)
    patch.setattr(compile_report, "_BATCHES", (3,))
    announced(patch)
    printed = said(programme, made, copy, "compile")
  return json.loads((copy / "compile.json").read_text()), printed


class Stopping:
  """In place of `StopRequest`: asks to stop after some steps."""

  def __init__(self, steps):
    self._left = steps

  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass

  @property
  def requested(self):
    self._left -= 1
    return self._left < 0
