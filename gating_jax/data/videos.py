"""Sets of videos, read from disk during training or whole in memory, and their segments.

`data/image_sets.py` sets the order, a function of (seed, step) alone. So a restart needs no state
and may use another number of workers. A file that cannot be read never stops a run: its video is
named once; in tests it has weight 0, and in training another video takes its place.
`data/video_files.py` decodes videos, `data/video_features.py` reads files of features.

Axes: M videos of a set, B videos of a batch, b of this process, K steps per call, T segments, F
frames each, H and W pixels, D channels, N frames of a video.

Reference: Hussein et al., 2020 (segments of 8 frames, spread uniformly over the video).
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from gating_jax.checks import few, user_path
from gating_jax.data.checked_files import FaultNotes
from gating_jax.data.image_sets import process_indices
from gating_jax.data.streaming import prefetch_noting
from gating_jax.data.video_tables import Intervals, VideoTable
from gating_jax.terminal import warn

Batch = dict[str, np.ndarray]

VIDEO_SUFFIXES = (
  ".mp4",
  ".avi",
  ".mkv",
  ".webm",
  ".mov",
  ".m4v",
  ".mpg",
  ".mpeg",
  ".wmv",
  ".ts",
  ".flv",
  ".3gp",
  ".ogg",
)
# Results of `map` that are prefetched: few, since each may be a whole batch of videos.
_PREFETCHED = 2
# Unreadable videos that an error or a result names.
_NAMED = 5
# Added to the seed of an example, which draws its jitter, to draw what takes its place.
_SUBSTITUTE = 1


class Segments(NamedTuple):
  """The segments of one video.

  Attributes:
    inputs: by name, `[T, ...]`.
    valid: `[T]`, False where a shorter video's own segments are repeated.
    middles: `[T]` in seconds, NaN where unknown.
  """

  inputs: Batch
  valid: np.ndarray
  middles: np.ndarray


class VideoSet(abc.ABC):
  """Split of videos on disk, read into batches: dicts of arrays `[B, ...]`, or `[b, K, ...]`.

  The latter are for training. Batches hold the inputs that a subclass names; `valid` `[T]` bool,
  False where a shorter video's own segments are repeated; `label` as in the table; `weight`
  float32, 0 where the video cannot be read (its inputs are then 0; never in training); and `units`
  `[T]` int32 where the table has any: the unit action at the segment's middle, the shortest of
  several, or -1.

  Attributes:
    table: of the videos that have their files.
    missing: names of the videos that have not.
  """

  def __init__(
    self,
    table: VideoTable,
    find: Callable[[str], Any],
    *,
    segments: int,
    seed: int,
    jitter: bool,
    workers: int,
  ):
    if segments < 1:
      raise ValueError(f"segments must be at least 1; got {segments}")
    kept, missing, self._files = [], [], []
    for i, name in enumerate(table.names):
      file = find(_inside(name))
      if file is None:
        missing.append(name)
      else:
        kept.append(i)
        self._files.append(file)
    if not kept:
      raise ValueError(f"the folder must hold videos of the table; found none of {few(missing)}")
    if missing:
      warn(
        "%d of %d videos have no file and are skipped: %s", len(missing), len(table), few(missing)
      )
    self.table, self.missing = table.take(kept), tuple(missing)
    self._segments, self._seed, self._jitter, self._workers = segments, seed, jitter, workers
    self._notes = FaultNotes({}, "video %s cannot be read and is skipped: %s")

  def __len__(self) -> int:
    return len(self.table)

  @property
  def names(self) -> tuple[str, ...]:
    """Returns the names, one per video."""
    return self.table.names

  @property
  def unreadable(self) -> dict[str, str]:
    """Returns the reason for each video that could not be read so far, by name."""
    return self._notes.later

  @property
  def paths(self) -> list[Path]:
    """Returns the file of each video; of one with several, the first."""
    found = []
    for file in self._files:
      found.append(next(iter(file.values())) if isinstance(file, dict) else file)
    return found

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names of the classes."""
    return self.table.class_names

  @property
  def unit_names(self) -> tuple[str, ...]:
    """Returns the names of the unit actions."""
    return self.table.unit_names

  @property
  def multi_label(self) -> bool:
    """Returns whether a video may have several classes."""
    return self.table.multi_label

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a batch's arrays, without the batch axes."""
    return {key: array.shape for key, array in self._blank(0).items()}

  def read(self, index: Sequence[int] | np.ndarray) -> Batch:
    """Returns the videos at `index`, at fixed segments."""
    return _stack([self._read_one(int(i)) for i in index])

  def map(self, fn: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Computes `fn` of each item, in order and ahead of the consumer, by threads or processes.

    `fn` may read this set.
    """
    return prefetch_noting(fn, items, self._workers, notes=self._notes, buffer_size=_PREFETCHED)

  def batches(
    self,
    batch_size: int,
    first_step: int,
    k: int,
    total_steps: int,
    process: tuple[int, int] = (0, 1),
  ) -> Iterator[Batch]:
    """Yields a batch `[b, K, ...]` for every `k` steps.

    All videos of a batch can be read: a blank one would go into the statistics of BatchNorm.

    Args:
      batch_size, k, process: as in `process_indices`.
      first_step, total_steps: steps from `first_step` to before `total_steps`.
    Raises:
      ValueError: none of the videos can be read; the first five are named.
    """

    def indices(step):
      """Returns the videos `[b]` of a step."""
      of_step = process_indices(
        self._seed, step, k=1, batch_size=batch_size, examples=len(self), process=process
      )
      return of_step[:, 0]

    self.check_readable()
    rows = len(indices(first_step))

    # Single videos are prefetched, not batches: workers share the decoding of a batch.
    def read(n):
      """Returns example n of this process, counted over steps and rows, with its jitter."""
      step, row = first_step + n // rows, n % rows
      # Seeded by the row in the whole batch: the jitter is the same on any number of processes.
      seed = (self._seed, step, process[0] * rows + row)
      return self._read_for_training(int(indices(step)[row]), seed)

    calls = len(range(first_step, total_steps, k))
    examples = prefetch_noting(
      read,
      range(calls * k * rows),
      self._workers,
      notes=self._notes,
      buffer_size=4 * _PREFETCHED,
    )
    for _ in range(calls):
      by_step, by_row = list(itertools.islice(examples, k * rows)), []
      # Examples come step by step; `[b, K]` is laid out row by row.
      for row in range(rows):
        by_row += by_step[row::rows]
      stacked = _stack(by_row)
      yield {key: array.reshape(rows, k, *array.shape[1:]) for key, array in stacked.items()}

  def check_readable(self) -> None:
    """Reads videos up to the first that can be read.

    Raises:
      ValueError: none can; the first five are named with their reasons.
    """
    for index in range(len(self)):
      if self._try_one(index, None) is not None:
        return
    raise ValueError(self._none_readable())

  def name_unreadable(self) -> list[str]:
    """Returns the first five videos that could not be read so far, in the table's order."""
    return [name for name in self.names if name in self.unreadable][:_NAMED]

  @abc.abstractmethod
  def _inputs(self) -> Batch:
    """Returns zeros in place of an example's inputs."""

  @abc.abstractmethod
  def _load(self, index: int, rng: np.random.Generator | None) -> Segments:
    """Reads the segments of a video; the generator, if any, draws their jitter."""

  def _blank(self, index: int) -> Batch:
    """Returns the example of a video that cannot be read: its weight is 0."""
    example = self._inputs() | {
      "valid": np.ones(self._segments, bool),
      "label": self.table.labels[index],
      "weight": np.float32(0),
    }
    if self.table.units is not None:
      example["units"] = np.full(self._segments, -1, np.int32)
    return example

  def _read_one(self, index: int) -> Batch:
    """Reads the example of a video at fixed segments; a blank one if that fails."""
    example = self._try_one(index, None)
    return self._blank(index) if example is None else example

  def _read_for_training(self, index: int, seed: tuple[int, ...]) -> Batch:
    """Reads the example of a video, or of another one where it cannot be read.

    The seed draws the jitter, and the order in which others are tried.
    """
    example = self._try_one(index, seed)
    if example is not None:
      return example
    # By the example's own seed: the same after a restart, with any number of workers.
    for other in np.random.default_rng((*seed, _SUBSTITUTE)).permutation(len(self)):
      # A video known to be unreadable is not decoded again.
      if self.names[other] in self.unreadable:
        continue
      example = self._try_one(int(other), seed)
      if example is not None:
        return example
    raise ValueError(self._none_readable())

  def _none_readable(self) -> str:
    """Returns the message for a set of which no video can be read."""
    reasons = [f"{name} ({reason})" for name, reason in self.unreadable.items()]
    return f"none of {len(self)} videos can be read: {few(reasons, _NAMED)}"

  def _try_one(self, index: int, seed: tuple[int, ...] | None) -> Batch | None:
    """Reads the example of a video, its jitter drawn by the seed; None if that fails."""
    rng = np.random.default_rng(seed) if self._jitter and seed is not None else None
    try:
      loaded = self._load(index, rng)
    # A damaged file makes its decoder raise errors of many types; none may stop a run.
    except Exception as error:
      self._notes.note({self.names[index]: str(error) or type(error).__name__})
      return None
    example = self._blank(index)
    example |= loaded.inputs | {"valid": loaded.valid, "weight": np.float32(1)}
    if self.table.units is not None:
      example["units"] = _units_at(self.table.units[index], loaded.middles)
    return example


@dataclasses.dataclass(frozen=True)
class VideoArrays:
  """Split of a set of videos, whole, on the host.

  Attributes:
    arrays: by name, `[M, ...]`. Inputs: `clips` `[M, T, F, H, W, D]` uint8, or the features `light`
      and `heavy` `[M, T, ...]`. `valid` `[M, T]` bool: False where a shorter video was padded.
      `label` `[M]` int32, or `[M, classes]` of 0 and 1. `weight` `[M]`: 0 for videos that could not
      be read. Where known, `units` `[M, T]`: the unit action of each segment or -1; and `relevant`
      `[M, T]`: whether the segment belongs to the video's activity.
    class_names: one per class.
    names: one per video.
    unit_names: one per unit action.
  """

  arrays: dict[str, np.ndarray]
  class_names: tuple[str, ...]
  names: tuple[str, ...]
  unit_names: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.names)

  @property
  def multi_label(self) -> bool:
    """Returns whether a video may have several classes."""
    # Single-label sets have one class number per video.
    return self.arrays["label"].ndim == 2

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a batch's arrays, without the batch axis."""
    return {name: values.shape[1:] for name, values in self.arrays.items()}

  def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the videos at `index`, as one batch."""
    # Every array begins with the axis of videos.
    return {name: values[index] for name, values in self.arrays.items()}

  def map(self, fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Computes `fn` of each item, in order."""
    return map(fn, items)


def segment_starts(
  frames: int, segments: int, length: int, rng: np.random.Generator | None = None
) -> np.ndarray:
  """Returns first frames of segments spread uniformly over a video of constant frame rate.

      start_i = floor(i (frames - length) / (segments - 1)),

  or, with a generator, a random frame of the i-th of `segments` equal parts of all possible starts.

  Segments overlap where the video is short. A single segment lies in the middle; a video shorter
  than `length` has all of them at 0.

  Args:
    frames: number of frames of the video, at least 1.
    segments: T.
    length: F, frames of a segment.
    rng: draws the starts; None for the fixed ones.
  Returns:
    `[T]` integers.

  >>> segment_starts(30, 4, 8).tolist()
  [0, 7, 14, 22]
  """
  last = max(frames - length, 0)
  if rng is not None:
    part = (last + 1) / segments
    starts = np.floor((np.arange(segments) + rng.random(segments)) * part).astype(int)
    # Rounding may give last + 1.
    return starts.clip(max=last)
  if segments == 1:
    return np.array([last // 2])
  return np.arange(segments) * last // (segments - 1)


def timed_starts(
  times: np.ndarray,
  end: float,
  segments: int,
  length: int,
  rng: np.random.Generator | None = None,
  *,
  rounding: float = 0.0,
) -> np.ndarray:
  """Returns first frames of segments spread uniformly over the time of a video.

  A segment begins with the frame that is shown at

      time_i = times[0] + i (times[last] - times[0]) / (segments - 1),   last = N - length,

  or, with a generator, at a random time of the i-th of `segments` equal parts of the time in which
  a segment may begin, up to the end of frame `last`. Segments overlap where the video is short. At
  a constant rate these are the frames of `segment_starts`.

  Args:
    times: `[N]`, ascending: when each frame is first shown.
    end: when the last frame is no longer shown.
    segments: T.
    length: F, frames of a segment.
    rng: draws the starts; None for the fixed ones.
    rounding: how far a time may be off, in the unit of `times`.
  Returns:
    `[T]` integers.

  >>> times = np.array([0.0, 1.0, 2.0, 3.0, 3.1, 3.2, 3.3, 3.4])
  >>> timed_starts(times, 3.5, segments=3, length=2).tolist()
  [0, 1, 6]
  """
  last = max(len(times) - length, 0)
  if rng is not None:
    stop = times[last + 1] if last + 1 < len(times) else end
    parts = (np.arange(segments) + rng.random(segments)) / segments
    starts = times[0] + parts * (stop - times[0])
  elif segments > 1:
    # Rounded times may lie a little after the exact ones; the frame that begins there is meant.
    starts = np.linspace(times[0], times[last], segments) + rounding
  else:
    starts = np.array([times[0] + (times[last] - times[0]) / 2 + rounding])
  # The frame shown at a time is the last that begins at it or before.
  return (np.searchsorted(times, starts, side="right") - 1).clip(0, last)


def find_file(folder: str | Path, name: str, suffixes: Sequence[str]) -> Path | None:
  """Returns the first file of this name and one of the suffixes; None if there is none.

  Suffixes may be in capitals, and the name may have its own. A name with a video's suffix also
  stands for the file of its features.
  """
  if name.lower().endswith(tuple(suffixes)):
    path = Path(user_path(folder), name)
    if path.is_file():
      return path
  if "" not in suffixes and name.lower().endswith((*VIDEO_SUFFIXES, *suffixes)):
    name = str(PurePosixPath(name).with_suffix(""))
  # As cameras write them: .MP4.
  for suffix in (*suffixes, *[suffix.upper() for suffix in suffixes if suffix]):
    path = Path(user_path(folder), name + suffix)
    if path.is_file():
      return path
  return None


def _inside(name: str) -> str:
  """Returns the name, unless it would lead out of the folder."""
  path = PurePosixPath(name)
  if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
    raise ValueError(f"names of videos must stay inside their folder; got {name!r}")
  return name


def _stack(examples: Sequence[Batch]) -> Batch:
  """Joins examples to a batch."""
  batch = {}
  for key in examples[0]:
    batch[key] = np.stack([example[key] for example in examples])
  return batch


def _units_at(intervals: Intervals, seconds: np.ndarray) -> np.ndarray:
  """Returns the unit action at each of these times, -1 where there is none."""
  units = np.full(len(seconds), -1, np.int32)
  # The longest first, so that a shorter one overwrites it.
  for start, end, unit in sorted(intervals, key=lambda interval: interval[0] - interval[1]):
    units[(start <= seconds) & (seconds < end)] = unit
  return units
