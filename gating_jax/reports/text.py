"""Texts fit for a picture or a terminal: names that anybody may have given, and columns."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO, Any

from gating_jax.checks import printable
from gating_jax.training.journal import write_atomically


def plain(name: object, letters: int) -> str:
  """One line of printable characters, at most `letters` of them.

  >>> plain("two\\nlines", 20), plain("a long name", 7)
  ('two?lines', 'a long…')
  """
  name = printable(name)
  return name if len(name) <= letters else name[: max(letters - 1, 0)] + "…"


def columns(rows: list[list[str]]) -> list[str]:
  """Lines of aligned columns, the first to the left and the others to the right.

  >>> columns([["a", "12"], ["bcd", "3"]])
  ['a    12', 'bcd   3']
  """
  rows = [[printable(cell) for cell in row] for row in rows]
  first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
  return [
    "  ".join(
      [f"{row[0]:<{first}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths, strict=True))]
    )
    for row in rows
  ]


def save(figure, file: Path | IO[bytes], **options: Any) -> None:
  """Writes a matplotlib figure as PNG, its texts as they are: `$` starts no formula, and a letter may be in no font.

  A file by its path is whole or not there.
  """
  from matplotlib.text import Text  # imports slowly

  for text in figure.findobj(Text):
    text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    content = io.BytesIO()
    figure.savefig(content, **options)
  if isinstance(file, Path):
    write_atomically(file, content.getvalue())
  else:
    file.write(content.getvalue())
