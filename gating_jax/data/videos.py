"""Sets of videos read from disk while training goes on: files decoded with PyAV, or files of features.

Axes: B videos of a batch, b of this process, K steps per call, T segments, F frames each, H and W pixels.
The order is that of `data/images.py`, a function of (seed, step) alone, so a restart needs no state and may use
another number of workers. A file that cannot be read never stops a run: its video has weight 0 and is named once.

Reference: Hussein et al., 2020.
"""

from __future__ import annotations

import abc
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gating_jax.checks import few, printable
from gating_jax.data import images, video_files
from gating_jax.data.ahead import computed_ahead
from gating_jax.data.video_tables import Intervals, VideoTable
from gating_jax.paths import user_path
from gating_jax.terminal import warn

Batch = dict[str, np.ndarray]

_AHEAD = 2  # results of `map`, which may be whole batches of videos
_NOTING = threading.Lock()


class VideoSet(abc.ABC):
  """One split of videos on disk, read into batches: dicts of arrays `[B, ...]`, or `[b, K, ...]` in training.

  They hold the inputs that a subclass names; `valid` `[T]` bool, False where a shorter video's own segments are
  repeated; `label` as in the table; `weight` float32, 0 where the video cannot be read (its inputs are then 0); and
  `units` `[T]` int32 where the table has any: the unit action at the segment's middle, the shortest of several, or -1.

  Attributes:
    table: of the videos that have their files.
    missing: names of those that have not.
    unreadable: why, for each video that could not be read so far, by name.
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
    files = [find(_inside(name)) for name in table.names]
    self.missing = tuple(
      name for name, file in zip(table.names, files, strict=True) if file is None
    )
    if len(self.missing) == len(files):
      raise ValueError(
        f"the folder must hold videos of the table; none of {few(self.missing)} is there"
      )
    if self.missing:
      warn(
        "%d of %d videos have no file and are left out: %s",
        len(self.missing),
        len(files),
        few(self.missing),
      )
    self.table = table.take([i for i, file in enumerate(files) if file is not None])
    self.unreadable: dict[str, str] = {}
    self._files = [file for file in files if file is not None]
    self._segments, self._seed, self._jitter, self._workers = segments, seed, jitter, workers
    self._process = os.getpid()

  def __len__(self) -> int:
    return len(self.table)

  @property
  def names(self) -> tuple[str, ...]:
    """One per video."""
    return self.table.names

  @property
  def class_names(self) -> tuple[str, ...]:
    """One per class."""
    return self.table.class_names

  @property
  def unit_names(self) -> tuple[str, ...]:
    """One per unit action."""
    return self.table.unit_names

  @property
  def multi_label(self) -> bool:
    """Whether a video may have several classes."""
    return self.table.multi_label

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Of a batch's arrays, without the batch axes."""
    return {key: array.shape for key, array in self._blank(0).items()}

  def read(self, index: Sequence[int]) -> Batch:
    """The videos at `index`, at fixed segments."""
    return _stack([self._read_one(int(i), None) for i in index])

  def map(self, fn: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`fn` of each item, in order, computed ahead by threads or worker processes; `fn` may read this set."""
    return self._noted(fn, items, _AHEAD)

  def batches(
    self,
    batch_size: int,
    first_step: int,
    k: int,
    total_steps: int,
    process: tuple[int, int] = (0, 1),
  ) -> Iterator[Batch]:
    """A batch `[b, K, ...]` for each `k` steps; arguments as in `resident.indices`."""
    rows = len(images.indices(self._seed, first_step, 1, batch_size, len(self), process))

    def read(n):
      step, row = first_step + n // rows, n % rows
      index = images.indices(self._seed, step, 1, batch_size, len(self), process)[row, 0]
      return self._read_one(int(index), (self._seed, step, process[0] * rows + row))

    calls = len(range(first_step, total_steps, k))
    examples = self._noted(read, range(calls * k * rows), 4 * _AHEAD)
    for _ in range(calls):
      steps = [list(itertools.islice(examples, rows)) for _ in range(k)]
      flat = [example for row in zip(*steps, strict=True) for example in row]
      yield {key: array.reshape(rows, k, *array.shape[1:]) for key, array in _stack(flat).items()}

  @abc.abstractmethod
  def _inputs(self) -> Batch:
    """Zeros in place of an example's inputs."""

  @abc.abstractmethod
  def _load(
    self, index: int, rng: np.random.Generator | None
  ) -> tuple[Batch, np.ndarray, np.ndarray]:
    """An example's inputs, `valid` and its segments' middles in seconds."""

  def _blank(self, index: int) -> Batch:
    example = self._inputs() | {
      "valid": np.ones(self._segments, bool),
      "label": self.table.labels[index],
      "weight": np.float32(0),
    }
    if self.table.units is not None:
      example["units"] = np.full(self._segments, -1, np.int32)
    return example

  def _read_one(self, index: int, seed: tuple[int, ...] | None) -> Batch:
    rng = np.random.default_rng(seed) if self._jitter and seed is not None else None
    example = self._blank(index)
    try:
      inputs, valid, middles = self._load(index, rng)
    except Exception as error:  # whatever a damaged file makes its decoder raise
      self._note({self.names[index]: str(error) or type(error).__name__})
      return example
    example |= inputs | {"valid": valid, "weight": np.float32(1)}
    if "units" in example:
      example["units"] = _units_at(self.table.units[index], middles)
    return example

  def _noted(self, fn: Callable[[Any], Any], items: Sequence[Any], ahead: int) -> Iterator[Any]:
    """As `map`; what worker processes could not read is noted in this one."""
    for result, unreadable in computed_ahead(
      lambda item: (fn(item), dict(self.unreadable)), items, self._workers, ahead=ahead
    ):
      self._note(unreadable)
      yield result

  def _note(self, unreadable: dict[str, str]) -> None:
    with _NOTING:
      for name in unreadable.keys() - self.unreadable.keys():
        self.unreadable[name] = unreadable[name]
        if os.getpid() == self._process:
          warn(
            "video %s cannot be read and counts for nothing: %s",
            printable(name),
            printable(unreadable[name]),
          )


class VideoFolder(VideoSet):
  """A folder of video files, decoded with PyAV; the input is `clips` `[T, F, H, W, 3]` uint8.

  They are read as a player shows them: by presentation time, upright, without what edit lists hide
  (`data/video_files.py`).

  Args:
    table: whose names are files in `folder`, with or without their suffix.
    folder: of the videos.
    segments: T, spread uniformly over the time of the video; they overlap where it is short.
    frames: F, successive frames of a segment.
    size: `(H, W)` that frames are brought to, bilinearly.
    seed: of the order and of the jitter.
    jitter: in training, segments start at random, each in its own part of the video.
    workers: processes that decode; 0 for threads of this one.
  Raises:
    ValueError: PyAV is missing, a name would leave the folder, or none of the files is there.
  """

  def __init__(
    self,
    table: VideoTable,
    folder: str | Path,
    *,
    segments: int,
    size: tuple[int, int],
    frames: int = 8,
    seed: int = 0,
    jitter: bool = False,
    workers: int = 0,
  ):
    if frames < 1 or min(size) < 1:
      raise ValueError(f"frames and size must be at least 1; got {frames} and {size}")
    video_files.require_av()
    self._frames, self._size = frames, tuple(size)
    super().__init__(
      table,
      lambda name: _find(folder, name, ("", *video_files.VIDEO_SUFFIXES)),
      segments=segments,
      seed=seed,
      jitter=jitter,
      workers=workers,
    )

  def _inputs(self) -> Batch:
    return {"clips": np.zeros((self._segments, self._frames, *self._size, 3), np.uint8)}

  def _load(
    self, index: int, rng: np.random.Generator | None
  ) -> tuple[Batch, np.ndarray, np.ndarray]:
    clips, middles = video_files.read_clips(
      self._files[index], self._segments, self._frames, self._size, rng
    )
    return {"clips": clips}, np.ones(self._segments, bool), middles


class FeatureFolder(VideoSet):
  """Folders of `<name>.npy` or `.npz` arrays `[T_i, ...]`; the inputs are `light` and `heavy`, `[T, ...]` float32.

  Of a longer video T rows are taken, uniformly spaced; a shorter one is repeated, with `valid` False.

  Args:
    table: whose names are files in the folders, without suffix or with that of a video.
    light: folder of the features that the gate sees.
    heavy: folder of those that the classifier sees; None for the same.
    segments: T.
    seed, jitter, workers: as in `VideoFolder`.
  Raises:
    ValueError: a name would leave the folder, or no file is there or can be read.
  """

  def __init__(
    self,
    table: VideoTable,
    light: str | Path,
    heavy: str | Path | None = None,
    *,
    segments: int,
    seed: int = 0,
    jitter: bool = False,
    workers: int = 0,
  ):
    folders = {"light": light} | ({} if heavy is None else {"heavy": heavy})

    def find(name):
      found = {
        key: _find(folder, name, video_files.FEATURE_SUFFIXES) for key, folder in folders.items()
      }
      return found if all(found.values()) else None

    super().__init__(table, find, segments=segments, seed=seed, jitter=jitter, workers=workers)
    self._shapes = {
      key: video_files.common_shape([file[key] for file in self._files]) for key in folders
    }

  def _inputs(self) -> Batch:
    arrays = {
      key: np.zeros((self._segments, *shape), np.float32) for key, shape in self._shapes.items()
    }
    return {"heavy": arrays["light"]} | arrays

  def _load(
    self, index: int, rng: np.random.Generator | None
  ) -> tuple[Batch, np.ndarray, np.ndarray]:
    arrays = {key: video_files.read_features(file) for key, file in self._files[index].items()}
    for key, array in arrays.items():
      if array.shape[1:] != self._shapes[key]:
        raise ValueError(
          f"{key} features of a segment must be {self._shapes[key]}, as most are; got {array.shape[1:]}"
        )
    arrays = {"heavy": arrays["light"]} | arrays
    own = len(arrays["light"])
    if own != len(arrays["heavy"]):
      raise ValueError(
        f"light and heavy must have as many segments; got {own} and {len(arrays['heavy'])}"
      )
    longer = own > self._segments
    rows = (
      video_files.segment_starts(own, self._segments, 1, rng)
      if longer
      else np.arange(self._segments) % own
    )
    seconds = np.nan if self.table.seconds is None else self.table.seconds[index]
    inputs = {key: array[rows] for key, array in arrays.items()}
    return inputs, np.arange(self._segments) < own, (rows + 0.5) / own * seconds


def _stack(examples: Sequence[Batch]) -> Batch:
  return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _inside(name: str) -> str:
  path = PurePosixPath(name)
  if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name:
    raise ValueError(f"names of videos must stay inside their folder; got {name!r}")
  return name


def _find(folder: str | Path, name: str, suffixes: Sequence[str]) -> Path | None:
  if "" not in suffixes and name.lower().endswith(video_files.VIDEO_SUFFIXES):
    name = str(PurePosixPath(name).with_suffix(""))
  return next(
    (path for suffix in suffixes if (path := Path(user_path(folder), name + suffix)).is_file()),
    None,
  )


def _units_at(intervals: Intervals, seconds: np.ndarray) -> np.ndarray:
  units = np.full(len(seconds), -1, np.int32)
  for start, end, unit in sorted(
    intervals, key=lambda interval: interval[0] - interval[1]
  ):  # the shortest last
    units[(start <= seconds) & (seconds < end)] = unit
  return units
