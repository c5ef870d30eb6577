"""Names that anybody may have given, fit for a picture or a terminal."""

from __future__ import annotations

import warnings
from pathlib import Path


def plain(name: object, letters: int) -> str:
  """One line of printable characters, at most `letters` of them.

  >>> plain("two\\nlines", 20), plain("a long name", 7)
  ('two?lines', 'a long…')
  """
  name = "".join(c if c.isprintable() else "?" for c in str(name))
  return name if len(name) <= letters else name[:max(letters - 1, 0)] + "…"


def save(figure, path: Path) -> None:
  """Writes a matplotlib figure, its texts drawn as they are: `$` starts no formula, and a letter may be in no font."""
  from matplotlib.text import Text  # imports slowly

  for text in figure.findobj(Text):
    text.set_parse_math(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    figure.savefig(path)
