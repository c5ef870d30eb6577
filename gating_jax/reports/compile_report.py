"""Output of `--mode=compile`: the time of each way to run the net, as a table and a picture.

Axes: M images.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gating_jax import timing
from gating_jax.inference.compiled import CompiledImages, Timing, spread_indices
from gating_jax.inference.conditional import CompiledConditional
from gating_jax.inference.strategies import why_not
from gating_jax.reports import conclusion, page, surroundings
from gating_jax.reports.timings import draw_timings, render_timings, timing_title
from gating_jax.terminal import say, working
from gating_jax.timing import ReportProgress
from gating_jax.training import rundir
from gating_jax.training.journal import write_json

TABLE_FILE, PICTURE_FILE = surroundings.TIMES_FILE, "compile.png"
_CALIBRATION = 256  # images, at most
_BATCHES, _REPEATS = (1, 64), 20


def write_times(
  run_dir: rundir.RunDir,
  step: int,
  tables: Iterable[tuple[str, Sequence[Timing]]],
  *,
  pixels: Sequence[int] | None = None,
) -> None:
  """Prints tables as they are measured; writes all of them and their picture, or nothing.

  Args:
    run_dir: of the run.
    step: of the checkpoint that was compiled.
    tables: pairs of a title and its rows.
    pixels: height and width of the images, from which a page tells what was timed.
  Raises:
    RunDirError: files of this checkpoint exist, or are being written.
  """
  found = {}
  with _staged(run_dir.path, step) as folder:
    say(f"checkpoint of step {step}, timed on {timing.device()}: some minutes")
    # `tables` is lazy: each table is printed as soon as it is measured.
    for title, rows in tables:
      found[title] = [dataclasses.asdict(row) for row in rows]
      say(f"\n{title}\n" + render_timings(found[title]))
    measured = {
      "step": step,
      "device": timing.device(),
      "jax_version": jax.__version__,
      "pixels": None if pixels is None else list(pixels),
      "timings": found,
    }
    write_json(folder / TABLE_FILE, measured)
    with working("drawing the times", "a few seconds"):
      page.save_figure(draw_timings(found, columns=2), folder / PICTURE_FILE)
  # A page of this step shows the times at once; one of another step must be written again.
  has_times, modes = surroundings.refresh_times(run_dir.path), []
  if run_dir.report.exists() and not has_times:
    modes.append("report")
  if run_dir.config().get("experiment") == "classification":
    modes.append("export")
  done = f"Timed the checkpoint of step {step:,}: median milliseconds of a call."
  made = ("made", f"{run_dir.path / TABLE_FILE}, {PICTURE_FILE}")
  rows = [made, *conclusion.times(found)]
  say(conclusion.text(done, rows, conclusion.following(run_dir.path, modes)))


@contextlib.contextmanager
def _staged(path: Path, step: int) -> Iterator[Path]:
  """Stages files like `rundir.staged`; keeps those of another step under a name with that step."""
  names, other = (TABLE_FILE, PICTURE_FILE), surroundings.read_times(path)
  if other is not None and other.step == step:
    other = None
  with rundir.staged(path, names if other is None else ()) as folder:
    yield folder
    # Only now, when the new files are complete: an interruption leaves the old ones in place.
    for name in names:
      file = path / name
      if other is not None and file.exists():
        file.rename(file.with_stem(f"{file.stem}_of_step_{other.step}"))


def calibration_images(
  images: Any, normalise: Callable[[Any], jax.Array], count: int = _CALIBRATION
) -> np.ndarray:
  """Returns `[M, H, W, D]` network inputs of at most `count` images, evenly spaced in a set."""
  return np.asarray(normalise(images.read(spread_indices(len(images), count))[0]), np.float32)


@contextlib.contextmanager
def announce_timing(title: str) -> Iterator[ReportProgress]:
  """Tells that each way to run so many examples is compiled and timed, and how far it is."""
  with working(f"compiling and timing each way to run {title}", "up to a few minutes") as progress:
    yield progress


def time_images(
  compiled: Callable[..., CompiledImages], images: np.ndarray
) -> Iterator[tuple[str, Sequence[Timing]]]:
  """Yields title and rows of a net's times, for one image at a time and for a batch.

  Args:
    compiled: `compile_conditional` or `compile_exits` of the net.
    images: `[M, H, W, D]`, the calibration images.
  """
  # One image shows latency, a batch throughput; the fastest strategies may differ.
  for size in _BATCHES:
    with announce_timing(timing_title(size, "image")) as progress:
      made = compiled(
        input_shape=images.shape[1:],
        batch_size=size,
        calibration=images,
        repeats=_REPEATS,
        progress=progress,
      )
    # Where it cannot run, the table lacks this strategy without a word.
    if isinstance(made, CompiledConditional) and (reason := why_not("native")):
      say(f"\nthe strategy native is not tried: {reason}")
    yield timing_title(size, "image"), made.report()
