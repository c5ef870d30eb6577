"""Lines and tables in text files, read strictly, with errors that name file, line and content.

Files are also written here, whole or not at all.

Text files are UTF-8, with or without a byte-order mark. Lines end at LF, CRLF or CR only. Only
spaces and tabs surround a field: every other character, such as U+2028 or a form feed, is part of a
name.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gating_jax.checks import user_path

# The suffix of a file that is still being written.
TEMPORARY = ".tmp"
# Characters that may surround a field.
BLANKS = " \t"
# A field of a CSV file and what ends it. A quoted field has two quotes for each one in it; any
# other field is taken as it is, with its quotes. `*+` never backtracks, so that no file takes long.
_FIELD = re.compile(
  r"""[ \t]*+(?:"(?P<quoted>[^"]*+(?:""[^"]*+)*+)"[ \t]*+|(?P<plain>(?!")[^,\n]*+))"""
  r"""(?P<end>,|\n|\Z)"""
)


class Line(NamedTuple):
  """A line of a file.

  Attributes:
    path: the file.
    number: from 1.
    text: without the blanks around it.
  """

  path: str | Path
  number: int
  text: str

  def error(self, rule: str, content: str | None = None) -> ValueError:
    """Returns the error for a line that breaks a rule.

    Args:
      rule: the rule, after "must".
      content: the part at fault; None for the whole line. Cut to 80 characters.
    """
    content = self.text if content is None else content
    return ValueError(f"{self.path}, line {self.number}: must {rule}; got {content[:80]!r}")


def text_lines(path: str | Path) -> Iterator[Line]:
  """Yields each line of a text file that is not blank.

  Args:
    path: the file.
  Raises:
    ValueError: NUL in a line, or a file that is not UTF-8.
  """
  for number, text in enumerate(_read_text(path).split("\n"), 1):
    line = Line(path, number, text.strip(BLANKS))
    if "\0" in line.text:
      raise line.error("be text, without NUL")
    if line.text:
      yield line


def csv_rows(
  path: str | Path, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[Line, dict[str, str]]]:
  """Yields `(line, {column: field})` of each row of a CSV file.

  Spaces and tabs around a field, empty fields after the last column, and rows of empty fields are
  ignored.

  Args:
    path: the file.
    columns: columns that the header must have, each once.
    optional: columns that it may have, once. Where it lacks one, the column's fields are empty.
  Raises:
    ValueError: naming file, line, rule and content.
  """
  rows = _csv_fields(path, _read_text(path))
  line, header = next(rows, (Line(path, 1, ""), []))
  places = {}
  for column in (*columns, *optional):
    found = header.count(column)
    if column in columns and found != 1:
      raise line.error(f"have the columns {','.join(columns)}")
    if found > 1:
      raise line.error(f"have the column {column} once")
    if found:
      places[column] = header.index(column)
  # Only optional fields may be missing at the end of a row.
  least = 1 + max(places[column] for column in columns)
  for line, fields in rows:
    if not any(fields):
      continue
    # A field too many often means an unquoted comma, which would shift the labels.
    if len(fields) < least or any(fields[len(header) :]):
      raise line.error(f"have {len(header)} fields")
    row = dict.fromkeys(optional, "")
    for column, place in places.items():
      row[column] = fields[place] if place < len(fields) else ""
    yield line, row


def _read_text(path: str | Path) -> str:
  """Reads a UTF-8 text with LF at the ends of its lines.

  Raises:
    ValueError: a file that is not UTF-8.
  """
  try:
    # Python's universal newlines turn CRLF and CR into LF, and no other character.
    return user_path(path).read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: must be UTF-8 text; {error}") from None


def _csv_fields(path: str | Path, text: str) -> Iterator[tuple[Line, list[str]]]:
  """Yields `(line, fields)` of each row; the line is the row's first, its text the whole row's.

  Blanks around fields and their quotes are left out.
  """
  start, place, number, fields = 0, 0, 1, []
  while place < len(text) or fields:
    match = _FIELD.match(text, place)
    if match is None:
      raise Line(path, number, text[place:]).error(
        "close a quoted field with a quote, followed by a comma or the end of the line"
      )
    field = match["plain"] or (match["quoted"] or "").replace('""', '"')
    fields.append(field.strip(BLANKS))
    place = match.end()
    if match["end"] == ",":
      continue
    line = Line(path, number, ",".join(fields))
    if "\0" in line.text:
      raise line.error("be text, without NUL")
    yield line, fields
    # Quoted fields may hold line ends.
    number += text.count("\n", start, place)
    start, fields = place, []


def write_atomically(path: Path, content: str | bytes) -> None:
  """Replaces the file whole or not at all.

  A kill in between leaves the old file, and a `.tmp` next to it.

  Args:
    path: the file.
    content: its bytes, or a text, which is written as UTF-8.
  Raises:
    OSError: the file cannot be written; the message names it.
  """
  temporary = path.with_name(path.name + TEMPORARY)
  if isinstance(content, str):
    # Names may hold surrogates, which UTF-8 cannot encode.
    content = content.encode("utf-8", errors="replace")
  with naming_file(path):
    with temporary.open("wb") as file:
      file.write(content)
      file.flush()
      # On disk before the rename: else a power cut could leave an empty file under the name.
      os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
  """Names the file in errors of writing, which otherwise say only `No space left on device`."""
  try:
    yield
  except OSError as error:
    raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
