"""Label tables of video sets: our own file format, folders, Breakfast, Charades and MultiThumos.

A table has names, labels and, where known, unit actions.

Text files are read as in `data/text_files.py`.

The published sets are read from the files that their authors publish. Each format is taken from
public code that reads the set; none was checked against the set itself. Content that does not fit
is refused with file, line and content, never guessed.

Axes: M videos.

Reference: Kuehne et al., 2014; Sigurdsson et al., 2016; Yeung et al., 2018.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from gating_jax.checks import few, one_of, user_path
from gating_jax.data import folders
from gating_jax.data.text_files import BLANKS, Line, csv_rows, text_lines

SPLITS = ("train", "test")
BREAKFAST_TEST_PERSONS = range(47, 55)

# Narrower than `float`, which reads `nan`, `1_0` and digits of other scripts too.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_BREAKFAST_FPS = 15
_BREAKFAST_FILES = {".avi", ".mp4", ".mkv", ".npy", ".npz"}
FEATURE_SUFFIXES = (".npy", ".npz")
# Videos and features that may lie in folders of classes.
_FOLDER_FILES = (
  *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv"),
  *FEATURE_SUFFIXES,
)


class Interval(NamedTuple):
  """A unit action between two times of a video, in seconds.

  Attributes:
    unit: index of its name.
  """

  start: float
  end: float
  unit: int


Intervals = tuple[Interval, ...]


@dataclasses.dataclass(frozen=True)
class VideoTable:
  """Table of one split of a set of videos, without the place of their files.

  Attributes:
    names: M paths relative to the folder of the videos, or of the features, with or without the
      file's suffix.
    labels: `[M]` int32 classes, or `[M, classes]` float32 of 0 and 1.
    class_names: one per class.
    units: the intervals of each video, which may overlap; None where nothing is known.
    unit_names: one per unit action.
    seconds: `[M]` lengths, NaN where unknown. They place units on segments for which there are only
      features.
  """

  names: tuple[str, ...]
  labels: np.ndarray
  class_names: tuple[str, ...]
  units: tuple[Intervals, ...] | None = None
  unit_names: tuple[str, ...] = ()
  seconds: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.names)

  @property
  def multi_label(self) -> bool:
    """Returns whether a video may have several classes."""
    return self.labels.ndim == 2

  def take(self, index: Sequence[int] | np.ndarray) -> VideoTable:
    """Returns the table of the videos at `index`, with the same classes and unit actions."""
    index = list(index)
    return dataclasses.replace(
      self,
      names=tuple(self.names[i] for i in index),
      labels=self.labels[index],
      units=None if self.units is None else tuple(self.units[i] for i in index),
      seconds=None if self.seconds is None else self.seconds[index],
    )


class _Label(NamedTuple):
  """The label field of a row.

  Attributes:
    line: the row.
    field: the text.
    classes: the labels in it.
  """

  line: Line
  field: str
  classes: list[str]


def read_table(table: str | Path, split: str | Path | None = None) -> VideoTable:
  """Reads a label table and a split file.

  The table is a CSV file with the columns `video` and `label`. Other columns are ignored, and so
  are blanks around a field and empty fields after the last column. A name may have folders and may
  leave out the file's suffix. Several labels stand in one field, separated by `;`. They make the
  set multi-label, and an empty field then means none. A split file holds one of the table's names a
  line. The class list is that of the whole table, sorted, so that all splits agree.

  Args:
    table: the CSV file.
    split: the split file; None for all videos.
  Raises:
    ValueError: naming file, line, rule and content.
  """
  labels: dict[str, _Label] = {}
  multi_label = False
  for line, row in csv_rows(table, ("video", "label")):
    name, field = row["video"], row["label"]
    if not name:
      raise line.error("name a video", name)
    if name in labels:
      raise line.error("name each video once", name)
    labels[name] = _Label(line, field, _parts(field))
    # One video with several labels is enough.
    multi_label |= ";" in field
  found = set()
  for label in labels.values():
    if not multi_label and not label.classes:
      raise label.line.error("give the video a label", label.field)
    found.update(label.classes)
  if not found:
    raise ValueError(f"{table}: must hold at least one video with a label; it has none")
  class_names = tuple(sorted(found))
  names = tuple(labels) if split is None else _read_split(split, labels, table)
  encoded = _encode_labels(
    [labels[name].classes for name in names], class_names, multi_label=multi_label
  )
  return VideoTable(names, encoded, class_names)


def _encode_labels(
  labels: Sequence[Sequence[str]], class_names: Sequence[str], *, multi_label: bool
) -> np.ndarray:
  """Encodes each video's class names as an array.

  Args:
    labels: class names of each video.
    class_names: of all classes, in order.
    multi_label: whether a video may have several classes.
  Returns:
    `[M, classes]` float32 of 0 and 1; or, for single labels, the index of each video's first class
    as `[M]` int32.
  """
  index = _numbers(class_names)
  if not multi_label:
    return np.array([index[names[0]] for names in labels], np.int32)
  encoded = np.zeros((len(labels), len(class_names)), np.float32)
  for video, names in enumerate(labels):
    for name in names:
      encoded[video, index[name]] = 1
  return encoded


def _numbers(names: Iterable[str]) -> dict[str, int]:
  """Returns the place of each name in their order."""
  return {name: place for place, name in enumerate(names)}


def _parts(field: str) -> list[str]:
  """Returns the texts in a field, which are separated by semicolons, without empty ones."""
  parts = []
  for part in field.split(";"):
    text = part.strip(BLANKS)
    if text:
      parts.append(text)
  return parts


def _read_split(path: str | Path, known: Iterable[str], table: str | Path) -> tuple[str, ...]:
  """Returns the names in a split file, each of which the table must know."""
  # A dict keeps the order and finds a name at once.
  names = {}
  for line in text_lines(path):
    if line.text not in known:
      raise line.error(f"name a video of {table}{_name_twin(line.text, known)}")
    if line.text in names:
      raise line.error("name each video once")
    names[line.text] = line
  if not names:
    raise ValueError(f"{path}: must name at least one video; it is empty")
  return tuple(names)


def _name_twin(name: str, known: Iterable[str]) -> str:
  """Says which known name looks the same in other characters; returns "" where none does.

  A Mac may write an accent as a character of its own.
  """
  look = unicodedata.normalize("NFC", name)
  for other in known:
    if unicodedata.normalize("NFC", other) == look:
      return f", which writes it as {ascii(other)}, not as {ascii(name)}"
  return ""


def read_folders(folder: str | Path, split: str, in_use: Sequence[str] | None = None) -> VideoTable:
  """Reads the videos, or the features, in folders of their classes.

      folder/train/CLASS/*.mp4, folder/test/CLASS/*.mp4     a folder for each split
      folder/CLASS/*.mp4                                    a fifth are for tests, by a hash

  Folders are read as those of images, see `data/folders.py`.

  Args:
    folder: of the classes, or of the splits.
    split: the name of a split's folder; else `train` or `test`.
    in_use: the splits that agree on the classes, which are those of their files; None for all.
  Raises:
    ValueError: no such folder, or none of its files are of the split.
  """
  root = user_path(folder)
  if not root.is_dir():
    raise ValueError(f"data.folder must be a folder of classes; no {root} exists")
  wanted = None if in_use is None else {split, *in_use}
  listing = folders.list_files(root, _FOLDER_FILES)
  # The names that the folders have.
  found = folders.find_split(split, listing.splits)
  used = None if wanted is None else {folders.find_split(name, listing.splits) for name in wanted}
  entries = _one_each(listing.entries)
  own = [entry for entry in entries if entry.split == found]
  if not own:
    splits = sorted({entry.split for entry in entries})
    lost = listing.outside.get(found or "", 0)
    advice = f"; {lost} lie outside folders of classes" if lost else ""
    raise ValueError(
      f"{root} must hold files of split {split!r} ({', '.join(_FOLDER_FILES[:4])}, ...) in folders "
      f"of their classes; it has those of {few(splits) or 'none'}{advice}"
    )
  labels = set()
  for entry in entries:
    if used is None or entry.split in used:
      labels.add(entry.label)
  class_names = folders.in_class_order(labels)
  names = tuple(entry.file.relative_to(root).as_posix() for entry in own)
  encoded = _encode_labels([[entry.label] for entry in own], class_names, multi_label=False)
  return VideoTable(names, encoded, class_names)


def _one_each(entries: Sequence[folders.Entry]) -> list[folders.Entry]:
  """Returns the files without those of features next to their video, or to a first such file."""
  # Videos first: they stand for their features.
  ordered = sorted(entries, key=lambda entry: _has_features(entry.file))
  seen, left = set(), set()
  for entry in ordered:
    video = entry.file.with_suffix("")
    if video not in seen or not _has_features(entry.file):
      left.add(entry)
    seen.add(video)
  return [entry for entry in entries if entry in left]


def _has_features(file: Path) -> bool:
  return file.suffix.lower() in FEATURE_SUFFIXES


def read_breakfast(
  folder: str | Path,
  split: str,
  *,
  segmentation: str | Path | None = None,
  test_persons: Collection[int] = BREAKFAST_TEST_PERSONS,
) -> VideoTable:
  """Reads Breakfast: 10 activities, single-label, and 48 unit actions.

  One of the unit actions is `SIL`: nothing happens.

  The videos are the files in `folder`, named `P03/cam01/P03_cereals.avi` (the authors' release; of
  a stereo pair only `stereo/P03_cereals_ch0.avi` is used) or `P03_cam01_P03_cereals.npy`
  (features): person, camera, activity. A segmentation is a text file of the same name with lines
  `1-30 SIL`: frames at 15 a second, from 1, both ends included. Only the `.txt` files are read, not
  the `.xml` of the finer segmentation.

  Args:
    folder: of the videos or of the features.
    split: `train` or `test`.
    segmentation: a folder that holds the segmentations at any depth (`segmentation_coarse`); None
      for none.
    test_persons: numbers of the persons in the test split. The default is Hussein's split of
      TimeGate and VideoGraph: of persons 3 to 54 the first 44 train and the last 8 test (1,357 and
      355 videos); `range(3, 16)`, `range(16, 29)`, `range(29, 42)` and `range(42, 55)` are Kuehne's
      four.
  Raises:
    ValueError: an unknown split, no videos, or a segmentation that cannot be read.
  """
  one_of("split", split, SPLITS)
  recordings: dict[Recording, str] = {}
  folder = user_path(folder)
  for path in sorted(folder.rglob("*")):
    name = path.relative_to(folder)
    recording = _recording(name) if path.suffix.lower() in _BREAKFAST_FILES else None
    if recording:
      # In sorted order the first file of a recording wins, which is `_ch0` of a stereo pair.
      recordings.setdefault(recording, name.with_suffix("").as_posix())
  chosen, activities = {}, set()
  for recording, name in recordings.items():
    # Both splits count, so that they agree on the classes.
    activities.add(recording.activity)
    is_test = int(recording.person[1:]) in test_persons
    if is_test == (split == "test"):
      chosen[recording] = name
  if not chosen:
    raise ValueError(
      f"{folder} must hold Breakfast videos of the {split} split, such as "
      f"P03/cam01/P03_cereals.avi; it has none ({len(recordings)} of the other split)"
    )
  class_names = tuple(sorted(activities))
  own = [[recording.activity] for recording in chosen]
  labels = _encode_labels(own, class_names, multi_label=False)
  table = VideoTable(tuple(chosen.values()), labels, class_names)
  if segmentation is None:
    return table
  return _with_segmentation(table, user_path(segmentation), list(chosen))


def read_charades(folder: str | Path, split: str) -> VideoTable:
  """Reads Charades: 157 actions, multi-label; an action's intervals are the unit actions too.

  The files are in `folder`: `Charades_v1_train.csv` or `Charades_v1_test.csv`, with the columns
  `id`, `actions` (`c092 11.90 21.20;c147 0.00 12.60`, seconds) and `length` (seconds), and
  `Charades_v1_classes.txt` with lines `c000 Holding some clothes`. Videos without any action are
  kept, as negatives of every class; Timeception left them out (7,811 of 7,985 and 1,814 of 1,863).

  Args:
    folder: of the annotation files.
    split: `train` or `test`.
  Raises:
    ValueError: naming file, line, rule and content.
  """
  one_of("split", split, SPLITS)
  names = {}
  path = user_path(folder) / "Charades_v1_classes.txt"
  for line in text_lines(path):
    match = re.fullmatch(r"(c\d{3})[ \t]+(.+)", line.text, re.ASCII)
    if not match or match[1] in names:
      raise line.error("be a new class such as 'c000 Holding some clothes'")
    names[match[1]] = match[2]
  # Classes are numbered in the order of the file, not by the digits of their codes.
  index = _numbers(names)
  path = user_path(folder) / f"Charades_v1_{split}.csv"
  units, seconds = {}, []
  for line, row in csv_rows(path, ("id", "actions", "length")):
    if not row["id"] or row["id"] in units:
      raise line.error("name each video once", row["id"])
    intervals = []
    for part in _parts(row["actions"]):
      action = _named_interval(line, part)
      if action.name not in index:
        raise line.error("name classes of Charades_v1_classes.txt", row["actions"])
      intervals.append(Interval(action.start, action.end, index[action.name]))
    units[row["id"]] = tuple(intervals)
    seconds.append(_length(line, row["length"]))
  if not units:
    raise ValueError(f"{path}: must hold at least one video; it is empty")
  return _multi_label_table(units, tuple(names.values()), np.array(seconds))


def read_multithumos(folder: str | Path, split: str) -> VideoTable:
  """Reads MultiThumos: 65 actions, multi-label; an action's intervals are the unit actions too.

  The files are in `folder`: `class_list.txt` with lines `1 BaseballPitch` and, for each class,
  `annotations/BaseballPitch.txt` with lines `video_validation_0000266 72.80 76.40` (seconds).
  Videos are those with an action.

  Args:
    folder: of the annotation files.
    split: `train` for `video_validation_*` (as in THUMOS'14, whose training videos are trimmed),
      `test` for `video_test_*`.
  Raises:
    ValueError: naming file, line, rule and content.
  """
  one_of("split", split, SPLITS)
  path = user_path(folder) / "class_list.txt"
  class_names = []
  for line in text_lines(path):
    number, *names = _fields(line.text)
    # The name becomes part of a path, so it must not lead elsewhere.
    single = len(names) == 1 and Path(names[0]).name == names[0]
    if number != str(len(class_names) + 1) or not single or names[0] in class_names:
      raise line.error(f"be the number {len(class_names) + 1} and a new class")
    class_names.append(names[0])
  prefix = {"train": "video_validation_", "test": "video_test_"}
  units = {}
  for number, class_name in enumerate(class_names):
    path = user_path(folder) / "annotations" / f"{class_name}.txt"
    for line in text_lines(path):
      video, start, end = _named_interval(line, line.text)
      if not video.startswith(tuple(prefix.values())):
        raise line.error(f"name a video of {' or '.join(prefix.values())}")
      if video.startswith(prefix[split]):
        units.setdefault(video, []).append(Interval(start, end, number))
  if not units:
    raise ValueError(
      f"{user_path(folder)} must hold at least one video of the {split} split; it has none"
    )
  # Sorted, since the files list the videos class by class.
  in_order = {video: tuple(units[video]) for video in sorted(units)}
  return _multi_label_table(in_order, tuple(class_names), None)


def _multi_label_table(
  units: dict[str, Intervals], class_names: tuple[str, ...], seconds: np.ndarray | None
) -> VideoTable:
  """Returns the table in which a video's labels are the actions that occur in it."""
  labels = np.zeros((len(units), len(class_names)), np.float32)
  for video, intervals in enumerate(units.values()):
    for interval in intervals:
      labels[video, interval.unit] = 1
  return VideoTable(
    names=tuple(units),
    labels=labels,
    class_names=class_names,
    units=tuple(units.values()),
    unit_names=class_names,
    seconds=seconds,
  )


def _fields(text: str) -> list[str]:
  """Splits a text at its blanks."""
  return re.split(f"[{BLANKS}]+", text.strip(BLANKS))


class _NamedInterval(NamedTuple):
  """The time between two moments of a video, in seconds, with the name that a file gives it."""

  name: str
  start: float
  end: float


def _named_interval(line: Line, text: str) -> _NamedInterval:
  """Reads a name, a start and an end, separated by blanks, from a text in a line."""
  fields = _fields(text)
  if len(fields) != 3 or not all(_NUMBER.fullmatch(field) for field in fields[1:]):
    raise line.error("hold a name, a start and an end in seconds", text)
  interval = _NamedInterval(fields[0], float(fields[1]), float(fields[2]))
  if not 0 <= interval.start < interval.end < np.inf:
    raise line.error("hold an interval that starts at 0 s or later and ends after its start", text)
  return interval


def _length(line: Line, text: str) -> float:
  """Returns the length in seconds, NaN where the field is empty."""
  if not text:
    return np.nan
  if not _NUMBER.fullmatch(text) or not 0 < float(text) < np.inf:
    raise line.error("give the video's length in seconds or leave it empty", text)
  return float(text)


class Recording(NamedTuple):
  """A video of Breakfast: somebody's activity, as one camera saw it."""

  person: str
  camera: str
  activity: str


def _recording(path: PurePath) -> Recording | None:
  """Returns the recording that the name of a Breakfast file stands for.

  An example is `("P03", "cam01", "cereals")`. None for a file that is named otherwise.
  """
  stem = re.sub(r"_ch[01]$", "", path.stem)
  if match := re.fullmatch(r"(P\d\d)_(\w+?)_\1_(\w+)", stem):
    return Recording(*match.groups())
  ends = "/".join([*path.parts[-3:-1], stem])
  if match := re.fullmatch(r"(P\d\d)/(\w+)/\1_(?:\2_)?(\w+)", ends):
    # One name for the stereo camera: files in a folder `stereo` match those named `stereo01`.
    camera = "stereo01" if match[2] == "stereo" else match[2]
    return Recording(match[1], camera, match[3])
  return None


def _with_segmentation(
  table: VideoTable, folder: Path, recordings: Sequence[Recording]
) -> VideoTable:
  """Adds to a table the unit actions and lengths that the segmentations of its videos give."""
  files = {}
  for path in sorted(folder.rglob("*.txt")):
    recording = _recording(path.relative_to(folder))
    # Other texts are no segmentations.
    if recording:
      files[recording] = path
  if not files:
    raise ValueError(
      f"segmentation must hold files such as cereals/P03_cam01_P03_cereals.txt; {folder} has none"
    )
  read, found = {}, set()
  for recording, path in files.items():
    read[recording] = _read_segmentation(path)
    for action in read[recording]:
      found.add(action.name)
  unit_names = tuple(sorted(found))
  index = _numbers(unit_names)
  units, seconds = [], []
  for recording in recordings:
    intervals = []
    # A segmentation covers the whole video, so its end is the video's.
    length = np.nan
    for action in read.get(recording, ()):
      intervals.append(Interval(action.start, action.end, index[action.name]))
      length = np.fmax(length, action.end)
    units.append(tuple(intervals))
    seconds.append(length)
  return dataclasses.replace(
    table, units=tuple(units), unit_names=unit_names, seconds=np.array(seconds)
  )


def _read_segmentation(path: Path) -> list[_NamedInterval]:
  """Reads the unit actions of a video, with their times."""
  actions = []
  for line in text_lines(path):
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})[ \t]+([^ \t]+)", line.text, re.ASCII)
    if not match:
      raise line.error("be frames and a unit action, such as '1-30 SIL'")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last:
      raise line.error("hold frames counted from 1, the last not before the first")
    # Frames count from 1 and both ends are included.
    start, end = (first - 1) / _BREAKFAST_FPS, last / _BREAKFAST_FPS
    actions.append(_NamedInterval(match[3], start, end))
  return actions
