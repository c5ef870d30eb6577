"""What a set of videos contains: names, labels and, where known, unit actions; and our own plain format of it.

Text files are UTF-8, with or without a byte-order mark. Lines end at LF, CRLF or CR alone, and spaces and tabs alone
surround a field: every other character, such as U+2028 or a form feed, is part of a name.

Axes: M videos. The published sets' own formats are read by `data/video_layouts.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gating_jax.paths import user_path

Intervals = tuple[tuple[float, float, int], ...]
BLANKS = " \t"  # that may surround a field
# Of a CSV file, with what ends it: quoted, with two quotes for each one in it, or else taken as it stands, quotes in it
# as well. `*+` gives nothing back, so that no file takes long.
_FIELD = re.compile(
  r"""[ \t]*+(?:"(?P<quoted>[^"]*+(?:""[^"]*+)*+)"[ \t]*+|(?P<plain>(?!")[^,\n]*+))(?P<end>,|\n|\Z)"""
)


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
      self,
      names=pick(self.names),
      labels=self.labels[list(index)],
      units=pick(self.units),
      seconds=seconds,
    )


def read_table(table: str | Path, split: str | Path | None = None) -> VideoTable:
  """Reads a label table and a split file.

  The table is a CSV file with the columns `video` and `label`; others are ignored, and so are blanks around a field and
  empty fields after the last column. A name may have folders and may leave out the file's suffix. Several labels stand
  in one field, separated by `;`, and make the set multi-label, where an empty field means none. A split file holds one
  of the table's names a line. The class list is that of the whole table, sorted, so that all splits agree.

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
  """Each video's class names as `[M, classes]` float32 of 0 and 1, or its first one's index as `[M]` int32."""
  index = {name: i for i, name in enumerate(class_names)}
  if not multi_label:
    return np.array([index[first] for first, *_ in labels], np.int32)
  encoded = np.zeros((len(labels), len(class_names)), np.float32)
  for row, several in zip(encoded, labels, strict=True):
    row[[index[name] for name in several]] = 1
  return encoded


def text_lines(path: str | Path) -> Iterator[tuple[int, str]]:
  """`(number, text)` of each line of a text file that is not blank, without the spaces and tabs around it."""
  try:
    with open(
      user_path(path), encoding="utf-8-sig"
    ) as file:  # which takes CRLF and CR for LF, and no other character
      for number, line in enumerate(file, 1):
        text = line.removesuffix("\n").strip(BLANKS)
        if "\0" in text:
          raise bad_line(path, number, "be text, without NUL", text)
        if text:
          yield number, text
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: must be UTF-8 text; {error}") from None


def csv_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
  """`(line, {column: field})` of each row of a CSV file whose header has all of `columns`, each once.

  Spaces and tabs around a field and empty fields after the last column are ignored, and so are rows of empty fields.
  """
  try:
    text = user_path(path).read_text(encoding="utf-8-sig")  # which makes LF of CRLF and CR
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
    if max(places.values()) >= len(fields) or any(fields[len(header) :]):
      raise bad_line(path, line, f"have {len(header)} fields", ",".join(fields))
    yield line, {column: fields[place] for column, place in places.items()}


def _csv_fields(path: str | Path, text: str) -> Iterator[tuple[int, list[str]]]:
  """`(line, fields)` of each row, which begins in that line; blanks around fields and their quotes are left out."""
  start, place, line, fields = 0, 0, 1, []
  while place < len(text) or fields:
    match = _FIELD.match(text, place)
    if match is None:
      raise bad_line(
        path,
        line,
        "end a quoted field by its quote, and a comma or the line behind it",
        text[place:],
      )
    fields.append((match["plain"] or (match["quoted"] or "").replace('""', '"')).strip(BLANKS))
    place = match.end()
    if match["end"] == ",":
      continue
    if any("\0" in field for field in fields):
      raise bad_line(path, line, "be text, without NUL", ",".join(fields))
    yield line, fields
    line += text.count("\n", start, place)
    start, fields = place, []


def bad_line(path: str | Path, line: int, rule: str, content: str) -> ValueError:
  """The error for a line of a file that breaks a rule."""
  return ValueError(f"{path}, line {line}: must {rule}; got {content[:80]!r}")


def _parts(label: str) -> list[str]:
  parts = [part.strip(BLANKS) for part in label.split(";")]
  return [part for part in parts if part]


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
