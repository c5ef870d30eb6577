"""Sanitised text for pictures and terminals, and aligned columns.

Names of runs, classes and videos come from users and data sets, so no letter in them is trusted.
"""

from __future__ import annotations

from gating_jax.checks import printable


def plain(name: object, letters: int) -> str:
  """Shortens a name to one line of at most `letters` printable characters.

  >>> plain("two\\nlines", 20), plain("a long name", 7)
  ('two?lines', 'a long…')
  """
  name = printable(name)
  # The ellipsis takes the place of the last letter that fits.
  return name if len(name) <= letters else name[: max(letters - 1, 0)] + "…"


def align_columns(rows: list[list[str]]) -> list[str]:
  """Aligns rows in columns: the first to the left, the others to the right.

  >>> align_columns([["a", "12"], ["bcd", "3"]])
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
