"""Label tables of video sets, and our own file format for them.

A table has names, labels and, where known, unit actions.

Text files are UTF-8, with or without a byte-order mark. Lines end at LF, CRLF or CR only. Only
spaces and tabs surround a field: every other character, such as U+2028 or a form feed, is part of a
name. The formats of the published sets are read by `data/video_layouts.py`.

Axes: M videos.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gating_jax.paths import user_path

Intervals = tuple[tuple[float, float, int], ...]
# Characters that may surround a field.
BLANKS = " \t"
# A field of a CSV file and what ends it. A quoted field has two quotes for each one in it; any
# other field is taken as it is, with its quotes. `*+` never backtracks, so that no file takes long.
_FIELD = re.compile(
  r"""[ \t]*+(?:"(?P<quoted>[^"]*+(?:""[^"]*+)*+)"[ \t]*+|(?P<plain>(?!")[^,\n]*+))"""
  r"""(?P<end>,|\n|\Z)"""
)


@dataclasses.dataclass(frozen=True)
class VideoTable:
  """Table of one split of a set of videos, without the place of their files.

  Attributes:
    names: M paths relative to the folder of the videos, or of the features, with or without the
      file's suffix.
    labels: `[M]` int32 classes, or `[M, classes]` float32 of 0 and 1.
    class_names: one per class.
    units: per video `(start, end, unit)` intervals in seconds, which may overlap; None where
      nothing is known.
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

  def take(self, index: Sequence[int]) -> VideoTable:
    """Returns the table of the videos at `index`, with the same classes and unit actions."""
    pick = lambda column: None if column is None else tuple(column[i] for i in index)
    seconds = None if self.seconds is None else self.seconds[list(index)]
    return dataclasses.replace(
      self,
      names=pick(self.names),
      labels=self.labels[list(index)],
      units=pick(self.units),
      seconds=seconds,
    )


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
  rows = {}
  for line, row in csv_rows(table, ("video", "label")):
    if not row["video"]:
      raise bad_line(table, line, "name a video", row["video"])
    if row["video"] in rows:
      raise bad_line(table, line, "name each video once", row["video"])
    rows[row["video"]] = (line, row["label"])
  # One video with several labels is enough.
  multi_label = any(";" in label for _, label in rows.values())
  labels = {name: _parts(label) for name, (_, label) in rows.items()}
  for name, (line, label) in rows.items():
    if not multi_label and not labels[name]:
      raise bad_line(table, line, "give the video a label", label)
  class_names = tuple(sorted({label for several in labels.values() for label in several}))
  if not class_names:
    raise ValueError(f"{table}: must hold at least one video with a label; it has none")
  names = tuple(rows) if split is None else _read_split(split, labels, table)
  return VideoTable(
    names, encode_labels([labels[name] for name in names], class_names, multi_label), class_names
  )


def encode_labels(
  labels: Sequence[Sequence[str]], class_names: Sequence[str], multi_label: bool
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
  index = {name: i for i, name in enumerate(class_names)}
  if not multi_label:
    return np.array([index[first] for first, *_ in labels], np.int32)
  encoded = np.zeros((len(labels), len(class_names)), np.float32)
  for row, several in zip(encoded, labels, strict=True):
    row[[index[name] for name in several]] = 1
  return encoded


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
  """Yields `(number, text)` of each line of a text file that is not blank.

  The spaces and tabs around the text are removed.

  Args:
    path: the file.
  Raises:
    ValueError: NUL in a line, or a file that is not UTF-8.
  """
  try:
    # Python's universal newlines turn CRLF and CR into LF, and no other character.
    with open(user_path(path), encoding="utf-8-sig") as file:
      for number, line in enumerate(file, 1):
        text = line.removesuffix("\n").strip(BLANKS)
        if "\0" in text:
          raise bad_line(path, number, "be text, without NUL", text)
        if text:
          yield number, text
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: must be UTF-8 text; {error}") from None


def csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
  """Yields `(line, {column: field})` of each row of a CSV file.

  Spaces and tabs around a field, empty fields after the last column, and rows of empty fields are
  ignored.

  Args:
    path: the file.
    columns: columns that the header must have, each once.
  Raises:
    ValueError: naming file, line, rule and content.
  """
  try:
    # Line ends become LF, as in `text_lines`.
    text = user_path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: must be UTF-8 text; {error}") from None
  rows = _csv_fields(path, text)
  _, header = next(rows, (1, []))
  if any(header.count(column) != 1 for column in columns):
    raise bad_line(path, 1, f"have the columns {','.join(columns)}", ",".join(header))
  places = {column: header.index(column) for column in columns}
  for line, fields in rows:
    if not any(fields):
      continue
    # A field too many often means an unquoted comma, which would shift the labels.
    if max(places.values()) >= len(fields) or any(fields[len(header) :]):
      raise bad_line(path, line, f"have {len(header)} fields", ",".join(fields))
    yield line, {column: fields[place] for column, place in places.items()}


def _csv_fields(path: str | Path, text: str) -> Iterator[tuple[int, list[str]]]:
  """Yields `(line, fields)` of each row, where the row begins in that line.

  Blanks around fields and their quotes are left out.
  """
  start, place, line, fields = 0, 0, 1, []
  while place < len(text) or fields:
    match = _FIELD.match(text, place)
    if match is None:
      raise bad_line(
        path,
        line,
        "close a quoted field with a quote, followed by a comma or the end of the line",
        text[place:],
      )
    fields.append((match["plain"] or (match["quoted"] or "").replace('""', '"')).strip(BLANKS))
    place = match.end()
    if match["end"] == ",":
      continue
    if any("\0" in field for field in fields):
      raise bad_line(path, line, "be text, without NUL", ",".join(fields))
    yield line, fields
    # Quoted fields may hold line ends.
    line += text.count("\n", start, place)
    start, fields = place, []


def bad_line(path: str | Path, line: int, rule: str, content: str) -> ValueError:
  """Builds the error for a line of a file that breaks a rule.

  Args:
    path, line: the file and the number of the line, from 1.
    rule: the rule, after "must".
    content: the line or field; cut to 80 characters.
  """
  return ValueError(f"{path}, line {line}: must {rule}; got {content[:80]!r}")


# The labels in a field.
def _parts(label: str) -> list[str]:
  parts = [part.strip(BLANKS) for part in label.split(";")]
  return [part for part in parts if part]


# The names in a split file, each of which the table knows.
def _read_split(
  path: str | Path, known: dict[str, list[str]], table: str | Path
) -> tuple[str, ...]:
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
