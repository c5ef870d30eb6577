"""Timing of each way to run a network, by `--mode=compile`: measured, printed and written.

Axes: M images.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from gating_jax import timing
from gating_jax.inference.compiled import CompiledImages, Timing, spread_indices
from gating_jax.inference.conditional import CompiledConditional
from gating_jax.inference.strategies import why_not
from gating_jax.names import lazy_names
from gating_jax.reports import page
from gating_jax.reports.measured_times import (
  PICTURE_FILE,
  TIMES_FILE,
  Rows,
  draw_timings,
  read_times,
  render_timings,
  timing_title,
)
from gating_jax.terminal import say, working
from gating_jax.timing import UNGATED, ReportProgress
from gating_jax.training import rundir
from gating_jax.training.journal import write_json

_CALIBRATION = 256  # images, at most
# One image shows latency, a batch throughput; the fastest strategies may differ.
_BATCHES, _REPEATS = (1, 64), 20
# Time saved may exceed MACs saved by the error of timing, and no more.
MAX_EFFICIENCY = 1.05


def write_times(
  run_dir: rundir.RunDir,
  step: int,
  tables: Iterable[tuple[str, Sequence[Timing]]],
  *,
  pixels: Sequence[int] | None = None,
) -> dict[str, Rows]:
  """Prints tables as they are measured; writes all of them and their picture, or nothing.

  Args:
    run_dir: of the run.
    step: of the checkpoint that was compiled.
    tables: pairs of a title and its rows.
    pixels: height and width of the images, which a page describes.
  Returns:
    The rows, by title.
  Raises:
    RunDirError: files of this checkpoint exist, or are being written.
    ValueError: more time was saved than MACs, which is an error in measuring.
  """
  found = {}
  with _stage_times(run_dir.path, step) as folder:
    say(f"checkpoint of step {step}, timed on {timing.device()}: some minutes")
    # `tables` is lazy: each table is printed as soon as it is measured.
    for title, rows in tables:
      found[title] = [dataclasses.asdict(row) for row in rows]
      say(f"\n{title}\n" + render_timings(found[title]))
      _check_efficiency(title, rows)
    measured = {
      "step": step,
      "device": timing.device(),
      "jax_version": jax.__version__,
      "pixels": None if pixels is None else list(pixels),
      "timings": found,
    }
    write_json(folder / TIMES_FILE, measured)
    with working("drawing the times", "a few seconds"):
      page.save_figure(draw_timings(found, columns=2), folder / PICTURE_FILE)
  return found


def _check_efficiency(title: str, rows: Sequence[Timing]) -> None:
  """Raises a ValueError where a whole network saved more time than multiply-accumulates.

  Parts are left out: nothing says how fast each strategy is on a part with every unit open.
  """
  whole = [row for row in rows if row.part is None]
  # The baseline may compute more than all that counts: the padding of shorter videos.
  computed = 1.0
  for row in whole:
    if row.strategy == UNGATED:
      computed = row.computed_ratio
  for row in whole:
    efficiency = efficiency_of(row.mac_ratio / computed, row.time_ratio)
    if efficiency > MAX_EFFICIENCY:
      raise ValueError(
        f"the efficiency of {row.strategy}, {title}, must be at most {MAX_EFFICIENCY}: more time "
        f"cannot be saved than MACs; got {efficiency:.2f}, an error in measuring. Time it again "
        "without other jobs on the machine"
      )


def efficiency_of(mac_ratio: float, time_ratio: float) -> float:
  """Computes the MACs of a program over its time, both relative to computing everything.

  Above 1, more time is saved than MACs. Those of gate networks, which the baseline lacks, save
  nothing: more than all MACs count as all.

  >>> efficiency_of(0.5, 0.625)
  0.8
  """
  return min(mac_ratio, 1.0) / time_ratio


@contextlib.contextmanager
def _stage_times(path: Path, step: int) -> Iterator[Path]:
  """Stages files like `rundir.staged`; keeps those of another step under a name with that step."""
  names, other = (TIMES_FILE, PICTURE_FILE), read_times(path)
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
  """Announces that each way to run so many examples is compiled and timed, with its progress."""
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
  for size in _BATCHES:
    with announce_timing(timing_title(size, "image")) as progress:
      made = compiled(
        input_shape=images.shape[1:],
        batch_size=size,
        calibration=images,
        repeats=_REPEATS,
        progress=progress,
      )
    # Where it cannot run, the table lacks this strategy without a notice.
    if isinstance(made, CompiledConditional) and (reason := why_not("native")):
      say(f"\nthe strategy native is not tried: {reason}")
    yield timing_title(size, "image"), made.report()


if not TYPE_CHECKING:
  # Functions that show times, which were here before.
  __getattr__, __dir__ = lazy_names(
    __name__,
    {
      "gating_jax.reports.measured_times": (
        "Times",
        "parse_times",
        "time_number",
        "times_section",
      )
    },
  )
