"""What a set of videos contains: names, labels and, where known, unit actions; and our own plain format of it.

Axes: M videos. The published sets' own formats are read by `data/video_layouts.py`.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gating_jax.paths import user_path

Intervals = tuple[tuple[float, float, int], ...]


@dataclasses.dataclass(frozen=True)
class VideoTable:
  """One split of a set of videos; says nothing of where the files are.

  Attributes:
    names: M paths relative to the folder of the videos, or of the features, with or without the file's suffix.
    labels: `[M]` int32 classes, or `[M, classes]` float32 of 0 and 1.
    class_names: one per class.
    units: per video `(start, end, unit)` intervals in seconds, which may overlap; None where nothing is known.
    unit_names: one per unit action.
    seconds: `[M]` lengths, NaN where unknown: they place units on segments of which only features are there.
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
    """Whether a video may have several classes."""
    return self.labels.ndim == 2

  def take(self, index: Sequence[int]) -> VideoTable:
    """The videos at `index`, with the same classes and unit actions."""
    pick = lambda column: None if column is None else tuple(column[i] for i in index)
    seconds = None if self.seconds is None else self.seconds[list(index)]
    return dataclasses.replace(
        self, names=pick(self.names), labels=self.labels[list(index)], units=pick(self.units), seconds=seconds)


def read_table(table: str | Path, split: str | Path | None = None) -> VideoTable:
  """Reads a label table and a split file.

  The table is a CSV file with the columns `video` and `label`; others are ignored. A name may have folders and may
  leave out the file's suffix. Several labels stand in one field, separated by `;`, and make the set multi-label, where
  an empty field means none. A split file holds one of the table's names a line. The class list is that of the whole
  table, sorted, so that all splits agree.

  Args:
    table: the CSV file.
    split: the split file; None for all videos.
  Raises:
    ValueError: naming file, line, rule and content.
  """
  rows = {}
  for line, row in csv_rows(table, ("video", "label")):
    if not row["video"]:
      raise bad_line(table, line, "name a video", row["video"])
    if row["video"] in rows:
      raise bad_line(table, line, "name each video once", row["video"])
    rows[row["video"]] = (line, row["label"])
  multi_label = any(";" in label for _, label in rows.values())
  labels = {name: [part.strip() for part in label.split(";") if part.strip()] for name, (_, label) in rows.items()}
  for name, (line, label) in rows.items():
    if not multi_label and not labels[name]:
      raise bad_line(table, line, "give the video a label", label)
  class_names = tuple(sorted({label for several in labels.values() for label in several}))
  if not class_names:
    raise ValueError(f"{table}: must hold at least one video with a label; it has none")
  names = tuple(rows) if split is None else _read_split(split, labels, table)
  return VideoTable(names, encode_labels([labels[name] for name in names], class_names, multi_label), class_names)


def encode_labels(labels: Sequence[Sequence[str]], class_names: Sequence[str], multi_label: bool) -> np.ndarray:
  """Each video's class names as `[M, classes]` float32 of 0 and 1, or its first one's index as `[M]` int32."""
  index = {name: i for i, name in enumerate(class_names)}
  if not multi_label:
    return np.array([index[first] for first, *_ in labels], np.int32)
  encoded = np.zeros((len(labels), len(class_names)), np.float32)
  for row, several in zip(encoded, labels, strict=True):
    row[[index[name] for name in several]] = 1
  return encoded


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
  """`(number, text)` of each line of a text file that is not blank, without the spaces around it."""
  try:
    text = user_path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: must be UTF-8 text; {error}") from None
  for number, line in enumerate(text.splitlines(), 1):
    if line.strip():
      yield number, line.strip()


def csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
  """`(line, {column: field})` of each row of a CSV file whose header has all of `columns`."""
  with open(user_path(path), encoding="utf-8-sig", newline="") as file:
    try:
      reader = csv.DictReader(file, strict=True)
      if not set(columns) <= set(reader.fieldnames or ()):
        raise bad_line(path, 1, f"have the columns {','.join(columns)}", ",".join(reader.fieldnames or ()))
      for row in reader:
        if any(row[column] is None for column in columns):
          raise bad_line(path, reader.line_num, f"have {len(reader.fieldnames)} fields",
                         ",".join(value for value in row.values() if value is not None))
        yield reader.line_num, {column: row[column].strip() for column in columns}
    except UnicodeDecodeError as error:
      raise ValueError(f"{path}: must be UTF-8 text; {error}") from None
    except csv.Error as error:
      raise ValueError(f"{path}, line {reader.line_num}: must be CSV; {error}") from None


def bad_line(path: str | Path, line: int, rule: str, content: str) -> ValueError:
  """The error for a line of a file that breaks a rule."""
  return ValueError(f"{path}, line {line}: must {rule}; got {content[:80]!r}")


def _read_split(path: str | Path, known: dict[str, list[str]], table: str | Path) -> tuple[str, ...]:
  names = {}
  for line, name in text_lines(path):
    if name not in known:
      raise bad_line(path, line, f"name a video of {table}", name)
    if name in names:
      raise bad_line(path, line, "name each video once", name)
    names[name] = line
  if not names:
    raise ValueError(f"{path}: must name at least one video; it is empty")
  return tuple(names)
