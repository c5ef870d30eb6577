"""Sanitised text for pictures and terminals, and aligned columns.

Names of runs, classes and videos come from users and data sets, so no letter in them is trusted.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import IO, Any

from gating_jax.checks import printable
from gating_jax.training.journal import write_atomically


def plain(name: object, letters: int) -> str:
  """Shortens a name to one line of at most `letters` printable characters.

  >>> plain("two\\nlines", 20), plain("a long name", 7)
  ('two?lines', 'a long…')
  """
  name = printable(name)
  # The ellipsis takes the place of the last letter that fits.
  return name if len(name) <= letters else name[: max(letters - 1, 0)] + "…"


def columns(rows: list[list[str]]) -> list[str]:
  """Aligns rows in columns: the first to the left, the others to the right.

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
  """Writes a matplotlib figure as a PNG file.

  Texts are drawn literally: `$` starts no formula. A letter that no font has is drawn as a box,
  without a warning.

  Args:
    figure: of matplotlib.
    file: a path, which is written whole or not at all, or an open binary file.
    **options: of `Figure.savefig`.
  """
  from matplotlib.text import Text  # imports slowly

  # A prior or a class may have `$` in its name, which matplotlib would parse as a formula.
  for text in figure.findobj(Text):
    text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    # In memory first, so that a figure that cannot be drawn leaves no half-written file.
    content = io.BytesIO()
    figure.savefig(content, **options)
  if isinstance(file, Path):
    write_atomically(file, content.getvalue())
  else:
    file.write(content.getvalue())
