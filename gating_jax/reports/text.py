"""Text for pictures, pages and terminals: sanitised names, numbers, and aligned columns.

Names of runs, classes and videos come from users and data sets, so no letter in them is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence

from gating_jax.checks import printable


def plain(name: object, letters: int) -> str:
  """Shortens a name to one line of at most `letters` printable characters.

  >>> plain("two\\nlines", 20), plain("a long name", 7)
  ('two?lines', 'a long…')
  """
  name = printable(name)
  # The ellipsis takes the place of the last letter that fits.
  return name if len(name) <= letters else name[: max(letters - 1, 0)] + "…"


def capitalise(text: str) -> str:
  """Makes the first letter a capital, and leaves the others as they are.

  >>> capitalise("mean IoU")
  'Mean IoU'
  """
  # `str.capitalize` would write "Mean iou".
  return text[:1].upper() + text[1:]


def format_percent(fraction: float, digits: int) -> str:
  """Formats a fraction in %.

  >>> format_percent(0.91256, 2), format_percent(-1e-9, 1)
  ('91.26 %', '0.0 %')
  """
  # The format `z` writes -0.0 as 0.0: forgetting may be a rounding error below 0.
  return f"{100 * fraction:z.{digits}f} %"


def format_count(count: float) -> str:
  """Formats a large count with three digits.

  >>> format_count(40_551_040), format_count(999), format_count(1_234)
  ('40.6 M', '999', '1.23 k')
  """
  for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if count >= size:
      return f"{count / size:.3g} {letter}"
  return f"{count:.3g}"


def format_milliseconds(seconds: float) -> str:
  """Formats seconds as milliseconds with three digits.

  >>> format_milliseconds(0.00123456), format_milliseconds(1.5)
  ('1.23', '1500')
  """
  value = 1000 * seconds
  # `g` would write 1500 as 1.5e+03.
  return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
  """Aligns rows in columns: the first to the left, the others to the right.

  >>> align_columns([["a", "12"], ["bcd", "3"]])
  ['a    12', 'bcd   3']
  """
  widths = [0] * len(rows[0])
  for row in rows:
    for column, cell in enumerate(row):
      widths[column] = max(widths[column], len(printable(cell)))
  lines = []
  for row in rows:
    first, *others = row
    cells = [f"{printable(first):<{widths[0]}}"]
    for width, cell in zip(widths[1:], others, strict=True):
      cells.append(f"{printable(cell):>{width}}")
    lines.append("  ".join(cells))
  return lines
