"""Runs of a programme within this process."""

import contextlib
import io


def said(programme, config, workdir, mode):
  """What a programme, such as `classification`, prints in a mode."""
  with contextlib.redirect_stdout(io.StringIO()) as out:
    programme.run(config, workdir, mode)
  return out.getvalue()


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
